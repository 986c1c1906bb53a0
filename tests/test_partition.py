"""Training the same rows of a vocabulary in each step."""

import array
import collections
from enum import IntEnum
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
    resize_vocabulary,
)

from .helpers import (
    assert_close,
    compile_by_default,
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
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def type_name(value):
    return type(value).__name__


@pytest.mark.parametrize(
    "rows, expected",
    [
        (range(6, 0, -3), [6, 3]),
        (slice(None), list(range(VOCAB_SIZE))),
        (slice(5, 99), [5, 6]),
        (slice(np.int64(1), np.uint8(3)), [1, 2]),
        (np.asarray([6, 1], np.uint64), [6, 1]),
        (np.asarray([6, 1], ">i4"), [6, 1]),
        (np.arange(VOCAB_SIZE)[::-3], [6, 3, 0]),
        (np.broadcast_to(np.asarray([4]), (1,)), [4]),
        ([True] + [False] * (VOCAB_SIZE - 1), [0]),
        (jnp.arange(VOCAB_SIZE) % 3 == 1, [1, 4]),
        (jnp.asarray([3, 1], "int8"), [3, 1]),
        ([IntEnum("Token", {"NEW": 5}).NEW], [5]),
        (array.array("i", [1, 4]), [1, 4]),
        (collections.deque([1, 4]), [1, 4]),
        (memoryview(array.array("i", [1, 4])), [1, 4]),
    ],
    ids=type_name,
)
def test_rows_may_be_of_many_kinds(rows, expected):
    table = make_table("first")
    trained, frozen = partition_rows(table, rows)
    np.testing.assert_array_equal(trained.embeddings, np.asarray(table.embeddings)[expected])
    assert eqx.tree_equal(combine_rows(trained, frozen), table)


@pytest.mark.parametrize(
    "rows",
    [
        {1, 4},
        {1: 4},
        {1: 4}.keys(),
        (token for token in [1, 4]),
        "14",
        ["1", "4"],
        None,
        [1.0],
        ...,
    ],
    ids=type_name,
)
def test_what_is_no_sequence_of_integers_is_a_type_error(rows):
    with pytest.raises(TypeError, match="parameter 'rows'"):
        partition_rows(make_table("first"), rows)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "find, biases",
    [(lambda layer: layer.table, 1), (lambda layer: layer.table.embeddings, 2)],
    ids=["table", "array"],
)
def test_what_eqx_nn_shared_ties_stays_tied(find, biases):
    table: Any = make_table("first", with_bias=True)
    layers = eqx.nn.Sequential([EmbeddingLookup(table), EmbeddingDecode(table)])
    shared = eqx.nn.Shared(layers, where=lambda s: find(s[1]), get=lambda s: find(s[0]))
    trained, frozen = partition_rows(shared, [0, 6])
    shapes = [leaf.shape for leaf in jax.tree.leaves(trained)]
    assert shapes == [(2, 4), *[(2,)] * biases]
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
        ([], "at least one of the 7 tokens, got none"),
        (slice(3, 3), "at least one of the 7 tokens, got none"),
        (slice(7, None), "got none. New tokens have no rows before `resize_vocabulary`"),
        (np.zeros(7, bool), "at least one of the 7 tokens, got none"),
        (np.ones(9, bool), r"a boolean for each of the 7 tokens, got bool of shape \(9,\)"),
        (np.array([0.5]), r"got float64 of shape \(1,\)"),
        (np.array([[1], [2]]), r"shape \(2, 1\)"),
        (3, r"shape \(\)"),
        (True, r"got bool of shape \(\)"),
        (b"14", r"got bytes16 of shape \(\)"),
        (np.zeros(VOCAB_SIZE + 1, bool), r"each of the 7 tokens, got bool of shape \(8,\)"),
        ([2**63], r"got \[9223372036854775808\]"),
        ([2**70], r"got object of shape \(1,\)"),
        (np.asarray([1, 4], object), r"got object of shape \(2,\)"),
        (np.asarray(["2020"], "datetime64[Y]"), r"got datetime64\[Y\]"),
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
    with pytest.raises(ValueError, match="the structure of frozen.*of one call of partition_rows"):
        combine_rows(trained, frozen)
    # one row would be broadcast to two
    _, frozen = partition_rows(make_table("first"), [1, 2])
    message = r"shape \(2, 4\) for the 2 rows of a table of shape \(9, 4\), got \(1, 4\)"
    with pytest.raises(ValueError, match=message):
        combine_rows(trained, frozen)
    table = make_table("first", with_bias=True)
    for empty in eqx.filter(table, False), eqx.tree_at(lambda t: t.embeddings, table, None):
        with pytest.raises(ValueError, match="'vocabulary' hold no embeddings"):
            partition_rows(empty, [1])


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


@pytest.mark.slow
def test_of_two_partitions_the_frozen_rows_hold():
    table = make_table("first")
    (trained, _), (_, frozen) = partition_rows(table, [1, 2]), partition_rows(table, [3, 4])
    combined = combine_rows(trained, frozen).embeddings
    np.testing.assert_array_equal(combined[3:5], table.embeddings[1:3])
