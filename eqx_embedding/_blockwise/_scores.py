"""The scores of the targets of a chunk of tokens, from its logits, tile after tile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Int

from .._devices import max_over_devices, min_over_devices, sum_over_devices
from .._inputs import nan_where
from ._chunks import over_tiles
from ._logits import Head, is_unknown, Logits, Options, tokens_before, without_padding
from ._token_scores import Scores, TokenScores


Targets = Int[Array, " C"] | Int[Array, "C k"]  # one target for each token, or k


class Used(NamedTuple):
    """Which scores are needed beside `log_prob` and `logsumexp`, which cost nothing."""

    mean_log_prob: bool = False
    entropy: bool = False
    is_top: bool = False


class Statistics(NamedTuple):
    """What the scores of a chunk follow from. `z` are the logits; the shape is (C,) but for k
    targets of each token."""

    maximum: Array  # of z
    total: Array  # the sum of exp(z - maximum)
    target_z: Array  # the logits of the targets, (k, C)
    below: Array  # the sum of z - maximum over tokens; for `mean_log_prob`
    weighted: Array  # the sum of exp(z - maximum) * (z - maximum); for `entropy`
    top: Array  # the first row of the maximum; for `is_top`


def find_statistics(
    options: Options,
    used: Used,
    head: Head,
    targets: Targets,
    logits: Callable[[Any, int], Logits],
) -> Statistics:
    """`logits(start, size)` are those of the `size` rows from `start` on."""

    def add(start: Any, size: int, statistics: Statistics) -> Statistics:
        of_tile = logits(start, size)
        return _add_tile(options, used, head, rows - head.start, of_tile, start, statistics)

    rows = targets_first(targets)
    zeros, tops = jnp.zeros(len(targets), options.wide), jnp.zeros(len(targets), "int32")
    lowest = jnp.full_like(zeros, jnp.finfo(options.wide).min)  # -inf - -inf would be NaN
    start = Statistics(lowest, zeros, jnp.zeros(rows.shape, options.wide), zeros, zeros, tops)
    tile_size = options.plan.tile_size
    statistics = over_tiles(len(head.rows), tile_size, add, start)
    return _merge_devices(options, used, head, statistics)


def targets_first(array: Array) -> Array:
    """`(C,)`, or `(C, k)` with k targets for each token, as `(k, C)`, the order of the logits."""
    return jnp.atleast_2d(array.T)


def as_scores(options: Options, targets: Targets, statistics: Statistics) -> TokenScores:
    maximum, total, target_z, below, weighted, top = statistics
    rows, log_total = targets_first(targets), jnp.log(total)
    # Differences to the maximum come first, so that large logits keep their precision.
    log_prob = (target_z - maximum[None]) - log_total[None]
    log_prob = nan_where(is_unknown(options, rows), log_prob)
    is_top = (top[None] == rows) & ~jnp.isnan(log_prob)
    return TokenScores(
        log_prob=log_prob.T.reshape(targets.shape),
        mean_log_prob=below / options.vocab_size - log_total,
        entropy=jnp.maximum(log_total - weighted / total, 0.0),
        logsumexp=maximum + log_total,
        is_top=is_top.T.reshape(targets.shape),
    )


def nan_if_unknown(scores: Scores, array: Array) -> Array:
    """A target out of range makes the loss NaN, even if the function does not look at it."""
    is_nan = jnp.isnan(scores[0])
    if is_nan.ndim > array.ndim:  # of k targets
        is_nan = jnp.any(is_nan, axis=-1)
    return nan_where(is_nan, array)


# exp(LOWEST) is zero, in float64 as well. It is not -inf, because 0 * -inf is NaN.
LOWEST = -1e4


def _add_tile(
    options: Options,
    used: Used,
    head: Head,
    targets: Array,
    logits: Logits,
    start: Any,
    statistics: Statistics,
) -> Statistics:
    """Adds the logits of the rows from `start` on (online softmax,
    https://arxiv.org/abs/1805.02867). `targets`, (k, C), count from the first row of the device."""
    z, largest = logits
    higher = jnp.maximum(statistics.maximum, largest)
    new = _lower(options, statistics, higher, tokens_before(options, head, start))
    shifted = cool(options, z - higher[None])
    e = jnp.exp(shifted)
    here = (targets >= start) & (targets < start + len(z))
    found = _at(options, jnp.where(here, targets - start, 0), z)
    new = new._replace(
        total=new.total + jnp.sum(e, axis=0), target_z=jnp.where(here, found, new.target_z)
    )
    if used.mean_log_prob:
        of_tokens = without_padding(options, head, shifted, start, 0.0)
        new = new._replace(below=new.below + jnp.sum(of_tokens, axis=0))
    if used.entropy:
        weighted = jnp.sum(e * jnp.maximum(shifted, LOWEST), axis=0)
        new = new._replace(weighted=new.weighted + weighted)
    if used.is_top:
        row = head.start + start + lax.broadcasted_iota(np.int32, z.shape, 0)
        first = jnp.min(jnp.where(z == largest[None], row, np.iinfo(np.int32).max), axis=0)
        new = new._replace(top=jnp.where(largest > statistics.maximum, first, statistics.top))
    return new


def _at(options: Options, rows: Array, z: Array) -> Array:
    """The logits `z`, (size, C), of k rows for each token, (k, C)."""
    types = options.local.vocabulary.mesh.axis_types
    if AxisType.Auto in types and AxisType.Manual in types:
        # Here XLA can abort the process in `take_along_axis`. This works, but sends the indices.
        return z[rows, jnp.arange(z.shape[1], dtype="int32")]
    return jnp.take_along_axis(z, rows, axis=0)


def cool(options: Options, difference: Array) -> Array:
    """A difference between logits, divided by the temperature.

    XLA rounds a quotient or product in one place, and not where it is subtracted from at once. So
    logits that were divided first would differ by more than they should.
    """
    return difference if options.temperature == 1 else difference / options.temperature


def _lower(options: Options, statistics: Statistics, higher: Array, count: Any) -> Statistics:
    """The statistics of `count` tokens, relative to a higher maximum."""
    maximum, total, target_z, below, weighted, top = statistics
    step = cool(options, maximum - higher)
    factor = jnp.exp(step)
    weighted = factor * (weighted + jnp.where(total > 0, step * total, 0.0))
    below = below + jnp.where(count > 0, count * step, 0.0)
    return Statistics(higher, factor * total, target_z, below, weighted, top)


def _merge_devices(options: Options, used: Used, head: Head, statistics: Statistics) -> Statistics:
    """The statistics of all rows of a table whose rows are split over devices."""
    group = options.local.vocabulary
    if not group.axes:
        return statistics
    highest = max_over_devices(group, lax.stop_gradient(statistics.maximum))
    local = _lower(options, statistics, highest, tokens_before(options, head, len(head.rows)))
    names = ["total"]
    names += ["below"] if used.mean_log_prob else []
    names += ["weighted"] if used.entropy else []
    rows = [local.target_z, *(getattr(local, name)[None] for name in names)]
    sums = sum_over_devices(group, jnp.concatenate(rows))
    k = len(local.target_z)
    new = local._replace(target_z=sums[:k], **dict(zip(names, sums[k:], strict=True)))
    if used.is_top:
        top = jnp.where(statistics.maximum == highest, local.top, np.iinfo(np.int32).max)
        new = new._replace(top=min_over_devices(group, top))
    return new
