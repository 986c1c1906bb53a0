"""The weighted losses of the tokens of a device, from their scores, and their gradients.

For losses that stay apart. Shapes are `*batch ...`, however many axes the batch has.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._devices import device_type, load, save, Saved, without_devices
from ._chunks import expand, only
from ._function import TokenFunction
from ._scores import nan_if_unknown
from ._token_scores import Scores


# What `fn` gets in place of masked tokens, if all are masked: scores, or a divergence, which is the
# first of these. The loss of that is thrown away.
PLAIN_SCORES = -0.5, -1.0, 0.5, 1.0, 0.0
PLAIN_DATA = 0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def device_losses(
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    outer_axes: frozenset[str],
    scores: Scores,
    weights: Array,
    data: tuple[Array, ...],
    closure: tuple[Array, ...],
    mask: Array | None,
) -> Array:
    """The weight of each token times its loss, `*batch`; zero where the mask leaves it out.

    `of_example` says which arrays of the closure have the first axis of the batch, too; `None` if
    none has. `outer_axes` are those of a `jax.shard_map` around that of this call.
    """
    return _all_losses(function, of_example, outer_axes, scores, weights, data, closure, mask)


def _all_losses(
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    outer_axes: frozenset[str],
    *operands: Any,
) -> Array:
    losses = functools.partial(_losses, function, of_example)
    return without_devices(losses, outer_axes, device_type(operands), *operands)


def _device_losses_forward(
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    outer_axes: frozenset[str],
    *operands: Any,
) -> Any:
    losses = _all_losses(function, of_example, outer_axes, *operands)
    return losses, save(outer_axes, operands)


def _device_losses_backward(
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    outer_axes: frozenset[str],
    saved: Saved,
    cotangent: Array,
) -> Any:
    def pull_back(cotangent: Array, *operands: Any) -> Any:
        _, pullback = eqx.filter_vjp(functools.partial(_losses, function, of_example), *operands)
        return pullback(cotangent)

    types, operands = load(saved)
    return without_devices(pull_back, outer_axes, tuple(types), cotangent, *operands)


device_losses.defvjp(_device_losses_forward, _device_losses_backward)


def _losses(
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    scores: Scores,
    weights: Array,
    data: tuple[Array, ...],
    closure: tuple[Array, ...],
    mask: Array | None,
) -> Array:
    if of_example is not None:
        axes = tuple(0 if mapped else None for mapped in of_example)
        each = functools.partial(_losses, function, None)
        return jax.vmap(each, (0, 0, 0, axes, 0))(scores, weights, data, closure, mask)
    of_tokens = function
    for _ in range(weights.ndim):
        of_tokens = jax.vmap(of_tokens, in_axes=(0, 0, None))
    # What the mask leaves out must not reach the gradient of `closure`: NaN times zero is NaN.
    counted = functools.partial(_repeat_counted, mask)
    numbers = type(scores)(*map(counted, scores, PLAIN_SCORES))
    data = tuple(counted(array, PLAIN_DATA) for array in data)
    losses = only(mask, of_tokens(numbers, data, _cut_if_none(mask, closure)))
    # The NaN is added without a gradient, so that those of the losses stay as they are.
    nan = jax.lax.stop_gradient(nan_if_unknown(scores, jnp.zeros_like(losses)))
    return only(mask, weights * losses + nan)


def _cut_if_none(mask: Array | None, closure: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays, without a gradient if no token counts."""

    def cut(array: Array) -> Array:
        if mask is None or not jnp.issubdtype(array.dtype, jnp.inexact):
            return array
        return jnp.where(jnp.any(mask), array, jax.lax.stop_gradient(array))

    return tuple(map(cut, closure))


def _repeat_counted(mask: Array | None, array: Array, otherwise: float) -> Array:
    """The array, with a token that counts in the place of those that the mask leaves out."""
    if mask is None or mask.size == 0 or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return array  # of no tokens, or of keys, which are all valid
    one = array.reshape(-1, *array.shape[mask.ndim :])[jnp.argmax(mask)]
    value = jnp.where(jnp.any(mask), one, jnp.asarray(otherwise, array.dtype))
    return jnp.where(expand(mask, array), array, jax.lax.stop_gradient(value))
