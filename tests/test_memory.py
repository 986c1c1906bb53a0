"""The memory of compiled programs on a CPU. Nothing runs, so that shapes may be large."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.losses import LOSSES
from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .helpers import compile_by_default, temporaries


pytestmark = pytest.mark.slow

loss, plain_loss = LOSSES["cross_entropy"].here, LOSSES["cross_entropy"].plain


def mebibytes(function, shape, dtype):
    """Of temporaries."""
    N, D, V = shape
    operands = (
        jax.ShapeDtypeStruct((N, D), dtype),
        jax.ShapeDtypeStruct((V, D), dtype),
        jax.ShapeDtypeStruct((N,), jnp.int32),
    )
    return temporaries(compile_by_default(jax.jit(function).lower(*operands))) / 2**20


SHAPES = [
    (1, 256, 4096),
    (1, 512, 50257),
    (16, 256, 4096),
    (100, 128, 5000),
    (128, 128, 4096),
    (128, 256, 5000),
    (129, 64, 50257),
    (257, 64, 4000),
    (333, 256, 32000),
    (333, 512, 32000),
    (600, 1024, 32000),
    (1024, 16, 1000),
    (1024, 256, 300),
    (2048, 128, 50257),
    (4096, 64, 300),
    (4096, 256, 300),
    (4096, 512, 300),
    (4096, 1024, 300),
    (4096, 1024, 1000),
    (8192, 64, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradients", [False, True], ids=["loss", "gradients"])
@pytest.mark.usefixtures("jax_defaults")
def test_the_loss_takes_no_more_memory_than_the_plain_way(shape, dtype, gradients):
    functions = [jax.value_and_grad(f, (0, 1)) if gradients else f for f in (loss, plain_loss)]
    ours, plain = (mebibytes(f, shape, dtype) for f in functions)
    assert ours <= plain + 1


@pytest.mark.parametrize("shape", [(128, 256, 16000), (256, 512, 8000)], ids=str)
@pytest.mark.parametrize("kind", ["forward", "jensen_shannon"])
@pytest.mark.usefixtures("jax_defaults")
def test_a_divergence_without_gradients_holds_the_two_logits_of_a_chunk(shape, kind):
    N, _, V = shape

    def divergence(hidden, rows, targets):
        decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
        return decode.divergence(hidden, decode, hidden[::-1], kind=kind)

    assert mebibytes(divergence, shape, "bfloat16") <= 1.4 * 2 * N * V * 4 / 2**20
