"""The likeliest tokens of a chunk, and draws from their distribution.

The logits of a chunk are held, unless only the likeliest token is asked for, and searched by blocks
of 128 rows. The ids of tokens fix their blocks, so a mesh that splits the table changes no draw.

- The k likeliest tokens are in the k blocks with the largest logits. On TPUs, XLA's own search
  reads less.
- A draw takes two steps: a block by its probability, then a token of that block. Each step adds
  Gumbel noise and takes the largest sum (https://arxiv.org/abs/1411.0030). So it needs a random
  number for each block and for each token of one block, instead of one for each logit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from .._devices import gather_over_devices, max_over_devices, min_over_devices, sum_over_devices
from .._inputs import HOTTEST, nan_where, NO_TARGET
from ._chunks import over_tiles, tile
from ._logits import all_tokens, Head, Logits, Options, own_tokens, tile_logits
from ._scores import find_statistics, Used


BLOCK = 128  # rows

# Below this temperature, no noise changes the order of logits that differ.
COLDEST = 1e-30

NO_RESULT = np.int32(-1)  # for a vector whose logits have no distribution


class Draws(NamedTuple):
    """What each token is drawn with."""

    keys: UInt32[Array, "C 2"]  # of Threefry, whose numbers do not depend on `jax.vmap`
    temperature: Float[Array, " C"]

    @property
    def is_random(self) -> Array:
        return self.temperature > COLDEST

    @property
    def coldness(self) -> Array:
        """The inverse of the temperature; 1 at zero, where only the order counts."""
        return 1 / jnp.where(self.is_random, jnp.minimum(self.temperature, HOTTEST), 1.0)

    def noise(self, step: int, count: int, dtype: DTypeLike) -> Float[Array, "C count"]:
        """Gumbel noise; zeros at temperature zero."""

        def draw(key: Array) -> Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step)
            # "low" would distort probabilities of one in a million
            return jax.random.gumbel(key, (count,), dtype, mode="high")

        return jnp.where(self.is_random[:, None], jax.vmap(draw)(self.keys), 0.0)

    def if_valid(self, tokens: Array) -> Array:
        valid = (self.temperature >= 0) & (self.temperature < jnp.inf)
        return jnp.where(valid, tokens, NO_RESULT)


def find_likeliest(
    options: Options, k: int, head: Head, x: Float[Array, "C D"]
) -> tuple[Float[Array, "C k"], Int[Array, "C k"]]:
    """The `k` largest log-probabilities and their tokens; NaN and -1 without a distribution."""
    x = all_tokens(options, x)
    if k == 1:
        log_probs, tokens, total = _likeliest_one(options, head, x)
    else:
        log_probs, tokens, total = _likeliest_some(options, k, head, x)
    has_none = ~(total > 0)[:, None]
    found = nan_where(has_none, log_probs), jnp.where(has_none, NO_RESULT, tokens)
    return own_tokens(options, found)


def draw_among(
    log_probs: Float[Array, "C k"], tokens: Int[Array, "C k"], draws: Draws
) -> Int[Array, " C"]:
    """One of `tokens` for each vector; the first has the largest probability."""
    relative = (log_probs - log_probs[:, :1]) * draws.coldness[:, None]
    noise = draws.noise(0, tokens.shape[1], log_probs.dtype)
    # A flat array has one layout. Else XLA for TPUs could bring all logits into that of the noise.
    noise = lax.optimization_barrier(noise.reshape(-1)).reshape(noise.shape)
    scores = relative + noise
    return draws.if_valid(_pick(tokens, jnp.argmax(scores, axis=1)))


def draw_token(
    options: Options, head: Head, x: Float[Array, "C D"], draws: Draws
) -> Int[Array, " C"]:
    """A token for each vector; -1 without a distribution."""
    x, draws = all_tokens(options, (x, draws))
    z = tile_logits(options, head, x, 0, len(head.rows)).values
    blocks = _sum_blocks(options, head, z, draws.coldness)
    blocks = _merge_devices(options, head, blocks, draws.coldness)
    largest = jnp.max(blocks.largest, axis=0)

    relative = (blocks.largest - largest[None]) * draws.coldness[None]
    weights = jnp.where(draws.is_random[None], jnp.log(blocks.total), 0.0)
    scores = relative + weights + draws.noise(0, len(relative), z.dtype).T
    block = jnp.argmax(scores, axis=0).astype(np.int32)  # also in 64-bit mode
    rows = _rows_of_blocks(block[:, None])

    relative = (_logits_of_rows(z, rows - head.start) - largest[:, None]) * draws.coldness[:, None]
    scores = relative + draws.noise(1, BLOCK, z.dtype)
    tokens = _pick_best_device(
        options, jnp.max(scores, axis=1), _pick(rows, jnp.argmax(scores, axis=1))
    )

    total = jnp.sum(blocks.total, axis=0)  # NaN if a logit is NaN or infinite
    has_one = (total > 0) & (largest > jnp.finfo(z.dtype).min)
    return own_tokens(options, draws.if_valid(jnp.where(has_one, tokens, NO_RESULT)))


def _likeliest_one(options: Options, head: Head, x: Array) -> tuple[Array, Array, Array]:
    """Of logits that are not held."""

    def logits(start: Any, size: int) -> Logits:
        return tile_logits(options, head, x, start, size)

    targets = jnp.full(len(x), NO_TARGET)
    statistics = find_statistics(options, Used(is_top=True), head, targets, logits)
    total = statistics.total
    return -jnp.log(total)[:, None], statistics.top[:, None], total


def _likeliest_some(options: Options, k: int, head: Head, x: Array) -> tuple[Array, Array, Array]:
    z, z_largest = tile_logits(options, head, x, 0, len(head.rows))
    group = options.local.vocabulary
    if options.plan.search_blocks and k * BLOCK < len(z):
        values, rows, largest, total = _search_blocks(options, k, head, z)
    else:
        values, rows = lax.top_k(z.T, min(k, len(z)))
        largest = max_over_devices(group, z_largest)
        total = jnp.sum(jnp.exp(z - largest[None]), axis=0)
    tokens = head.start + rows
    if group.axes:
        values, tokens = (gather_over_devices(group, a.T).T for a in (values, tokens))
        values, tokens = _largest(k, values, tokens)
    total = sum_over_devices(group, total)
    return values - largest[:, None] - jnp.log(total)[:, None], tokens, total


def _search_blocks(
    options: Options, k: int, head: Head, z: Float[Array, "V C"]
) -> tuple[Array, Array, Array, Array]:
    """The `k` largest logits of this device and their rows; of each vector the largest logit of all
    devices, and the sum over the rows of this device, relative to that."""
    coldness = jnp.ones(z.shape[1], z.dtype)
    blocks = _sum_blocks(options, head, z, coldness)
    _, block = lax.top_k(blocks.largest.T, k)
    # In the order of tokens: of equal logits, the first is taken.
    rows = _rows_of_blocks(jnp.sort(block, axis=1)) - _shift(options, head)
    largest = max_over_devices(options.local.vocabulary, jnp.max(blocks.largest, axis=0))
    total = jnp.sum(_lowered(blocks, largest[None], coldness), axis=0)
    return *_largest(k, _logits_of_rows(z, rows), rows), largest, total


class _Blocks(NamedTuple):
    """Of the logits z of the rows of each block; each of shape (blocks, C)."""

    largest: Array  # of z
    total: Array  # the sum of exp(coldness * (z - largest))


def _lowered(blocks: _Blocks, higher: Array, coldness: Array) -> Array:
    """The totals, relative to a higher logit."""
    return blocks.total * jnp.exp((blocks.largest - higher) * coldness[None])


def _sum_blocks(options: Options, head: Head, z: Float[Array, "V C"], coldness: Array) -> _Blocks:
    """Sums each block over the rows of this device; others may have the rest of the first and of
    the last block."""
    shift = _shift(options, head)
    before = BLOCK - 1 if options.local.vocabulary.axes else 0  # the largest shift
    lowest = jnp.finfo(z.dtype).min  # -inf - -inf would be NaN

    def add(start: Any, size: int, blocks: _Blocks) -> _Blocks:
        count, place = -(-(before + size) // BLOCK), start // BLOCK
        after = count * BLOCK - size
        rows = jnp.pad(tile(z, start, size), ((before, after), (0, 0)), constant_values=-jnp.inf)
        rows = tile(rows, before - shift, count * BLOCK).reshape(count, BLOCK, -1)
        largest = jnp.maximum(jnp.max(rows, axis=1), lowest)
        e = jnp.exp((rows - largest[:, None]) * coldness[None, None])
        old = _Blocks(*(tile(array, place, count) for array in blocks))
        both = _merge(old, _Blocks(largest, jnp.sum(e, axis=1)), coldness)
        update = functools.partial(lax.dynamic_update_slice_in_dim, start_index=place, axis=0)
        return _Blocks(*map(update, blocks, both))

    zeros = jnp.zeros((-(-(before + len(z)) // BLOCK), z.shape[1]), z.dtype)
    tile_size = min(max(options.plan.tile_size // BLOCK * BLOCK, BLOCK), len(z))
    return over_tiles(len(z), tile_size, add, _Blocks(jnp.full_like(zeros, lowest), zeros))


def _merge(some: _Blocks, others: _Blocks, coldness: Array) -> _Blocks:
    largest = jnp.maximum(some.largest, others.largest)
    total = _lowered(some, largest, coldness) + _lowered(others, largest, coldness)
    return _Blocks(largest, total)


def _merge_devices(options: Options, head: Head, blocks: _Blocks, coldness: Array) -> _Blocks:
    """Merges the blocks of all devices."""
    group = options.local.vocabulary
    count, start = -(-options.vocab_size // BLOCK), head.start // BLOCK
    if not group.axes:
        return _Blocks(*(array[:count] for array in blocks))
    lowest = float(jnp.finfo(blocks.total.dtype).min)

    def place(fill: float, array: Array) -> Array:
        whole = jnp.full((count + len(array), array.shape[1]), fill, array.dtype)
        return lax.dynamic_update_slice_in_dim(whole, array, start, 0)[:count]

    local = _Blocks(place(lowest, blocks.largest), place(0.0, blocks.total))
    largest = max_over_devices(group, local.largest)
    return _Blocks(largest, sum_over_devices(group, _lowered(local, largest, coldness)))


def _shift(options: Options, head: Head) -> Any:
    """How many rows of its first block the device does not have."""
    return head.start % BLOCK if options.local.vocabulary.axes else 0


def _rows_of_blocks(blocks: Int[Array, "C k"]) -> Int[Array, "C rows"]:
    rows = blocks[:, :, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)[None, None]
    return rows.reshape(len(blocks), blocks.shape[1] * BLOCK)


def _logits_of_rows(z: Float[Array, "V C"], rows: Int[Array, "C rows"]) -> Float[Array, "C rows"]:
    """The logits of some rows for each token; -inf for rows that this device does not have."""
    # Single numbers: XLA for TPUs would take slices one after the other. Not by `z[rows, columns]`:
    # for that, XLA ends the process on some meshes of three axes.
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(0,),
    )
    inside = jnp.clip(rows, 0, len(z) - 1)[..., None]
    found = lax.gather(z, inside, numbers, (1, 1), mode="promise_in_bounds")
    return jnp.where((rows >= 0) & (rows < len(z)), found, -jnp.inf)


def _pick(choices: Int[Array, "C n"], place: Int[Array, " C"]) -> Int[Array, " C"]:
    return jnp.take_along_axis(choices, place[:, None], axis=1)[:, 0]


def _largest(k: int, values: Array, tokens: Array) -> tuple[Array, Array]:
    values, place = lax.top_k(values, k)
    return values, jnp.take_along_axis(tokens, place, axis=1)


def _pick_best_device(options: Options, score: Array, token: Array) -> Array:
    """The token of the device with the highest score."""
    group = options.local.vocabulary
    is_best = score == max_over_devices(group, score)
    return min_over_devices(group, jnp.where(is_best, token, np.iinfo(np.int32).max))
