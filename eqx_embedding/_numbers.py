"""Numbers that a caller may give as Python's or as numpy's, and that are Python's from then on.

A numpy number would have a dtype, which takes part in JAX's promotion, and no place in JSON.
"""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


Whole = int | np.integer
Real = float | int | np.floating | np.integer


def as_int(number: Whole) -> int:
    return operator.index(number)


def as_real(number: Real | None) -> Any:
    return number.item() if isinstance(number, np.generic) else number


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype to compute and to sum in: float32 for anything narrower."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def as_float_dtype(what: str, name: str, dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:  # does not say which argument it is of
        raise ValueError(f"{what} are floats, got {name}={dtype!r}, which is no dtype.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{what} are floats, got {name}={found.name}.")
    return found
