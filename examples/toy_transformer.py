"""A decoder-only transformer, from tokens to loss, on one tied embedding table.

Read it from top to bottom. Each class is an `eqx.Module`: a dataclass whose arrays are parameters
and whose methods are functions of them. The methods are written for one sequence of tokens;
`eqx.filter_vmap` makes a batch of it. An import hook of jaxtyping checks every shape below while
the program runs; see `train_lm.py`.
"""

from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable


# The vocabulary can be split over any number of devices that divides this. It is the same for all
# runs, so that a checkpoint fits any number of devices.
ROWS_MULTIPLE = 64


def _matrix(
    inputs: int, outputs: int, scale: float, key: PRNGKeyArray
) -> Float[Array, "{inputs} {outputs}"]:
    """Random weights whose product with a vector is `scale` times as large as the vector."""
    return scale * inputs**-0.5 * jax.random.normal(key, (inputs, outputs))


def norm(x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
    """Brings each vector to a root mean square of one."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class Attention(eqx.Module):
    """Each token asks (query) all tokens up to itself (keys) for what they hold (values)."""

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
        """For each query, the mean of the values it sees, weighted by how their keys match it."""
        query, key, value = (
            rows.reshape(len(rows), self.num_heads, -1).swapaxes(0, 1)  # heads first
            for rows in (query, key, value)
        )
        scores = query @ key.mT * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        mixed = (weights @ value).swapaxes(0, 1)
        return mixed.reshape(len(mixed), -1) @ self.output

    def extend(
        self,
        x: Float[Array, "new embedding"],
        start: Integer[Array, ""],
        cache: Float[Array, "2 sequence embedding"],
    ) -> tuple[Float[Array, "new embedding"], Float[Array, "2 sequence embedding"]]:
        """`__call__` for the tokens from `start` on, with the keys and values of earlier tokens."""
        query, *new = jnp.split(x @ self.query_key_value, 3, axis=1)
        cache = jax.lax.dynamic_update_slice_in_dim(cache, jnp.stack(new), start, axis=1)
        seen = jnp.arange(cache.shape[1]) <= start + jnp.arange(len(x))[:, None]
        key, value = cache
        return self.mix(query, key, value, seen), cache


class Block(eqx.Module):
    """Attention between tokens, then a small network on each token; both are added to `x`."""

    attention: Attention
    expand: Float[Array, "embedding four_embedding"]
    contract: Float[Array, "embedding four_embedding"]

    def __init__(self, size: int, num_heads: int, num_layers: int, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        # So that the sum of the 2 * num_layers additions does not grow with their number
        small = (2 * num_layers) ** -0.5
        self.attention = Attention(
            _matrix(size, 3 * size, 1.0, keys[0]), _matrix(size, size, small, keys[1]), num_heads
        )
        self.expand = _matrix(size, 4 * size, 1.0, keys[2])
        self.contract = _matrix(4 * size, size, small, keys[3]).T  # for a faster gradient

    def __call__(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        x = x + self.attention(norm(x))
        return x + self.mlp(norm(x))

    def mlp(self, x: Float[Array, "sequence embedding"]) -> Float[Array, "sequence embedding"]:
        # the square of a ReLU costs less than a GELU and learns as well: arxiv.org/abs/2109.08668
        return jnp.square(jax.nn.relu(x @ self.expand)) @ self.contract.T

    def extend(
        self,
        x: Float[Array, "new embedding"],
        start: Integer[Array, ""],
        cache: Float[Array, "2 sequence embedding"],
    ) -> tuple[Float[Array, "new embedding"], Float[Array, "2 sequence embedding"]]:
        mixed, cache = self.attention.extend(norm(x), start, cache)
        x = x + mixed
        return x + self.mlp(norm(x)), cache


class Transformer(eqx.Module):
    """A language model: `loss` trains it, `logits` predict the next token."""

    tokens: EmbeddingTable  # stored once, used for the input and the output
    positions: EmbeddingTable
    blocks: list[Block]

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
        self.tokens = EmbeddingTable.from_config(
            vocab_size, axes, pad_to_multiple_of=ROWS_MULTIPLE, key=token_key
        )
        self.positions = EmbeddingTable.from_config(
            sequence_length, axes, vocabulary_axis="position", key=position_key
        )
        self.blocks = [Block(embedding_size, num_heads, num_layers, key) for key in block_keys]

    def hidden(self, tokens: Integer[Array, " sequence"]) -> Float[Array, "sequence embedding"]:
        """A vector for each token, computed from it and the tokens before it."""
        x = self.embed(tokens, jnp.arange(len(tokens)))
        for block in self.blocks:
            x = block(x)
        return norm(x)

    def embed(
        self, tokens: Integer[Array, " sequence"], positions: Integer[Array, " sequence"]
    ) -> Float[Array, "sequence embedding"]:
        x = EmbeddingLookup(self.tokens)(tokens) + EmbeddingLookup(self.positions)(positions)
        # The vectors of new tables have length one, which suits logits. The blocks expect entries
        # of size one.
        return x * x.shape[-1] ** 0.5

    def logits(self, tokens: Integer[Array, " sequence"]) -> Float[Array, "sequence vocabulary"]:
        """Scores for the token that follows each token."""
        return EmbeddingDecode(self.tokens)(self.hidden(tokens))

    def loss(
        self,
        inputs: Integer[Array, "batch sequence"],
        targets: Integer[Array, "batch sequence"],
        weights: Float[Array, "batch sequence"] | None = None,
    ) -> Float[Array, ""]:
        """The mean loss of the targets, in nats per token."""
        hidden = eqx.filter_vmap(self.hidden)(inputs)
        return EmbeddingDecode(self.tokens).cross_entropy(hidden, targets, weights=weights)

    @eqx.filter_jit
    def mean_loss(
        self,
        inputs: Integer[Array, "batches batch sequence"],
        targets: Integer[Array, "batches batch sequence"],
        weights: Float[Array, "batches batch sequence"],
    ) -> Float[Array, ""]:
        """The mean loss over the batches of a text, computed one after the other."""
        batches = inputs, targets, weights
        sums = jax.lax.map(lambda batch: self.loss(*batch) * batch[2].sum(), batches)
        return sums.sum() / weights.sum()

    def sample(
        self,
        prompt: Integer[np.ndarray, " prompt"],
        length: int,
        temperature: float,
        *,
        top_k: int | None = None,
        cache: bool = True,
        key: PRNGKeyArray,
    ) -> Iterator[int]:
        """Continues `prompt`, at least one token, by `length` tokens, one at a time.

        A temperature of 0 takes the likeliest token each time. With `top_k`, only the k likeliest
        tokens can be drawn. Without `cache`, all earlier tokens are encoded again for each new one:
        the text is the same up to rounding, but takes longer.

        There are as many positions as tokens in a sequence. When they are used up, the newer half
        of the tokens is kept, and moves to the front.
        """
        size = self.positions.vocab_size
        window, encoded = [int(token) for token in prompt[-size:]], 0
        caches = [jnp.zeros((2, *self.positions.embeddings.shape)) for _ in self.blocks]
        for key in jax.random.split(key, length):
            if len(window) > size:
                window, encoded = window[-(size // 2 + 1) :], 0
            new = window[encoded:]
            # One token, or a whole window: two sizes, so that only two programs are compiled.
            padding = [0] * (0 if encoded else size - len(new))
            token, caches = self._next(
                jnp.asarray(new + padding),
                jnp.asarray(encoded),
                jnp.asarray(len(new) - 1),
                caches,
                temperature,
                top_k,
                key,
            )
            encoded = len(window) if cache else 0
            window.append(int(token))
            yield window[-1]

    @eqx.filter_jit
    def _next(
        self,
        tokens: Integer[Array, " new"],
        start: Integer[Array, ""],
        last: Integer[Array, ""],
        caches: list[Float[Array, "2 sequence embedding"]],
        temperature: float,
        top_k: int | None,
        key: PRNGKeyArray,
    ) -> tuple[Integer[Array, ""], list[Float[Array, "2 sequence embedding"]]]:
        """A token to follow `tokens[last]`, and the keys and values of all tokens so far."""
        x = self.embed(tokens, start + jnp.arange(len(tokens)))
        for i, block in enumerate(self.blocks):
            x, caches[i] = block.extend(x, start, caches[i])
        logits = EmbeddingDecode(self.tokens)(norm(x)[last])
        if temperature == 0:
            return jnp.argmax(logits), caches
        if top_k is not None:
            likeliest, _ = jax.lax.top_k(logits, min(top_k, len(logits)))
            logits = jnp.where(logits < likeliest[-1], -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature), caches
