"""Models in which the table is frozen, changed, stacked, or beside layers with state, trained as a
plain model is.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import lax

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import draw, NAMES
from .idioms import (
    ADAM,
    assert_same,
    batch_loss,
    D,
    EXAMPLES,
    for_tables,
    init,
    make_model,
    make_step,
    make_table,
    Model,
    PADDING_ROWS,
    Plain,
    plain_decode,
    plain_hidden,
    plain_loss,
    run,
    SGD,
    STEPS,
    TARGETS,
    to_plain,
    TOKENS,
    train,
    train_plain,
    V,
    vmap_of_losses,
)


# JAX as its users have it: optax mixes dtypes, and so do these idioms
pytestmark = pytest.mark.usefixtures("jax_defaults")


# Parts that are not trained, and parts that are added


def frozen_by_a_tree(model):
    """As in Equinox's documentation."""
    spec = jax.tree.map(eqx.is_inexact_array, model)
    spec = eqx.tree_at(lambda m: (m.table.embeddings, m.table.bias), spec, (False, False))
    trained, frozen = eqx.partition(model, spec)

    def loss(trained, tokens, targets):
        return vmap_of_losses(eqx.combine(trained, frozen), tokens, targets)

    losses, trained = train(trained, loss=loss)
    return losses, eqx.combine(trained, frozen)


def frozen_by_stop_gradient(model):
    def loss(model, tokens, targets):
        table = jax.tree.map(lax.stop_gradient, model.table)
        return batch_loss(eqx.tree_at(lambda m: m.table, model, table), tokens, targets)

    return train(model, loss=loss)


class NonTrainable(eqx.Module):
    """A wrapper as in paramax, which is taken off before the model is called."""

    tree: Any

    def unwrap(self):
        arrays, static = eqx.partition(self.tree, eqx.is_array)
        return eqx.combine(lax.stop_gradient(arrays), static)


def unwrap(tree):
    def is_wrapper(node):
        return isinstance(node, NonTrainable)

    return jax.tree.map(lambda x: x.unwrap() if is_wrapper(x) else x, tree, is_leaf=is_wrapper)


def frozen_by_a_wrapper_of_the_table(model):
    wrapped: Any = eqx.tree_at(lambda m: m.table, model, replace_fn=NonTrainable)
    losses, wrapped = train(wrapped, loss=lambda x, *batch: vmap_of_losses(unwrap(x), *batch))
    return losses, unwrap(wrapped)


def frozen_by_wrappers_of_arrays(model):
    wrapped: Any = eqx.tree_at(
        lambda m: (m.table.embeddings, m.table.bias), model, replace_fn=NonTrainable
    )
    losses, wrapped = train(wrapped, loss=lambda x, *batch: batch_loss(unwrap(x), *batch))
    return losses, unwrap(wrapped)


def frozen_by_optax(model):
    tables = for_tables(eqx.filter(model, eqx.is_inexact_array))
    return train(model, optax.chain(ADAM, optax.masked(optax.set_to_zero(), tables)))


@functools.cache
def plain_frozen():
    def loss(params, tokens, targets):
        rows, bias = lax.stop_gradient((params.rows, params.bias))
        return plain_loss(params._replace(rows=rows, bias=bias), tokens, targets)

    return train_plain(loss=loss)


@pytest.mark.parametrize(
    "trained",
    [
        frozen_by_a_tree,
        frozen_by_stop_gradient,
        frozen_by_a_wrapper_of_the_table,
        frozen_by_wrappers_of_arrays,
        frozen_by_optax,
    ],
)
@pytest.mark.slow
def test_a_frozen_table_stays_while_the_body_is_trained(trained):
    losses, model = trained(make_model())
    assert eqx.tree_equal(model.table, make_table())
    assert_same((losses, model), plain_frozen())


class LoRA(eqx.Module):
    """A product of low rank, which is added to the embeddings of a frozen model."""

    up: jax.Array
    down: jax.Array

    def __call__(self, model):
        embeddings = model.table.embeddings + self.up @ self.down
        return eqx.tree_at(lambda m: m.table.embeddings, model, embeddings)


@pytest.mark.slow
def test_a_product_of_low_rank_may_be_added_to_the_table():
    model, frozen = make_model(), to_plain(make_model())
    up, down = (jnp.asarray(draw(shape, seed=5)) for shape in ((V + PADDING_ROWS, 2), (2, D)))
    losses, lora = train(LoRA(up, down), loss=lambda x, *batch: batch_loss(x(model), *batch))

    def added(params):
        return frozen._replace(rows=frozen.rows + params["up"] @ params["down"])

    expected, params = train_plain(
        loss=lambda params, *batch: plain_loss(added(params), *batch),
        params={"up": up[:V], "down": down},
    )
    assert_same((losses, lora(model)), (expected, added(params)))
    np.testing.assert_array_equal(lora.up[V:], up[V:])


def test_what_tree_at_replaces_between_steps_takes_effect():
    """Some rows, then all embeddings, then the whole table."""
    other = make_table(seed=3)
    changes = [
        lambda m: eqx.tree_at(lambda m: m.table.embeddings, m, m.table.embeddings.at[2:4].set(1.0)),
        lambda m: eqx.tree_at(lambda m: m.table.embeddings, m, np.asarray(other.embeddings)),
        lambda m: eqx.tree_at(lambda m: m.table, m, make_table(seed=4)),
    ]
    model, step, plain_step = make_model(), make_step(SGD), make_step(SGD, plain_loss)
    state, plain_state = init(SGD, model), SGD.init(to_plain(model))
    for change, *batch in zip(changes, TOKENS, TARGETS, strict=True):
        changed = change(model)
        model, state, loss = step(changed, state, *batch)
        params, plain_state, expected = plain_step(to_plain(changed), plain_state, *batch)
        assert_same(([loss], model), ([expected], params))


# Models that look up and decode inside of loops


@pytest.mark.slow
def test_a_recurrent_network_may_decode_in_its_loop():
    cell = eqx.nn.GRUCell(D, D, key=jax.random.key(3))

    def total(step, tokens, targets):
        def of_example(tokens, targets):
            return jnp.mean(lax.scan(step, jnp.zeros(D), (tokens, targets))[1])

        return jnp.mean(jax.vmap(of_example)(tokens, targets))

    def loss(model, tokens, targets):
        def step(state, x):
            state = cell(model(x[0]), state)
            return state, EmbeddingDecode(model.table).cross_entropy(state, x[1])

        return total(step, tokens, targets)

    def plain(params, tokens, targets):
        def step(state, x):
            state = cell(plain_hidden(params, x[0]), state)
            return state, plain_decode(params, state, x[1])

        return total(step, tokens, targets)

    class OfToken(Model):
        def __call__(self, tokens):
            vector = EmbeddingLookup(self.table)(tokens)
            return vector + jnp.tanh(self.body(vector))

    tied = make_model()
    assert_same(train(OfToken(tied.table, tied.body), loss=loss), train_plain(loss=plain))


@pytest.mark.slow
def test_each_of_stacked_layers_may_have_a_loss():
    """Layers are stacked by `eqx.filter_vmap` and run by `jax.lax.scan`."""
    keys = jax.random.split(jax.random.key(4), 3)
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(D, D, key=key))(keys)
    arrays, static = eqx.partition(layers, eqx.is_array)

    def total(decode, hidden, targets):
        def step(hidden, arrays):
            layer = eqx.combine(arrays, static)
            hidden = hidden + jnp.tanh(jax.vmap(jax.vmap(layer))(hidden))
            return hidden, decode(hidden, targets)

        return jnp.mean(lax.scan(step, hidden, arrays)[1])

    def loss(model, tokens, targets):
        decode = EmbeddingDecode(model.table)
        return total(decode.cross_entropy, jax.vmap(model)(tokens), targets)

    def plain(params, tokens, targets):
        return total(functools.partial(plain_decode, params), plain_hidden(params, tokens), targets)

    assert_same(train(make_model(), loss=loss), train_plain(loss=plain))


# State, random numbers, modes


class Normed(eqx.Module):
    """A model with batch normalisation of the means of sequences, and a count of its calls."""

    table: EmbeddingTable
    body: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    calls: eqx.nn.StateIndex

    def __init__(self, mode):
        self.table, self.body = make_table(), make_model().body
        self.norm = eqx.nn.BatchNorm(D, axis_name="batch", mode=mode)
        self.calls = eqx.nn.StateIndex(jnp.zeros((), int))

    def __call__(self, tokens, state):
        state = state.set(self.calls, state.get(self.calls) + 1)
        vectors = jnp.mean(EmbeddingLookup(self.table)(tokens), 0)
        return self.norm(vectors + jnp.tanh(self.body(vectors)), state)


class PlainNormed(NamedTuple):
    params: Plain
    norm: eqx.nn.BatchNorm

    def hidden(self, tokens, state):
        vectors = jnp.mean(self.params.rows[tokens], 0)
        return self.norm(
            vectors + jnp.tanh(self.params.weight @ vectors + self.params.shift), state
        )


MAPPED: Any = {"in_axes": (0, None), "out_axes": (0, None), "axis_name": "batch"}


def normed_loss_outside(model, state, tokens, targets):
    hidden, state = jax.vmap(model, **MAPPED)(tokens, state)
    return EmbeddingDecode(model.table).cross_entropy(hidden, targets), state


def normed_loss_inside(model, state, tokens, targets):
    def of_example(example, state):
        hidden, state = model(example[0], state)
        return EmbeddingDecode(model.table).cross_entropy(hidden, example[1]), state

    losses, state = jax.vmap(of_example, **MAPPED)((tokens, targets), state)
    return jnp.mean(losses), state


def plain_normed_loss(model, state, tokens, targets):
    hidden, state = jax.vmap(model.hidden, **MAPPED)(tokens, state)
    return plain_decode(model.params, hidden, targets), state


def train_with_state(loss, model, model_state):
    gradient = eqx.filter_value_and_grad(loss, has_aux=True)

    @eqx.filter_jit
    def step(model, states, tokens, targets):
        (value, model_state), gradients = gradient(model, states[0], tokens, targets[:, 0])
        updates, state = ADAM.update(gradients, states[1])
        return eqx.apply_updates(model, updates), (model_state, state), value

    model, (model_state, _), losses = run(step, model, (model_state, init(ADAM, model)))
    return losses, model, model_state


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("loss", [normed_loss_outside, normed_loss_inside])
@pytest.mark.slow
def test_layers_with_state_may_stand_beside_the_table(mode, loss):
    losses, model, state = train_with_state(loss, *eqx.nn.make_with_state(Normed)(mode))
    assert state.get(model.calls) == STEPS
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(D, axis_name="batch", mode=mode)
    plain = PlainNormed(to_plain(make_model()), norm)
    expected, plain, _ = train_with_state(plain_normed_loss, plain, state)
    assert_same((losses, model), (expected, plain.params))


class WithDropout(eqx.Module):
    table: EmbeddingTable
    body: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, tokens, key=None):
        vectors = self.dropout(EmbeddingLookup(self.table)(tokens), key=key)
        return vectors + jnp.tanh(jax.vmap(self.body)(vectors))


@pytest.mark.slow
def test_dropout_and_inference_mode_work_as_ever():
    keys = jax.random.split(jax.random.key(1), EXAMPLES)
    dropout = eqx.nn.Dropout(0.5)

    def loss(model, tokens, targets):
        def of_example(tokens, targets, key):
            return EmbeddingDecode(model.table).cross_entropy(model(tokens, key), targets)

        return jnp.mean(jax.vmap(of_example)(tokens, targets, keys))

    def plain(params, tokens, targets):
        vectors = jax.vmap(lambda x, key: dropout(x, key=key))(params.rows[tokens], keys)
        hidden = vectors + jnp.tanh(vectors @ params.weight.T + params.shift)
        return plain_decode(params, hidden, targets)

    tied = make_model()
    losses, model = train(WithDropout(tied.table, tied.body, dropout), loss=loss)
    model = eqx.nn.inference_mode(model)
    expected, params = train_plain(loss=plain)
    losses.append(eqx.filter_jit(batch_loss)(model, TOKENS[0], TARGETS[0]))
    expected.append(plain_loss(params, TOKENS[0], TARGETS[0]))
    assert_same((losses, model), (expected, params))


@pytest.mark.slow
def test_the_members_of_an_ensemble_are_trained_alone():
    tables = [make_table(seed) for seed in (0, 10)]

    @eqx.filter_vmap
    def make(embeddings, bias, key):
        table = EmbeddingTable(embeddings, NAMES, padding_rows=PADDING_ROWS, bias=bias)
        return Model(table, eqx.nn.Linear(D, D, key=key))

    embeddings, bias = (jnp.stack([getattr(t, n) for t in tables]) for n in ("embeddings", "bias"))
    models = make(embeddings, bias, jax.random.split(jax.random.key(2), 2))
    states = eqx.filter_vmap(functools.partial(init, ADAM))(models)
    member = eqx.if_array(0)
    step = eqx.filter_jit(eqx.filter_vmap(make_step(ADAM), in_axes=(member, member, None, None)))
    trained, _, losses = run(step, models, states)
    for i in range(2):
        before, after = (jax.tree.map(lambda x: x[i], m) for m in (models, trained))
        assert_same(([loss[i] for loss in losses], after), train_plain(params=to_plain(before)))
