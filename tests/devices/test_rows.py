"""Steps on the rows of each batch, with tables and batches that a mesh splits."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from eqx_embedding import (
    combine_rows,
    EmbeddingLookup,
    partition_rows,
    put_rows,
    resize_vocabulary,
    take_rows,
    unique_tokens,
)

from ..helpers import compile_by_default
from .helpers import assert_trees_close, collectives, make_mesh, make_table, place, with_bias


OPTIMIZER = optax.sgd(0.1, momentum=0.9)
RULES = {
    "vocabulary": {"vocabulary": "model"},
    "twice": {"vocabulary": ("data", "model")},
    "both": {"vocabulary": "model", "embedding": "data"},
    "embedding": {"embedding": "data"},
    "whole": {},
}


def step(table, state, tokens):
    ids, places = unique_tokens(tokens, tokens.size)
    small, small_state = take_rows((table, state), ids)

    def loss(small):
        biases = jnp.sum(jnp.where(ids < table.vocab_size, small.bias, 0.0))
        return jnp.mean(jnp.square(EmbeddingLookup(small)(places) - 1.0)) + biases

    gradient = eqx.filter_grad(loss)(small)
    updates, small_state = OPTIMIZER.update(gradient, small_state, small)
    small = eqx.apply_updates(small, updates)
    return put_rows((table, state), ids, (small, small_state))


def make_arguments(rows=64):
    table = with_bias(make_table(rows, padding_rows=3))
    state: optax.OptState = OPTIMIZER.init(table)  # pyright: ignore[reportArgumentType]
    tokens = np.random.default_rng(0).integers(0, rows - 3, (8, 4))
    return table, state, jnp.asarray(tokens, "int32")


def split(setting, rules, table, state, tokens, spec=P("data")):
    mesh = make_mesh(setting)
    shardings = table.shardings(mesh, rules)
    state = jax.tree.map(
        lambda node: jax.device_put(node, shardings),
        state,
        is_leaf=lambda node: isinstance(node, type(table)),
    )
    return mesh, (jax.device_put(table, shardings), state, place(mesh, tokens, *spec))


@functools.cache
def expected():
    return eqx.filter_jit(step)(*make_arguments())


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["automatic", "explicit"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("spec", [P(), P("data"), P("data", "model")], ids=str)
def test_a_step_equals_that_of_one_device(setting, rules, spec):
    mesh, arguments = split(setting, rules, *make_arguments(), spec=spec)
    with jax.set_mesh(mesh):
        new = eqx.filter_jit(step)(*arguments)
    assert_trees_close(jax.tree.map(jnp.nan_to_num, new), jax.tree.map(jnp.nan_to_num, expected()))
    for before, after in zip(*map(jax.tree.leaves, (arguments[:2], new)), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)


@pytest.mark.parametrize("setting", ["automatic", "explicit"])
@pytest.mark.parametrize("rules", [RULES["twice"], RULES["both"]], ids=["twice", "both"])
@pytest.mark.slow
def test_a_step_moves_only_rows_of_the_batch(setting, rules):
    rows = 65_536
    mesh, (table, state, tokens) = split(setting, rules, *make_arguments(rows))
    with jax.set_mesh(mesh):
        donated = eqx.filter_jit(
            lambda t, table, state: step(table, state, t), donate="all-except-first"
        )
        compiled = compile_by_default(donated.lower(tokens, table, state))
    sizes = [math.prod(shape) for shapes in collectives(compiled).values() for _, shape in shapes]
    assert sizes and max(sizes) <= tokens.size * 8
    of_device = 4 * rows * 8 / 8
    assert compiled.memory_analysis().temp_size_in_bytes < of_device / 8


@pytest.mark.parametrize("setting", ["automatic", "explicit"])
@pytest.mark.slow
def test_tokens_of_a_split_batch_have_the_places_of_one_device(setting):
    tokens = make_arguments()[2]
    here, mesh = unique_tokens(tokens, 20), make_mesh(setting)
    with jax.set_mesh(mesh):
        ids, places = jax.jit(unique_tokens, static_argnums=1)(place(mesh, tokens, "data"), 20)
    np.testing.assert_array_equal(ids, here[0])
    np.testing.assert_array_equal(places, here[1])
    if setting == "explicit":
        assert places.sharding == NamedSharding(mesh, P("data", None))


@pytest.mark.parametrize("setting", ["explicit", "a shard_map along one axis"])
@pytest.mark.slow
def test_the_tokens_of_each_device_are_found_alone(setting):
    """`jnp.searchsorted` of JAX 0.10 is an error there."""
    table, _, tokens = make_arguments()

    def of_each(table, tokens):
        def of_one(tokens):
            ids, places = unique_tokens(tokens, 5)
            return ids, places, put_rows(table, ids, take_rows(table, ids)).embeddings[:-3]

        return jax.vmap(of_one)(tokens)

    expected, mesh = of_each(table, tokens), make_mesh(setting)
    if setting != "explicit":
        of_each = jax.shard_map(
            of_each, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}
        )
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, table.shardings(mesh, {}))
        actual = jax.jit(of_each)(placed, place(mesh, tokens, "data"))
    assert_trees_close(actual, expected)


@pytest.mark.parametrize(
    "on_each_device",
    [
        lambda table, ids: put_rows(table, ids, take_rows(table, ids)),
        lambda table, _: combine_rows(*partition_rows(table, [0])),
        lambda table, _: resize_vocabulary(
            resize_vocabulary(table, 70, pad_to_multiple_of=1),
            table.vocab_size,
            pad_to_multiple_of=len(table.embeddings),
        ),
        lambda table, _: resize_vocabulary(table, table.vocab_size, fresh=table),
    ],
    ids=["take_rows", "partition_rows", "resize_vocabulary", "fresh"],
)
def test_rows_of_a_table_that_differs_in_a_shard_map_are_refused(on_each_device):
    table, _, tokens = make_arguments()
    mesh = make_mesh("automatic")

    def run(spec):
        mapped = jax.shard_map(on_each_device, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
        return jax.jit(mapped)(table, jnp.unique(tokens))

    assert_trees_close(*(jax.tree.map(jnp.nan_to_num, x) for x in (run(P()), table)))
    with pytest.raises(ValueError, match=r"differs along \['model'\].*outside of it"):
        run(P("model"))
