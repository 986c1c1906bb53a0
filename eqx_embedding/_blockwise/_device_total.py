"""The weighted sum of the losses of all tokens of a device, and its gradients.

A sum has one cotangent. So the gradients are made in the forward pass, a chunk of tokens after the
other, and the backward pass scales them: 6NVD operations, 2NVD each for the logits, the gradient
of `hidden`, and that of the rows.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jaxtyping import Array

from .._devices import device_type, load, save, Saved, without_devices
from .._inputs import at_least_float32
from ._chunks import only
from ._function import TokenFunction
from ._gradients import chunk_gradients, chunk_scores, whole_gradient, zero_gradient
from ._logits import chunks_of, make_head, on_device, Operands, Options
from ._scores import nan_if_unknown
from ._token_scores import differentiable, Scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def device_total(
    options: Options, function: TokenFunction, return_scores: bool, operands: Operands
) -> tuple[Array, Scores | None]:
    """The sum of the weighted losses of N tokens, and their scores."""
    total = functools.partial(_total, function, return_scores)
    return on_device(total, options.without_gradient, options.local.token_type, operands)


def _total(
    function: TokenFunction, return_scores: bool, options: Options, operands: Operands
) -> tuple[Array, Scores | None]:
    head, used = make_head(options, operands), function.used(return_scores)

    def chunk(
        total: Array,
        is_token: Array | None,
        x: Array,
        goals: Array,
        w: Array,
        data: tuple[Array, ...],
    ) -> Any:
        scores = chunk_scores(options, used, head, x, goals)
        losses = w * function.of_tokens(scores, data, operands.closure)
        losses = only(is_token, nan_if_unknown(scores, losses))
        return total + jnp.sum(losses), scores if return_scores else None

    tokens = operands.hidden, operands.goals, operands.weights, operands.data
    return chunks_of(options, operands).run(chunk, tokens, jnp.zeros((), options.wide))


def _device_total_forward(
    options: Options, function: TokenFunction, return_scores: bool, given: Operands
) -> Any:
    operands = custom_vjp_primal_tree_values(given)
    if not given.rows.perturbed:
        options = options.without_gradient  # of the table, which is frozen
    both = functools.partial(_total_and_gradients, function, return_scores)
    types = options.local.token_type, Operands(*map(device_type, operands))
    results, gradients = on_device(both, options, types, operands)
    return results, save(options.local.outer_axes, gradients)


def _total_and_gradients(
    function: TokenFunction, return_scores: bool, options: Options, operands: Operands
) -> tuple[tuple[Array, Scores | None], Operands]:
    head, used = make_head(options, operands), function.used(return_scores)

    def chunk(
        sums: Any, is_token: Array | None, x: Array, goals: Array, w: Array, data: tuple[Array, ...]
    ) -> Any:
        total, d_closure, d_head = sums

        def of_tokens(scores: Scores) -> Any:
            losses, pullback = eqx.filter_vjp(function.of_tokens, scores, data, operands.closure)
            d_scores, d_data, new = pullback(only(is_token, nan_if_unknown(scores, w)))
            # In a chunk of several devices, one may have no token, but data that it must not use.
            some = None if is_token is None else jnp.any(is_token)
            d_scores, new = jax.tree.map(functools.partial(only, some), (d_scores, new))
            return differentiable(d_scores), (scores, losses, d_data, new)

        d_x, d_head, (scores, losses, d_data, new) = chunk_gradients(
            options, used, head, x, goals, of_tokens, d_head
        )
        total = total + jnp.sum(only(is_token, nan_if_unknown(scores, w * losses)))
        d_closure = jax.tree.map(jnp.add, d_closure, new)
        of_chunk = d_x, losses, d_data, scores if return_scores else None
        return (total, d_closure, d_head), of_chunk

    tokens = operands.hidden, operands.goals, operands.weights, operands.data
    closure = eqx.filter(operands.closure, eqx.is_inexact_array)
    chunks = chunks_of(options, operands)
    zeros = jax.tree.map(jnp.zeros_like, closure), zero_gradient(options, head, chunks.count)
    sums, of_tokens = chunks.run(chunk, tokens, (jnp.zeros((), options.wide), *zeros))
    (total, d_closure, d_head), (d_hidden, d_weights, d_data, scores) = sums, of_tokens
    d_rows, d_bias = whole_gradient(options, d_head)
    gradients = Operands(d_hidden, d_rows, d_bias, None, None, d_weights, d_data, d_closure)
    return (total, scores), gradients


def _device_total_backward(
    options: Options,
    function: TokenFunction,
    return_scores: bool,
    saved: Saved,
    cotangents: tuple[Array, Scores | None],
) -> tuple[Operands]:
    cotangent, _ = cotangents  # the scores have no gradient

    def scale(cotangent: Array, gradients: Operands) -> Operands:
        def scale_one(gradient: Array) -> Array:
            dtype = at_least_float32(gradient.dtype)
            product = cotangent.astype(dtype) * gradient.astype(dtype)
            return product.astype(gradient.dtype)

        scaled = jax.tree.map(scale_one, gradients)
        return scaled._replace(rows=scaled.rows.astype(options.local.rows_dtype))

    types, gradients = (Operands(*each) for each in load(saved))
    return (without_devices(scale, options.local.outer_axes, types, cotangent, gradients),)


device_total.defvjp(_device_total_forward, _device_total_backward, symbolic_zeros=True)
