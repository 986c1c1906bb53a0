"""Text from a model, one token at a time, with the keys and values of the tokens before it kept."""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray
from toy_transformer import Block, norm, Transformer

from eqx_embedding import EmbeddingDecode


NUCLEUS = 1024  # tokens that `sample_top_p` draws among at most, unless it is told how many


def sample(
    model: Transformer,
    prompt: Integer[np.ndarray, " prompt"],
    length: int,
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    cache: bool = True,
    key: PRNGKeyArray,
) -> Iterator[int]:
    """Continues `prompt`, at least one token, by `length` tokens, one at a time.

    A temperature of 0 takes the likeliest token each time. `top_k` leaves all but the k likeliest
    out, and `top_p` all but the likeliest that together have this probability: see `sample_top_p`.
    Without `cache`, all tokens are encoded again for each new one: the same text, to rounding, at a
    higher price. The program stops with one line if the logits are NaN.

    There are as many positions as tokens in a sequence. When they are used up, the newer half of
    the tokens is kept, and moves to the front.
    """
    size = model.positions.vocab_size
    window, encoded = [int(token) for token in prompt[-size:]], 0
    caches = empty_caches(model)
    heat = jnp.asarray(min(temperature, 1e30), "float32")
    for _ in range(length):
        if len(window) > size:
            window, encoded = window[-(size // 2 + 1) :], 0
        new = window[encoded:]
        # One token, or a whole window: two sizes, so that only two programs are compiled.
        padded = jnp.asarray(new + [0] * (0 if encoded else size - len(new)))
        start, last = jnp.asarray(encoded), jnp.asarray(len(new) - 1)
        key, draw = jax.random.split(key)
        token, caches = next_token(model, padded, start, last, caches, heat, top_k, top_p, draw)
        if token < 0:
            raise SystemExit("the model's logits are NaN: its training has diverged.")
        encoded = len(window) if cache else 0
        window.append(int(token))
        yield window[-1]


@eqx.filter_jit
def next_token(
    model: Transformer,
    tokens: Integer[Array, " new"],
    start: Integer[Array, ""],
    last: Integer[Array, ""],
    caches: list[Float[Array, "2 sequence embedding"]],
    temperature: Float[Array, ""],
    top_k: int | None,
    top_p: float | None,
    key: PRNGKeyArray,
) -> tuple[Integer[Array, ""], list[Float[Array, "2 sequence embedding"]]]:
    """A token to follow `tokens[last]`, and the keys and values of all tokens so far."""
    hidden, caches = extend(model, tokens, start, caches)
    decode, most = EmbeddingDecode(model.tokens), model.tokens.vocab_size
    if top_p is not None:
        k = min(top_k or NUCLEUS, most)
        return sample_top_p(decode, hidden[last], top_p, temperature, k, key), caches
    k = None if top_k is None else min(top_k, most)
    return decode.sample(hidden[last], temperature=temperature, top_k=k, key=key), caches


def sample_top_p(
    decode: EmbeddingDecode,
    hidden: Float[Array, "*batch embedding"],
    top_p: float,
    temperature: Float[Array, ""],
    k: int,
    key: PRNGKeyArray,
) -> Integer[Array, "*batch"]:
    """Nucleus sampling (arxiv.org/abs/1904.09751): draws among the fewest tokens that together have
    the probability `top_p`.

    Only the `k` likeliest tokens are looked at, and `top_p` is a share of their probability. So the
    draw is exact if `k` is the whole vocabulary, and nearly so if they hold nearly everything.
    """
    log_probs, tokens = decode.top_k(hidden, k)
    scores = (log_probs - log_probs[..., :1]) / jnp.maximum(temperature, 1e-30)
    probs = jax.nn.softmax(scores)
    likelier = jnp.cumsum(probs, axis=-1) - probs  # the probability of the tokens before this one
    choice = jax.random.categorical(key, jnp.where(likelier < top_p, scores, -jnp.inf))
    return jnp.take_along_axis(tokens, choice[..., None], axis=-1)[..., 0]


def empty_caches(model: Transformer) -> list[Float[Array, "2 sequence embedding"]]:
    return [jnp.zeros((2, *model.positions.embeddings.shape)) for _ in model.blocks]


def extend(
    model: Transformer,
    tokens: Integer[Array, " new"],
    start: Integer[Array, ""],
    caches: list[Float[Array, "2 sequence embedding"]],
) -> tuple[Float[Array, "new embedding"], list[Float[Array, "2 sequence embedding"]]]:
    """`model.hidden` for the tokens from `start` on, given the keys and values of those before."""
    x, caches = model.embed(tokens, start + jnp.arange(len(tokens))), list(caches)
    for i, block in enumerate(model.blocks):
        x, caches[i] = extend_block(block, x, start, caches[i])
    return norm(x), caches


def extend_block(
    block: Block,
    x: Float[Array, "new embedding"],
    start: Integer[Array, ""],
    cache: Float[Array, "2 sequence embedding"],
) -> tuple[Float[Array, "new embedding"], Float[Array, "2 sequence embedding"]]:
    """A block for the tokens from `start` on, given the keys and values of those before."""
    query, *new = jnp.split(norm(x) @ block.attention.query_key_value, 3, axis=1)
    cache = jax.lax.dynamic_update_slice_in_dim(cache, jnp.stack(new), start, axis=1)
    seen = jnp.arange(cache.shape[1]) <= start + jnp.arange(len(x))[:, None]
    key, value = cache
    x = x + block.attention.mix(query, key, value, seen)
    return x + block.mlp(norm(x)), cache
