"""Text from a model, one token at a time, with the keys and values of the tokens before it kept."""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray
from toy_transformer import Block, norm, Transformer

from eqx_embedding import EmbeddingDecode


def sample(
    model: Transformer,
    prompt: Integer[np.ndarray, " prompt"],
    length: int,
    temperature: float,
    *,
    top_k: int | None = None,
    cache: bool = True,
    key: PRNGKeyArray,
) -> Iterator[int]:
    """Continues `prompt`, at least one token, by `length` tokens, one at a time.

    A temperature of 0 takes the likeliest token each time. `top_k` leaves all but the k likeliest
    out. Without `cache`, all tokens are encoded again for each new one: the same text, to rounding,
    at a higher price.

    There are as many positions as tokens in a sequence. When they are used up, the newer half of
    the tokens is kept, and moves to the front.
    """
    size = model.positions.vocab_size
    window, encoded = [int(token) for token in prompt[-size:]], 0
    caches = [jnp.zeros((2, *model.positions.embeddings.shape)) for _ in model.blocks]
    heat = jnp.asarray(temperature, "float32")
    for _ in range(length):
        if len(window) > size:
            window, encoded = window[-(size // 2 + 1) :], 0
        new = window[encoded:]
        # One token, or a whole window: two sizes, so that only two programs are compiled.
        padded = jnp.asarray(new + [0] * (0 if encoded else size - len(new)))
        start, last = jnp.asarray(encoded), jnp.asarray(len(new) - 1)
        token, caches, key = next_token(model, padded, start, last, caches, heat, top_k, key)
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
    key: PRNGKeyArray,
) -> tuple[Integer[Array, ""], list[Float[Array, "2 sequence embedding"]], PRNGKeyArray]:
    """A token to follow `tokens[last]`, the keys and values of all tokens so far, and a key."""
    x = model.embed(tokens, start + jnp.arange(len(tokens)))
    for i, block in enumerate(model.blocks):
        x, caches[i] = extend(block, x, start, caches[i])
    logits = EmbeddingDecode(model.tokens)(norm(x)[last])
    if top_k is not None:
        likeliest, _ = jax.lax.top_k(logits, min(top_k, len(logits)))
        logits = jnp.where(logits < likeliest[-1], -jnp.inf, logits)
    key, draw = jax.random.split(key)
    # `jax.random.categorical` of logits divided by the temperature, which may be next to nothing
    noise = jax.random.gumbel(draw, logits.shape)
    return jnp.argmax(logits + temperature * noise), caches, key


def extend(
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
