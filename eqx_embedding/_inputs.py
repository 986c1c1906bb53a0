"""Checks and converts arguments: numbers, dtypes, arrays, tokens and weights.

Outside of its 64-bit mode, JAX narrows numbers to 32 bits. Host data (Python numbers and NumPy
arrays) is checked before that happens.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, UInt32


Whole = int | np.integer
Real = float | int | np.floating | np.integer


def as_int(number: Whole) -> int:
    # Sums of NumPy integers overflow
    return operator.index(number)


def as_named_int(name: str, number: Any) -> int:
    """Like `as_int`, but refuses truth values: `ignore_index=True` would be the token 1."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{name} must be an integer, got {number!r:.80}.")
    return as_int(number)


def as_count(name: str, number: Any) -> int:
    count = as_named_int(name, number)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")
    return count


def as_real(number: Real | None) -> Any:
    """A NumPy number as a Python number, whose dtype JAX's promotion ignores."""
    return number.item() if isinstance(number, np.generic) else number


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype, or float32 if it is narrower."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def as_float_dtype(what: str, name: str, dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:  # which does not name the argument
        raise ValueError(
            f"{what} must be floating, got {name}={dtype!r}, which is not a dtype."
        ) from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{what} must be floating, got {name}={found.name}.")
    if not found.isnative:
        raise ValueError(
            f"{what} must be in the byte order of this machine, got {name}={found.str!r}: use "
            f"{name}='{found.name}'."
        )
    return found


def as_array(name: str, array: Any) -> Array | np.ndarray:
    """Host data as a NumPy array in native byte order, not narrowed; a JAX array unchanged."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array: its mask would be lost. Use `.filled(...)` first."
        )
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_byte_order(name: str, array: Any) -> None:
    """Raises a `TypeError` for an array that JAX cannot take, not even as an argument of `jit`."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        raise TypeError(
            f"{name} must be in the byte order of this machine, got {array.dtype.str!r}: use "
            "`array.astype(array.dtype.newbyteorder('='))`."
        )


def as_whole_array(name: str, array: Any) -> Array | np.ndarray:
    """Like `as_array`, but a 64-bit JAX array outside of the 64-bit mode becomes a NumPy array.

    JAX would narrow such an array before it compares it.
    """
    array = as_array(name, array)
    if isinstance(array, np.ndarray) or array.dtype == jax.dtypes.canonicalize_dtype(array.dtype):
        return array
    if isinstance(array, Tracer):
        raise TypeError(
            f"{name} of {array.dtype.name} are traced outside of JAX's 64-bit mode, where JAX "
            "narrows them to 32 bits: turn the mode on here as well, or convert them first."
        )
    return np.asarray(array)


def batch_shape(hidden: Any, rows: Any) -> tuple[Any, ...]:
    """`hidden` is `*batch *embedding`, and `rows` are `rows *embedding`."""
    return hidden.shape[: hidden.ndim - (rows.ndim - 1)]


def nan_where(condition: Bool[Array, "..."], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array, with NaN where the condition holds.

    The NaN is computed, because `jax_debug_nans` would report a constant NaN even if no element
    needs it.
    """
    # Not `where`, whose result has no mesh in JAX 0.12 if none is set
    nan = jnp.sqrt(1 - 2 * condition.astype(array.dtype))
    return jnp.where(condition, nan, array)


def tokens_in_range(
    name: str, tokens: ArrayLike, vocab_size: int
) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Integer tokens of at least 32 bits, and which of them satisfy `0 <= token < vocab_size`.

    Host data stays in NumPy: a narrowed 64-bit id could become the id of another token.
    """
    tokens = as_whole_array(name, tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype.name}.")
    if tokens.dtype.itemsize < 4:  # `vocab_size` may not fit into an int8
        tokens = tokens.astype(np.int32)
    in_range = (tokens >= 0) & (tokens < vocab_size)
    # For an array without axes, NumPy's comparison returns a scalar
    return tokens, in_range if isinstance(in_range, jax.Array) else np.asarray(in_range)


Reshard = Callable[[Array], Array]  # splits an array over the mesh as the batch is split


# A target that counts for nothing
NO_TARGET = np.int32(-1)


def prepare_targets(
    targets: ArrayLike,
    target_weights: ArrayLike | None,
    ignore_index: Whole | None,
    vocab_size: int,
    dtype: DTypeLike,
    reshard: Reshard,
) -> tuple[Int[Array, "..."], Float[Array, "*batch k"] | None, Any]:
    """Checks targets and their weights, which get the dtype `dtype`, and applies `ignore_index`.

    Returns the targets in int32, `vocab_size` if out of range, or `NO_TARGET`; their weights;
    and which tokens have a target, `None` if all do.
    """
    targets, in_range = tokens_in_range("targets", targets, vocab_size)
    xp = np if isinstance(targets, np.ndarray) else jnp
    counts = None
    # JAX cannot compare with a number that does not fit the dtype
    index = None if ignore_index is None else as_named_int("ignore_index", ignore_index)
    if index is not None and np.iinfo(targets.dtype).min <= index <= np.iinfo(targets.dtype).max:
        counts = targets != targets.dtype.type(index)
    targets = reshard(jnp.asarray(xp.where(in_range, targets, vocab_size).astype(np.int32)))
    if target_weights is None:
        return targets, None, counts
    target_weights = _as_weights("target_weights", target_weights)
    # Before narrowing, which makes small weights zero
    has_weight = reshard(jnp.asarray(target_weights.astype(bool)))
    if counts is not None:
        has_weight = has_weight & reshard(jnp.asarray(counts))
        counts = xp.any(counts, axis=-1)
    target_weights = reshard(_narrow_weights(target_weights, dtype, False, ()))
    targets = jnp.where(has_weight, targets, NO_TARGET)
    return targets, jnp.where(has_weight, target_weights, 0), counts


def prepare_weights(
    weights: ArrayLike | None,
    counts: Any,
    batch: tuple[Any, ...],
    dtype: DTypeLike,
    normalize: bool,
    mesh_axes: tuple[str, ...],
    reshard: Reshard,
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"] | None]:
    """The weights, checked and in the dtype `dtype`; and which tokens count, `None` if all do.

    The weights are zero unless `counts`. With `normalize`, they are divided by their sum, also over
    the manual `mesh_axes`.
    """
    mask = None
    if weights is None:
        weights = jnp.ones(batch, dtype)
    else:
        weights = _as_weights("weights", weights)
        # Before narrowing, which makes small weights zero
        mask = reshard(jnp.asarray(weights.astype(bool)))
    if counts is not None:
        weights = _zero_unless(counts, weights, dtype, reshard)
        counts = reshard(jnp.asarray(counts))
        mask = counts if mask is None else mask & counts
    weights = reshard(_narrow_weights(weights, dtype, normalize, mesh_axes))
    if normalize:
        weights = _normalize_weights(weights, mask, mesh_axes)
    return weights, mask


def _as_weights(name: str, weights: ArrayLike) -> Array | np.ndarray:
    weights = as_whole_array(name, weights)
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be bool, integer or floating, got {weights.dtype.name}.")
    return weights


def _zero_unless(
    counts: Any, weights: Array | np.ndarray, dtype: DTypeLike, reshard: Reshard
) -> Array | np.ndarray:
    """The weights, with zero for tokens that do not count. Host data stays in NumPy."""
    if isinstance(counts, np.ndarray) and isinstance(weights, np.ndarray):
        return np.where(counts, weights, np.zeros((), weights.dtype))
    weights = reshard(_widen_weights(jnp.asarray(weights), dtype))
    return jnp.where(reshard(jnp.asarray(counts)), weights, 0)


def _widen_weights(weights: Array, dtype: DTypeLike) -> Array:
    """In `dtype`, but for those in float64, which could overflow before they are scaled."""
    return weights.astype(weights.dtype if weights.dtype == np.float64 else dtype)


def _narrow_weights(
    weights: Array | np.ndarray, dtype: DTypeLike, scale: bool, mesh_axes: tuple[str, ...]
) -> Array:
    """The weights in `dtype`. With `scale`, the largest becomes 1, so that no sum overflows."""
    if isinstance(weights, np.ndarray):
        xp, weights = np, weights.astype(np.float64)
    else:
        xp, weights = jnp, _widen_weights(weights, dtype)
    if scale:
        largest = xp.max(xp.abs(weights), initial=0)
        if xp is jnp:
            largest = lax.stop_gradient(largest)
            largest = lax.pmax(largest, mesh_axes) if mesh_axes else largest
        # Two factors, because XLA may flush the reciprocal of the largest to zero
        factor = 1 / xp.sqrt(xp.where((largest > 0) & (largest < math.inf), largest, 1))
        weights = weights * factor * factor
    return jnp.asarray(weights.astype(dtype))


def _normalize_weights(
    weights: Array, mask: Array | None, mesh_axes: tuple[str, ...]
) -> Float[Array, "*batch"]:
    """The weights divided by their sum; zeros if no token counts."""
    counted = jnp.asarray(weights.size) if mask is None else jnp.sum(mask)
    counted, total = lax.psum((counted, jnp.sum(weights)), mesh_axes)
    # Do not test `total` instead: it is also zero for the weights 1 and -1
    return weights / jnp.where(counted > 0, total, 1)


def as_data(position: int, array: ArrayLike, batch: tuple[int, ...]) -> Array:
    """Checks an array in `data` of a token loss, whose shape begins with that of the batch."""
    whole = as_array(f"data[{position}]", array)
    if whole.shape[: len(batch)] != batch:
        raise ValueError(
            f"data must begin with the shape {batch} of hidden without its embedding axes, got "
            f"data[{position}] of shape {whole.shape}."
        )
    if isinstance(whole, np.ndarray) and whole.dtype.kind in "OSU":
        raise TypeError(f"data[{position}] must be an array of numbers, got {array!r:.80}.")
    narrow = jnp.asarray(whole)
    if isinstance(whole, np.ndarray) and np.issubdtype(whole.dtype, np.integer):
        limits = np.iinfo(narrow.dtype)
        if whole.size > 0 and not limits.min <= whole.min() <= whole.max() <= limits.max:
            raise ValueError(
                f"data[{position}] of {whole.dtype.name} does not fit {narrow.dtype.name}, to "
                "which JAX would narrow it: turn on its 64-bit mode, or convert the data first."
            )
    return narrow


def keys_of_tokens(
    key: PRNGKeyArray, batch: tuple[Any, ...], mesh_axes: tuple[str, ...]
) -> UInt32[Array, "... 2"]:
    """A key for each token, from its place in the batch, which the manual `mesh_axes` split.

    They are keys of Threefry, whatever kind the `key` is of: others draw numbers that depend on
    how many are drawn together.
    """
    count = math.prod(batch)
    start = lax.axis_index(mesh_axes).astype("uint32") * count if mesh_axes else 0
    # Not bits: under `jax.vmap`, keys of kind rbg draw them from the key of the first example alone
    words = jax.random.key_data(jax.random.fold_in(key, 0))[:2]
    whole = jax.random.wrap_key_data(words, impl="threefry2x32")
    places = start + jnp.arange(count, dtype="uint32")
    keys = jax.vmap(functools.partial(jax.random.fold_in, whole))(places)
    return jax.random.key_data(keys).reshape(*batch, 2)


def is_seen(array: Array) -> bool:
    """Whether this process knows the numbers of an array while JAX traces a program."""
    return not isinstance(array, Tracer) and array.is_fully_addressable


# Above this temperature, differences between logits are lost to rounding.
HOTTEST = 1e30


def as_temperature(
    temperature: ArrayLike, batch: tuple[Any, ...], dtype: DTypeLike
) -> Float[Array, "*batch"]:
    """Checks temperatures, as far as this process can see them, and cuts them to `HOTTEST`."""
    temperature = as_array("temperature", temperature)
    if not any(jnp.issubdtype(temperature.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(f"temperature must be integer or floating, got {temperature.dtype.name}.")
    if temperature.shape not in ((), batch):
        raise ValueError(
            f"temperature must be a number or have the shape {batch} of hidden without its "
            f"embedding axes, got {temperature.shape}."
        )
    if isinstance(temperature, np.ndarray) or is_seen(temperature):
        values = np.asarray(temperature, np.float64)
        wrong = values[~((values >= 0) & (values < np.inf))]
        if wrong.size > 0:
            raise ValueError(f"temperature must be at least 0 and finite, got {wrong[0]}.")
        temperature = np.minimum(values, HOTTEST)
    elif temperature.dtype == np.float64:  # float32 would round it to infinity or zero
        valid = (temperature >= 0) & (temperature < np.inf)
        temperature = jnp.where(valid, jnp.minimum(temperature, HOTTEST), -1.0)
    return jnp.broadcast_to(jnp.asarray(temperature.astype(dtype)), batch)
