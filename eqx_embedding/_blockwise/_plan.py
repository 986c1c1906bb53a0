"""How the work is cut: for speed and memory, without meaning for the result."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Plan(NamedTuple):
    chunk_size: int  # tokens
    tile_size: int  # rows of the table
    dtype: DTypeLike  # of the factors of the two products for the gradients
    transpose: bool  # whether to transpose a tile before its product with the table


def make_plan(V: int, D: int, dtype: DTypeLike, wide: DTypeLike, tiles: bool) -> Plan:
    """What is fast for this backend, these sizes, and factors of `dtype` summed in `wide`.

    The sizes for CPUs were chosen on two cores of an AMD EPYC, by `benchmarks/cross_entropy.py`.
    """
    if jax.default_backend() != "cpu":
        # Small products starve an accelerator. float16 would lose the small probabilities.
        return Plan(4096, V, wide if dtype == jnp.float16 else dtype, False)
    # Each chunk reads and writes the gradient of the table once, so larger chunks are faster, up to
    # 256; the logits of 13/16 D tokens and the rest take less memory than that gradient. A chunk
    # of 2**20 logits is small in any case: a small problem is one chunk, the plain way. Tiles of
    # 2**18 numbers of the table fit the cache, and are work enough for a few threads. For the
    # gradients, products in float32 are faster than in anything narrower. With a short D, XLA's
    # product with a transposed left factor costs more than to transpose it first.
    chunk_size = max(min(max(D * 13 // 16, 128), 256), 2**20 // V)
    tile_size = min(V, max(min(2**18 // D, 1024), 256)) if tiles else V
    return Plan(chunk_size, tile_size, wide, transpose=D < 256)
