"""A decoder-only transformer, from tokens to loss, on one tied embedding table.

Read it from top to bottom. Each class is an `eqx.Module`: a dataclass whose arrays are parameters
and whose methods are functions of them. The methods are written for one sequence of tokens;
`eqx.filter_vmap` makes a batch of it. An import hook of jaxtyping checks every shape below while
the program runs; see `train_lm.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable


def _matrix(
    inputs: int, outputs: int, scale: float, key: PRNGKeyArray
) -> Float[Array, "{inputs} {outputs}"]:
    """Random weights whose product with a vector is `scale` times as large as the vector."""
    return scale * inputs**-0.5 * jax.random.normal(key, (inputs, outputs))


class Norm(eqx.Module):
    """Brings each vector to a root mean square of one, then scales its entries."""

    scale: Float[Array, " embedding"]

    def __call__(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + 1e-6) * self.scale


class Attention(eqx.Module):
    """Each token asks (query) all tokens up to itself (keys) for what they hold (values)."""

    query_key_value: Float[Array, "embedding three_embedding"]
    output: Float[Array, "embedding embedding"]
    num_heads: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        sequence, embedding = x.shape
        heads = (x @ self.query_key_value).reshape(sequence, 3 * self.num_heads, -1)
        query, key, value = jnp.split(heads, 3, axis=1)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return mixed.reshape(sequence, embedding) @ self.output


class Block(eqx.Module):
    """Attention between tokens, then a small network on each token; both are added to `x`."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    expand: Float[Array, "embedding four_embedding"]
    contract: Float[Array, "four_embedding embedding"]

    def __init__(self, size: int, num_heads: int, num_layers: int, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        # What the 2 * num_layers additions add up to should not grow with their number.
        small = (2 * num_layers) ** -0.5
        self.attention_norm = Norm(jnp.ones(size))
        self.attention = Attention(
            _matrix(size, 3 * size, 1.0, keys[0]), _matrix(size, size, small, keys[1]), num_heads
        )
        self.mlp_norm = Norm(jnp.ones(size))
        self.expand = _matrix(size, 4 * size, 1.0, keys[2])
        self.contract = _matrix(4 * size, size, small, keys[3])

    def __call__(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        x = x + self.attention(self.attention_norm(x))
        # the square of a ReLU costs less than a GELU and learns as well: arxiv.org/abs/2109.08668
        return x + jnp.square(jax.nn.relu(self.mlp_norm(x) @ self.expand)) @ self.contract


class Transformer(eqx.Module):
    """A language model: `loss` trains it, `logits` predict the next token."""

    tokens: EmbeddingTable  # stored once, used on the way in and on the way out
    positions: EmbeddingTable
    blocks: list[Block]
    norm: Norm

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        num_layers: int,
        num_heads: int,
        embedding_size: int,
        *,
        key: PRNGKeyArray,
    ):
        token_key, position_key, *block_keys = jax.random.split(key, 2 + num_layers)
        axes = {"embedding": embedding_size}
        self.tokens = EmbeddingTable.from_config(vocab_size, axes, key=token_key)
        self.positions = EmbeddingTable.from_config(
            sequence_length, axes, vocabulary_axis="position", key=position_key
        )
        self.blocks = [Block(embedding_size, num_heads, num_layers, key) for key in block_keys]
        self.norm = Norm(jnp.ones(embedding_size))

    def hidden(self, tokens: Integer[Array, " sequence"]) -> Float[Array, "sequence embedding"]:
        """What the model makes of each token and of those before it."""
        x = EmbeddingLookup(self.tokens)(tokens)
        x = x + EmbeddingLookup(self.positions)(jnp.arange(len(tokens)))
        # The tables start with vectors of length one, the right size for logits; the blocks want
        # entries of size one.
        x = x * x.shape[-1] ** 0.5
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def logits(self, tokens: Integer[Array, " sequence"]) -> Float[Array, "sequence vocabulary"]:
        """Scores for the token that follows each token."""
        return EmbeddingDecode(self.tokens)(self.hidden(tokens))

    def loss(
        self,
        inputs: Integer[Array, "batch sequence"],
        targets: Integer[Array, "batch sequence"],
        weights: Float[Array, "batch sequence"] | None = None,
    ) -> Float[Array, ""]:
        """The mean loss in nats per token, of the token that follows each token."""
        hidden = eqx.filter_vmap(self.hidden)(inputs)
        return EmbeddingDecode(self.tokens).cross_entropy(hidden, targets, weights=weights)

    def sample(
        self,
        prompt: Integer[Array, " prompt"],
        length: int,
        temperature: float,
        *,
        key: PRNGKeyArray,
    ) -> Integer[Array, " length"]:
        """Continues `prompt`, at most one sequence long, by `length` tokens."""
        limit = self.positions.vocab_size
        window = jnp.pad(prompt, (0, limit - len(prompt)))

        def next_token(carry, key):
            window, count = carry
            # attention looks back only, so what stands behind `count` has no influence
            logits = self.logits(window)[count - 1]
            token = jax.random.categorical(key, logits / temperature).astype(window.dtype)
            full = count == limit
            window = jnp.where(full, jnp.roll(window, -1), window)
            count = jnp.where(full, count, count + 1)
            return (window.at[count - 1].set(token), count), token

        _, tokens = jax.lax.scan(next_token, (window, len(prompt)), jax.random.split(key, length))
        return tokens
