"""Which tokens are in range, said before JAX narrows them to 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike


def tokens_in_range(
    tokens: ArrayLike, vocab_size: int
) -> tuple[Array | np.ndarray, Array | np.ndarray]:
    """Integer tokens of at least 32 bits, and which of them satisfy `0 <= token < vocab_size`.

    Host data, numpy arrays and Python ints, stays in numpy: a 64-bit id must not wrap onto the
    row of another token.
    """
    if isinstance(tokens, int) and not isinstance(tokens, bool):
        tokens = np.int64(min(max(tokens, -1), vocab_size))  # a Python int has no size
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype.name}.")
    if tokens.dtype.itemsize < 4:  # the size of the vocabulary need not fit an int8
        tokens = tokens.astype(np.int32)
    in_range = (tokens >= 0) & (tokens < vocab_size)
    # numpy compares an array without axes to a scalar that is no array
    return tokens, in_range if isinstance(in_range, jax.Array) else np.asarray(in_range)
