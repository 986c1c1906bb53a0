"""What the rows of new tokens are."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from .._inputs import as_named_int, at_least_float32, Whole


# The covariance of new rows, as a part of that of the old ones. Hewitt (2021) takes the same part.
# `benchmarks/growth.py` measures what others do to a trained model.
COVARIANCE = 1e-5
# A new token starts a hundred times less likely than by the median bias.
BIAS = -math.log(100)


# By new token. A type checker would refuse a `dict[int, ...]` if keys were of `Whole`
Pieces = Mapping[Any, Sequence[Whole] | np.ndarray | Array]


class Means(NamedTuple):
    """New tokens whose rows are means of old ones."""

    places: Int[np.ndarray, " means"]  # among the new rows
    old_tokens: Int[np.ndarray, " pieces"]
    segments: Int[np.ndarray, " pieces"]  # the mean to which each old token belongs
    lengths: Int[np.ndarray, " means"]  # how many old tokens each mean has


def check_pieces(
    pieces: Pieces | None,
    old_tokens: int,
    tokens: int,
) -> Means | None:
    """Raises a `ValueError` unless each piece is an old token, and stands for a new one."""
    if not pieces:
        return None
    parts_of = {as_named_int("a key of pieces", token): _as_ints(pieces[token]) for token in pieces}
    for token, parts in parts_of.items():
        if not old_tokens <= token < tokens:
            raise ValueError(
                f"pieces must be given for new tokens, which are at least {old_tokens} and below "
                f"{tokens}, got {token}."
            )
        if not parts or not all(0 <= part < old_tokens for part in parts):
            raise ValueError(
                f"the pieces of a new token must be at least one of the {old_tokens} old tokens, "
                f"got {parts!r:.80} for {token}."
            )
    lengths = np.asarray([len(parts) for parts in parts_of.values()], np.int32)
    return Means(
        np.asarray([token - old_tokens for token in parts_of], np.int32),
        np.asarray([part for parts in parts_of.values() for part in parts], np.int32),
        np.repeat(np.arange(len(parts_of), dtype=np.int32), lengths),
        lengths,
    )


def _as_ints(parts: Sequence[Whole] | np.ndarray | Array) -> list[int]:
    # An element of a JAX array is an array
    parts = np.asarray(parts) if isinstance(parts, jax.Array) else parts
    return [as_named_int("pieces", part) for part in parts]


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_rows(
    count: int,
    is_bias: bool,
    rows: Shaped[Array, "V ..."],
    key: PRNGKeyArray | None,
    means: Means | None,
) -> Shaped[Array, "M ..."]:
    """The rows or the biases of `count` new tokens: zero, but for means, unless there is a key."""
    if not jnp.issubdtype(rows.dtype, jnp.floating):  # such as a mask
        return jnp.zeros((count, *rows.shape[1:]), rows.dtype)
    wide = rows.reshape(len(rows), -1).astype(at_least_float32(rows.dtype))
    new = jnp.zeros((count, wide.shape[1]), wide.dtype)
    if key is not None:
        new = new + _low_bias(wide) if is_bias else _draw_near_mean(count, key, wide)
    if means is not None:
        sums = jax.ops.segment_sum(wide[means.old_tokens], means.segments, len(means.lengths))
        new = new.at[means.places].set(sums / means.lengths[:, None].astype(wide.dtype))
    return new.astype(rows.dtype).reshape(count, *rows.shape[1:])


def _low_bias(bias: Float[Array, "V 1"]) -> Float[Array, ""]:
    """Below the median, which, unlike the mean, a few tokens that are banned do not move."""
    return jnp.nanmedian(jnp.where(jnp.isfinite(bias), bias, jnp.nan)) + BIAS


def _draw_near_mean(
    count: int, key: PRNGKeyArray, rows: Float[Array, "V D"]
) -> Float[Array, "M D"]:
    """The mean of the finite rows, plus noise with a part of their covariance.

    The noise of each new row is a uniform number of variance 1 times the difference between one
    row, at random, and the mean. So it has the covariance of the rows, which is never computed.
    """
    finite = jnp.all(jnp.isfinite(rows), axis=1)
    # Divided before the sum, which could overflow. Without any finite row it is NaN.
    parts = jnp.where(finite[:, None], rows, 0) / jnp.sum(finite, dtype=rows.dtype)
    mean = jnp.sum(parts, axis=0)

    def draw(i: Array) -> Array:
        # The first two words of a key that was folded in are random numbers themselves
        index, size, *_ = jax.random.key_data(jax.random.fold_in(key, i))
        row = index % len(rows)
        # In float32, so that the numbers do not depend on the dtype of the table
        size = math.sqrt(3 * COVARIANCE) * (size.astype(jnp.float32) / 2.0**31 - 1.0)
        return mean + jnp.where(finite[row], size.astype(rows.dtype) * (rows[row] - mean), 0)

    return jax.vmap(draw)(jnp.arange(count))
