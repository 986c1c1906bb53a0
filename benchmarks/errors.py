"""Errors of a loss and its gradients, against float64."""

import jax
import jax.numpy as jnp
import numpy as np


def exact(hidden, rows, targets):
    """Cross-entropy and its gradients in NumPy and float64, some tokens at a time."""
    hidden, rows = (np.asarray(a, np.float64) for a in (hidden, rows))
    targets, N = np.asarray(targets), len(hidden)
    loss, for_hidden, for_rows = 0.0, np.zeros_like(hidden), np.zeros_like(rows)
    for start in range(0, N, 256):
        x, y = hidden[start : start + 256], targets[start : start + 256]
        z = x @ rows.T
        maximum = z.max(1, keepdims=True)
        e = np.exp(z - maximum)
        total = e.sum(1, keepdims=True)
        here = np.arange(len(y)), y
        loss += (np.log(total) + maximum)[:, 0].sum() - z[here].sum()
        g = e / total
        g[here] -= 1
        for_hidden[start : start + 256] = g @ rows / N
        for_rows += g.T @ x / N
    return loss / N, (for_hidden, for_rows)


def in_float64(loss, operands):
    """A JAX loss and its gradients, computed from the operands in float64."""

    def widen(array):
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        return np.asarray(array, np.float64 if floating else array.dtype)

    with jax.enable_x64(True):
        result = jax.jit(jax.value_and_grad(loss, (0, 1)))(*map(widen, operands))
        return jax.tree.map(np.asarray, result)


def largest_error(result, expected):
    """The largest difference, divided by the largest number expected in the same array."""

    def error(one, other):
        one = np.asarray(one.astype(jnp.float32) if isinstance(one, jax.Array) else one)
        return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))

    # not Python's max, which can ignore a NaN
    errors = map(error, jax.tree.leaves(result), jax.tree.leaves(expected))
    return float(np.max(list(errors)))
