"""The weighted sum of the losses of all tokens of a device, and its gradients.

A sum has one cotangent. So the gradients are made in the forward pass, a chunk of tokens after the
other, and the backward pass scales them: 6NVD operations, 2NVD each for the logits, the gradient
of `hidden`, and that of the rows.

Shapes: `hidden` is (N, D), `rows` (V, D), `bias` (V,) or `None`; `weights`, `targets` and `mask`,
which says what tokens count, are (N,); `mask` may be `None`. Floats are of `Options.wide`.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._inputs import at_least_float32
from ._chunks import only
from ._devices import device_type, without_devices
from ._function import TokenFunction
from ._gradients import chunk_gradients, zeros_like
from ._logits import chunks_of, make_head, Options
from ._scores import chunk_scores, nan_if_unknown, TokenScores


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
        losses = only(is_token, nan_if_unknown(scores, losses))
        return total + jnp.sum(losses), scores if return_scores else None

    chunks, zero = chunks_of(options, hidden, rows, mask), jnp.zeros((), weights.dtype)
    return chunks.run(chunk, (hidden, targets, weights, data), zero)


def _device_total_forward(
    options: Options, function: TokenFunction, return_scores: bool, *operands: Any
) -> Any:
    both = functools.partial(_total_and_gradients, options, function, return_scores)
    types = tuple(device_type(operand).outside(options.outer_axes) for operand in operands[:6])
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
            d_scores, *others = pullback(only(is_token, nan_if_unknown(scores, w)))
            return d_scores, (scores, nan_if_unknown(scores, w * losses), losses, *others)

        d_x, d_head, (scores, weighted, losses, d_data, new) = chunk_gradients(
            options, used, head, x, y, of_tokens, d_head
        )
        total = total + jnp.sum(only(is_token, weighted))
        d_closure = jax.tree.map(jnp.add, d_closure, new)
        return (total, d_closure, d_head), (
            d_x,
            losses,
            d_data,
            scores if return_scores else None,
        )

    d_closure = jax.tree.map(jnp.zeros_like, eqx.filter(closure, eqx.is_inexact_array))
    sums = jnp.zeros((), weights.dtype), d_closure, zeros_like(head, options.wide)
    chunks = chunks_of(options, hidden, rows, mask)
    sums, results = chunks.run(chunk, (hidden, targets, weights, data), sums)
    (total, d_closure, d_head), (d_hidden, losses, d_data, scores) = sums, results
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

    head = tuple(device_type(gradient).inside(options.outer_axes) for gradient in gradients[:3])
    tokens = device_type(cotangent)
    types = *head, tokens, tokens, tokens
    return *without_devices(scale, types, cotangent, gradients), None, None


device_total.defvjp(_device_total_forward, _device_total_backward)
