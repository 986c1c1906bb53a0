"""`resize_vocabulary`: what is kept bit for bit, what is new, and what is refused."""

import dataclasses
import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable, resize_vocabulary

from .helpers import (
    assert_close,
    float64,
    LAYOUTS,
    make_array,
    make_table,
    NAMES,
    rows_first,
    VOCAB_SIZE,
)


def raw_rows(table):
    """All rows, the vocabulary first, padding included, bit for bit."""
    return np.moveaxis(np.asarray(table.embeddings), table.axis_names.index("vocabulary"), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vocab_size, multiple", [(3, 1), (3, 4), (7, 1), (8, 1), (9, 1), (12, 8)])
def test_old_rows_stay_bit_for_bit_and_new_ones_and_padding_are_zero(layout, vocab_size, multiple):
    old = make_table(layout)
    new = resize_vocabulary(old, vocab_size, pad_to_multiple_of=multiple)
    kept = min(VOCAB_SIZE, vocab_size)
    rows = raw_rows(new)
    assert new.vocab_size == vocab_size
    assert len(rows) == -(-vocab_size // multiple) * multiple
    assert (new.axis_names, new.embedding_axes) == (old.axis_names, old.embedding_axes)
    np.testing.assert_array_equal(rows[:kept], raw_rows(old)[:kept])
    np.testing.assert_array_equal(rows[kept:], 0)


@pytest.mark.slow
def test_dtypes_are_kept_with_and_without_a_key(dtype, getkey):
    old: Any = make_table("middle", dtype, with_bias=True)
    for key in None, getkey():
        new = resize_vocabulary(old, 10, key=key, pad_to_multiple_of=4)
        assert new.embeddings.dtype == new.bias.dtype == dtype
        np.testing.assert_array_equal(raw_rows(new)[:7], raw_rows(old)[:7])
        np.testing.assert_array_equal(new.bias[:7], old.bias[:7])
        np.testing.assert_array_equal(new.bias[10 if key is not None else 7 :], 0)
        assert new.bias.shape == (12,)
        for array in new.embeddings, new.bias:
            assert np.all(np.isfinite(float64(array)))


def test_a_table_that_has_the_size_already_is_the_same_array(getkey):
    table = EmbeddingTable(make_array((8, 3)), NAMES, padding_rows=1)
    same = resize_vocabulary(table, 7, key=getkey(), pad_to_multiple_of=4)
    assert same.embeddings is table.embeddings and same.padding_rows == 1
    without_padding = resize_vocabulary(table, 7, pad_to_multiple_of=1)
    np.testing.assert_array_equal(without_padding.embeddings, table.embeddings[:7])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_padding_that_become_tokens_hold_nothing_of_what_was_there(layout, getkey):
    old: Any = make_table(layout, with_bias=True)
    poisoned = dataclasses.replace(
        old,
        embeddings=jnp.where(jnp.isin(old.embeddings, raw_rows(old)[7:]), jnp.nan, old.embeddings),
        bias=old.bias.at[7:].set(jnp.nan),
    )
    assert np.isnan(poisoned.embeddings).any()
    key = getkey()
    new = resize_vocabulary(poisoned, 9, key=key, pad_to_multiple_of=1)
    assert np.isfinite(new.embeddings).all() and np.isfinite(new.bias).all()
    expected = resize_vocabulary(old, 9, key=key, pad_to_multiple_of=1)
    np.testing.assert_array_equal(new.embeddings, expected.embeddings)
    np.testing.assert_array_equal(new.bias, expected.bias)


# What new rows are


def correlated(V, D):
    generator = np.random.default_rng(1)
    return (generator.normal(size=(V, D)) @ generator.normal(size=(D, D)) + 3).astype(np.float32)


def assert_noise_has_the_covariance(rows, old):
    """New rows are the mean of the old ones, plus noise with 1e-5 of their covariance."""
    off = (float64(rows) - float64(old).mean(0)) / np.sqrt(1e-5)
    expected = np.cov(float64(old), rowvar=False, bias=True)
    np.testing.assert_allclose(off.mean(0), 0, atol=0.05 * np.sqrt(np.trace(expected)))
    assert np.linalg.norm(np.cov(off, rowvar=False) - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("vocabulary_first", [True, False])
def test_new_rows_are_the_mean_with_little_noise(vocabulary_first):
    old = correlated(40, 4)
    names = NAMES if vocabulary_first else NAMES[::-1]
    table = EmbeddingTable(jnp.asarray(old if vocabulary_first else old.T), names)
    new = raw_rows(resize_vocabulary(table, 20040, key=jax.random.key(0)))[40:]
    assert_noise_has_the_covariance(new, old)
    assert len(np.unique(new, axis=0)) > 19_900


def test_new_rows_in_half_precision_are_near_the_mean(dtype):
    old = correlated(40, 4).astype(jnp.dtype(dtype))
    new = raw_rows(resize_vocabulary(EmbeddingTable(old, NAMES), 60, key=jax.random.key(0)))
    spread = 4 * np.sqrt(1e-5) * float64(old).std(0).max()
    rounding = float(jnp.finfo(dtype).eps) * np.abs(float64(old)).max()
    assert_close(new[40:], np.tile(float64(old).mean(0), (20, 1)), 0, spread + rounding)


def test_infinite_rows_are_left_out_of_new_ones(getkey):
    old = correlated(40, 4)
    old[7, 2], old[9, 0] = np.inf, np.nan
    bias = np.arange(40, dtype=np.float32)
    bias[[3, 30]] = -np.inf, -1e9
    table = EmbeddingTable(jnp.asarray(old), NAMES, bias=jnp.asarray(bias))
    new = resize_vocabulary(table, 5040, key=getkey())
    finite = np.delete(old, [7, 9], axis=0)
    assert np.isfinite(new.embeddings[40:]).all()
    assert_close(raw_rows(new)[40:].mean(0), float64(finite).mean(0), 1e-3)
    assert_close(new.bias[40:], np.full(5000, np.median(np.delete(bias, 3)) - np.log(100)))


def test_new_rows_are_nan_if_no_row_is_finite(getkey):
    table = EmbeddingTable(jnp.full((40, 4), jnp.inf), NAMES, bias=jnp.full(40, jnp.nan))
    new = resize_vocabulary(table, 42, key=getkey())
    assert np.isnan(new.embeddings[40:]).all() and np.isnan(new.bias[40:]).all()


@pytest.mark.slow
def test_new_tokens_raise_the_loss_by_what_jensen_allows(getkey):
    table = EmbeddingTable(jnp.asarray(correlated(50, 4)), NAMES)
    hidden, targets = make_array((64, 4)), jnp.arange(64) % 50
    for bias, rise in (None, np.log(1 + 10 / 50)), (jnp.zeros(50), np.log(1 + 10 / 50 / 100)):
        old = dataclasses.replace(table, bias=bias)
        new = resize_vocabulary(old, 60, key=getkey())
        before, after = (
            np.asarray(EmbeddingDecode(t).cross_entropy(hidden, targets, reduction="none"))
            for t in (old, new)
        )
        assert np.all(after - before < rise + 1e-3) and np.all(after - before > -1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_make_rows_that_are_means_of_theirs(layout, getkey):
    table: Any = make_table(layout, with_bias=True)
    pieces = {9: (1, 2, 2), 8: np.asarray([6]), np.int64(10): jnp.asarray([0, 5])}
    new = resize_vocabulary(table, 12, key=getkey(), pieces=pieces, pad_to_multiple_of=1)
    without = resize_vocabulary(table, 12, pieces=pieces, pad_to_multiple_of=1)
    rows, bias = float64(raw_rows(table)), float64(table.bias)
    for token, parts in pieces.items():
        for grown in new, without:
            assert_close(raw_rows(grown)[token], rows[list(parts)].mean(0), 1e-6, 1e-7)
            assert_close(grown.bias[token], bias[list(parts)].mean(), 1e-6, 1e-7)
    np.testing.assert_array_equal(raw_rows(without)[[7, 11]], 0)
    assert np.all(np.any(raw_rows(new)[[7, 11]], axis=tuple(range(1, rows.ndim))))


@pytest.mark.parametrize(
    "pieces, message",
    [
        ({6: [1]}, "new tokens, which are at least 7 and below 9, got 6"),
        ({9: [1]}, "new tokens, which are at least 7 and below 9, got 9"),
        ({7: []}, r"at least one of the 7 old tokens, got \[\] for 7"),
        ({8: [0, 7]}, r"at least one of the 7 old tokens, got \[0, 7\] for 8"),
        ({8: [-1]}, r"at least one of the 7 old tokens, got \[-1\] for 8"),
    ],
)
def test_pieces_must_be_old_tokens_for_new_ones(pieces, message):
    with pytest.raises(ValueError, match=message):
        resize_vocabulary(make_table("first"), 9, pieces=pieces, pad_to_multiple_of=1)


def test_new_rows_of_masks_are_zero():
    mask: Any = eqx.tree_at(lambda t: t.embeddings, make_table("first"), jnp.ones((9, 4), bool))
    new = resize_vocabulary(mask, 12, key=jax.random.key(0), pad_to_multiple_of=1)
    np.testing.assert_array_equal(new.embeddings, np.arange(12)[:, None] < [7] * 4)


def test_large_rows_do_not_overflow():
    table = EmbeddingTable(jnp.full((50, 2), 3e38), NAMES)
    new = resize_vocabulary(table, 60, key=jax.random.key(0))
    assert_close(new.embeddings[50:], np.full((10, 2), 3e38), 1e-5)


def test_new_rows_beside_a_single_one_are_like_it(dtype, getkey):
    table = EmbeddingTable(make_array((1, 3), dtype), NAMES)
    new = resize_vocabulary(table, 4, key=getkey())
    np.testing.assert_array_equal(new.embeddings, np.repeat(table.embeddings, 4, axis=0))


def test_what_is_drawn_for_a_token_does_not_depend_on_how_many_are_new_or_on_padding(getkey):
    key, table = getkey(), make_table("middle")
    many = raw_rows(resize_vocabulary(table, 300, key=key, pad_to_multiple_of=1))
    few = raw_rows(resize_vocabulary(table, 9, key=key, pad_to_multiple_of=16))
    assert_close(few[:9], many[:9])
    one = resize_vocabulary(table, 8, key=key, pad_to_multiple_of=1)
    assert_close(raw_rows(one), many[:8])  # one alone, too
    assert len(np.unique(many.reshape(300, -1), axis=0)) == 300


def test_fields_with_one_array_get_the_same_rows(getkey):
    table, key = make_table("first"), getkey()
    biased = dataclasses.replace(table, bias=jnp.zeros(9))
    layers = EmbeddingLookup(table), EmbeddingDecode(biased)
    lookup, decode = resize_vocabulary(layers, 12, key=key, pad_to_multiple_of=1)
    assert lookup.table.embeddings is decode.table.embeddings
    assert lookup.table.bias is None and decode.table.bias.shape == (12,)
    # `jax.jit` makes two arrays of the one
    jitted = eqx.filter_jit(resize_vocabulary)(layers, 12, key=key, pad_to_multiple_of=1)
    assert eqx.tree_equal(jitted, (lookup, decode), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(jitted[0].table.embeddings, jitted[1].table.embeddings)


def test_rows_do_not_depend_on_other_tables(getkey):
    table, other, key = make_table("first"), make_table("last"), getkey()
    alone = resize_vocabulary(table, 12, key=key, pad_to_multiple_of=1)
    _, beside = resize_vocabulary((other, table), 12, key=key, pad_to_multiple_of=1)
    assert eqx.tree_equal(alone, beside)


def test_each_of_stacked_tables_grows_by_its_own_mean():
    arrays = np.stack([correlated(40, 3), 10 - 0.1 * correlated(40, 3)])
    biases = np.stack([arrays[0, :, 0], -arrays[1, :, 0]])

    @eqx.filter_vmap
    def stack(array, bias):
        return EmbeddingTable(array, NAMES, bias=bias)

    old = stack(jnp.asarray(arrays), jnp.asarray(biases))
    new = resize_vocabulary(old, 5040, key=jax.random.key(0), pad_to_multiple_of=64)
    assert new.embeddings.shape == (2, 5056, 3) and new.bias.shape == (2, 5056)
    np.testing.assert_array_equal(new.embeddings[:, :40], arrays)
    np.testing.assert_array_equal(new.bias[:, :40], biases)
    np.testing.assert_array_equal(new.bias[:, 5040:], 0)
    for array, grown, before, bias in zip(arrays, new.embeddings, biases, new.bias):
        rows = float64(grown)[40:5040]
        assert np.abs(rows.mean(0) - float64(array).mean(0)).max() < 1e-3
        assert_close(bias[40:5040], np.full(5000, np.median(before) - np.log(100)), 1e-6)
    correlation = np.corrcoef(
        float64(new.embeddings[0, 40:5040, 0]), float64(new.embeddings[1, 40:5040, 0])
    )
    assert abs(correlation[0, 1]) < 0.1


def test_it_gives_the_same_under_jit(getkey):
    key, decode = getkey(), EmbeddingDecode(make_table("last", with_bias=True))
    plain = resize_vocabulary(decode, 9, key=key, pad_to_multiple_of=4)
    jitted = eqx.filter_jit(resize_vocabulary)(decode, 9, key=key, pad_to_multiple_of=4)
    assert eqx.tree_equal(plain, jitted, rtol=1e-6, atol=1e-6)


# Whole models


class Model(eqx.Module):
    tokens: EmbeddingTable
    positions: EmbeddingTable
    untied: EmbeddingTable
    layer: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.tokens = EmbeddingTable.from_config(
            13, {"embedding": 8}, pad_to_multiple_of=8, key=keys[0]
        )
        self.positions = EmbeddingTable.from_config(6, {"embedding": 8}, "position", key=keys[1])
        self.untied = EmbeddingTable.from_config(
            13, {"embedding": 8}, use_bias=True, pad_to_multiple_of=8, key=keys[2]
        )
        self.layer = eqx.nn.Linear(8, 8, key=keys[3])

    def hidden(self, tokens):
        x = EmbeddingLookup(self.tokens)(tokens) + self.positions.embeddings
        return jnp.tanh(jax.vmap(self.layer)(x))

    def loss(self, tokens, targets):
        tied = EmbeddingDecode(self.tokens).cross_entropy(self.hidden(tokens), targets)
        untied = EmbeddingDecode(self.untied)
        return tied + untied.cross_entropy(self.hidden(tokens), targets)


TOKENS = jnp.asarray([0, 3, 12, 5, 5, 1])
TARGETS = jnp.asarray([3, 12, 5, 5, 1, 7])


def make_step(optimizer):
    @eqx.filter_jit
    def step(model, opt_state):
        loss, gradient = eqx.filter_value_and_grad(Model.loss)(model, TOKENS, TARGETS)
        updates, opt_state = optimizer.update(gradient, opt_state, eqx.filter(model, eqx.is_array))
        return loss, eqx.apply_updates(model, updates), opt_state

    return step


def decays(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_training_goes_on_after_a_resize_with_the_loss_that_the_new_tokens_leave():
    optimizer = optax.adamw(1e-2, weight_decay=0.1, mask=decays)
    step = make_step(optimizer)
    model: Any = Model(jax.random.key(0))
    opt_state: Any = optimizer.init(eqx.filter(model, eqx.is_array))
    for _ in range(10):
        _, model, opt_state = step(model, opt_state)

    grown = resize_vocabulary(model, 15, key=jax.random.key(1), pad_to_multiple_of=4)
    grown_state: Any = resize_vocabulary(opt_state, 15, pad_to_multiple_of=4)

    # Everything but the vocabulary is the same; the rows of old tokens and their moments as well.
    assert eqx.tree_equal(grown.positions, model.positions)
    assert eqx.tree_equal(grown.layer, model.layer)
    fresh = optimizer.init(eqx.filter(grown, eqx.is_array))
    assert jax.tree.structure(grown_state) == jax.tree.structure(fresh)
    for old, new in (
        (model, grown),
        (opt_state[0].mu, grown_state[0].mu),
        (opt_state[0].nu, grown_state[0].nu),
    ):
        for part in (lambda m: m.tokens, lambda m: m.untied):
            np.testing.assert_array_equal(part(new).embeddings[:13], part(old).embeddings[:13])
            assert np.all(float64(part(old).embeddings[:13]).any(axis=1)), "no row is untrained"
        np.testing.assert_array_equal(new.untied.bias[:13], old.untied.bias[:13])
        assert np.all(float64(old.untied.bias[:13]))
    for moments in grown_state[0].mu, grown_state[0].nu:
        np.testing.assert_array_equal(moments.tokens.embeddings[13:], 0)
        np.testing.assert_array_equal(moments.untied.bias[13:], 0)

    # The loss rises by what the new tokens take of the probability, and by nothing else.
    hidden = float64(model.hidden(TOKENS))
    expected = float(model.loss(TOKENS, TARGETS))
    for table, bias in (
        (grown.tokens, np.zeros(15)),
        (grown.untied, float64(grown.untied.bias)[:15]),
    ):
        weights = np.exp(hidden @ rows_first(table).T + bias)
        expected += np.log(weights.sum(1) / weights[:, :13].sum(1)).mean()
    assert expected > float(model.loss(TOKENS, TARGETS)) + 0.01
    assert_close(grown.loss(TOKENS, TARGETS), expected, rtol=1e-6)

    # The next step moves old rows by moments that are still there.
    assert np.isclose(step(grown, grown_state)[0], expected, rtol=1e-6)
    losses = []
    for _ in range(20):
        loss, grown, grown_state = step(grown, grown_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    assert optax.tree_utils.tree_get(grown_state, "count") == 30
    assert grown.tokens.vocab_size == 15


@pytest.mark.slow
def test_shrinking_and_growing_again_loses_only_what_was_cut():
    model = Model(jax.random.key(0))
    small = resize_vocabulary(model, 8, pad_to_multiple_of=1)
    assert small.tokens.padding_rows == 0 and small.untied.bias.shape == (8,)
    assert_close(
        EmbeddingDecode(small.tokens)(model.layer.weight),
        EmbeddingDecode(model.tokens)(model.layer.weight)[:, :8],
    )
    again = resize_vocabulary(small, 13, pad_to_multiple_of=8)
    np.testing.assert_array_equal(again.tokens.embeddings[:8], model.tokens.embeddings[:8])
    assert jax.tree.structure(again) == jax.tree.structure(model)


def test_a_table_shared_by_eqx_nn_shared_is_resized_once_and_the_bias_with_it(getkey):
    lookup = EmbeddingLookup(make_table("first", with_bias=True))
    decode = EmbeddingDecode(make_table("first", with_bias=True))
    shared = eqx.nn.Shared((lookup, decode), where=lambda s: s[1].table, get=lambda s: s[0].table)
    key = getkey()
    new = resize_vocabulary(shared, 10, key=key, pad_to_multiple_of=1)
    new_lookup, new_decode = new()
    assert new_lookup.table.embeddings is new_decode.table.embeddings
    expected = resize_vocabulary(decode, 10, key=key, pad_to_multiple_of=1)
    assert eqx.tree_equal(new_decode, expected)
    assert new_decode(jnp.ones((2, 4))).shape == (2, 10)
    assert len(jax.tree.leaves(eqx.filter(new, eqx.is_array))) == 2
    moments = optax.adam(1e-3).init(eqx.filter(shared, eqx.is_array))
    moments = resize_vocabulary(moments, 10, pad_to_multiple_of=1)
    expected = optax.adam(1e-3).init(eqx.filter(new, eqx.is_array))
    assert eqx.tree_equal(moments, expected)


@pytest.mark.parametrize("given", ["key", "pieces"])
def test_a_key_is_refused_for_the_state_of_an_optimizer(given, getkey):
    model: Any = make_table("first", with_bias=True)
    optimizer = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(1e-3))
    state = optimizer.init(model)
    rows: Any = {"key": getkey()} if given == "key" else {"pieces": {7: [1, 2]}}
    for tree in (model, state), state:
        with pytest.raises(
            ValueError, match="is the state of an optimizer, Inject.*: resize the model alone"
        ):
            resize_vocabulary(tree, 10, pad_to_multiple_of=1, **rows)
    others = model, optax.scale(1.0).init(model), optax.EmptyState()  # no state of a table
    assert resize_vocabulary(others, 10, pad_to_multiple_of=1, **rows)[0].vocab_size == 10


def test_a_decode_whose_table_is_elsewhere_stays():
    table = make_table("first")
    decode = eqx.tree_at(lambda decode: decode.table, EmbeddingDecode(table, soft_cap=3.0), None)
    resized, new = resize_vocabulary((decode, table), 10, pad_to_multiple_of=1)
    assert eqx.tree_equal(resized, decode) and new.vocab_size == 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.sgd(1e-2, momentum=0.9),
        lambda: optax.lion(1e-3),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.ema(0.9)),
        lambda: optax.masked(
            optax.adam(1e-3),
            lambda params: eqx.tree_at(
                lambda m: m.layer.bias, jax.tree.map(lambda _: False, params), True
            ),
        ),
        lambda: optax.masked(optax.adam(1e-3), decays),
        lambda: optax.MultiSteps(optax.adam(1e-3), 4),
        lambda: optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
        lambda: optax.inject_hyperparams(optax.adamw)(1e-3),
        lambda: optax.partition(
            {True: optax.adam(1e-3), False: optax.sgd(1e-2, momentum=0.9)}, decays
        ),
        lambda: optax.apply_if_finite(optax.adam(1e-3), 3),
        lambda: optax.lbfgs(1e-3),
        lambda: optax.contrib.muon(1e-3),
        lambda: optax.contrib.schedule_free_adamw(1e-3, warmup_steps=1),
    ],
    ids=[
        "sgd",
        "lion",
        "chain",
        "masked tables",
        "masked vectors",
        "MultiSteps",
        "mu_dtype",
        "inject_hyperparams",
        "partition",
        "apply_if_finite",
        "lbfgs",
        "muon",
        "schedule-free",
    ],
)
def test_states_of_optimizers_have_the_structure_of_new_ones(make, getkey):
    model = Model(getkey())
    grown = resize_vocabulary(model, 16, key=getkey(), pad_to_multiple_of=8)
    old, expected = (make().init(eqx.filter(m, eqx.is_array)) for m in (model, grown))
    new = resize_vocabulary(old, 16, pad_to_multiple_of=8)
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    assert [leaf.shape for leaf in jax.tree.leaves(new)] == [
        leaf.shape for leaf in jax.tree.leaves(expected)
    ]
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [
        leaf.dtype for leaf in jax.tree.leaves(expected)
    ]
    # the state to restore a checkpoint of the grown model into
    skeleton = resize_vocabulary(jax.eval_shape(lambda: old), 16, pad_to_multiple_of=8)
    assert eqx.tree_equal(skeleton, jax.eval_shape(lambda: new))


def named_optimizers():
    """Every optimizer of optax with a learning rate, and those that wrap another one."""
    adam = optax.adam(1e-3)
    optimizers = {
        "adafactor factored": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2),
        "apply_if_finite": lambda: optax.apply_if_finite(adam, 3),
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(1e-3),
        "lookahead": lambda: optax.lookahead(adam, 5, 0.5),
        "masked": lambda: optax.masked(adam, decays),
        "mechanize": lambda: optax.contrib.mechanize(adam),
        "MultiSteps": lambda: optax.MultiSteps(adam, 4),
        "partition": lambda: optax.partition({True: adam, False: optax.sgd(1.0, 0.9)}, decays),
        "polyak_sgd": lambda: optax.polyak_sgd(),
        "rmsprop from 1": lambda: optax.rmsprop(1e-3, initial_scale=1.0),
        "sam": lambda: optax.contrib.sam(adam, optax.sgd(0.1)),
        "schedule_free": lambda: optax.contrib.schedule_free(adam, 1e-3),
    }
    for module in optax, optax.contrib:
        for name in dir(module):
            function = getattr(module, name)
            if inspect.isfunction(function) and not name.startswith("scale_by"):
                needed = [
                    parameter.name
                    for parameter in inspect.signature(function).parameters.values()
                    if parameter.default is inspect.Parameter.empty
                ]
                named = inspect.signature(function).parameters
                if "learning_rate" in named and needed in ([], ["learning_rate"]):
                    optimizers[name] = functools.partial(function, learning_rate=1e-3)
    return optimizers


OPTIMIZERS = named_optimizers()


def init(make, params):
    with jax.numpy_dtype_promotion("standard"):
        return make().init(params)


@pytest.mark.filterwarnings("ignore:Specifying a key", "ignore:.optimistic_adam. is deprecated")
@pytest.mark.parametrize("vocab_size, multiple", [(21, 8), (9, 1)])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_the_state_of_any_optimizer_grows_with_fresh_rows(name, vocab_size, multiple):
    model = Model(jax.random.key(0))
    params: Any = eqx.filter((model.untied, model.layer), eqx.is_array)
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    grown = resize_vocabulary(
        params, vocab_size, key=jax.random.key(1), pad_to_multiple_of=multiple
    )
    fresh = init(OPTIMIZERS[name], grown)
    old: Any = jax.tree.map(
        lambda x: x + 1 if eqx.is_inexact_array(x) else x, init(OPTIMIZERS[name], params)
    )
    if "MultiSteps" in name:
        old, fresh = old.inner_opt_state, fresh.inner_opt_state
    new = resize_vocabulary(old, vocab_size, fresh=fresh)
    assert jax.tree.structure(new) == jax.tree.structure(fresh)
    kept = min(13, vocab_size)
    joined = []
    for before, after, start in zip(*map(jax.tree.leaves, (old, new, fresh)), strict=True):
        assert after.shape == start.shape and after.dtype == start.dtype
        rows = [axis for axis, size in enumerate(after.shape) if size != before.shape[axis]]
        if rows:
            (axis,) = rows
            joined.append(axis)
            kept_rows, new_rows = zip(*(np.split(x, [kept], axis) for x in (before, after, start)))
            np.testing.assert_array_equal(kept_rows[1], kept_rows[0])
            np.testing.assert_array_equal(new_rows[1], new_rows[2])
        else:
            assert_bitwise_equal(before, after)
    assert joined or not any(x.ndim > 0 for x in jax.tree.leaves(old))


def assert_bitwise_equal(left, right):
    keys = jnp.issubdtype(left.dtype, jax.dtypes.prng_key)
    left, right = map(jax.random.key_data, (left, right)) if keys else (left, right)
    np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "name", ["adam", "rprop", "schedule_free_adamw", "adafactor factored", "sm3"]
)
def test_padding_that_becomes_tokens_gets_fresh_states(name):
    params = eqx.filter(Model(jax.random.key(0)).untied, eqx.is_array)
    grown = resize_vocabulary(params, 16, key=jax.random.key(1), pad_to_multiple_of=8)
    assert grown.embeddings.shape == params.embeddings.shape
    fresh = init(OPTIMIZERS[name], grown)
    old: Any = jax.tree.map(
        lambda x: x + 1 if eqx.is_inexact_array(x) else x, init(OPTIMIZERS[name], params)
    )
    new = resize_vocabulary(old, 16, fresh=fresh)
    for before, after, start in zip(*map(jax.tree.leaves, (old, new, fresh)), strict=True):
        if after.ndim > 0 and len(after) == 16:
            np.testing.assert_array_equal(after[:13], before[:13])
            np.testing.assert_array_equal(after[13:], start[13:])
        else:
            np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", ["mechanize", "cocob", "schedule_free_adamw", "rprop", "sm3"])
def test_a_step_after_a_resize_moves_new_rows_as_old_ones(name):
    with jax.numpy_dtype_promotion("standard"):
        optimizer = OPTIMIZERS[name]()
        update = eqx.filter_jit(optimizer.update)
        params: Any = EmbeddingTable(make_array((13, 4)), NAMES)
        state = optimizer.init(params)
        gradient = jax.tree.map(jnp.ones_like, params)
        for _ in range(3):
            updates, state = update(gradient, state, params)
            params = eqx.apply_updates(params, updates)
        grown = resize_vocabulary(params, 15, key=jax.random.key(0))
        state = resize_vocabulary(state, 15, fresh=optimizer.init(grown))
        updates: Any = None
        for _ in range(2):  # Rprop stands still in its first step
            updates, state = update(jax.tree.map(jnp.ones_like, grown), state, grown)
    moved = np.abs(float64(updates.embeddings)).max(axis=1)
    assert np.all(moved < 0.1) and np.all(moved[13:] >= 0.001 * moved[:13].max())


def test_a_state_without_tables_stays():
    state = state_of(optax.sgd(1e-3), make_table("first"))
    assert resize_vocabulary(state, 9, fresh=state) == state


def test_a_state_keeps_what_is_no_array():
    """As the count and the function of an optimizer that one writes."""
    table: Any = make_table("first")
    grown = resize_vocabulary(table, 9, key=jax.random.key(0), pad_to_multiple_of=1)
    resized = resize_vocabulary((table, 3, abs), 9, fresh=(grown, 0, abs))
    assert resized[0].vocab_size == 9 and resized[1:] == (3, abs)


@pytest.mark.parametrize("frozen", ["leaves", "subtree", "None"])
def test_a_state_of_frozen_tables_keeps_the_rest(frozen, getkey):
    """An optimizer that trains only another part of the model."""
    names = "tokens", "untied"

    def of_leaf(path, _):
        return path[0].name not in names

    def mask(model):
        if frozen == "leaves":
            return jax.tree_util.tree_map_with_path(of_leaf, model)
        return eqx.tree_at(lambda m: [getattr(m, name) for name in names], model, [False, False])

    def state_of(model):
        model = eqx.filter(model, eqx.is_array)
        if frozen == "None":
            trained = eqx.filter(model, jax.tree_util.tree_map_with_path(of_leaf, model))
            return optax.adam(1e-3).init(trained)
        true = jax.tree.map(lambda _: True, model)
        is_trained = mask(true)
        return optax.masked(optax.adam(1e-3), is_trained).init(model)

    model = Model(getkey())
    state = jax.tree.map(lambda x: x + 1, state_of(model))
    larger = resize_vocabulary(model, 17, key=getkey(), pad_to_multiple_of=4)
    fresh = state_of(larger)
    grown = resize_vocabulary(state, 17, fresh=fresh)
    assert jax.tree.structure(grown) == jax.tree.structure(fresh)
    assert eqx.tree_equal(jax.tree.leaves(grown), jax.tree.leaves(state))


def resize_what_does_not_fit(case):
    old: Any = EmbeddingTable(make_array((13, 4)), NAMES)
    new: Any = resize_vocabulary(old, 15)
    smaller: Any = resize_vocabulary(old, 14)
    adam, sm3, count = optax.adam(1e-3), optax.sm3(1e-3), jnp.zeros((3, 2))
    resize = functools.partial(resize_vocabulary, vocab_size=15)
    square: Any = EmbeddingTable(make_array((4, 4)), NAMES)
    factored = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    return {
        "no fresh for a list": lambda: resize(sm3.init(old)),
        "another optimizer": lambda: resize(adam.init(old), fresh=sm3.init(new)),
        "not resized": lambda: resize(adam.init(old), fresh=adam.init(old)),
        "another size": lambda: resize(adam.init(old), fresh=adam.init(smaller)),
        "another width": lambda: resize(
            old, fresh=EmbeddingTable(jnp.zeros((15, 5)), old.axis_names)
        ),
        "another leaf": lambda: resize((old, count), fresh=(new, jnp.zeros((3, 5)))),
        "another rank": lambda: resize((old, count), fresh=(new, jnp.zeros(3))),
        "a number": lambda: resize((old, count), fresh=(new, 3.0)),
        "two sizes": lambda: resize([old, resize_vocabulary(old, 12)], fresh=[new, new]),
        "half a skeleton": lambda: resize(old, fresh=jax.eval_shape(lambda: new)),
        "square": lambda: resize_vocabulary(
            factored.init(square), 6, fresh=factored.init(resize_vocabulary(square, 6))
        ),
        "no bias": lambda: resize(old, fresh=dataclasses.replace(new, bias=jnp.zeros(15))),
        "another vocabulary": lambda: resize(old, fresh=new, vocabulary_axis="words"),
        "a key": lambda: resize(old, fresh=new, key=jax.random.key(0)),
        "pieces": lambda: resize(old, fresh=new, pieces={13: [0]}),
        "a multiple": lambda: resize(old, fresh=new, pad_to_multiple_of=1),
    }[case]()


@pytest.mark.parametrize(
    "case, message",
    [
        ("no fresh for a list", r"tree\[0\].mu.embeddings has a list of arrays.* `fresh="),
        ("another optimizer", r"structure of the tree, but they differ at \[0\].count: it must be"),
        ("not resized", "fresh must be made from the resized model, with 15 tokens"),
        (
            "another size",
            r"mu.embeddings has the shape \(13, 4\), and \(14, 4\) in fresh",
        ),
        ("another width", r"embeddings has the shape \(13, 4\), and \(15, 5\) in fresh"),
        ("another leaf", r"tree\[1\] has the shape \(3, 2\), and \(3, 5\) in fresh"),
        ("another rank", r"tree\[1\] has the shape \(3, 2\), and \(3,\) in fresh"),
        ("a number", r"tree\[1\] has the shape \(3, 2\), and None in fresh"),
        ("two sizes", r"tree\[0\].embeddings has 13 tokens, tree\[1\].embeddings has 12 tokens"),
        ("half a skeleton", "must both be skeletons, or neither"),
        ("square", r"v_\w+.embeddings has 4 numbers, as many as there are old rows"),
        ("no bias", r"fresh.bias must have the structure of the tree, but they differ"),
        ("another vocabulary", "no table has the vocabulary axis 'words': this tree has tables of"),
        ("a key", "key, pieces and pad_to_multiple_of must not be given"),
        ("pieces", "key, pieces and pad_to_multiple_of must not be given"),
        ("a multiple", "key, pieces and pad_to_multiple_of must not be given"),
    ],
)
def test_fresh_states_that_do_not_fit_are_refused(case, message):
    with pytest.raises(ValueError, match=message):
        resize_what_does_not_fit(case)


def test_a_flattened_state_is_refused(getkey):
    model = eqx.filter(Model(getkey()), eqx.is_array)
    larger = resize_vocabulary(model, 17, key=getkey(), pad_to_multiple_of=1)
    old, new = map(optax.flatten(optax.adam(1e-3)).init, (model, larger))
    with pytest.raises(ValueError, match=r"tree\[0\].mu has the shape .* Use fresh"):
        resize_vocabulary(old, 17, fresh=new)
    plain = optax.sgd(1e-3, momentum=None)
    assert resize_vocabulary(plain.init(model), 17, fresh=plain.init(larger)) == plain.init(model)


def test_skeletons_grow_with_fresh_skeletons():
    old: Any = EmbeddingTable(make_array((13, 4)), NAMES)
    new: Any = resize_vocabulary(old, 15)
    states = [jax.eval_shape(optax.sm3(1e-3).init, table) for table in (old, new)]
    assert eqx.tree_equal(resize_vocabulary(states[0], 15, fresh=states[1]), states[1])


def test_both_parameters_of_lookahead_grow(getkey):
    model = eqx.filter(Model(getkey()), eqx.is_array)
    both = optax.LookaheadParams(model, jax.tree.map(lambda x: x + 1, model))
    key = getkey()
    new = resize_vocabulary(both, 16, key=key, pad_to_multiple_of=1)
    expected = resize_vocabulary(model, 16, key=key, pad_to_multiple_of=1)
    assert eqx.tree_equal(new.fast, expected)
    np.testing.assert_array_equal(new.slow.tokens.embeddings[:13], model.tokens.embeddings[:13] + 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skeleton_becomes_that_of_the_resized_table(layout, getkey):
    decode = EmbeddingDecode(make_table(layout, "bfloat16", with_bias=True))
    skeleton = eqx.filter_eval_shape(lambda: decode)
    for key in None, getkey():
        new = resize_vocabulary(skeleton, 9, key=key, pad_to_multiple_of=4)
        grown = resize_vocabulary(decode, 9, pad_to_multiple_of=4)
        assert eqx.tree_equal(new, eqx.filter_eval_shape(lambda: grown))


def test_a_skeleton_stays_on_its_device():
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    table = EmbeddingTable(make_array((9, 4)), ("vocabulary", "embedding"))
    skeleton = eqx.tree_at(
        lambda t: t.embeddings, table, jax.ShapeDtypeStruct((9, 4), jnp.float32, sharding=placed)
    )
    assert resize_vocabulary(skeleton, 12).embeddings.sharding == placed


def test_arrays_of_numpy_grow_as_those_of_jax(getkey):
    key, table = getkey(), make_table("middle", with_bias=True)
    host = jax.tree.map(np.asarray, table)
    new = resize_vocabulary(host, 9, key=key, pad_to_multiple_of=4)
    assert eqx.tree_equal(new, resize_vocabulary(table, 9, key=key, pad_to_multiple_of=4))
    fresh = jax.tree.map(np.zeros_like, new)
    joined = resize_vocabulary(host, 9, fresh=fresh)
    expected = resize_vocabulary(table, 9, pad_to_multiple_of=4)
    assert eqx.tree_equal(joined, expected)


def test_factored_moments_of_another_vocabulary_are_left_alone():
    positions = EmbeddingTable(make_array((6, 4)), ("position", "embedding"), "position")
    factored = state_of(optax.adafactor(1e-3, min_dim_size_to_factor=2), positions)
    moments, same = resize_vocabulary((make_table("first"), factored), 9, pad_to_multiple_of=1)
    assert moments.vocab_size == 9 and eqx.tree_equal(same, factored)


@pytest.mark.slow
def test_what_is_no_array_in_the_place_of_a_table_stays(getkey):
    model = Model(getkey())
    mask = jax.tree.map(lambda _: False, model)
    grown_mask = resize_vocabulary(mask, 16, pad_to_multiple_of=8)
    arrays = resize_vocabulary(eqx.filter(model, eqx.is_array), 16, pad_to_multiple_of=8)
    # a mask of the old model, resized, is a mask of the new one
    nothing, everything = eqx.partition(arrays, grown_mask)
    assert jax.tree.leaves(nothing) == [] and eqx.tree_equal(everything, arrays)
    _, static = eqx.partition(model, eqx.is_array)
    combined = eqx.combine(arrays, resize_vocabulary(static, 16, pad_to_multiple_of=8))
    assert jnp.isfinite(combined.loss(TOKENS, TARGETS))


# What is refused


def test_the_key_has_a_name_and_the_others_may_have_theirs(getkey):
    table = make_table("first")
    named = resize_vocabulary(
        tree=table, vocab_size=8, vocabulary_axis="vocabulary", pad_to_multiple_of=1
    )
    assert eqx.tree_equal(named, resize_vocabulary(table, 8, pad_to_multiple_of=1))
    with pytest.raises(TypeError, match="positional"):
        resize_vocabulary(table, 8, "vocabulary", getkey())  # pyright: ignore[reportCallIssue]


def state_of(optimizer, params: Any) -> Any:
    return optimizer.init(params)


@pytest.mark.parametrize(
    "tree, sizes, message",
    [
        ([], (3,), "no table has the vocabulary axis 'vocabulary': this tree has no tables"),
        (make_table("first"), (3, "bytes"), "'bytes': this tree has tables of 'vocabulary'"),
        (make_table("first"), (0,), "at least 1, got 0 and 1"),
        (
            (make_table("first"), [EmbeddingTable(make_array((5, 3)), NAMES)]),
            (9,),
            r"same size, got 7 tokens at tree\[0\].embeddings, 5 tokens at tree\[1\]\[0\]",
        ),
        (
            state_of(optax.adafactor(1e-3, min_dim_size_to_factor=2), make_table("first")),
            (9,),
            r"v_row.embeddings has shape \(4,\), .* Adafactor, give `resize_vocabulary` the state",
        ),
        (
            [eqx.tree_at(lambda t: t.bias, make_table("first", with_bias=True), jnp.ones(7))],
            (9,),
            r"same size, got 7 tokens at tree\[0\].embeddings, 5 tokens at tree\[0\].bias",
        ),
    ],
    ids=["no table", "other name", "size 0", "two sizes", "factored", "stale bias"],
)
def test_what_cannot_be_resized_is_refused(tree, sizes, message):
    with pytest.raises(ValueError, match=message):
        resize_vocabulary(tree, *sizes, pad_to_multiple_of=1)


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 9 and 0"):
        resize_vocabulary(make_table("first"), 9, pad_to_multiple_of=0)


@pytest.mark.slow
def test_padding_must_be_asked_for_where_there_is_some():
    padded, plain = make_table("first"), EmbeddingTable(make_array((7, 4)), NAMES)
    for tree in (padded, jax.eval_shape(lambda: padded), eqx.filter(padded, False)):
        for size in 7, 9:
            message = r"tree\[1\] has 2 padding rows.*given: 1 for no padding, or the multiple"
            with pytest.raises(ValueError, match=message):
                resize_vocabulary([plain, tree], size)
    one = EmbeddingTable(make_array((8, 4)), NAMES, padding_rows=1)
    with pytest.raises(ValueError, match="tree has 1 padding row"):
        resize_vocabulary(one, 9)
    assert eqx.tree_equal(
        resize_vocabulary(plain, 9), resize_vocabulary(plain, 9, pad_to_multiple_of=1)
    )
    positions = EmbeddingTable(make_array((8, 4)), ("position", "d"), "position", padding_rows=1)
    resize_vocabulary([plain, positions], 9)  # the padding of another vocabulary is left alone
