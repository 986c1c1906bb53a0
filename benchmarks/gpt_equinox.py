"""The transformer of examples/toy_transformer.py, with Equinox's layers and optax's loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Block(eqx.Module):
    norm: eqx.nn.RMSNorm
    query_key_value: eqx.nn.Linear
    output: eqx.nn.Linear
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, size, num_heads, key):
        def linear(inputs, outputs, key):
            return eqx.nn.Linear(inputs, outputs, use_bias=False, key=key)

        keys = jax.random.split(key, 4)
        self.norm = eqx.nn.RMSNorm(size, eps=1e-6, use_weight=False, use_bias=False)
        self.query_key_value = linear(size, 3 * size, keys[0])
        self.output = linear(size, size, keys[1])
        self.expand = linear(size, 4 * size, keys[2])
        self.contract = linear(4 * size, size, keys[3])
        self.num_heads = num_heads

    def __call__(self, x):
        heads = jax.vmap(self.query_key_value)(jax.vmap(self.norm)(x))
        heads = heads.reshape(len(x), 3 * self.num_heads, -1)
        mixed = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=1), is_causal=True)
        x = x + jax.vmap(self.output)(mixed.reshape(x.shape))
        wide = jnp.square(jax.nn.relu(jax.vmap(self.expand)(jax.vmap(self.norm)(x))))
        return x + jax.vmap(self.contract)(wide)


class GPT(eqx.Module):
    shared: eqx.nn.Shared
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm

    def __init__(self, vocab_size, sequence_length, num_layers, num_heads, size, *, key):
        keys = jax.random.split(key, 3 + num_layers)
        tokens = eqx.nn.Embedding(vocab_size, size, key=keys[0])
        head = eqx.nn.Linear(size, vocab_size, use_bias=False, key=keys[1])
        self.shared = eqx.nn.Shared(
            (tokens, head), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight
        )
        self.positions = eqx.nn.Embedding(sequence_length, size, key=keys[2])
        self.blocks = [Block(size, num_heads, key) for key in keys[3:]]
        self.norm = eqx.nn.RMSNorm(size, eps=1e-6, use_weight=False, use_bias=False)

    def __call__(self, tokens):
        embed, head = self.shared()
        x = jax.vmap(embed)(tokens) + jax.vmap(self.positions)(jnp.arange(len(tokens)))
        x = x * x.shape[-1] ** 0.5
        for block in self.blocks:
            x = block(x)
        return jax.vmap(head)(jax.vmap(self.norm)(x))


def matrices(model):
    blocks = [
        (b.query_key_value.weight, b.output.weight, b.expand.weight, b.contract.weight)
        for b in model.blocks
    ]
    return jax.tree.leaves((model.shared.pytree[0].weight, model.positions.weight, blocks))


class Training:
    """Training steps with `eqx.filter_jit`, as users write them."""

    def __init__(self, sizes: dict[str, int], optimizer, weights):
        model = GPT(**sizes, key=jax.random.key(0))
        model = eqx.tree_at(matrices, model, [jnp.asarray(w) for w in jax.tree.leaves(weights)])
        self.state = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))

        def loss(model, tokens):
            logits = jax.vmap(model)(tokens[:, :-1])
            targets = tokens[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        @eqx.filter_jit
        def step(model, state, tokens):
            value, gradients = eqx.filter_value_and_grad(loss)(model, tokens)
            params = eqx.filter(model, eqx.is_inexact_array)
            updates, state = optimizer.update(gradients, state, params)
            return value, (eqx.apply_updates(model, updates), state)

        self.step = step

    def __call__(self, tokens):
        value, self.state = self.step(*self.state, jnp.asarray(tokens, np.int32))
        return float(value)
