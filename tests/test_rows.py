"""Training the rows of each batch."""

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
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    put_rows,
    resize_vocabulary,
    take_rows,
    unique_tokens,
)

from .helpers import (
    assert_close,
    compile_by_default,
    float64,
    FOUR_TOKENS,
    LAYOUTS,
    make_array,
    make_table,
    NAMES,
)


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


@pytest.mark.slow
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


def test_a_table_may_have_a_single_token():
    table = EmbeddingTable(jnp.ones((1, 3)), ("vocabulary", "embedding"))
    taken = jax.tree.map(lambda x: x + 1, take_rows(table, np.asarray([0])))
    np.testing.assert_array_equal(put_rows(table, np.asarray([0]), taken).embeddings, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
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
@pytest.mark.slow
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


class Model(eqx.Module):
    tokens: EmbeddingTable
    positions: EmbeddingTable
    layer: eqx.nn.Linear
    untied: EmbeddingTable


def make_model():
    keys, axes = jax.random.split(jax.random.key(0), 4), {"embedding": 4}
    return Model(
        EmbeddingTable.from_config(10, axes, pad_to_multiple_of=8, key=keys[0]),
        EmbeddingTable.from_config(16, axes, "position", key=keys[1]),
        eqx.nn.Linear(4, 4, key=keys[2]),
        EmbeddingTable.from_config(10, axes, use_bias=True, key=keys[3]),
    )


@pytest.mark.slow
def test_everything_but_the_tables_comes_from_rows():
    model = make_model()
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


@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
@pytest.mark.slow
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
        (lambda t: put_rows(t, ONE, jnp.ones((1, 3))), "rows must have a table in place of each"),
        (
            lambda t: put_rows(t, ONE, without_bias(t)),
            "must have an array for their bias",
        ),
        (
            lambda t: put_rows(without_array(t), ONE, take_rows(t, ONE)),
            "must have an array for their embeddings",
        ),
        (lambda t: take_rows(t, ONE, "words"), "'words': this tree has tables of 'vocabulary'"),
        (lambda t: put_rows(t, ONE, t, "words"), "'words': this tree has tables of 'vocabulary'"),
        (lambda t: take_rows(factored_state(t), ONE), "no rows to take: use an optimizer whose"),
    ],
)
@pytest.mark.slow
def test_rows_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_table("first", with_bias=True))


def test_rows_of_two_vocabularies_are_put_back_in_reverse_order():
    pair = {
        name: EmbeddingTable(make_array((size, 4)), (name, "embedding"), name)
        for name, size in {"users": 7, "items": 9}.items()
    }
    users, items = np.asarray([5, 0]), np.asarray([8, 1, 2])
    some = take_rows(pair, users, "users")
    small = jax.tree.map(lambda x: x + 1, take_rows(some, items, "items"))
    new = put_rows(pair, users, put_rows(some, items, small, "items"), "users")
    for name, index in ("users", users), ("items", items):
        expected = jnp.asarray(pair[name].embeddings).at[index].add(1)
        np.testing.assert_array_equal(new[name].embeddings, expected)
    message = r"rows\['items'\].embeddings has shape \(3, 4\) in place of \(9, 4\), but put_rows"
    with pytest.raises(ValueError, match=message):
        put_rows(pair, users, small, "users")


def resized(table):
    return resize_vocabulary(table, 9, pad_to_multiple_of=1)


def without_array(table):
    return eqx.tree_at(lambda t: t.embeddings, table, None)


def factored_state(table):
    return optax.adafactor(1e-3, min_dim_size_to_factor=2).init(table)


def without_bias(table):
    return dataclasses.replace(take_rows(table, ONE), bias=None)
