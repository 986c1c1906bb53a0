"""The likeliest tokens for all vectors of a device, with a gradient; and draws, which have none."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._devices import call_as_one, jvp_of_active, save, Saved
from ._device_scores import all_scores, device_scores_backward
from ._logits import chunks_of, Head, make_head, on_device, Operands, Options
from ._scores import Used
from ._search import draw_among, draw_token, Draws, find_likeliest
from ._token_scores import TokenScores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def device_top_k(
    options: Options, k: int, operands: Operands
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The `k` largest log-probabilities of N vectors, and their tokens."""
    return _top_k(options, k, operands)


def _top_k(options: Options, k: int, operands: Operands) -> Any:
    def find(options: Options, head: Head, x: Array) -> Any:
        return find_likeliest(options, k, head, x)

    log_probs, tokens = _map_chunks(find, options, lax.stop_gradient(operands))
    return _attach_derivative(options, operands._replace(targets=tokens), log_probs), tokens


def _attach_derivative(options: Options, operands: Operands, log_probs: Array) -> Array:
    """The log-probabilities as they are, with the derivative of the scores of the tokens found.

    The gradient has a rule of its own, but not its derivatives: they need this.
    """
    return call_as_one(functools.partial(_keep, options), operands, log_probs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _keep(options: Options, operands: Operands, log_probs: Array) -> Array:
    return log_probs


@functools.partial(_keep.defjvp, symbolic_zeros=True)
def _keep_jvp(options: Options, primals: Any, tangents: Any) -> tuple[Array, Array]:
    leaves, structure = jax.tree.flatten(primals[0])

    def log_probs(*leaves: Array) -> Array:
        return all_scores(options, Used(), structure.unflatten(leaves))[0]

    _, tangent = jvp_of_active(log_probs, leaves, jax.tree.leaves(tangents[0]))
    return _attach_derivative(options, *primals), tangent


def _device_top_k_forward(options: Options, k: int, operands: Operands) -> Any:
    found = _top_k(options, k, operands)
    log_probs, tokens = found
    before = lax.stop_gradient(log_probs)
    return found, save(options.local.outer_axes, (*operands._replace(targets=tokens), before))


def _device_top_k_backward(
    options: Options, k: int, saved: Saved, cotangents: tuple[Array, Any]
) -> tuple[Operands]:
    """That of the log-probabilities of `k` targets."""
    cotangent, _ = cotangents  # tokens are integers, which have none
    zeros = jnp.zeros_like(cotangent[:, 0])
    scores = TokenScores(cotangent, zeros, zeros, zeros, zeros)
    return device_scores_backward(options, Used(), saved, scores)


device_top_k.defvjp(_device_top_k_forward, _device_top_k_backward)


def device_sample(options: Options, k: int | None, operands: Operands) -> Int[Array, " N"]:
    """A token for each of N vectors, one of the `k` likeliest, or of all."""

    def find(options: Options, head: Head, x: Array, draws: Draws) -> Array:
        if k is None:
            return draw_token(options, head, x, draws)
        return draw_among(*find_likeliest(options, k, head, x), draws)

    return _map_chunks(find, options, operands, operands.draws)


def _map_chunks(
    find: Callable[..., Any], options: Options, operands: Operands, *tokens: Any
) -> Any:
    """`find(options, head, x, *tokens)` for the vectors and tokens of each chunk."""

    def run(options: Options, operands: Operands, *tokens: Any) -> Any:
        head = make_head(options, operands)

        def chunk(sums: Any, is_token: Array | None, *of_chunk: Any) -> Any:
            return sums, find(options, head, *of_chunk)

        _, found = chunks_of(options, operands).run(chunk, (operands.hidden, *tokens), ())
        return found

    return on_device(run, options.without_gradient, options.local.token_type, operands, *tokens)
