"""The ways in which people train over devices with Equinox, each beside the plain model on one."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from ..helpers import assert_close
from ..idioms import (
    ADAM,
    assert_same,
    batch_loss,
    init,
    make_model,
    make_step,
    plain_adam,
    plain_decode,
    run,
    TARGETS,
    to_plain,
    TOKENS,
    V,
    vmap_of_losses,
)
from .helpers import make_mesh, place


pytestmark = pytest.mark.usefixtures("jax_defaults")

KINDS = ["automatic", "explicit"]


def whole(mesh, tree):
    return jax.tree.map(lambda x: NamedSharding(mesh, P()), tree)


def over_first_axes(mesh, tree):
    """Each array over its first axis, if it has one, as a fully sharded model is split."""
    return jax.tree.map(lambda x: NamedSharding(mesh, P("data") if x.ndim else P()), tree)


def filter_shard(shardings, tree):
    arrays, others = eqx.partition(tree, eqx.is_array)
    return eqx.combine(eqx.filter_shard(arrays, shardings(arrays)), others)


@pytest.mark.parametrize("loss", [batch_loss, vmap_of_losses])
@pytest.mark.parametrize("shardings", [whole, over_first_axes])
@pytest.mark.slow
def test_filter_shard_splits_batches_and_models(shardings, loss):
    """In and outside of `jit`, as in Equinox's example, for which no mesh is set."""
    mesh = make_mesh("automatic", 4, 1)
    split = functools.partial(filter_shard, functools.partial(shardings, mesh))
    step, batch = make_step(ADAM, loss), NamedSharding(mesh, P("data"))

    @eqx.filter_jit(donate="all")
    def sharded_step(model, state, tokens, targets):
        tokens, targets = eqx.filter_shard((tokens, targets), batch)
        model, state, value = step(*split((model, state)), tokens, targets)
        return *split((model, state)), value

    model = make_model()
    model, _, losses = run(sharded_step, *split((model, init(ADAM, model))))
    assert_same((losses, model), plain_adam())


def test_filter_shard_splits_no_explicit_axes():
    """JAX takes it for an assertion there. `jax.device_put` splits."""
    mesh = make_mesh("explicit", 4, 1)
    with jax.set_mesh(mesh), pytest.raises(AssertionError, match="reshard"):
        eqx.filter_shard(make_model().table, NamedSharding(mesh, P("data")))


def closed_over(model, tokens, targets):
    def loss(tokens, targets):
        return EmbeddingDecode(model.table).cross_entropy(model(tokens), targets)

    return jnp.mean(jax.vmap(loss)(tokens, targets))


def split_model(mesh, rules):
    model = make_model()
    table = jax.device_put(model.table, model.table.shardings(mesh, rules))
    return eqx.tree_at(lambda m: m.table, place(mesh, model), table)


LAYOUTS = [
    {"vocabulary": "model"},
    {"vocabulary": "data"},
    {"vocabulary": ("data", "model")},
    {"vocabulary": "data", "embedding": "model"},
]


@pytest.mark.parametrize(
    "kind, rules, loss",
    [(kind, rules, batch_loss) for kind in KINDS for rules in LAYOUTS]
    + [("automatic", rules, vmap_of_losses) for rules in LAYOUTS]
    + [("explicit", LAYOUTS[0], loss) for loss in (vmap_of_losses, closed_over)],
)
@pytest.mark.slow
def test_device_put_splits_tables_and_batches(kind, rules, loss):
    mesh, step = make_mesh(kind, 2, 2), make_step(ADAM, loss)

    def split_step(model, state, *batch):
        return step(model, state, *place(mesh, jax.tree.map(jnp.asarray, batch), "data"))

    with jax.set_mesh(mesh):
        model = split_model(mesh, rules)
        trained, _, losses = run(split_step, model, init(ADAM, model))
    assert trained.table.embeddings.sharding.spec == model.table.embeddings.sharding.spec
    assert_same(jax.device_get((losses, trained)), plain_adam())


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adafactor(1e-2, min_dim_size_to_factor=2),
        optax.masked(optax.adam(1e-2), lambda model: jax.tree.map(lambda x: x.ndim > 1, model)),
        optax.contrib.muon(1e-2),
        optax.sm3(1e-2),
    ],
    ids=["adafactor", "masked", "muon", "sm3"],
)
def test_the_state_of_any_optimizer_has_shardings(optimizer):
    mesh, rules = make_mesh("automatic", 2, 2), {"vocabulary": "model"}
    table = EmbeddingTable.from_config(8, {"embedding": 4}, use_bias=True, key=jax.random.key(0))

    def split(tree):
        def shardings(node):
            is_table = isinstance(node, EmbeddingTable)
            return node.shardings(mesh, rules) if is_table else NamedSharding(mesh, P())

        is_leaf = lambda node: isinstance(node, EmbeddingTable)  # noqa: E731
        return jax.device_put(tree, jax.tree.map(shardings, tree, is_leaf=is_leaf))

    @jax.jit
    def step(table, state):
        gradient = jax.tree.map(jnp.sin, table)
        updates, state = optimizer.update(gradient, state, table)
        return eqx.apply_updates(table, updates), state

    state = optimizer.init(table)
    split_table, split_state = split(table), split(state)
    assert eqx.tree_equal(jax.device_get(split_state), jax.device_get(state))
    same_shape = [x for x in jax.tree.leaves(split_state) if x.shape == (8, 4)]
    assert all(x.sharding.spec == P("model", None) for x in same_shape)
    actual, expected = step(split_table, split_state), step(table, state)
    jax.tree.map(assert_close, jax.device_get(actual), jax.device_get(expected))


@pytest.mark.parametrize(
    "loss, message",
    [
        (vmap_of_losses, "Unmapped values passed to vmap cannot be sharded"),
        (closed_over, "Call the method on the whole batch instead"),
    ],
)
def test_a_vmap_takes_no_table_split_as_its_examples(loss, message):
    mesh = make_mesh("explicit", 2, 2)
    with jax.set_mesh(mesh):
        batch = place(mesh, (jnp.asarray(TOKENS[0]), jnp.asarray(TARGETS[0])), "data")
        with pytest.raises(ValueError, match=message):
            eqx.filter_jit(loss)(split_model(mesh, {"vocabulary": "data"}), *batch)


@pytest.mark.slow
def test_jit_may_be_given_shardings():
    mesh = make_mesh("automatic", 2, 2)
    params, static = eqx.partition(make_model(), eqx.is_inexact_array)
    whole_body = whole(mesh, params)
    shardings = eqx.tree_at(
        lambda m: m.table, whole_body, params.table.shardings(mesh, {"vocabulary": "model"})
    )
    one_step = make_step(
        ADAM, lambda params, *batch: batch_loss(eqx.combine(params, static), *batch)
    )
    state = ADAM.init(params)
    batch = NamedSharding(mesh, P("data"))
    step = jax.jit(
        one_step.__wrapped__,
        in_shardings=(shardings, None, batch, batch),
        out_shardings=(shardings, None, None),
    )
    params, _, losses = run(step, params, state)
    assert params.table.embeddings.sharding.spec == P("model", None)
    assert_same((losses, params), plain_adam())


def parallel_step(loss, model, state, tokens, targets):
    """Each device has a part of the batch, and their gradients are averaged."""
    value, gradients = eqx.filter_value_and_grad(loss)(model, tokens, targets)
    value, gradients = lax.pmean((value, gradients), "data")
    updates, state = ADAM.update(gradients, state)
    return eqx.apply_updates(model, updates), state, value


@pytest.mark.parametrize("loss", [batch_loss, vmap_of_losses])
@pytest.mark.slow
def test_filter_pmap_averages_over_devices(loss):
    pmap: Any = eqx.filter_pmap
    step = pmap(
        functools.partial(parallel_step, loss),
        in_axes=(None, None, 0, 0),
        out_axes=None,
        axis_name="data",
        devices=jax.devices()[:4],
    )

    def on_four(model, state, tokens, targets):
        return step(model, state, tokens[:, None], targets[:, None])

    model = make_model()
    model, _, losses = run(on_four, model, init(ADAM, model))
    assert_same((losses, model), plain_adam())


def mean_over_devices(loss, *arguments):
    return lax.pmean(loss(*arguments), "data")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("loss", [batch_loss, vmap_of_losses])
@pytest.mark.slow
def test_a_shard_map_averages_over_devices(loss, check_vma):
    """With `check_vma`, JAX adds the gradients of what all devices have, so the loss is averaged
    before. Without it, gradients are averaged after."""
    params, static = eqx.partition(make_model(), eqx.is_inexact_array)
    loss = functools.partial(mean_over_devices, loss) if check_vma else loss

    def step(params, state, tokens, targets):
        model = eqx.combine(params, static)
        model, state, value = parallel_step(loss, model, state, tokens, targets)
        return eqx.filter(model, eqx.is_inexact_array), state, value

    specs = P(), P(), P("data"), P("data")
    mapped = jax.shard_map(
        step, mesh=make_mesh("automatic", 4, 1), in_specs=specs, out_specs=P(), check_vma=check_vma
    )
    params, _, losses = run(jax.jit(mapped), params, ADAM.init(params))
    assert_same((losses, params), plain_adam())


@pytest.mark.slow
def test_a_shard_map_asks_for_rules_if_tables_vary():
    """If the gradients of each device are wanted alone."""
    mesh, rules = make_mesh("automatic", 4, 1), {"vocabulary": None}

    def gradient(rules, table, tokens, targets):
        table = lax.pcast(table, "data", to="varying")

        def loss(table):
            hidden = EmbeddingLookup(table)(tokens, rules=rules)
            return EmbeddingDecode(table).cross_entropy(hidden, targets, rules=rules)

        return lax.pmean(jax.grad(loss)(table), "data")

    def mapped(rules):
        specs = P(), P("data"), P("data")
        function = functools.partial(gradient, rules)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P())

    table = make_model().table
    with pytest.raises(ValueError, match="if each device has a table of its own, by rules"):
        jax.jit(mapped(None))(table, TOKENS[0], TARGETS[0])

    def plain(params):
        return plain_decode(params, params.rows[TOKENS[0]], TARGETS[0])

    actual = jax.jit(mapped(rules))(table, TOKENS[0], TARGETS[0])
    expected = jax.grad(plain)(to_plain(make_model()))
    assert_close(actual.embeddings[:V], expected.rows)
    assert_close(actual.bias[:V], expected.bias)


def test_a_table_may_be_gathered_in_a_shard_map():
    """Each device stores a part of the table, and gets its part of the gradient."""
    mesh, rules = make_mesh("automatic", 4, 1), {"vocabulary": None}

    def gradient(rules, part, tokens, targets):
        def loss(part):
            table = jax.tree.map(lambda x: lax.all_gather(x, "data", tiled=True), part)
            hidden = EmbeddingLookup(table)(tokens, rules=rules)
            return EmbeddingDecode(table).cross_entropy(hidden, targets, rules=rules)

        # JAX adds the gradients of all devices
        return jax.tree.map(lambda x: x / lax.axis_size("data"), jax.grad(loss)(part))

    def mapped(rules):
        function = functools.partial(gradient, rules)
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data"))
        )

    table = make_model().table
    with pytest.raises(ValueError, match="also for a whole table from `jax.lax.all_gather`"):
        mapped(None)(table, TOKENS[0], TARGETS[0])

    def plain(params):
        return plain_decode(params, params.rows[TOKENS[0]], TARGETS[0])

    actual = mapped(rules)(table, TOKENS[0], TARGETS[0])
    expected = jax.grad(plain)(to_plain(make_model()))
    assert_close(actual.embeddings[:V], expected.rows)
    assert_close(actual.bias[:V], expected.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_each_device_may_have_a_member_of_an_ensemble(kind):
    mesh = make_mesh(kind, 4, 1)
    members = [make_model(seed) for seed in range(4)]
    models = jax.tree.map(lambda *x: jnp.stack(x), *members)
    states = eqx.filter_vmap(functools.partial(init, ADAM))(models)
    member: Any = eqx.if_array(0)
    step = eqx.filter_jit(eqx.filter_vmap(make_step(ADAM), in_axes=(member, member, None, None)))
    with jax.set_mesh(mesh):
        models, states = place(mesh, (models, states), "data")
        trained, _, losses = run(step, models, states)
    assert trained.table.embeddings.sharding.spec[0] == "data"
    first = jax.tree.map(lambda x: x[0], jax.device_get((losses, trained)))
    assert_same(first, plain_adam())
