import contextlib
import gc
import os
import zlib
from collections import defaultdict

from .flags import xla_flags


os.environ["XLA_FLAGS"] = xla_flags(devices=8)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from .helpers import Keys  # noqa: E402


# Tracing makes many objects and few cycles, and each collection walks all that JAX caches.
gc.set_threshold(200_000, 20, 50)

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


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="a part of the exhaustive tests, such as 1/2")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of the cases of a slow test, all but one are `exhaustive`.

    Of these tests, `--part` chooses some. Where the command line names a test, as in
    `test_tying.py::test_name`, all its cases run.
    """
    is_default = config.option.markexpr == "not exhaustive"
    if is_default and any("::" in argument for argument in config.args):
        config.option.markexpr = ""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            cases[item.function].append(item)
    for same in cases.values():
        same.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))  # in an order without meaning
        for item in same[1:]:
            item.add_marker("exhaustive")
    part, parts = map(int, config.option.part.split("/"))
    of_others = set()
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")
            if zlib.crc32(item.nodeid.encode()) % parts != part - 1:
                of_others.add(item)
    config.hook.pytest_deselected(items=list(of_others))
    items[:] = [item for item in items if item not in of_others]


@pytest.fixture(scope="module", autouse=True)
def device_count(request):
    """One, but for the tests in `devices`. JAX has eight, of which only this number tells."""
    with pytest.MonkeyPatch.context() as context:
        if "devices" not in request.path.parts:
            context.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """XLA maps memory for each of them, and Linux ends a process that has too many such maps."""
    yield
    jax.clear_caches()


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
