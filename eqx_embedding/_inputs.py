"""What callers give, turned into what the other modules take.

Host data (Python numbers and NumPy arrays) are checked before JAX narrows them to 32 bits.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int


Whole = int | np.integer
Real = float | int | np.floating | np.integer


# Numbers and dtypes


def as_int(number: Whole) -> int:
    return operator.index(number)


def as_real(number: Real | None) -> Any:
    """A Python number: one of NumPy has a dtype, which would take part in JAX's promotion."""
    return number.item() if isinstance(number, np.generic) else number


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype to compute and to sum in: float32 for anything narrower."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def as_float_dtype(what: str, name: str, dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:  # does not say which argument it is about
        raise ValueError(
            f"{what} are floats, got {name}={dtype!r}, which is not a dtype."
        ) from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{what} are floats, got {name}={found.name}.")
    return found


# Arrays


def as_array(name: str, array: Any) -> Array | np.ndarray:
    """Host data as a NumPy array, which nothing has narrowed yet; a JAX array as it is."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} are a masked array, whose mask would be lost: fill it, by `.filled(...)`."
        )
    return array if isinstance(array, jax.Array) else np.asarray(array)


def as_whole_array(name: str, array: Any) -> Array | np.ndarray:
    """Like `as_array`, but a 64-bit JAX array that is used outside of JAX's 64-bit mode becomes a
    NumPy array: JAX would narrow it to compare it."""
    array = as_array(name, array)
    if isinstance(array, np.ndarray) or array.dtype == jax.dtypes.canonicalize_dtype(array.dtype):
        return array
    if isinstance(array, Tracer):
        raise TypeError(
            f"{name} of {array.dtype.name} are traced outside of JAX's 64-bit mode, which would "
            "narrow them: turn it on here, too, or convert them before."
        )
    return np.asarray(array)


def nan_where(condition: Bool[Array, "..."], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """`array`, with NaN under the condition.

    No NaN is made elsewhere: `jax_debug_nans`, which looks for the first, would take a constant
    for the fault that it is after.
    """
    nan = jnp.sqrt(jnp.where(condition, -1.0, 1.0).astype(array.dtype))
    return jnp.where(condition, nan, array)


# Tokens


def tokens_in_range(
    name: str, tokens: ArrayLike, vocab_size: int
) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Integer tokens of at least 32 bits, and which of them satisfy `0 <= token < vocab_size`.

    Host data stays in NumPy: a 64-bit id must not wrap onto the row of another token.
    """
    tokens = as_whole_array(name, tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype.name}.")
    if tokens.dtype.itemsize < 4:  # the size of the vocabulary need not fit an int8
        tokens = tokens.astype(np.int32)
    in_range = (tokens >= 0) & (tokens < vocab_size)
    # NumPy compares an array without axes to a scalar that is not an array
    return tokens, in_range if isinstance(in_range, jax.Array) else np.asarray(in_range)


class Tokens(NamedTuple):
    """The targets of a batch, and how much each counts."""

    targets: Int[Array, "*batch"]  # int32; `vocab_size` stands for any out of range
    weights: Float[Array, "*batch"]
    mask: Bool[Array, "*batch"] | None  # which tokens count; `None` if all do


def prepare_tokens(
    targets: ArrayLike,
    weights: ArrayLike | None,
    ignore_index: Whole | None,
    vocab_size: int,
    dtype: DTypeLike,
    normalize: bool,
    mesh_axes: tuple[str, ...],
    place: Callable[[Array], Array],
) -> Tokens:
    """Targets and weights as the losses take them; weights of `dtype`.

    If `normalize`, the weights are divided by their sum, also over the manual `mesh_axes`. `place`
    splits an array over the mesh as the batch is split.
    """
    targets, in_range = tokens_in_range("targets", targets, vocab_size)
    all_count = weights is None and ignore_index is None
    weights = jnp.ones(targets.shape, dtype) if weights is None else _as_weights(weights)
    # before anything narrows the weights
    mask = None if all_count else place(jnp.asarray(weights.astype(bool)))
    if mask is not None and ignore_index is not None and _fits(ignore_index, targets.dtype):
        counts = targets != as_int(ignore_index)
        mask = mask & place(jnp.asarray(counts))
        if isinstance(counts, np.ndarray) and isinstance(weights, np.ndarray):
            weights = np.where(counts, weights, np.zeros((), weights.dtype))
        else:
            weights = place(jnp.asarray(weights.astype(dtype)))
            weights = jnp.where(place(jnp.asarray(counts)), weights, 0)
    weights = place(_narrow(weights, dtype, normalize, mesh_axes))
    if normalize:
        # A sum of zero does not say that no token counts: 1 and -1
        counted = jnp.asarray(weights.size) if mask is None else jnp.sum(mask)
        counted, total = lax.psum((counted, jnp.sum(weights)), mesh_axes)
        weights = weights / jnp.where(counted > 0, total, 1)
    xp = np if isinstance(targets, np.ndarray) else jnp
    targets = place(jnp.asarray(xp.where(in_range, targets, vocab_size).astype(np.int32)))
    return Tokens(targets, weights, mask)


def _fits(number: Whole, dtype: np.dtype) -> bool:
    return np.iinfo(dtype).min <= as_int(number) <= np.iinfo(dtype).max


def _as_weights(weights: ArrayLike) -> Array | np.ndarray:
    weights = as_whole_array("weights", weights)
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in kinds):
        raise TypeError(f"weights must be bool, integer or floating, got {weights.dtype.name}.")
    return weights


def _narrow(
    weights: Array | np.ndarray, dtype: DTypeLike, scale: bool, mesh_axes: tuple[str, ...]
) -> Array:
    """Weights of `dtype`. To `scale` them makes the largest 1, so that no sum overflows."""
    xp = np if isinstance(weights, np.ndarray) else jnp
    weights = weights.astype(np.float64 if xp is np else dtype)
    if scale:
        largest = xp.max(xp.abs(weights), initial=0)
        if xp is jnp:
            largest = lax.stop_gradient(largest)
            largest = lax.pmax(largest, mesh_axes) if mesh_axes else largest
        # in two steps, for the reciprocal of the largest may be too small for XLA
        factor = 1 / xp.sqrt(xp.where((largest > 0) & (largest < math.inf), largest, 1))
        weights = weights * factor * factor
    return jnp.asarray(weights.astype(dtype))


def as_data(position: int, array: ArrayLike, batch: tuple[int, ...]) -> Array:
    """One of the `data` of a token loss, with an axis of a batch for each of its axes."""
    whole = as_array(f"data[{position}]", array)
    if whole.shape[: len(batch)] != batch:
        raise ValueError(
            f"data must begin with the shape {batch} of hidden without its embedding axes, got "
            f"data[{position}] of shape {whole.shape}."
        )
    narrow = jnp.asarray(whole)
    if isinstance(whole, np.ndarray) and np.issubdtype(whole.dtype, np.integer):
        limits = np.iinfo(narrow.dtype)
        if whole.size > 0 and not limits.min <= whole.min() <= whole.max() <= limits.max:
            raise ValueError(
                f"data[{position}] of {whole.dtype.name} does not fit {narrow.dtype.name}, to "
                "which JAX would narrow it: turn on its 64-bit mode, or convert the data before."
            )
    return narrow
