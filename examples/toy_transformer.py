"""A decoder-only transformer, from tokens to loss, on one tied embedding table.

Read it from top to bottom. Each class is an `eqx.Module`: a dataclass whose arrays are parameters
and whose methods are functions of them. The methods are written for one sequence of tokens;
`eqx.filter_vmap` makes a batch of it. An import hook of jaxtyping checks every shape below while
the program runs; see `train_lm.py`.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray
from support.settings import require

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable


# Any number of devices that divides this may share the vocabulary. It stays the same for all runs,
# so that a checkpoint fits any number.
ROWS_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    sequence_length: int = 64
    """Tokens in a sequence: how far the model looks back."""
    num_layers: int = 4
    """Blocks of attention and multilayer perceptron."""
    num_heads: int = 4
    """Attention heads in each block."""
    embedding_size: int = 128
    """The size of an embedding, a multiple of --num-heads."""

    def __post_init__(self):
        require(self, "sequence_length", "num_heads", "embedding_size", above=0)
        require(self, "num_layers", above=0, below=2**16)
        if self.embedding_size % self.num_heads != 0:
            raise ValueError(f"--embedding-size must be a multiple of --num-heads {self.num_heads}")


def _matrix(
    inputs: int, outputs: int, scale: float, key: PRNGKeyArray
) -> Float[Array, "{inputs} {outputs}"]:
    """Random weights whose product with a vector is `scale` times as large as the vector."""
    return scale * inputs**-0.5 * jax.random.normal(key, (inputs, outputs))


def norm(x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
    """Brings each vector to a root mean square of one."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class Attention(eqx.Module):
    """Each token takes a mean of the values of all tokens up to itself."""

    query_key_value: Float[Array, "embedding three_embedding"]
    output: Float[Array, "embedding embedding"]
    num_heads: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        query, key, value = jnp.split(x @ self.query_key_value, 3, axis=1)
        return self.mix(query, key, value, jnp.tri(len(x), dtype=bool))

    def mix(
        self,
        query: Float[Array, "new embedding"],
        key: Float[Array, "sequence embedding"],
        value: Float[Array, "sequence embedding"],
        seen: Bool[Array, "new sequence"],
    ) -> Float[Array, "new embedding"]:
        """For each query, the mean of the values it sees, weighted by how well their keys match."""
        query, key, value = (
            rows.reshape(len(rows), self.num_heads, -1).swapaxes(0, 1)  # heads first
            for rows in (query, key, value)
        )
        scores = query @ key.mT * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        mixed = (weights @ value).swapaxes(0, 1)
        return mixed.reshape(len(mixed), -1) @ self.output


class Block(eqx.Module):
    """Attention between tokens, then a small network on each token; both are added to `x`."""

    attention: Attention
    expand: Float[Array, "embedding four_embedding"]
    contract: Float[Array, "embedding four_embedding"]

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        size, keys = config.embedding_size, jax.random.split(key, 4)
        # Scaled down, so that the sum of all 2 * num_layers additions does not grow with depth.
        small = (2 * config.num_layers) ** -0.5
        self.attention = Attention(
            _matrix(size, 3 * size, 1.0, keys[0]),
            _matrix(size, size, small, keys[1]),
            config.num_heads,
        )
        self.expand = _matrix(size, 4 * size, 1.0, keys[2])
        # Transposed, because a gradient of this shape takes less time.
        self.contract = _matrix(4 * size, size, small, keys[3]).T

    def __call__(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        x = x + self.attention(norm(x))
        return x + self.mlp(norm(x))

    def mlp(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        # the square of a ReLU costs less than a GELU and learns as well: arxiv.org/abs/2109.08668
        return jnp.square(jax.nn.relu(x @ self.expand)) @ self.contract.T


class Transformer(eqx.Module):
    """A language model: `loss` trains it, `logits` predict the next token."""

    tokens: EmbeddingTable  # stored once, used on the way in and on the way out
    positions: EmbeddingTable
    blocks: list[Block]

    def __init__(self, vocab_size: int, config: ModelConfig, *, key: PRNGKeyArray):
        token_key, position_key, *block_keys = jax.random.split(key, 2 + config.num_layers)
        axes = {"embedding": config.embedding_size}
        self.tokens = EmbeddingTable.from_config(
            vocab_size, axes, pad_to_multiple_of=ROWS_MULTIPLE, key=token_key
        )
        self.positions = EmbeddingTable.from_config(
            config.sequence_length, axes, vocabulary_axis="position", key=position_key
        )
        self.blocks = [Block(config, key) for key in block_keys]

    def hidden(self, tokens: Integer[Array, " sequence"]) -> Float[Array, "sequence embedding"]:
        """A vector for each token, computed from this token and those before it."""
        x = self.embed(tokens, jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        return norm(x)

    def embed(
        self, tokens: Integer[Array, " sequence"], positions: Integer[Array, " sequence"]
    ) -> Float[Array, "sequence embedding"]:
        x = EmbeddingLookup(self.tokens)(tokens) + EmbeddingLookup(self.positions)(positions)
        # The tables start with vectors of length one, the right size for logits; the blocks want
        # entries of size one.
        return x * x.shape[-1] ** 0.5

    def logits(self, tokens: Integer[Array, " sequence"]) -> Float[Array, "sequence vocabulary"]:
        """Scores for the token that follows each token."""
        return EmbeddingDecode(self.tokens)(self.hidden(tokens))

    def loss(
        self,
        inputs: Integer[Array, "batch sequence"],
        targets: Integer[Array, "batch sequence"],
    ) -> Float[Array, ""]:
        """The mean loss in nats per token, of the token that follows each token."""
        hidden = eqx.filter_vmap(self.hidden)(inputs)
        return EmbeddingDecode(self.tokens).cross_entropy(hidden, targets)
