"""Scores and losses of all tokens of a device, and their gradients.

The loss of a token is any function of its scores (`_scores.py`). Loss and gradients need three
products of 2NVD operations: the logits, the gradient of `hidden`, and that of the rows.

- A sum of losses has one cotangent. So the gradients are made in the forward pass, one chunk of
  tokens after the other, and the backward pass scales them: 6NVD.
- Scores that stay apart have a cotangent each: the backward pass makes the logits again: 8NVD.

Shapes: `hidden` is (N, D), `rows` (V, D), `bias` (V,) or `None`; `weights`, `targets`, and `mask`,
which says what tokens count, are (N,); `mask` may be `None`. Floats are of `Options.wide`.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._inputs import at_least_float32, nan_where
from ._chunks import Chunks
from ._devices import device_type, DeviceType, without_devices
from ._function import TokenFunction
from ._gradients import chunk_gradients, HeadGradient
from ._logits import Head, is_unknown, make_head, Options
from ._scores import chunk_scores, TokenScores, Used


def _zeros_like(head: Head, dtype: Any) -> HeadGradient:
    bias = None if head.bias is None else jnp.zeros(len(head.rows), dtype)
    return HeadGradient(jnp.zeros(head.rows.shape, dtype), bias)


def _chunks_of(options: Options, hidden: Array, rows: Array, mask: Array | None) -> Chunks:
    return Chunks(hidden.shape[0], options.plan(*rows.shape).chunk_size, mask)


# Scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def device_scores(
    options: Options,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
) -> TokenScores:
    """The scores of N tokens; zeros for those that the mask leaves out."""
    return _all_scores(options, used, hidden, rows, bias, targets, mask)


def _all_scores(options: Options, used: Used, *operands: Any) -> TokenScores:
    kind = device_type(operands[3])
    return without_devices(functools.partial(_scores, options, used), kind, *operands)


def _scores(
    options: Options,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
) -> TokenScores:
    head = make_head(options, rows, bias)

    def chunk(sums: Any, is_token: Array | None, x: Array, y: Array) -> Any:
        return sums, chunk_scores(options, used, head, x, y)

    _, scores = _chunks_of(options, hidden, rows, mask).run(chunk, (hidden, targets), ())
    return scores


def _device_scores_forward(options: Options, used: Used, *operands: Any) -> Any:
    saved = tuple(map(functools.partial(_save, options), operands))
    return _all_scores(options, used, *operands), saved


def _device_scores_backward(
    options: Options, used: Used, operands: Any, cotangents: TokenScores
) -> Any:
    types = tuple(_with_outer_axes(options, device_type(operand)) for operand in operands[:3])
    gradients = functools.partial(_score_gradients, options, used)
    return *without_devices(gradients, types, *operands, cotangents[:4]), None, None


def _score_gradients(
    options: Options,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
    cotangents: tuple[Array, ...],
) -> tuple[Array, Array, Array | None]:
    # A token whose scores are not used must not poison the others, whatever its vector is.
    needed = functools.reduce(jnp.logical_or, [c != 0 for c in cotangents])
    mask = needed if mask is None else needed & mask
    d_log_prob, *others = cotangents
    d_log_prob = nan_where(is_unknown(options, targets) & (d_log_prob != 0), d_log_prob)
    head = make_head(options, rows, bias)

    def chunk(
        d_head: HeadGradient, is_token: Array | None, x: Array, y: Array, given: tuple[Array, ...]
    ) -> Any:
        log_prob, mean_log_prob, entropy, logsumexp = (_only(is_token, c) for c in given)

        def of_tokens(scores: TokenScores) -> Any:
            new = TokenScores(log_prob, mean_log_prob, entropy, logsumexp, scores.is_top)
            return new, None

        d_x, d_head, _ = chunk_gradients(options, used, head, x, y, of_tokens, d_head)
        return d_head, d_x

    tokens = hidden, targets, (d_log_prob, *others)
    chunks = _chunks_of(options, hidden, rows, mask)
    d_head, d_hidden = chunks.run(chunk, tokens, _zeros_like(head, options.wide))
    return d_hidden, *d_head


device_scores.defvjp(_device_scores_forward, _device_scores_backward)


# Sums of losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def device_total(
    options: Options,
    function: TokenFunction,
    return_scores: bool,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    weights: Array,
    data: tuple[Array, ...],
    closure: tuple[Array, ...],
    targets: Array,
    mask: Array | None,
) -> tuple[Array, TokenScores | None]:
    """The sum of weighted losses, and the scores.

    `data` are arrays `(N, ...)`, of which the `function` gets a row for each token; `closure` are
    the arrays that it gets as they are.
    """
    operands = hidden, rows, bias, weights, data, closure, targets, mask
    total = functools.partial(_total, options, function, return_scores)
    return without_devices(total, device_type(weights), *operands)


def _total(
    options: Options, function: TokenFunction, return_scores: bool, *operands: Any
) -> tuple[Array, TokenScores | None]:
    hidden, rows, bias, weights, data, closure, targets, mask = operands
    head, used = make_head(options, rows, bias), function.used(return_scores)

    def chunk(
        total: Array, is_token: Array | None, x: Array, y: Array, w: Array, data: tuple[Array, ...]
    ) -> Any:
        scores = chunk_scores(options, used, head, x, y)
        losses = w * function.of_tokens(scores, data, closure)
        losses = _only(is_token, nan_where(jnp.isnan(scores.log_prob), losses))
        return total + jnp.sum(losses), scores if return_scores else None

    chunks, zero = _chunks_of(options, hidden, rows, mask), jnp.zeros((), weights.dtype)
    return chunks.run(chunk, (hidden, targets, weights, data), zero)


def _device_total_forward(
    options: Options, function: TokenFunction, return_scores: bool, *operands: Any
) -> Any:
    both = functools.partial(_total_and_gradients, options, function, return_scores)
    types = tuple(_without_outer_axes(options, device_type(operand)) for operand in operands[:6])
    return without_devices(both, (device_type(operands[3]), types), *operands)


def _total_and_gradients(
    options: Options, function: TokenFunction, return_scores: bool, *operands: Any
) -> Any:
    hidden, rows, bias, weights, data, closure, targets, mask = operands
    head, used = make_head(options, rows, bias), function.used(return_scores)

    def chunk(
        sums: Any, is_token: Array | None, x: Array, y: Array, w: Array, data: tuple[Array, ...]
    ) -> Any:
        total, d_closure, d_head = sums

        def of_tokens(scores: TokenScores) -> Any:
            losses, pullback = eqx.filter_vjp(function.of_tokens, scores, data, closure)
            # a target out of range makes the loss NaN, even if `function` does not look at it
            unknown = jnp.isnan(scores.log_prob)
            d_scores, *others = pullback(_only(is_token, nan_where(unknown, w)))
            return d_scores, (scores, nan_where(unknown, w * losses), losses, *others)

        d_x, d_head, (scores, weighted, losses, d_data, new) = chunk_gradients(
            options, used, head, x, y, of_tokens, d_head
        )
        total = total + jnp.sum(_only(is_token, weighted))
        d_closure = jax.tree.map(lambda a, b: a + b.astype(a.dtype), d_closure, new)
        return (total, d_closure, d_head), (
            d_x,
            losses,
            d_data,
            scores if return_scores else None,
        )

    floats = eqx.filter(closure, eqx.is_inexact_array)
    d_closure = jax.tree.map(_wide_zeros, floats)
    sums = jnp.zeros((), weights.dtype), d_closure, _zeros_like(head, options.wide)
    chunks = _chunks_of(options, hidden, rows, mask)
    sums, results = chunks.run(chunk, (hidden, targets, weights, data), sums)
    (total, d_closure, d_head), (d_hidden, losses, d_data, scores) = sums, results
    d_closure = jax.tree.map(lambda d, a: d.astype(a.dtype), d_closure, floats)
    gradients = d_hidden, *d_head, losses, d_data, d_closure
    return (total, scores), gradients


def _device_total_backward(
    options: Options, function: TokenFunction, return_scores: bool, gradients: Any, cotangents: Any
) -> Any:
    cotangent, _ = cotangents  # the scores have no gradient

    def scale(cotangent: Array, gradients: Any) -> Any:
        def scale_one(gradient: Array) -> Array:
            dtype = at_least_float32(gradient.dtype)
            product = cotangent.astype(dtype) * gradient.astype(dtype)
            return product.astype(gradient.dtype)

        return jax.tree.map(scale_one, gradients)

    head = tuple(_with_outer_axes(options, device_type(gradient)) for gradient in gradients[:3])
    tokens = device_type(cotangent)
    types = *head, tokens, tokens, tokens
    return *without_devices(scale, types, cotangent, gradients), None, None


device_total.defvjp(_device_total_forward, _device_total_backward)


# JAX cannot save what differs along the axes of two `jax.shard_map`, one inside the other, from the
# forward pass for the backward pass. So the types of what is saved do not name the outer axes.


def _without_outer_axes(options: Options, kind: DeviceType) -> DeviceType:
    return kind._replace(varying=kind.varying - options.outer_axes)


def _with_outer_axes(options: Options, kind: DeviceType) -> DeviceType:
    return kind._replace(varying=kind.varying | options.outer_axes)


def _save(options: Options, operand: Any) -> Any:
    kind = _without_outer_axes(options, device_type(operand))
    return without_devices(lambda operand: operand, kind, operand)


def _wide_zeros(array: Array) -> Array:
    return jnp.zeros(array.shape, at_least_float32(array.dtype))


def _only(is_token: Array | None, array: Array) -> Array:
    """The array, with zeros in places that have no token."""
    return array if is_token is None else jnp.where(is_token, array, 0.0)
