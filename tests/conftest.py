import contextlib

import hypothesis
import jax
import jax.numpy as jnp
import pytest

from .helpers import Keys


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Property tests draw the same examples each time. `--hypothesis-profile=full` draws many more.
for name, examples in {"quick": 16, "full": 230}.items():
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("quick")


@pytest.fixture
def getkey():
    return Keys()


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request):
    """Each floating dtype, float64 in JAX's 64-bit mode."""
    wide = request.param == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        yield jnp.dtype(request.param)


@pytest.fixture
def jax_defaults():
    """JAX as its users have it, for code that mixes dtypes or ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
