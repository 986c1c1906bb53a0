"""Training some rows of a vocabulary: always the same, or those of each batch."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from eqx_embedding import (
    combine_rows,
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    partition_rows,
    put_rows,
    resize_vocabulary,
    take_rows,
    unique_tokens,
)

from .helpers import (
    assert_close,
    compile_by_default,
    float64,
    FOUR_TARGETS,
    FOUR_TOKENS,
    LAYOUTS,
    make_array,
    make_table,
    NAMES,
    temporaries,
    VOCAB_SIZE,
)


class Model(eqx.Module):
    tokens: EmbeddingTable
    positions: EmbeddingTable
    layer: eqx.nn.Linear
    untied: EmbeddingTable

    def __init__(self, vocab_size, size, key):
        keys = jax.random.split(key, 4)
        axes = {"embedding": size}
        self.tokens = EmbeddingTable.from_config(
            vocab_size, axes, pad_to_multiple_of=8, key=keys[0]
        )
        self.positions = EmbeddingTable.from_config(16, axes, "position", key=keys[1])
        self.layer = eqx.nn.Linear(size, size, key=keys[2])
        self.untied = EmbeddingTable.from_config(vocab_size, axes, use_bias=True, key=keys[3])

    def loss(self, tokens, targets):
        x = EmbeddingLookup(self.tokens)(tokens)
        hidden = x + jnp.tanh(x @ self.layer.weight.T)
        tied = EmbeddingDecode(self.tokens).cross_entropy(hidden, targets)
        return tied + EmbeddingDecode(self.untied).cross_entropy(hidden, targets)


def make_step(optimizer):
    @eqx.filter_jit
    def step(trained, frozen, opt_state, tokens, targets):
        def loss(trained):
            return combine_rows(trained, frozen).loss(tokens, targets)

        value, gradient = eqx.filter_value_and_grad(loss)(trained)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return value, eqx.apply_updates(trained, updates), opt_state

    return step


def batch(vocab_size, count=64, seed=0):
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (2, count))
    return jnp.asarray(tokens[0]), jnp.asarray(tokens[1])


ROWS = [3, 40, 17]


@pytest.mark.usefixtures("jax_defaults")
def test_after_100_steps_of_adamw_with_weight_decay_all_other_rows_are_bit_for_bit_the_same():
    model = Model(50, 8, jax.random.key(0))
    optimizer = optax.adamw(1e-2, weight_decay=0.3)
    trained, frozen = partition_rows(model, ROWS)
    opt_state: Any = optimizer.init(trained)
    step = make_step(optimizer)
    losses = []
    for _ in range(100):
        loss, trained, opt_state = step(trained, frozen, opt_state, *batch(50))
        losses.append(float(loss))
    after = combine_rows(trained, frozen)
    assert losses[-1] < losses[0] - 0.02

    others = np.setdiff1d(np.arange(56), ROWS)
    for part in lambda m: m.tokens.embeddings, lambda m: m.untied.embeddings:
        old, new = np.asarray(part(model)), np.asarray(part(after))
        kept = others[others < len(old)]
        np.testing.assert_array_equal(new[kept], old[kept])
        assert np.all(np.any(new[ROWS] != old[ROWS], axis=1))
    np.testing.assert_array_equal(np.delete(after.untied.bias, ROWS), 0)
    assert np.all(np.asarray(after.untied.bias)[ROWS] != 0)
    assert eqx.tree_equal((after.positions, after.layer), (model.positions, model.layer))
    # Moments of three rows of both tables, and of three entries of the bias, and no others.
    for moments in opt_state[0].mu, opt_state[0].nu:
        assert [leaf.shape for leaf in jax.tree.leaves(moments)] == [(3, 8), (3, 8), (3,)]


@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: optax.lion(1e-2, weight_decay=0.1),
        lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2, weight_decay_rate=0.1),
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1e-2, weight_decay=0.1)),
        lambda: optax.contrib.muon(1e-2, weight_decay=0.1),
        lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=1, weight_decay=0.1),
        lambda: optax.inject_hyperparams(optax.adamw)(1e-2),
    ],
    ids=["sgd", "lion", "adafactor", "lamb", "muon", "schedule-free", "inject_hyperparams"],
)
def test_any_optimizer_moves_the_rows_and_no_others(make):
    table = EmbeddingTable(make_array((9, 4)), ("vocabulary", "embedding"))
    trained, frozen = partition_rows(table, [8, 2, 5])
    optimizer = make()
    opt_state = optimizer.init(trained)
    opt_state = jax.tree.map(jnp.array, opt_state)  # some optimizers keep `trained` in it as it is

    @eqx.filter_jit(donate="all")
    def step(trained, opt_state):
        def loss(trained):
            table = combine_rows(trained, frozen)
            hidden = EmbeddingLookup(table)(jnp.arange(9))
            return EmbeddingDecode(table).cross_entropy(hidden, jnp.arange(9)[::-1])

        gradient = eqx.filter_grad(loss)(trained)
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return eqx.apply_updates(trained, updates), opt_state

    for _ in range(3):
        trained, opt_state = step(trained, opt_state)
    new, old = np.asarray(combine_rows(trained, frozen).embeddings), np.asarray(table.embeddings)
    np.testing.assert_array_equal(np.any(new != old, axis=1), np.isin(np.arange(9), [2, 5, 8]))


def test_the_gradient_is_that_of_the_whole_model_at_the_rows():
    model = Model(50, 8, jax.random.key(1))
    trained, frozen = partition_rows(model, ROWS)

    def loss(trained, frozen):
        return combine_rows(trained, frozen).loss(*batch(50))

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(trained, frozen)
    expected, whole = eqx.filter_jit(eqx.filter_value_and_grad(Model.loss))(model, *batch(50))
    assert_close(value, expected)
    index = jnp.asarray(ROWS)
    assert_close(gradient.tokens.embeddings, whole.tokens.embeddings[index])
    assert_close(gradient.untied.embeddings, whole.untied.embeddings[index])
    assert_close(gradient.untied.bias, whole.untied.bias[index])
    assert gradient.layer.weight is None and gradient.positions.embeddings is None


def test_the_logits_of_a_loss_never_exist():
    V, D, N = 4096, 16, 4096
    table = EmbeddingTable(jnp.zeros((V, D)), ("vocabulary", "embedding"))
    trained, frozen = partition_rows(table, range(V - 8, V))

    def loss(trained, frozen, tokens):
        table = combine_rows(trained, frozen)
        return EmbeddingDecode(table).cross_entropy(EmbeddingLookup(table)(tokens), tokens)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    compiled = compile_by_default(gradient.lower(trained, frozen, jnp.zeros(N, "int32")))
    assert temporaries(compiled) < 4 * N * V / 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "rows, expected",
    [
        ([5, np.int64(0)], [5, 0]),
        (range(4, 7), [4, 5, 6]),
        ((2, 3), [2, 3]),
        (slice(-2, None), [5, 6]),
        (slice(5, 1, -2), [5, 3]),
        (np.array([6, 1], np.uint8), [6, 1]),
        (np.arange(VOCAB_SIZE) % 3 == 1, [1, 4]),
        (jnp.asarray([3]), [3]),
    ],
    ids=["list", "range", "tuple", "slice", "backwards", "uint8", "mask", "jax"],
)
def test_rows_are_named_in_many_ways_and_come_back_where_they_were(layout, rows, expected, dtype):
    table = make_table(layout, dtype)
    axis = table.axis_names.index("vocabulary")
    trained, frozen = partition_rows(table, rows)
    assert trained.embeddings.dtype == dtype
    np.testing.assert_array_equal(
        trained.embeddings, np.take(np.asarray(table.embeddings), expected, axis)
    )
    assert eqx.tree_equal(combine_rows(trained, frozen), table)
    new = combine_rows(jax.tree.map(lambda x: x + 1, trained), frozen)
    reference = np.array(table.embeddings)
    reference[(slice(None),) * axis + (expected,)] += 1
    np.testing.assert_array_equal(new.embeddings, reference)
    assert new.embeddings.dtype == dtype


def test_other_parameters_are_trained_as_well_where_filter_spec_says_so():
    model = Model(10, 4, jax.random.key(0))
    trained, frozen = partition_rows(model, [9], filter_spec=eqx.is_inexact_array)
    assert trained.tokens.embeddings.shape == trained.untied.embeddings.shape == (1, 4)
    assert trained.layer is not None and trained.positions.embeddings.shape == (16, 4)
    doubled = combine_rows(jax.tree.map(lambda x: 2 * x, trained), frozen)
    np.testing.assert_array_equal(doubled.layer.weight, 2 * model.layer.weight)
    np.testing.assert_array_equal(doubled.tokens.embeddings[:9], model.tokens.embeddings[:9])
    np.testing.assert_array_equal(doubled.tokens.embeddings[9], 2 * model.tokens.embeddings[9])

    spec = eqx.tree_at(lambda m: m.layer.bias, jax.tree.map(lambda _: False, model), replace=True)
    trained, frozen = partition_rows(model, [9], filter_spec=spec)
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(1, 4), (4,), (1, 4), (1,)]
    assert eqx.tree_equal(combine_rows(trained, frozen), model)


def test_another_vocabulary_of_the_model_and_stacked_tables_can_be_trained_by_rows():
    model = Model(10, 4, jax.random.key(0))
    trained, frozen = partition_rows(model, [15], "position")
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(1, 4)]
    stacked = EmbeddingTable(make_array((3, 9, 4)), ("vocabulary", "embedding"), padding_rows=2)
    trained, frozen = partition_rows(stacked, [6, 2])
    np.testing.assert_array_equal(trained.embeddings, stacked.embeddings[:, np.array([6, 2])])
    assert eqx.tree_equal(combine_rows(trained, frozen), stacked)


def test_the_two_parts_of_stacked_tables_are_combined_one_by_one_under_vmap_and_scan():
    # so square that a mistaken axis would show in no shape
    stacked = EmbeddingTable(make_array((3, 4, 4)), ("vocabulary", "embedding"))
    trained, frozen = partition_rows(stacked, [3, 1, 0, 2])

    def combine(_, parts):
        rows, model = parts
        return None, combine_rows(rows, eqx.tree_at(lambda f: f.model, frozen, model))

    parts = trained, frozen.model
    assert eqx.tree_equal(jax.lax.scan(combine, None, parts)[1], stacked)
    assert eqx.tree_equal(eqx.filter_vmap(lambda parts: combine(None, parts)[1])(parts), stacked)


def test_a_table_tied_by_eqx_nn_shared_stays_tied():
    table: Any = make_table("first", with_bias=True)
    layers = eqx.nn.Sequential([EmbeddingLookup(table), EmbeddingDecode(table)])
    shared = eqx.nn.Shared(layers, where=lambda s: s[1].table, get=lambda s: s[0].table)
    trained, frozen = partition_rows(shared, [0, 6])
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(2, 4), (2,)]
    assert eqx.tree_equal(combine_rows(trained, frozen), shared)
    changed = combine_rows(jax.tree.map(lambda x: x + 1, trained), frozen)()
    assert changed[0].table.embeddings is changed[1].table.embeddings
    np.testing.assert_array_equal(changed[1].table.bias[6], table.bias[6] + 1)
    np.testing.assert_array_equal(changed[1].table.bias[1:6], table.bias[1:6])


def test_other_rows_of_the_same_number_compile_nothing_anew():
    table = make_table("first")
    compiled = []

    @eqx.filter_jit
    def combine(trained, frozen):
        compiled.append(None)
        return combine_rows(trained, frozen)

    for rows in [1, 2], [6, 0]:
        trained, frozen = partition_rows(table, rows)
        assert all(map(eqx.is_array, jax.tree.leaves(frozen)))
        assert eqx.tree_equal(combine(trained, frozen), table)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "rows, message",
    [
        ([1, 2, 1], r"must be unique, got \[1\] more than once"),
        ([0, 7], r"7 tokens, so rows must be at least 0 and below 7, got \[7\]"),
        ([-1], r"got \[-1\]"),
        ([2**40], r"got \[1099511627776\]"),
        (range(20), r"got \[7, 8, 9, 10, 11\]\.$"),
        (2 * [0, 1, 2, 3, 4, 5], r"must be unique, got \[0, 1, 2, 3, 4\] more than"),
        ([], "at least one integer"),
        (slice(3, 3), "at least one integer"),
        (np.zeros(7, bool), "at least one integer"),
        (np.ones(9, bool), r"a boolean for each of the 7 tokens, got bool of shape \(9,\)"),
        (np.array([0.5]), r"got float64 of shape \(1,\)"),
        (np.array([[1], [2]]), r"shape \(2, 1\)"),
        (3, r"shape \(\)"),
    ],
)
def test_rows_that_make_no_sense_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        partition_rows(make_table("first"), rows)


def test_numpy_arrays_are_split_and_combined_like_jax_arrays():
    table = make_table("last", with_bias=True)
    for dtype in np.float32, np.float64:  # JAX narrows float64 outside of its 64-bit mode
        given = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), table)
        trained, frozen = partition_rows(given, np.asarray([6, 2]))
        assert eqx.tree_equal(combine_rows(trained, frozen), table)
        restored = jax.tree.map(np.asarray, (trained, frozen))
        assert eqx.tree_equal(combine_rows(*restored), table)


def test_a_vocabulary_that_is_not_there_and_parts_of_two_models_are_refused():
    with pytest.raises(ValueError, match="'bytes': this tree has tables of 'vocabulary'"):
        partition_rows(make_table("first"), [1], "bytes")
    trained, _ = partition_rows(make_table("first"), [1])
    _, frozen = partition_rows(make_table("middle"), [1])
    with pytest.raises(ValueError, match="the two results of one call of partition_rows"):
        combine_rows(trained, frozen)
    # one row would be broadcast to two
    _, frozen = partition_rows(make_table("first"), [1, 2])
    message = r"shape \(2, 4\) for the 2 rows of a table of shape \(9, 4\), got \(1, 4\)"
    with pytest.raises(ValueError, match=message):
        combine_rows(trained, frozen)
    with pytest.raises(ValueError, match="'vocabulary' hold no arrays"):
        partition_rows(eqx.filter(make_table("first"), False), [1])


def test_rows_without_their_table_are_no_vocabulary():
    trained, _ = partition_rows(make_table("first"), [1, 2])
    state: Any = optax.adam(1e-3).init(trained)
    message = "2 rows, 2 of them padding.*use `combine_rows` first"
    for tree in trained, state:
        with pytest.raises(ValueError, match=message):
            resize_vocabulary(tree, 9, pad_to_multiple_of=1)
        with pytest.raises(ValueError, match=message):
            partition_rows(tree, [0])


def test_a_skeleton_is_split_by_filter_eval_shape():
    skeleton = eqx.filter_eval_shape(lambda: make_table("middle"))
    with pytest.raises(ValueError, match="a skeleton has no rows .* `eqx.filter_eval_shape"):
        partition_rows(skeleton, [1])
    parts = eqx.filter_eval_shape(lambda model: partition_rows(model, [1, 5]), skeleton)
    assert parts[0].embeddings.shape == (2, 2, 3)
    assert eqx.tree_equal(eqx.filter_eval_shape(combine_rows, *parts), skeleton)


def test_the_trained_part_is_refused_as_a_model():
    table = EmbeddingTable(make_array((12, 4)), NAMES, padding_rows=4)
    trained, _ = partition_rows(table, [0, 1, 2])
    for use in (
        lambda: EmbeddingLookup(trained)(FOUR_TOKENS),
        lambda: EmbeddingDecode(trained)(jnp.ones((4, 4))),
        lambda: EmbeddingDecode(trained).cross_entropy(jnp.ones((4, 4)), FOUR_TARGETS),
    ):
        with pytest.raises(ValueError, match="3 rows, 4 of them padding.*`combine_rows` first"):
            use()
    # without padding nothing shows that its tables are a part: they count from their first row
    trained, _ = partition_rows(make_table("first"), [4, 6, 1])
    rows = EmbeddingLookup(trained, "clip")(np.asarray([0]))
    np.testing.assert_array_equal(rows, make_table("first").embeddings[4][None])


def test_resized_frozen_rows_are_refused():
    for size in (3, 6, 12):
        trained, frozen = partition_rows(EmbeddingTable(make_array((9, 4)), NAMES), [4, 6])
        with pytest.raises(ValueError, match=f"{size} tokens, but had 9.*before you resize"):
            combine_rows(trained, resize_vocabulary(frozen, size))


def test_of_two_partitions_the_frozen_rows_hold():
    table = make_table("first")
    (trained, _), (_, frozen) = partition_rows(table, [1, 2]), partition_rows(table, [3, 4])
    combined = combine_rows(trained, frozen).embeddings
    np.testing.assert_array_equal(combined[3:5], table.embeddings[1:3])


# The rows of each batch

NO_TOKEN = 2**31 - 1


@pytest.mark.parametrize("size", [1, 3, 4, 9])
@pytest.mark.parametrize("shape", [(8,), (2, 4), ()])
def test_unique_tokens_are_those_of_numpy(shape, size):
    tokens = np.random.default_rng(size).integers(0, 6, shape)
    expected = np.unique(tokens)
    for given in tokens, jnp.asarray(tokens), tokens.astype(np.uint8):
        ids, places = jax.jit(unique_tokens, static_argnums=1)(given, size)
        assert ids.dtype == places.dtype == np.int32 and places.shape == shape
        kept = expected[:size]
        np.testing.assert_array_equal(ids[: len(kept)], kept)
        np.testing.assert_array_equal(ids[len(kept) :], NO_TOKEN)
        fits = np.isin(tokens, kept)
        np.testing.assert_array_equal(np.asarray(places)[~fits], -1)
        np.testing.assert_array_equal(np.asarray(ids)[np.asarray(places)[fits]], tokens[fits])


def test_tokens_that_are_no_tokens_have_no_place():
    tokens = np.asarray([5, -1, 2**40 + 3, NO_TOKEN, 3, 2**31 + 3])
    ids, places = unique_tokens(tokens, 6)
    np.testing.assert_array_equal(ids, [3, 5, *[NO_TOKEN] * 4])
    np.testing.assert_array_equal(places, [1, -1, -1, -1, 0, -1])
    ids, places = unique_tokens(np.zeros(0, int), 2)
    np.testing.assert_array_equal(ids, [NO_TOKEN] * 2)
    assert places.shape == (0,)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        unique_tokens(tokens, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_taken_rows_are_those_of_numpy_and_go_back(layout, dtype):
    table: Any = make_table(layout, dtype, with_bias=True, padding=np.nan)
    axis = table.axis_names.index("vocabulary")
    tokens = np.asarray([5, 0, NO_TOKEN, 6])
    for given in tokens, jnp.asarray(tokens, "int32"):
        small = take_rows(table, given)
        assert small.padding_rows == 0 and small.embeddings.dtype == small.bias.dtype == dtype
        kept = np.asarray([5, 0, 6])
        for part, i in (("embeddings", axis), ("bias", 0)):
            rows = np.moveaxis(float64(getattr(small, part)), i, 0)
            whole = np.moveaxis(float64(getattr(table, part)), i, 0)
            np.testing.assert_array_equal(rows[[0, 1, 3]], whole[kept])
            np.testing.assert_array_equal(rows[2], 0)
        same = put_rows(table, given, small)
        assert eqx.tree_equal(*(jax.tree.map(jnp.nan_to_num, tree) for tree in (same, table)))
        new = jax.jit(put_rows)(table, given, jax.tree.map(lambda x: x + 1, small))
        expected = np.moveaxis(np.array(table.embeddings), axis, 0)
        expected[kept] += 1
        rows = np.moveaxis(np.asarray(new.embeddings), axis, 0)
        np.testing.assert_array_equal(float64(rows), float64(expected))
        assert new.padding_rows == 2 and new.embeddings.dtype == dtype


@pytest.mark.parametrize("jit", [False, True])
def test_rows_out_of_range_are_nan_and_never_written(jit):
    table = make_table("first", with_bias=True)
    counts = jnp.arange(1, 10, dtype="int32")[:, None]
    seen = eqx.tree_at(lambda t: t.embeddings, dataclasses.replace(table, bias=None), counts)
    tree = {"table": table, "seen": seen}
    tokens = jnp.asarray([-1, 2, 7, 8, 9, -9, NO_TOKEN - 1, NO_TOKEN])  # 7 and 8 are padding
    take: Any = jax.jit(take_rows) if jit else take_rows
    put: Any = jax.jit(put_rows) if jit else put_rows
    small = take(tree, tokens)
    missing = np.asarray([True, False, True, True, True, True, True, False])
    rows = np.asarray(small["table"].embeddings)
    np.testing.assert_array_equal(np.isnan(rows), np.tile(missing[:, None], 4))
    np.testing.assert_array_equal(np.isnan(small["table"].bias), missing)
    np.testing.assert_array_equal(rows[-1], 0)
    np.testing.assert_array_equal(small["seen"].embeddings, [[0], [3], *[[0]] * 6])
    new = put(tree, tokens, jax.tree.map(lambda x: x + 1, small))
    np.testing.assert_array_equal(
        np.delete(new["table"].embeddings, 2, 0), np.delete(table.embeddings, 2, 0)
    )
    np.testing.assert_array_equal(new["table"].embeddings[2], table.embeddings[2] + 1)
    np.testing.assert_array_equal(new["seen"].embeddings[:, 0], [1, 2, 4, 4, 5, 6, 7, 8, 9])


def test_tokens_that_repeat_are_an_error_or_nan():
    table = make_table("first", with_bias=True)
    tokens = jnp.asarray([3, 1, 3, NO_TOKEN, NO_TOKEN, -1, -1])
    small = take_rows(table, tokens)
    np.testing.assert_array_equal(small.embeddings[0], small.embeddings[2])
    for given in tokens, np.asarray(tokens):
        with pytest.raises(ValueError, match=r"got \[3\] more than once.*`unique_tokens`"):
            put_rows(table, given, small)
    new = jax.jit(put_rows)(table, tokens, jax.tree.map(lambda x: x + 1, small))
    np.testing.assert_array_equal(np.isnan(new.embeddings).all(1), np.arange(9) == 3)
    np.testing.assert_array_equal(np.isnan(new.bias), np.arange(9) == 3)
    np.testing.assert_array_equal(new.embeddings[1], table.embeddings[1] + 1)


def test_everything_but_the_tables_comes_from_rows():
    model = Model(10, 4, jax.random.key(0))
    state: Any = optax.adam(1e-3).init(eqx.filter(model, eqx.is_array))
    tree = model, state
    small = take_rows(tree, np.asarray([9, 2]))
    assert eqx.tree_equal(small[0].positions, model.positions) and small[1][0].count == 0
    assert [x.shape for x in jax.tree.leaves(small[1][0].mu)] == [
        (2, 4), (16, 4), (4, 4), (4,), (2, 4), (2,)
    ]  # fmt: skip
    changed = jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, small)
    new, new_state = put_rows(tree, np.asarray([9, 2]), changed)
    assert eqx.tree_equal(new.positions, changed[0].positions) and new_state[0].count == 1
    rows = np.isin(np.arange(16), [2, 9])
    np.testing.assert_array_equal(np.any(new.tokens.embeddings != model.tokens.embeddings, 1), rows)
    np.testing.assert_array_equal(np.any(new_state[0].nu.untied.embeddings != 0, 1), rows[:10])
    other = take_rows(tree, np.asarray([15]), "position")
    assert other[0].positions.embeddings.shape == (1, 4) and eqx.tree_equal(
        other[0].tokens, model.tokens
    )
    nothing = {"layer": model.layer}
    assert eqx.tree_equal(take_rows(nothing, np.asarray([1])), nothing)
    assert eqx.tree_equal(put_rows(nothing, np.asarray([1]), nothing), nothing)


def test_stacked_and_shared_tables_are_taken_apart():
    stacked: Any = EmbeddingTable(make_array((3, 9, 4)), NAMES, bias=make_array((3, 9)))
    small = take_rows(stacked, np.asarray([6, 2]))
    np.testing.assert_array_equal(small.embeddings, stacked.embeddings[:, np.asarray([6, 2])])
    np.testing.assert_array_equal(small.bias, stacked.bias[:, np.asarray([6, 2])])
    assert eqx.tree_equal(put_rows(stacked, np.asarray([6, 2]), small), stacked)
    mapped = eqx.filter_vmap(take_rows, in_axes=(eqx.if_array(0), None))(
        stacked, jnp.asarray([6, 2])
    )
    assert eqx.tree_equal(mapped, small)
    table: Any = make_table("first", with_bias=True)
    layers = eqx.nn.Sequential([EmbeddingLookup(table), EmbeddingDecode(table)])
    shared = eqx.nn.Shared(layers, where=lambda s: s[1].table, get=lambda s: s[0].table)
    rows = take_rows(shared, np.asarray([5]))
    assert [leaf.shape for leaf in jax.tree.leaves(eqx.filter(rows, eqx.is_array))] == [
        (1, 4),
        (1,),
    ]
    assert eqx.tree_equal(put_rows(shared, np.asarray([5]), rows), shared)


class Words(eqx.Module):
    """Predicts the vectors of words by those of their neighbours: no tied head."""

    words: EmbeddingTable
    layer: eqx.nn.Linear

    def loss(self, tokens):
        x = EmbeddingLookup(self.words)(tokens)
        return jnp.mean(jnp.square(jax.vmap(self.layer)(x[0]) - x[1]))


def make_words():
    words = EmbeddingTable(make_array((40, 4)), NAMES, padding_rows=4)
    return Words(words, eqx.nn.Linear(4, 4, key=jax.random.key(0)))


def dense_step(optimizer) -> Any:
    def step(model, state, tokens):
        loss, gradient = eqx.filter_value_and_grad(Words.loss)(model, tokens)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_array))
        return loss, (eqx.apply_updates(model, updates), state)

    return step


def sparse_step(optimizer, size=16) -> Any:
    dense = dense_step(optimizer)

    def step(model, state, tokens):
        ids, places = unique_tokens(tokens, size)
        small = take_rows((model, state), ids)
        loss, small = dense(*small, places)
        return loss, put_rows((model, state), ids, small)

    return step


BATCHES = jnp.asarray(np.random.default_rng(0).integers(0, 36, (6, 2, 8)))


@pytest.mark.usefixtures("jax_defaults")
def test_steps_of_sgd_equal_the_dense_ones_bit_for_bit():
    optimizer = optax.sgd(0.3)
    results = []
    for step in dense_step(optimizer), sparse_step(optimizer):
        step, model = eqx.filter_jit(step), make_words()
        state = optimizer.init(eqx.filter(model, eqx.is_array))
        loss = None
        for tokens in BATCHES:
            loss, (model, state) = step(model, state, tokens)
        results.append((loss, model))
    assert eqx.tree_equal(*results)
    assert np.any(results[0][1].words.embeddings != make_words().words.embeddings)


@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
        lambda: optax.rprop(1e-2),
        lambda: optax.contrib.schedule_free_adamw(1e-2),
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.lion(1e-2)),
    ],
    ids=["adamw", "nesterov", "rprop", "schedule-free", "chain"],
)
def test_steps_move_the_rows_of_their_batch_alone(make):
    """Lazy updates: each step is the dense one of a model with only the rows of the batch."""
    optimizer, step = make(), eqx.filter_jit(sparse_step(make()))
    model: Any = make_words()
    state: Any = optimizer.init(eqx.filter(model, eqx.is_array))
    state = jax.tree.map(jnp.array, state)
    for tokens in BATCHES:
        before = np.asarray(model.words.embeddings)
        rows, places = np.unique(np.asarray(tokens), return_inverse=True)
        by_hand = jax.tree.map(
            lambda x: x[rows] if eqx.is_array(x) and x.shape == (40, 4) else x, (model, state)
        )
        by_hand = eqx.tree_at(lambda t: t[0].words, by_hand, EmbeddingTable(before[rows], NAMES))
        by_hand_state = without_padding(by_hand[1])
        _, (expected, _) = dense_step(optimizer)(
            by_hand[0], by_hand_state, jnp.asarray(places.reshape(tokens.shape))
        )
        _, (model, state) = step(model, state, tokens)
        after = np.asarray(model.words.embeddings)
        assert_close(after[rows], expected.words.embeddings, 1e-4, 1e-6)
        assert_close(model.layer.weight, expected.layer.weight, 1e-4, 1e-6)
        np.testing.assert_array_equal(np.delete(after, rows, 0), np.delete(before, rows, 0))


def without_padding(tree):
    is_table = lambda node: isinstance(node, EmbeddingTable)  # noqa: E731
    return jax.tree.map(
        lambda node: EmbeddingTable(node.embeddings, NAMES) if is_table(node) else node,
        tree,
        is_leaf=is_table,
    )


@pytest.mark.usefixtures("jax_defaults")
def test_too_few_places_make_the_loss_nan():
    model, optimizer = make_words(), optax.sgd(0.3)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    loss, _ = sparse_step(optimizer, size=3)(model, state, BATCHES[0])
    assert np.isnan(loss)


@pytest.mark.usefixtures("jax_defaults")
def test_steps_work_in_a_scan():
    optimizer = optax.adam(1e-2)
    step, model = sparse_step(optimizer), make_words()
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    params, static = eqx.partition((model, state), eqx.is_array)

    @jax.jit
    def run(params, batches):
        def body(params, tokens):
            loss, new = step(*eqx.combine(params, static), tokens)
            return eqx.filter(new, eqx.is_array), loss

        return jax.lax.scan(body, params, batches)

    scanned, losses = run(params, BATCHES)
    jitted = eqx.filter_jit(step)
    for tokens, loss in zip(BATCHES, losses, strict=True):
        expected, (model, state) = jitted(model, state, tokens)
        assert_close(loss, expected)
    for one, other in zip(*map(jax.tree.leaves, (scanned, (model, state))), strict=True):
        assert_close(one, other, 1e-5, 1e-6)


@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("steps", [1, 3])
def test_a_donated_step_copies_no_table(steps):
    V, D, N = 65_536, 16, 64
    optimizer = optax.adam(1e-2)
    model = Words(
        EmbeddingTable(jnp.zeros((V, D)), NAMES), eqx.nn.Linear(D, D, key=jax.random.key(0))
    )
    model = eqx.filter(model, eqx.is_array)
    state = optimizer.init(model)
    step = sparse_step(optimizer, 2 * N)

    @eqx.filter_jit(donate="all-except-first")
    def run(batches, params):
        return jax.lax.scan(lambda params, tokens: step(*params, tokens)[::-1], params, batches)

    lowered = run.lower(jnp.zeros((steps, 2, N), "int32"), (model, state))
    memory = compile_by_default(lowered).memory_analysis()
    table = 4 * V * D
    assert memory.temp_size_in_bytes < table / 16
    assert memory.alias_size_in_bytes > 3 * table  # the table and two moments


def test_gradients_pass_through_take_and_put():
    table, tokens = make_table("first", with_bias=True), jnp.asarray([5, 0, NO_TOKEN, 8])

    def loss(table, factor):
        small = jax.tree.map(
            lambda x: factor * jnp.where(jnp.isnan(x), 0.0, x), take_rows(table, tokens)
        )
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(put_rows(table, tokens, small)))

    def reference(table, factor):
        rows = jnp.asarray([5, 0])

        def total(x):
            return jnp.sum(jnp.sin(x.at[rows].set(factor * x[rows])))

        return sum(map(total, jax.tree.leaves(table)))

    actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(table, 1.5)
    expected = jax.jit(jax.value_and_grad(reference, (0, 1)))(table, 1.5)
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert_close(one, other, 1e-5, 1e-6)


ONE = np.asarray([1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: take_rows([t, resized(t)], ONE), r"same size, got 7 tokens at tree\[0\]"),
        (lambda t: take_rows(jax.eval_shape(lambda: t), ONE), "a skeleton has no rows"),
        (lambda t: put_rows(t, ONE, take_rows(t, FOUR_TOKENS)), "for the 1 rows of a table"),
        (lambda t: put_rows(t, ONE, [t]), "rows must have the structure of the tree"),
        (lambda t: put_rows([t], ONE, [None]), "rows must have the structure of the tree"),
        (lambda t: put_rows(t, ONE, without_bias(t)), "the tables of rows must have arrays where"),
        (lambda t: put_rows(without_array(t), ONE, take_rows(t, ONE)), "must have arrays where"),
        (lambda t: take_rows(t, ONE, "words"), "'words': this tree has tables of 'vocabulary'"),
        (lambda t: put_rows(t, ONE, t, "words"), "'words': this tree has tables of 'vocabulary'"),
        (lambda t: take_rows(factored_state(t), ONE), "no rows to take: use an optimizer whose"),
    ],
)
def test_rows_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_table("first", with_bias=True))


def resized(table):
    return resize_vocabulary(table, 9, pad_to_multiple_of=1)


def without_array(table):
    return eqx.tree_at(lambda t: t.embeddings, table, None)


def factored_state(table):
    return optax.adafactor(1e-3, min_dim_size_to_factor=2).init(table)


def without_bias(table):
    return dataclasses.replace(take_rows(table, ONE), bias=None)
