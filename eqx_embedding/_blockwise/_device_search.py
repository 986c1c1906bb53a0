"""The likeliest tokens for all vectors of a device, with a gradient; and draws, which have none."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._device_scores import device_scores_backward, save_operands
from ._devices import device_type
from ._logits import chunks_of, Head, make_head, on_device, Operands, Options
from ._reference import TokenScores
from ._scores import Used
from ._search import draw_among, draw_token, Draws, find_likeliest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def device_top_k(
    options: Options, k: int, operands: Operands
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The `k` largest log-probabilities of N vectors, and their tokens."""

    def find(options: Options, head: Head, x: Array) -> Any:
        return find_likeliest(options, k, head, x)

    return _of_chunks(find, options, operands)


def _device_top_k_forward(options: Options, k: int, operands: Operands) -> Any:
    found: Any = device_top_k(options, k, operands)
    _, tokens = found
    return found, save_operands(options, operands._replace(targets=tokens))


def _device_top_k_backward(
    options: Options, k: int, saved: Any, cotangents: tuple[Array, Array]
) -> tuple[Operands]:
    """That of the log-probabilities of `k` targets."""
    cotangent, _ = cotangents
    zeros = jnp.zeros_like(cotangent[:, 0])
    none = Used(mean_log_prob=False, entropy=False, is_top=False)
    scores = TokenScores(cotangent, zeros, zeros, zeros, zeros)
    return device_scores_backward(options, none, saved, scores)


device_top_k.defvjp(_device_top_k_forward, _device_top_k_backward)


def device_sample(options: Options, k: int | None, operands: Operands) -> Int[Array, " N"]:
    """A token for each of N vectors, one of the `k` likeliest, or of all."""

    def find(options: Options, head: Head, x: Array, draws: Draws) -> Array:
        if k is None:
            return draw_token(options, head, x, draws)
        return draw_among(*find_likeliest(options, k, head, x), draws)

    return _of_chunks(find, options, operands, Draws(*operands.data))


def _of_chunks(find: Callable[..., Any], options: Options, operands: Operands, *tokens: Any) -> Any:
    """`find(options, head, x, *tokens)` for the vectors and tokens of each chunk."""
    options = options._replace(gathered=True)  # No gradient has a buffer that logits could use.

    def run(options: Options, operands: Operands, *tokens: Any) -> Any:
        head = make_head(options, operands)

        def chunk(sums: Any, is_token: Array | None, *of_chunk: Any) -> Any:
            return sums, find(options, head, *of_chunk)

        _, found = chunks_of(options, operands).run(chunk, (operands.hidden, *tokens), ())
        return found

    return on_device(run, options, device_type(operands.targets), operands, *tokens)
