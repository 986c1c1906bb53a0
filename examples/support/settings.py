"""Checks of settings, with an error that the command line shows."""

import math
from typing import Any


Number = int | float


def require_finite(*numbers: float, what: str = "the loss") -> None:
    """Stops the program with one line unless all are finite: what follows would be worthless."""
    if not all(map(math.isfinite, numbers)):
        raise SystemExit(f"{what} is not finite: try a lower --learning-rate.")


def require(
    config: Any,
    *names: str,
    above: Number = -math.inf,
    at_least: Number = -math.inf,
    below: Number = math.inf,
    at_most: Number = math.inf,
) -> None:
    """Raises a `ValueError`, of which tyro makes a message, unless all fields are in a range.

    Infinity and NaN never are, nor are integers that 32 bits cannot hold, unless `below` is given.
    """
    for name in names:
        value = getattr(config, name)
        too_large = isinstance(value, int) and value >= 2**31 and below == math.inf
        if too_large or not (above < value < below and at_least <= value <= at_most):
            top = 2**31 if too_large else below
            limits = {"above": above, "at least": at_least, "below": top, "at most": at_most}
            limits = [f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit)]
            limits += [] if math.isfinite(value) else ["finite"]
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be {' and '.join(limits)}, got {value}.")
