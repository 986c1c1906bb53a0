"""The scores of all tokens of a device, and their gradient.

Scores have a cotangent for each token, which is not known before the backward pass. So that makes
the logits again: 8NVD operations, 2NVD for each product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._devices import load, save, Saved
from .._inputs import nan_where
from ._chunks import only
from ._gradients import (
    chunk_gradients,
    chunk_scores,
    HeadGradient,
    whole_gradient,
    zero_gradient,
)
from ._logits import chunks_of, make_head, on_device, Operands, Options
from ._scores import Used
from ._token_scores import differentiable, Scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def device_scores(options: Options, used: Used, operands: Operands) -> Scores:
    """The scores of N tokens; zeros for those that the mask leaves out."""
    return all_scores(options, used, operands)


def all_scores(options: Options, used: Used, operands: Operands) -> Scores:
    scores = functools.partial(_scores, used)
    return on_device(scores, options.without_gradient, options.local.token_type, operands)


def _scores(used: Used, options: Options, operands: Operands) -> Scores:
    head = make_head(options, operands)

    def chunk(sums: Any, is_token: Array | None, x: Array, goals: Array) -> Any:
        return sums, chunk_scores(options, used, head, x, goals)

    tokens = operands.hidden, operands.goals
    _, scores = chunks_of(options, operands).run(chunk, tokens, ())
    return scores


def _device_scores_forward(options: Options, used: Used, operands: Operands) -> Any:
    scores = all_scores(options, used, operands)
    return scores, save(options.local.outer_axes, (*operands, jax.lax.stop_gradient(scores[0])))


def device_scores_backward(
    options: Options, used: Used, saved: Saved, cotangents: Scores
) -> tuple[Operands]:
    """`saved` are the operands, and the first score of the forward pass."""
    (*types, _), (*operands, before) = load(saved)
    gradients = functools.partial(_score_gradients, used)
    given = Operands(*operands), differentiable(cotangents), before
    return (on_device(gradients, options, Operands(*types), *given),)


def _score_gradients(
    used: Used,
    options: Options,
    operands: Operands,
    cotangents: tuple[Array, ...],
    before: Array,
) -> Operands:
    # A token whose scores are not used must not poison the others, whatever its vector is.
    needed = functools.reduce(jnp.logical_or, map(_any_of_token, cotangents))
    mask = needed if operands.mask is None else needed & operands.mask
    head = make_head(options, operands)

    def chunk(
        d_head: HeadGradient,
        is_token: Array | None,
        x: Array,
        goals: Array,
        of_chunk: tuple[Array, ...],
        before: Array,
    ) -> Any:
        first, *others = (only(is_token, cotangent) for cotangent in of_chunk)

        def of_tokens(scores: Scores) -> Any:
            # The gradient of a target out of range is NaN
            is_nan = jnp.isnan(before) & (first != 0)
            return (nan_where(is_nan, first), *others), None

        d_x, d_head, _ = chunk_gradients(options, used, head, x, goals, of_tokens, d_head)
        return d_head, d_x

    tokens = operands.hidden, operands.goals, cotangents, before
    chunks = chunks_of(options, operands._replace(mask=mask))
    if options.plan.logits_apart and chunks.count == 1:
        # After the logits of the forward pass, on which `before` depends: not both in one product
        tokens = jax.lax.optimization_barrier(tokens)
    d_head, d_hidden = chunks.run(chunk, tokens, zero_gradient(options, head, chunks.count))
    d_rows, d_bias = whole_gradient(options, d_head)
    return Operands(d_hidden, d_rows.astype(options.local.rows_dtype), d_bias)


def _any_of_token(array: Array) -> Array:
    return array != 0 if array.ndim == 1 else jnp.any(array != 0, axis=1)


device_scores.defvjp(_device_scores_forward, device_scores_backward)
