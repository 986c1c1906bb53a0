"""The divergence of a chunk of tokens from a teacher, and its gradient.

By the table of `_reference.py`. Both logits of the chunk are held; their probabilities are made
again where they are needed, for each tile of the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._devices import sum_over_devices
from ._chunks import over_tiles, tile
from ._logits import Head, Logits, Options, tile_logits
from ._scores import cool, find_statistics, Used
from ._token_scores import Divergence


# Takes cotangents, and returns a function of the first row of a tile, and of its logits.
PullBack = Callable[[tuple[Array, ...]], Callable[[Any, Array], Array]]


def compare(
    options: Options, head: Head, teacher_x: Float[Array, "C E"], logits: Logits
) -> tuple[Divergence, PullBack]:
    """The divergence of C tokens, and how to pull back cotangents of it."""
    assert options.comparison is not None and head.teacher is not None
    of_teacher, kind, T = options.of_teacher(), options.comparison.kind, options.temperature
    teacher_logits = tile_logits(of_teacher, head.teacher, teacher_x, 0, len(head.teacher.rows))
    student = _log_softmax(options, head, logits)
    teacher = _log_softmax(of_teacher, head.teacher, teacher_logits)
    z, y = logits.values, teacher_logits.values

    def add(start: Any, size: int, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        terms = _terms(kind, student(tile(z, start, size)), teacher(tile(y, start, size)))
        return sums[0] + jnp.sum(terms[0], axis=0), sums[1] + jnp.sum(terms[1], axis=0)

    zeros = jnp.zeros(z.shape[1], options.wide)
    sums = over_tiles(count_rows(head), options.plan.tile_size, add, (zeros, zeros))
    sums = sum_over_devices(options.local.vocabulary, jnp.stack(sums))

    def pull_back(cotangents: tuple[Array, ...]) -> Callable[[Any, Array], Array]:
        (cotangent,) = cotangents

        def gradient(start: Any, z: Array) -> Array:
            log_p, log_q = student(z), teacher(tile(y, start, len(z)))
            p = jnp.exp(log_p)
            if kind == "forward":
                d_z = p - jnp.exp(log_q)
            else:
                d_z = _terms(kind, log_p, log_q)[0] - p * sums[0][None]
            return (cotangent / T)[None] * d_z

        return gradient

    return Divergence(jnp.maximum(sums[0] + sums[1], 0.0)), pull_back


def count_rows(head: Head) -> int:
    """Of the rows with logits. The rest of the longer table, if there is one, is padding."""
    return len(head.rows) if head.teacher is None else min(len(head.rows), len(head.teacher.rows))


def _log_softmax(options: Options, head: Head, logits: Logits) -> Callable[[Array], Array]:
    """A function of the values of a tile of the logits that returns its log-probabilities."""
    no_targets = jnp.zeros((len(logits.largest), 0), "int32")
    statistics = find_statistics(options, Used(), head, no_targets, logits.tile)
    maximum, log_total = statistics.maximum[None], jnp.log(statistics.total)[None]
    return lambda z: cool(options, z - maximum) - log_total


def _terms(kind: str, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """What each row adds to the divergence: with the probability of the student for a factor, and
    with that of the teacher."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # 0 times infinity would be NaN
    above = jnp.where(p > 0, log_p - log_q, 0.0)
    below = jnp.where(q > 0, log_q - log_p, 0.0)
    if kind == "forward":
        return jnp.zeros_like(p), q * below
    if kind == "reverse":
        return p * above, jnp.zeros_like(p)
    # log(p / m) = log(2) - log(1 + q / p)
    return (
        p * (0.5 * (jnp.log(2.0) - jax.nn.softplus(-above))),
        q * (0.5 * (jnp.log(2.0) - jax.nn.softplus(-below))),
    )
