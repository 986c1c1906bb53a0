"""The scores of a chunk of tokens, and the gradients of a function of them.

For scores of targets by the formula of `_reference.py`, with z relative to the largest logit:

    d_logits[j] = exp(z[j]) * (scale + slope * z[j]) + at_target * (j is the target) + everywhere
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._devices import call_linear
from ._chunks import over_tiles, tile
from ._divergence import compare, count_rows, PullBack
from ._logits import (
    all_tokens,
    Head,
    Logits,
    Options,
    own_tokens,
    sum_own_tokens,
    tile_logits,
    without_padding,
)
from ._scores import as_scores, find_statistics, LOWEST, Statistics, Targets, targets_first, Used
from ._token_scores import Scores, TokenScores


class HeadGradient(NamedTuple):
    rows: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


def zero_gradient(options: Options, head: Head, num_chunks: int) -> HeadGradient:
    """Zeros to add gradients of chunks to. If that is one product, it may be rounded as it is made.

    Else XLA would hold it in float32 first. A product that is rounded to less than its factors,
    such as float8, would be computed from factors of that dtype.
    """
    plan = options.plan
    rounded = num_chunks == 1 and plan.round_early and options.local.rows_dtype == plan.dtype
    dtype = options.local.rows_dtype if rounded else options.wide
    bias = None if head.bias is None else jnp.zeros(len(head.rows), options.wide)
    return HeadGradient(jnp.zeros(head.rows.shape, dtype), bias)


def whole_gradient(options: Options, d_head: HeadGradient) -> HeadGradient:
    """The gradient of the table, from the sums of all chunks.

    Nothing is derived from that of padding rows, which is zero. The derivative of a norm is NaN
    there, and would reach all tokens.
    """
    rows = d_head.rows.astype(options.wide)

    def drop_padding(array: Array) -> Array:
        start = options.local.vocabulary.rank * np.int32(len(array))
        return without_padding(options, Head(array, None, start), array, 0, 0.0)

    if options.padded:
        rows = call_linear(lambda array: array, drop_padding, rows)
    return HeadGradient(rows, d_head.bias)


def chunk_scores(
    options: Options, used: Used, head: Head, x: Float[Array, "C D"], goals: Array
) -> Scores:
    """The scores of C tokens; those that are not used have no meaning. `goals` are the targets, or
    the hidden vectors of a teacher."""
    x, goals = all_tokens(options, (x, goals))

    def logits(start: Any, size: int) -> Logits:
        return tile_logits(options, head, x, start, size)

    if options.comparison is None:
        statistics = find_statistics(options, used, head, goals, logits)
        return own_tokens(options, as_scores(options, goals, statistics))
    scores, _ = compare(options, head, goals, logits(0, len(head.rows)))
    return own_tokens(options, scores)


def chunk_gradients(
    options: Options,
    used: Used,
    head: Head,
    x: Float[Array, "C D"],
    goals: Array,
    cotangents_of: Callable[[Any], tuple[tuple[Array, ...], Any]],
    d_head: HeadGradient,
) -> tuple[Float[Array, "C D"], HeadGradient, Any]:
    """The gradients with respect to C tokens and to the table.

    `cotangents_of(scores)` returns the cotangents of the scores that are differentiable, and
    anything else, which is handed on. Returns the gradient of `x`; `d_head`, with that of the table
    added; anything else.
    """
    x, goals = all_tokens(options, (x, goals))
    (C, D), (V, _) = x.shape, head.rows.shape
    logits = tile_logits(options, head, x, 0, V)
    if options.comparison is None:
        scores, pull_back = _score_targets(options, used, head, goals, logits)
    else:
        scores, pull_back = compare(options, head, goals, logits)
    cotangents, other = cotangents_of(own_tokens(options, scores))
    gradient = pull_back(all_tokens(options, cotangents))

    def add(start: Any, size: int, carry: Any) -> Any:
        z_tile = tile(logits.values, start, size)
        d_z = _before_cap(options, head, gradient(start, z_tile), z_tile, start)
        return _add_products(options, head, x, d_z, start, *carry)

    carry = jnp.zeros((C, D), options.wide), d_head
    d_x, d_head = over_tiles(count_rows(head), options.plan.tile_size, add, carry)
    return sum_own_tokens(options, d_x), d_head, other


def _score_targets(
    options: Options, used: Used, head: Head, targets: Targets, logits: Logits
) -> tuple[TokenScores, PullBack]:
    """The scores of C tokens, and how to pull back cotangents of them."""
    statistics = find_statistics(options, used, head, targets, logits.tile)
    scores = as_scores(options, targets, statistics)

    def pull_back(cotangents: tuple[Array, ...]) -> Callable[[Any, Array], Array]:
        coefficients = _find_coefficients(options, used, statistics, scores, cotangents)

        def gradient(start: Any, z: Array) -> Array:
            return _logit_gradient(coefficients, targets_first(targets) - head.start - start, z)

        return gradient

    return scores, pull_back


class _Coefficients(NamedTuple):
    """The coefficients of the formula above; each of shape (C,), but for k targets, and `None` for
    zeros."""

    maximum: Array
    scale: Array
    slope: Array | None
    at_target: Array  # (k, C)
    everywhere: Array | None


def _find_coefficients(
    options: Options,
    used: Used,
    statistics: Statistics,
    scores: TokenScores,
    cotangents: tuple[Array, ...],
) -> _Coefficients:
    log_prob, mean_log_prob, entropy, logsumexp = cotangents
    total, slope, everywhere = statistics.total, None, None
    at_target = targets_first(log_prob)
    scale = logsumexp - (log_prob if log_prob.ndim == 1 else jnp.sum(log_prob, axis=1))
    if used.mean_log_prob:
        scale = scale - mean_log_prob
        everywhere = mean_log_prob / options.vocab_size
    if used.entropy:
        scale = scale + entropy * (jnp.log(total) - scores.entropy)
        slope = -entropy / total
    return _Coefficients(statistics.maximum, scale / total, slope, at_target, everywhere)


def _logit_gradient(coefficients: _Coefficients, target_rows: Array, z: Array) -> Array:
    """The gradient of the logits `z` of some rows. `target_rows`, (k, C), count from the first."""
    maximum, scale, slope, at_target, everywhere = coefficients
    shifted = z - maximum[None]
    factor = scale[None]
    if slope is not None:
        factor = factor + slope[None] * jnp.maximum(shifted, LOWEST)
    d_z = _add_at(target_rows, at_target, factor * jnp.exp(shifted))
    return d_z if everywhere is None else d_z + everywhere[None]


def _add_at(rows: Array, numbers: Array, array: Array) -> Array:
    """The array, (size, C), with k numbers added in each column, at those of the rows it has."""
    if len(rows) == 1:  # a comparison is part of the loop around it, and a scatter is not
        here = lax.broadcasted_iota(np.int32, array.shape, 0) == rows
        return array + jnp.where(here, numbers, 0.0)
    # Not `array.at[rows, columns]`: for that, XLA ends the process on some meshes of three axes.
    in_columns = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(1,),
    )
    return lax.scatter_add(array, rows[..., None], numbers, in_columns, mode="drop")


def _before_cap(options: Options, head: Head, d_z: Array, z: Array, start: Any) -> Array:
    """The gradient of the logits `z` of the rows from `start` on, before their soft cap."""
    if options.soft_cap is not None:
        # where the logit is -inf, the derivative of this would be NaN
        capped = without_padding(options, head, z, start, 0.0) / options.soft_cap
        d_z = d_z * (1 - capped**2)
    return without_padding(options, head, d_z, start, 0.0)


def _add_products(
    options: Options, head: Head, x: Array, d_z: Array, start: Any, d_x: Array, d_head: HeadGradient
) -> tuple[Array, HeadGradient]:
    """Adds the gradients of a tile of logits to those of `x` and of the table."""
    plan, size = options.plan, len(d_z)

    def add(array: Array, new: Array) -> Array:
        new = tile(array, start, size) + new
        return lax.dynamic_update_slice_in_dim(array, new, start, 0)

    def dot(left: Array, right: Array, axis: int, dtype: DTypeLike = options.wide) -> Array:
        dimensions = ((axis,), (0,)), ((), ())
        return lax.dot_general(left, right, dimensions, preferred_element_type=dtype)

    d_bias = d_head.bias
    if d_bias is not None:
        d_bias = add(d_bias, jnp.sum(d_z, axis=1))
    d_z = d_z.astype(plan.d_logits_dtype)
    rows = tile(head.rows, start, size).astype(plan.dtype)
    rows = without_padding(options, head, rows, start, 0.0)
    if plan.transpose:
        d_x = d_x + dot(lax.optimization_barrier(d_z.T), rows, 1)
    else:
        d_x = d_x + dot(d_z, rows, 0)
    x = x.astype(plan.dtype)
    d_rows = dot(d_z, x, 1, d_head.rows.dtype)
    return d_x, HeadGradient(add(d_head.rows, d_rows), d_bias)
