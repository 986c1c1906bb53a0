"""The scores of tokens, from their logits, and the gradients of any function of these scores.

What is computed here, before how:

    logits = soft_cap * tanh((hidden @ rows.T + bias) / soft_cap)    # (N, V)
    log_probs = log_softmax(logits)

| score           | meaning                         | its derivative by logit j, with p = softmax |
| --------------- | ------------------------------- | ------------------------------------------- |
| `log_prob`      | log_probs[target]               | (j is the target) - p[j]                    |
| `mean_log_prob` | the mean of log_probs           | 1 / V - p[j]                                |
| `entropy`       | -sum(p * log_probs)             | -p[j] * (log_probs[j] + entropy)            |
| `logsumexp`     | log(sum(exp(logits)))           | p[j]                                        |

So the gradient of any function of the scores is, with z = logits - max(logits),

    d_logits[j] = p[j] * (a + b * z[j]) + c * (j is the target) + d

with four numbers a, b, c, d for each token. `reference` is the same in a few lines, with all logits
at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .._inputs import nan_where
from ._chunks import over_tiles, tile
from ._plan import make_plan, Plan
from ._devices import index_of_device, max_over_devices, min_over_devices, sum_over_devices


class TokenScores(NamedTuple):
    """What [`eqx_embedding.EmbeddingDecode.score`][] says of each token.

    - `log_prob`: the logarithm of the probability of the target.
    - `mean_log_prob`: the mean of the logarithms of the probabilities of all tokens of the
        vocabulary.
    - `entropy`: that of the distribution over the vocabulary, in nats.
    - `logsumexp`: the logarithm of the sum of the exponentials of the logits.
    - `is_top`: whether the target has the largest logit; of equal logits that of the lower token.
    """

    log_prob: Float[Array, "*batch"]
    mean_log_prob: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    logsumexp: Float[Array, "*batch"]
    is_top: Bool[Array, "*batch"]


def reference(
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    targets: Int[Array, " N"],
    bias: Float[Array, " V"] | None = None,
    soft_cap: float | None = None,
) -> TokenScores:
    """The scores, from all logits at once: what the rest of this module computes in parts."""
    logits = hidden @ rows.T
    logits = logits if bias is None else logits + bias[None]
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    log_probs = jax.nn.log_softmax(logits)
    return TokenScores(
        log_prob=jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0],
        mean_log_prob=jnp.mean(log_probs, axis=1),
        entropy=-jnp.sum(jnp.exp(log_probs) * log_probs, axis=1),
        logsumexp=jax.nn.logsumexp(logits, axis=1),
        is_top=jnp.argmax(logits, axis=1) == targets,
    )


class Options(NamedTuple):
    """What is known when the program is compiled."""

    vocab_size: int  # the first so many rows are tokens, the others padding
    padded: bool  # whether there are others
    soft_cap: float | None
    dtype: DTypeLike  # of the factors of the logits
    wide: DTypeLike  # of all else: float32 or float64
    chunk_size: int | None  # `None` leaves it to the plan
    tiles: bool  # whether a device can cut its rows into tiles
    mesh: AbstractMesh | None = None
    vocabulary_axes: tuple[str, ...] = ()  # manual axes of it that split the rows

    def plan(self, V: int, D: int) -> Plan:
        plan = make_plan(V, D, self.dtype, self.wide, self.tiles)
        return plan if self.chunk_size is None else plan._replace(chunk_size=self.chunk_size)


class Head(NamedTuple):
    """What a device has of the table."""

    rows: Float[Array, "V D"]  # in `Options.dtype`
    bias: Float[Array, " V"] | None
    start: Any  # the token of the first row


def make_head(options: Options, rows: Array, bias: Array | None) -> Head:
    start = np.int32(0)
    if options.mesh is not None and options.vocabulary_axes:
        start = index_of_device(options.mesh, options.vocabulary_axes) * np.int32(len(rows))
    return Head(rows.astype(options.dtype), bias, start)


class Used(NamedTuple):
    """Which scores are needed beside `log_prob` and `logsumexp`, which cost nothing."""

    mean_log_prob: bool
    entropy: bool
    is_top: bool


class _Statistics(NamedTuple):
    """What the scores of a chunk follow from; `z` are the logits, and each has the shape (C,)."""

    maximum: Array  # of z
    total: Array  # the sum of exp(z - maximum)
    target_z: Array
    below: Array  # the sum of z - maximum over tokens; for `mean_log_prob`
    weighted: Array  # the sum of exp(z - maximum) * (z - maximum); for `entropy`
    top: Array  # the first row of the maximum; for `is_top`


# e to the power of this is zero, in float64 as well, and times infinity it would be NaN.
_LOWEST = -1e4


def _without_padding(options: Options, head: Head, array: Array, start: Any, fill: float) -> Array:
    """`array`, whose first axis is that of rows from `start`, with `fill` where they are padding."""
    if not options.padded:
        return array
    rows = head.start + start + lax.broadcasted_iota(np.int32, array.shape, 0)
    return jnp.where(rows < options.vocab_size, array, jnp.asarray(fill, array.dtype))


def _tokens_before(options: Options, head: Head, row: Any) -> Array:
    """How many of the rows before `row` are tokens."""
    return jnp.clip(options.vocab_size - head.start, 0, row).astype(options.wide)


def _logits(options: Options, head: Head, x: Array, start: Any, size: int) -> Array:
    """(size, C): the vocabulary comes first, so that a tile of the logits is contiguous."""
    z = lax.dot_general(
        tile(head.rows, start, size),
        x.astype(options.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=options.wide,
    )
    z = z if head.bias is None else z + tile(head.bias, start, size)[:, None]
    z = z if options.soft_cap is None else options.soft_cap * jnp.tanh(z / options.soft_cap)
    return _without_padding(options, head, z, start, -jnp.inf)


def _no_statistics(options: Options, C: int) -> _Statistics:
    zeros = jnp.zeros(C, options.wide)
    lowest = jnp.full(C, jnp.finfo(options.wide).min)  # -inf would give NaN for a tile of -inf
    return _Statistics(lowest, zeros, zeros, zeros, zeros, jnp.zeros(C, "int32"))


def _lower(statistics: _Statistics, higher: Array, count: Any) -> _Statistics:
    """The statistics of `count` tokens, relative to a higher maximum."""
    maximum, total, target_z, below, weighted, top = statistics
    step = maximum - higher
    factor = jnp.exp(step)
    weighted = factor * (weighted + jnp.where(total > 0, step * total, 0.0))
    below = below + jnp.where(count > 0, count * step, 0.0)
    return _Statistics(higher, factor * total, target_z, below, weighted, top)


def _add_tile(
    options: Options,
    used: Used,
    head: Head,
    targets: Array,
    z: Array,
    start: Any,
    statistics: _Statistics,
) -> _Statistics:
    """The statistics with those of the logits `z` of the rows from `start` on (online softmax,
    https://arxiv.org/abs/1805.02867)."""
    # The scores do not depend on what is subtracted, so neither do their derivatives.
    largest = lax.stop_gradient(jnp.max(z, axis=0))
    higher = jnp.maximum(statistics.maximum, largest)
    new = _lower(statistics, higher, _tokens_before(options, head, start))
    shifted = z - higher[None]
    e = jnp.exp(shifted)
    here = (targets >= start) & (targets < start + len(z))
    found = jnp.take_along_axis(z, jnp.where(here, targets - start, 0)[None], axis=0)[0]
    new = new._replace(
        total=new.total + jnp.sum(e, axis=0), target_z=jnp.where(here, found, new.target_z)
    )
    if used.mean_log_prob:
        tokens = _without_padding(options, head, shifted, start, 0.0)
        new = new._replace(below=new.below + jnp.sum(tokens, axis=0))
    if used.entropy:
        weighted = jnp.sum(e * jnp.maximum(shifted, _LOWEST), axis=0)
        new = new._replace(weighted=new.weighted + weighted)
    if used.is_top:
        row = head.start + start + lax.broadcasted_iota(np.int32, z.shape, 0)
        first = jnp.min(jnp.where(z == largest[None], row, np.iinfo(np.int32).max), axis=0)
        new = new._replace(top=jnp.where(largest > statistics.maximum, first, statistics.top))
    return new


def _merge_devices(
    options: Options, used: Used, head: Head, statistics: _Statistics
) -> _Statistics:
    """The statistics of all rows of a table whose rows are split over devices."""
    mesh, axes = options.mesh, options.vocabulary_axes
    if mesh is None or not axes:
        return statistics
    highest = max_over_devices(mesh, axes, lax.stop_gradient(statistics.maximum))
    local = _lower(statistics, highest, _tokens_before(options, head, len(head.rows)))
    names = ["total", "target_z"]
    names += ["below"] if used.mean_log_prob else []
    names += ["weighted"] if used.entropy else []
    sums = sum_over_devices(mesh, axes, jnp.stack([getattr(local, name) for name in names]))
    new = local._replace(**dict(zip(names, sums, strict=True)))
    if used.is_top:
        top = jnp.where(statistics.maximum == highest, local.top, np.iinfo(np.int32).max)
        new = new._replace(top=min_over_devices(mesh, axes, top))
    return new


def _as_scores(options: Options, targets: Array, statistics: _Statistics) -> TokenScores:
    maximum, total, target_z, below, weighted, top = statistics
    log_total = jnp.log(total)
    out_of_range = (targets < 0) | (targets >= options.vocab_size)
    # Differences to the maximum come first, so that large logits keep their precision.
    return TokenScores(
        log_prob=nan_where(out_of_range, (target_z - maximum) - log_total),
        mean_log_prob=below / options.vocab_size - log_total,
        entropy=jnp.maximum(log_total - weighted / total, 0.0),
        logsumexp=maximum + log_total,
        is_top=top == targets,
    )


def chunk_scores(
    options: Options, used: Used, head: Head, x: Float[Array, "C D"], targets: Int[Array, " C"]
) -> TokenScores:
    """The scores of C tokens; those that are not used have no meaning."""
    local = targets - head.start

    def add(start: Any, size: int, statistics: _Statistics) -> _Statistics:
        z = _logits(options, head, x, start, size)
        return _add_tile(options, used, head, local, z, start, statistics)

    V, T = len(head.rows), options.plan(*head.rows.shape).tile_size
    statistics = over_tiles(V, T, add, _no_statistics(options, len(x)))
    return _as_scores(options, targets, _merge_devices(options, used, head, statistics))


class HeadGradient(NamedTuple):
    rows: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


def chunk_gradients(
    options: Options,
    used: Used,
    head: Head,
    x: Float[Array, "C D"],
    targets: Int[Array, " C"],
    cotangents_of: Any,
    d_head: HeadGradient,
) -> tuple[Float[Array, "C D"], HeadGradient, Any]:
    """The gradients of a function of the scores of C tokens.

    `cotangents_of(scores)` returns the cotangents of the scores, and anything else, which is handed
    on. Returns the gradient of `x`, `d_head` with those of the table added, and anything else.
    """
    (C, D), V, T = x.shape, len(head.rows), options.plan(*head.rows.shape).tile_size
    local = targets - head.start
    z = _logits(options, head, x, 0, V)

    def add(start: Any, size: int, statistics: _Statistics) -> _Statistics:
        part = tile(z, start, size)
        return _add_tile(options, used, head, local, part, start, statistics)

    statistics = over_tiles(V, T, add, _no_statistics(options, C))
    statistics = _merge_devices(options, used, head, statistics)
    scores = _as_scores(options, targets, statistics)
    cotangents, other = cotangents_of(scores)
    d_logits = _LogitGradient.make(options, used, statistics, scores, cotangents)

    def gradients(start: Any, size: int, carry: Any) -> Any:
        d_x, d_head = carry
        d_z = d_logits.of_tile(options, head, local, tile(z, start, size), start)
        return _add_products(options, head, x, d_z, start, d_x, d_head)

    d_x = jnp.zeros((C, D), options.wide)
    d_x, d_head = over_tiles(V, T, gradients, (d_x, d_head))
    return d_x, d_head, other


class _LogitGradient(NamedTuple):
    """`d_logits = exp(z) * (scale + slope * z) + at_target * (j is the target) + everywhere`, with
    z relative to `maximum`; each of shape (C,)."""

    maximum: Array
    scale: Array
    slope: Array | None
    at_target: Array
    everywhere: Array | None

    @classmethod
    def make(
        cls,
        options: Options,
        used: Used,
        statistics: _Statistics,
        scores: TokenScores,
        cotangents: TokenScores,
    ) -> "_LogitGradient":
        total = statistics.total
        a = cotangents.logsumexp - cotangents.log_prob
        slope = everywhere = None
        if used.mean_log_prob:
            a = a - cotangents.mean_log_prob
            everywhere = cotangents.mean_log_prob / options.vocab_size
        if used.entropy:
            a = a + cotangents.entropy * (jnp.log(total) - scores.entropy)
            slope = -cotangents.entropy / total
        return cls(statistics.maximum, a / total, slope, cotangents.log_prob, everywhere)

    def of_tile(self, options: Options, head: Head, targets: Array, z: Array, start: Any) -> Array:
        shifted = z - self.maximum[None]
        factor = self.scale[None]
        if self.slope is not None:
            factor = factor + self.slope[None] * jnp.maximum(shifted, _LOWEST)
        d_z = factor * jnp.exp(shifted)
        row = start + lax.broadcasted_iota(np.int32, z.shape, 0)
        d_z = d_z + jnp.where(row == targets[None], self.at_target[None], 0.0)
        if self.everywhere is not None:
            d_z = d_z + self.everywhere[None]
        if options.soft_cap is not None:
            # where the logit is -inf, the derivative of this would be NaN
            capped = _without_padding(options, head, z, start, 0.0) / options.soft_cap
            d_z = d_z * (1 - capped**2)
        return _without_padding(options, head, d_z, start, 0.0)


def _add_products(
    options: Options, head: Head, x: Array, d_z: Array, start: Any, d_x: Array, d_head: HeadGradient
) -> tuple[Array, HeadGradient]:
    """Adds the gradients of one tile of logits to those of `x` and of the table."""
    plan, size = options.plan(*head.rows.shape), len(d_z)
    d_bias = d_head.bias
    if d_bias is not None:
        d_b = tile(d_bias, start, size) + jnp.sum(d_z, axis=1)
        d_bias = lax.dynamic_update_slice_in_dim(d_bias, d_b, start, 0)

    def dot(left: Array, right: Array, axis: int) -> Array:
        dimensions = ((axis,), (0,)), ((), ())
        return lax.dot_general(left, right, dimensions, preferred_element_type=options.wide)

    d_z = d_z.astype(plan.dtype)
    rows = tile(head.rows, start, size).astype(plan.dtype)
    rows = _without_padding(options, head, rows, start, 0.0)
    if plan.transpose:
        d_x = d_x + dot(lax.optimization_barrier(d_z.T), rows, 1)
    else:
        d_x = d_x + dot(d_z, rows, 0)
    d_t = tile(d_head.rows, start, size) + dot(d_z, x.astype(options.dtype).astype(plan.dtype), 1)
    d_rows = lax.dynamic_update_slice_in_dim(d_head.rows, d_t, start, 0)
    return d_x, HeadGradient(d_rows, d_bias)
