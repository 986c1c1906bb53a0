"""A tied model that is trained for a few steps, and a plain model in JAX and optax beside it.

`Plain` holds arrays, computes all logits, and uses no code of the package.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import assert_close, draw, float64, NAMES


V, PADDING_ROWS, D = 11, 1, 8
STEPS, EXAMPLES, LENGTH = 3, 4, 5
TOKENS, TARGETS = np.random.default_rng(0).integers(0, V, (2, STEPS, EXAMPLES, LENGTH), np.int32)
ADAM = optax.adam(0.05)
SGD = optax.sgd(0.5)


class Plain(NamedTuple):
    """The parameters of the model, which is tied because it uses `rows` twice."""

    rows: Any
    bias: Any
    weight: Any
    shift: Any


def plain_hidden(params, tokens):
    vectors = params.rows[tokens]
    return vectors + jnp.tanh(vectors @ params.weight.T + params.shift)


def plain_decode(params, hidden, targets):
    """The mean loss. Logits are in float32, also in half precision."""
    logits = jnp.dot(hidden, params.rows.T, preferred_element_type=jnp.float32) + params.bias
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def plain_loss(params, tokens, targets):
    return plain_decode(params, plain_hidden(params, tokens), targets)


class Model(eqx.Module):
    """The same model, called with one sequence, as models of Equinox are."""

    table: EmbeddingTable
    body: eqx.nn.Linear

    def __call__(self, tokens):
        vectors = EmbeddingLookup(self.table)(tokens)
        return vectors + jnp.tanh(jax.vmap(self.body)(vectors))


def make_table(seed=0, padding_rows=PADDING_ROWS) -> EmbeddingTable:
    """Its padding rows are random numbers, so that a leak shows."""
    rows = V + padding_rows
    embeddings, bias = (jnp.asarray(draw(s, seed=seed)) for s in ((rows, D), (rows,)))
    return EmbeddingTable(embeddings, NAMES, padding_rows=padding_rows, bias=bias)


def make_model(seed=0, padding_rows=PADDING_ROWS) -> Model:
    body = eqx.nn.Linear(D, D, key=jax.random.key(seed))
    return Model(make_table(seed, padding_rows), body)


def to_plain(model) -> Plain:
    """The arrays of a model, or of anything that has its fields, without padding."""
    table, body = model.table, model.body
    return Plain(table.embeddings[:V], table.bias[:V], body.weight, body.bias)


def batch_loss(model, tokens, targets):
    return EmbeddingDecode(model.table).cross_entropy(jax.vmap(model)(tokens), targets)


def loss_of_example(model, tokens, targets):
    return EmbeddingDecode(model.table).cross_entropy(model(tokens), targets)


def vmap_of_losses(model, tokens, targets):
    return jnp.mean(jax.vmap(loss_of_example, (None, 0, 0))(model, tokens, targets))


def make_step(optimizer, loss: Callable[..., Any] = batch_loss, **options) -> Any:
    @eqx.filter_jit(**options)
    def step(model, state, tokens, targets):
        value, gradients = eqx.filter_value_and_grad(loss)(model, tokens, targets)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(gradients, state, params)
        return eqx.apply_updates(model, updates), state, value

    return step


def for_tables(params):
    """True for the arrays of the table, and False for all others."""
    mask = jax.tree.map(lambda _: False, params)
    return eqx.tree_at(lambda m: (m.table.embeddings, m.table.bias), mask, (True, True))


def init(optimizer, model):
    return optimizer.init(eqx.filter(model, eqx.is_inexact_array))


def run(step, model, state, steps=slice(None)):
    losses = []
    for tokens, targets in zip(TOKENS[steps], TARGETS[steps], strict=True):
        model, state, loss = step(model, state, tokens, targets)
        losses.append(loss)
    return model, state, losses


def train(model, optimizer=ADAM, loss: Callable[..., Any] = batch_loss):
    """The losses and the last model."""
    model, _, losses = run(make_step(optimizer, loss), model, init(optimizer, model))
    return losses, model


def train_plain(optimizer=ADAM, loss=plain_loss, params: Any = None):
    params = to_plain(make_model()) if params is None else params

    @jax.jit
    def step(params, state, tokens, targets):
        value, gradients = jax.value_and_grad(loss)(params, tokens, targets)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, _, losses = run(step, params, optimizer.init(params))
    return losses, params


@functools.cache
def plain_adam():
    return train_plain()


def assert_same(actual, expected, rtol=1e-5, atol=1e-5):
    """Of two pairs of losses and parameters."""
    assert_close(jnp.stack(actual[0]), jnp.stack(expected[0]), rtol, atol)
    for field, a, e in zip(Plain._fields, to_plain(actual[1]), expected[1], strict=True):
        np.testing.assert_allclose(float64(a), float64(e), 10 * rtol, atol, err_msg=field)
