"""Numbers that a caller may give as Python's or as numpy's, and that are Python's from then on.

A numpy number would have a dtype, which takes part in JAX's promotion, and no place in JSON.
"""

import operator

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


Whole = int | np.integer
Real = float | int | np.floating | np.integer


def as_int(number: Whole) -> int:
    return operator.index(number)


def as_real(number: Real | None) -> float | int | None:
    return number.item() if isinstance(number, np.generic) else number


def as_float_dtype(what: str, name: str, dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:  # does not say which argument it is of
        raise ValueError(f"{what} are floats, got {name}={dtype!r}, which is no dtype.") from None
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"{what} are floats, got {name}={found.name}.")
    return found
