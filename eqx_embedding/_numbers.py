"""Numbers that a caller may give as Python's or as numpy's, and that are Python's from then on.

A numpy number would have a dtype, which takes part in JAX's promotion, and no place in JSON.
"""

import operator

import numpy as np


Whole = int | np.integer
Real = float | int | np.floating | np.integer


def as_int(number: Whole) -> int:
    return operator.index(number)


def as_real(number: Real | None) -> float | int | None:
    return number.item() if isinstance(number, np.generic) else number
