"""A table split over eight devices grows, shrinks, is trained by rows and saved as on one."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from eqx_embedding import (
    combine_rows,
    EmbeddingDecode,
    EmbeddingTable,
    load_safetensors,
    partition_rows,
    resize_vocabulary,
    save_safetensors,
)

from ..helpers import compile_by_default
from .helpers import assert_trees_close, collectives, make_mesh, make_table, place, random


SPECS = {
    "vocabulary": P("model", None),
    "both": P("model", "data"),
    "twice": P(("data", "model"), None),
    "embedding": P(None, "data"),
}
settings = pytest.mark.parametrize("setting", ["automatic", "explicit"])
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def split(setting, table, spec):
    return place(make_mesh(setting), table, *spec)


def skeleton_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def is_split(array, spec):
    mesh = array.sharding.mesh
    return array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)


@pytest.mark.slow
@settings
@specs
@pytest.mark.parametrize("vocab_size", [17, 29, 51])
def test_a_resized_table_equals_that_of_one_device_and_stays_split(setting, spec, vocab_size):
    table, key = make_table(32, padding_rows=3), jax.random.key(0)
    for draw in None, key:
        expected = resize_vocabulary(table, vocab_size, key=draw, pad_to_multiple_of=16)
        new = resize_vocabulary(
            split(setting, table, spec), vocab_size, key=draw, pad_to_multiple_of=16
        )
        assert new.padding_rows == expected.padding_rows
        assert is_split(new.embeddings, spec)
        assert_trees_close(new, expected)
        np.testing.assert_array_equal(np.asarray(new.embeddings)[:17], table.embeddings[:17])


@settings
@pytest.mark.slow
def test_a_table_that_each_device_has_whole_stays_so(setting):
    table, key = make_table(16, padding_rows=3), jax.random.key(0)
    here = place(make_mesh(setting), table)
    for draw in None, key:
        new = resize_vocabulary(here, 17, key=draw, pad_to_multiple_of=1)
        assert is_split(new.embeddings, P())
        assert_trees_close(new, resize_vocabulary(table, 17, key=draw, pad_to_multiple_of=1))
    trained, frozen = partition_rows(here, [3, 0])
    assert is_split(trained.embeddings, P())
    assert is_split(combine_rows(trained, frozen).embeddings, P())


@pytest.mark.slow
@settings
def test_a_bias_and_stacked_tables_stay_split(setting):
    names, rules = ("vocabulary", "embedding"), {"vocabulary": "model"}
    mesh, key = make_mesh(setting), jax.random.key(0)
    for stacked in (), (2,):
        table = EmbeddingTable(random((*stacked, 16, 8)), names, bias=random((*stacked, 16)))
        expected = resize_vocabulary(table, 18, key=key, pad_to_multiple_of=4)
        here = jax.device_put(table, table.shardings(mesh, rules))
        new = resize_vocabulary(here, 18, key=key, pad_to_multiple_of=4)
        axes = (*(None for _ in stacked), "model")
        assert is_split(new.embeddings, P(*axes)) and is_split(new.bias, P(*axes))
        assert_trees_close(new, expected)


@pytest.mark.slow
def test_under_jit_a_split_table_is_not_gathered():
    table, key = make_table(4096, padding_rows=5), jax.random.key(0)
    here = split("explicit", table, SPECS["vocabulary"])

    @eqx.filter_jit
    def grow(table, key):
        return resize_vocabulary(table, 4500, key=key, pad_to_multiple_of=4)

    new = grow(here, key)
    assert is_split(new.embeddings, SPECS["vocabulary"])
    assert_trees_close(new, resize_vocabulary(table, 4500, key=key, pad_to_multiple_of=4))
    moved = collectives(compile_by_default(grow.lower(here, None)))
    assert "all-gather" not in moved and "all-reduce" not in moved
    drawn = collectives(compile_by_default(grow.lower(here, key)))
    new_rows = (4500 - 4091) * 8
    assert all(math.prod(shape) <= new_rows for shapes in drawn.values() for _, shape in shapes)


@settings
@pytest.mark.parametrize("spec", [SPECS["vocabulary"], SPECS["both"]], ids=["vocabulary", "both"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.slow
def test_states_with_fresh_rows_stay_split(setting, spec, jit):
    optimizer, table = optax.contrib.schedule_free_adamw(1e-2), make_table(32, padding_rows=3)
    table = jax.tree.map(jnp.nan_to_num, table)
    here = split(setting, table, spec)

    def grow(table, new):
        states = [optimizer.init(x) for x in (table, new)]
        return resize_vocabulary(jax.tree.map(lambda x: x + 1, states[0]), 45, fresh=states[1])

    grow = jax.jit(grow) if jit else grow
    with jax.numpy_dtype_promotion("standard"):
        expected = grow(table, resize_vocabulary(table, 45, pad_to_multiple_of=16))
        with jax.set_mesh(make_mesh(setting)):
            new = grow(here, resize_vocabulary(here, 45, pad_to_multiple_of=16))
    assert_trees_close(new, expected)
    moments: Any = optax.tree_utils.tree_get(new, "z")
    assert is_split(moments.embeddings, spec)


@settings
def test_rows_that_the_mesh_does_not_divide_are_refused(setting):
    here = split(setting, make_table(32), SPECS["vocabulary"])
    for tree in here, skeleton_of(here):
        message = "'model', whose size 4 does not divide 33 rows. Give pad_to_multiple_of=4"
        with pytest.raises(ValueError, match=message):
            resize_vocabulary(tree, 33)


@settings
def test_a_skeleton_stays_split(setting):
    here = split(setting, make_table(32, padding_rows=3), SPECS["vocabulary"])
    new = resize_vocabulary(skeleton_of(here), 33, pad_to_multiple_of=4)
    grown = resize_vocabulary(here, 33, pad_to_multiple_of=4)
    assert new.embeddings.shape == grown.embeddings.shape
    assert new.embeddings.sharding == grown.embeddings.sharding


def rows_loss(trained, frozen, hidden, targets, rules=None):
    return EmbeddingDecode(combine_rows(trained, frozen)).cross_entropy(
        hidden, targets, rules=rules
    )


@pytest.mark.slow
@settings
@specs
def test_rows_of_a_split_table_are_trained_as_on_one_device(setting, spec):
    table, rows = make_table(32, padding_rows=3), [3, 28, 11]
    hidden, targets = random((16, 8), seed=1), jnp.arange(16) % 29
    expected = eqx.filter_jit(jax.grad(rows_loss))(*partition_rows(table, rows), hidden, targets)
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        here = place(mesh, table, *spec)
        trained, frozen = partition_rows(here, rows)
        # each device has all of the rows that are trained
        assert is_split(trained.embeddings, P(None, spec[1]))
        batch = place(mesh, (hidden, targets))
        rules = None if setting == "explicit" else {"vocabulary": spec[0]}
        gradient = eqx.filter_jit(jax.grad(rows_loss))(trained, frozen, *batch, rules)
        assert_trees_close(gradient, expected)
        for combine in combine_rows, eqx.filter_jit(combine_rows):
            moved = combine(jax.tree.map(lambda x: x + 1, trained), frozen).embeddings
            assert is_split(moved, spec)
            np.testing.assert_array_equal(
                moved, jnp.asarray(table.embeddings).at[jnp.asarray(rows)].add(1), strict=True
            )
    assert is_split(combine_rows(*partition_rows(here, rows)).embeddings, spec)


def test_to_combine_rows_moves_nothing_and_their_gradient_is_summed_once():
    table = make_table(4096)
    trained, frozen = partition_rows(
        split("explicit", table, SPECS["vocabulary"]), range(4088, 4096)
    )
    combine = compile_by_default(jax.jit(combine_rows).lower(trained, frozen))
    assert collectives(combine) == {}

    def square(trained, frozen):
        return jnp.sum(combine_rows(trained, frozen).embeddings ** 2)

    moved = collectives(compile_by_default(jax.jit(jax.grad(square)).lower(trained, frozen)))
    assert moved == {"all-reduce": {("f32", (8, 8)): 1}}


@settings
def test_a_split_table_is_saved_whole(setting, tmp_path):
    table = make_table(32, padding_rows=3)
    save_safetensors(split(setting, table, SPECS["both"]), tmp_path / "table")
    np.testing.assert_array_equal(load_safetensors(tmp_path / "table").embeddings, table.embeddings)
