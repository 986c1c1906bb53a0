"""The scores of all tokens of a device, and their gradient.

Scores have a cotangent for each token, which is not known before the backward pass. So that makes
the logits again: 8NVD operations, 2NVD for each product.

Shapes: `hidden` is (N, D), `rows` (V, D), `bias` (V,) or `None`; `targets`, and `mask`, which says
what tokens count, are (N,); `mask` may be `None`. Floats are of `Options.wide`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._inputs import nan_where
from ._chunks import only
from ._devices import device_type, retype, without_devices
from ._gradients import chunk_gradients, HeadGradient, zeros_like
from ._logits import chunks_of, is_unknown, make_head, Options
from ._scores import chunk_scores, TokenScores, Used


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def device_scores(
    options: Options,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
) -> TokenScores:
    """The scores of N tokens; zeros for those that the mask leaves out."""
    return _all_scores(options, used, hidden, rows, bias, targets, mask)


def _all_scores(options: Options, used: Used, *operands: Any) -> TokenScores:
    kind = device_type(operands[3])
    return without_devices(functools.partial(_scores, options, used), kind, *operands)


def _scores(
    options: Options,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
) -> TokenScores:
    head = make_head(options, rows, bias)

    def chunk(sums: Any, is_token: Array | None, x: Array, y: Array) -> Any:
        return sums, chunk_scores(options, used, head, x, y)

    _, scores = chunks_of(options, hidden, rows, mask).run(chunk, (hidden, targets), ())
    return scores


def _device_scores_forward(options: Options, used: Used, *operands: Any) -> Any:
    scores = _all_scores(options, used, *operands)
    return scores, tuple(
        retype(device_type(operand).outside(options.outer_axes), operand) for operand in operands
    )


def _device_scores_backward(
    options: Options, used: Used, operands: Any, cotangents: TokenScores
) -> Any:
    types = tuple(device_type(operand).inside(options.outer_axes) for operand in operands[:3])
    gradients = functools.partial(_score_gradients, options, used)
    return *without_devices(gradients, types, *operands, cotangents[:4]), None, None


def _score_gradients(
    options: Options,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
    cotangents: tuple[Array, ...],
) -> tuple[Array, Array, Array | None]:
    # A token whose scores are not used must not poison the others, whatever its vector is.
    needed = functools.reduce(jnp.logical_or, [c != 0 for c in cotangents])
    mask = needed if mask is None else needed & mask
    d_log_prob, *others = cotangents
    d_log_prob = nan_where(is_unknown(options, targets) & (d_log_prob != 0), d_log_prob)
    head = make_head(options, rows, bias)

    def chunk(
        d_head: HeadGradient, is_token: Array | None, x: Array, y: Array, given: tuple[Array, ...]
    ) -> Any:
        log_prob, mean_log_prob, entropy, logsumexp = (only(is_token, c) for c in given)

        def of_tokens(scores: TokenScores) -> Any:
            new = TokenScores(log_prob, mean_log_prob, entropy, logsumexp, scores.is_top)
            return new, None

        d_x, d_head, _ = chunk_gradients(options, used, head, x, y, of_tokens, d_head)
        return d_head, d_x

    tokens = hidden, targets, (d_log_prob, *others)
    chunks = chunks_of(options, hidden, rows, mask)
    d_head, d_hidden = chunks.run(chunk, tokens, zeros_like(head, options.wide))
    return d_hidden, *d_head


device_scores.defvjp(_device_scores_forward, _device_scores_backward)
