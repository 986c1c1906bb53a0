"""How the work is cut: for speed and memory, without meaning for the result."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from .._inputs import at_least_float32


Platform = Literal["cpu", "gpu", "tpu"]


class Plan(NamedTuple):
    chunk_size: int  # tokens
    tile_size: int  # rows of the table
    dtype: DTypeLike  # of rows and vectors in the two products for the gradients
    d_logits_dtype: DTypeLike  # of their other factor
    transpose: bool  # whether to transpose a tile before its product with the table
    round_early: bool  # whether a gradient of the table from one product is rounded at once
    keep_copy: bool = False  # whether no product may undo the copy of a transposed table
    double_one: bool = False  # whether one vector in bfloat16 is computed as two
    hold_logits: bool = False  # whether logits are held as they are after bias, cap and padding
    rewrite_skipped: bool = False  # whether a skipped chunk writes a row of each sum again
    search_blocks: bool = True  # whether to look for the likeliest tokens in the largest blocks
    logits_apart: bool = False  # whether to keep the logits of the two passes apart without chunks


class Work(NamedTuple):
    """What is to be cut."""

    N: Any  # a symbolic one, of `jax.export`, is an error of JAX
    V: int
    D: int
    logits_per_row: int  # of a token: 2 for those of a student and of its teacher, else 1
    dtype: DTypeLike  # of the factors of the logits
    wide: DTypeLike  # of their sums
    tiles: bool  # whether a device can cut its rows into tiles
    masked: bool  # whether some tokens may not count
    logits_fit: bool  # whether logits fit into the place of a gradient, before it is written
    device_kind: str  # of the devices that the program is most likely for
    chunk_size: int | None  # that was asked for


def make_plan(platform: Platform, work: Work) -> Plan:
    """The fastest plan by which a loss alone holds no more than the plain way: all logits, as one
    chunk."""
    if platform == "cpu":
        # XLA for CPUs cannot run a product in bfloat16 that transposes the table, and would convert
        # the whole table to multiply it by one vector.
        return _cpu_plan(work)._replace(keep_copy=True, double_one=True)
    # float16 and float8 would lose the small probabilities.
    keeps_range = work.dtype == jnp.bfloat16 or jnp.finfo(work.dtype).bits >= 32
    dtype = work.dtype if keeps_range else work.wide
    chunk_size = work.chunk_size or _accelerator_chunk(platform, work)
    # A TPU rounds factors to bfloat16 in any case. Told to round one before, XLA can write a copy.
    d_logits_dtype = at_least_float32(dtype) if platform == "tpu" else dtype
    return Plan(
        chunk_size,
        work.V,
        dtype,
        d_logits_dtype,
        transpose=False,
        round_early=dtype == jnp.bfloat16,
        # XLA for TPUs would hold both the logits before their bias, cap and padding, and after.
        hold_logits=platform == "tpu",
        # By XLA's estimate for TPUs, to gather the logits of blocks reads more than ten times the
        # bytes that a search of all reads.
        search_blocks=platform != "tpu",
        # XLA for GPUs would copy the gradient of the table twice for each chunk: it copies what one
        # branch adds to and another returns as it is.
        rewrite_skipped=platform == "gpu",
        # XLA for GPUs would make one product of the logits of both passes, and hold all of them.
        logits_apart=platform == "gpu",
    )


def _cpu_plan(work: Work) -> Plan:
    """Chosen on two cores of an AMD EPYC, by `benchmarks/cross_entropy.py`.

    Each chunk reads and writes the gradient of the table once, so larger chunks are faster, up to
    256; the logits of 13/16 D tokens and the rest take less memory than that gradient. A chunk of
    2**20 logits is small in any case. With a mask, the last chunk is half empty on average, so
    that smaller chunks save more than they cost. Tiles of 2**18 numbers of the table fit the
    cache, and are work enough for a few threads. For the gradients, products in float32 are faster
    than in anything narrower. With a short D, XLA's product with a transposed left factor costs
    more than to transpose it first; in half precision with a small V it holds more. XLA transposes
    the logits of the plain way in float32 as well, if V is at least 2D.

    A small problem is one chunk and one tile, the plain way: if it has no more logits than those,
    or than numbers that a loop would hold. These are vectors of a chunk and their gradient; with
    several chunks also the gradient of all vectors, and the logits of a chunk; and float32 copies
    that XLA makes of tables and vectors in bfloat16, but not to compare two tables without a
    gradient. A mask needs chunks, to skip some.
    """
    N, V, D, logits_per_row, dtype, wide, tiles, masked, logits_fit, _, chunk_size = work
    largest = 128 if masked else 256
    C = max(min(max(logits_per_row * D * 13 // 16, 128), largest), 2**20 // V)
    narrow = dtype == jnp.bfloat16
    held = 2 * C * D
    if not masked:
        chunks = max(-(-N // C), 1)
        several = N * D + N // chunks * (V + D) if chunks > 1 else 0
        copied = narrow and (logits_fit or logits_per_row == 1)
        held = max(held, several) + (N + V) * D * copied
    if logits_per_row * N * V <= max(2**20, held) and N <= (chunk_size or N):
        factors = dtype if narrow else wide
        half = jnp.finfo(dtype).bits <= 16
        transpose = 4 * V < 3 * D if half else D < 256 and 2 * D <= V
        left = factors if transpose else wide
        return Plan(max(N, 1), V, factors, left, transpose, narrow and not transpose)
    tile_size = min(V, max(min(2**18 // D, 1024), 256)) if tiles else V
    return Plan(chunk_size or C, tile_size, wide, wide, transpose=D < 256, round_early=False)


# Whose compiler copies no rows for a loop. JAX has had two names for some of them.
LEAN_TPUS = "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"
SMALLEST_CHUNK = 1024  # tokens; smaller products would leave an accelerator idle


def _accelerator_chunk(platform: Platform, work: Work) -> int:
    """Chosen by the memory of programs compiled for them, by `benchmarks/accelerators.py`.

    Each chunk reads and writes the gradient of the table in float32, 8VD bytes, beside 6CVD
    operations. At the published rates, that takes the following share of the time of the products,
    if nothing overlaps:

    | TPU v5e | v5p   | v6e   | TPU7x | H100  | B200  |
    | ------- | ----- | ----- | ----- | ----- | ----- |
    | 320/C   | 221/C | 746/C | 417/C | 394/C | 375/C |

    So chunks are as large as costs no memory, up to 2048: the logits of D/2 tokens fit into the
    place of the result, a table of 16 bits, before that is written. A quarter of few tokens is
    enough.

    In bytes for each row of the table, the plain way holds 4N for logits on a TPU, and 2N more for
    their gradient on a GPU. Chunks hold 4D for the sum of the table's gradient, and 4ND/V for that
    of all vectors before it is rounded. On a GPU they hold 4C for logits, as far as these do not
    fit into the place of the result, and 2C for their gradient; on a TPU 8C for both, unless one
    fits. On a TPU7x they hold 4C at least, and copies of rows and vectors, 2D and 4ND/V: XLA makes
    these for a loop. A single chunk of all tokens, which is the plain way, is best as long as it
    holds no more. Where the table is gathered, the result is only the part of a device: no logits
    fit into its place, and chunks are as small as they may be.
    """
    N, V, D, logits_per_row, *_ = work
    N = max(N * logits_per_row, 1)
    quarter = -(-N // 512) * 128  # rounded up: four chunks are enough
    C = SMALLEST_CHUNK
    if work.logits_fit:
        C = min(max(min(D // 256 * 128, quarter), C), 2048)
    count = -(-N // C)
    if N < SMALLEST_CHUNK * count:  # even chunks would be smaller: as many of that size as fit
        C = -(-N // max(N // SMALLEST_CHUNK, 1))
    sums = 4 * D + 4 * N * D // V
    if platform == "gpu":
        is_plain = 6 * N <= sums + max(4 * C - 2 * D, 0) + 2 * C
    else:
        of_logits = 8 * C if 4 * C > 2 * D else 0
        if work.device_kind not in LEAN_TPUS:
            of_logits = max(of_logits, 4 * C) + 2 * D + 4 * N * D // V
        is_plain = 4 * N <= sums + of_logits
    return -(-(N if work.logits_fit and is_plain else C) // logits_per_row)
