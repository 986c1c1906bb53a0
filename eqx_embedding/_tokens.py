"""Which tokens are in range, said before JAX narrows them to 32 bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float


def as_array(name: str, array: Any) -> Array | np.ndarray:
    """Host data as a numpy array, which nothing has narrowed yet; an array of JAX as it is."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} are a masked array, whose mask would be lost: fill it, by `.filled(...)`."
        )
    return array if isinstance(array, jax.Array) else np.asarray(array)


def as_whole_array(name: str, array: Any) -> Array | np.ndarray:
    """The same, and an array of JAX as numpy if it was made in the 64-bit mode and is used outside
    of it, where JAX would narrow it to compare it."""
    array = as_array(name, array)
    if isinstance(array, np.ndarray) or array.dtype == jax.dtypes.canonicalize_dtype(array.dtype):
        return array
    if isinstance(array, Tracer):
        raise TypeError(
            f"{name} of {array.dtype.name} are traced outside of JAX's 64-bit mode, which would "
            "narrow them: turn it on here, too, or convert them before."
        )
    return np.asarray(array)


def tokens_in_range(
    name: str, tokens: ArrayLike, vocab_size: int
) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Integer tokens of at least 32 bits, and which of them satisfy `0 <= token < vocab_size`.

    Host data, numpy arrays and Python ints, stays in numpy: a 64-bit id must not wrap onto the
    row of another token.
    """
    if isinstance(tokens, int) and not isinstance(tokens, bool):
        tokens = np.int64(min(max(tokens, -1), vocab_size))  # a Python int has no size
    tokens = as_whole_array(name, tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype.name}.")
    if tokens.dtype.itemsize < 4:  # the size of the vocabulary need not fit an int8
        tokens = tokens.astype(np.int32)
    in_range = (tokens >= 0) & (tokens < vocab_size)
    # numpy compares an array without axes to a scalar that is no array
    return tokens, in_range if isinstance(in_range, jax.Array) else np.asarray(in_range)


def nan_where(condition: Bool[Array, "..."], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """`array`, with NaN under the condition.

    No NaN is made elsewhere: `jax_debug_nans`, which looks for the first, would take a constant
    for the fault that it is after.
    """
    nan = jnp.sqrt(jnp.where(condition, -1.0, 1.0).astype(array.dtype))
    return jnp.where(condition, nan, array)
