"""`resize_vocabulary`: what is kept bit for bit, what is new, and what is refused."""

import dataclasses
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


def sample_error(samples, expected_mean, expected_covariance):
    """How far the moments of samples are off, in standard errors at most."""
    samples, count = float64(samples), len(samples)
    variances = np.diag(expected_covariance)
    mean_error = (samples.mean(0) - expected_mean) / np.sqrt(variances / count)
    off = np.cov(samples, rowvar=False) - expected_covariance
    covariance_error = off / np.sqrt(
        (np.outer(variances, variances) + expected_covariance**2) / count
    )
    return max(np.abs(mean_error).max(), np.abs(covariance_error).max())


def correlated(V, D):
    generator = np.random.default_rng(1)
    return (generator.normal(size=(V, D)) @ generator.normal(size=(D, D)) + 3).astype(np.float32)


@pytest.mark.parametrize("vocabulary_first", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_and_biases_have_mean_and_covariance_of_the_old_ones(vocabulary_first, dtype):
    old = correlated(40, 4).astype(jnp.dtype(dtype))
    array, bias = old[:, :3].copy(), old[:, 3].copy()
    names = NAMES if vocabulary_first else NAMES[::-1]
    array = jnp.asarray(array if vocabulary_first else array.T)
    table = EmbeddingTable(array, names, bias=jnp.asarray(bias))
    new = resize_vocabulary(table, 20040, key=jax.random.key(0))
    assert new.embeddings.dtype == new.bias.dtype == dtype
    rows = np.concatenate([raw_rows(new), np.asarray(new.bias)[:, None]], axis=1)[40:]
    assert sample_error(rows, float64(old).mean(0), np.cov(float64(old), rowvar=False)) < 4.5


@pytest.mark.parametrize("V", [2, 4])
def test_with_fewer_rows_than_features_new_rows_stay_in_the_space_of_the_old_ones(V):
    old = correlated(V, 6)
    table = EmbeddingTable(jnp.asarray(old), NAMES)
    new = raw_rows(resize_vocabulary(table, 10004, key=jax.random.key(0)))[V:]
    _, sizes, directions = np.linalg.svd(float64(old) - float64(old).mean(0))
    assert sizes[V - 1] < 1e-5 * sizes[0]
    along = (float64(new) - float64(old).mean(0)) @ directions.T
    assert_close(along[:, V - 1 :], 0, atol=1e-4)
    covariance = np.diag(sizes[: V - 1] ** 2 / (V - 1))
    assert sample_error(along[:, : V - 1], np.zeros(V - 1), covariance) < 4.5


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


def test_two_tables_get_two_draws_and_one_array_in_two_places_gets_one(getkey):
    table, copy = make_table("first"), make_table("first")
    key = getkey()
    one, two = resize_vocabulary((table, copy), 12, key=key, pad_to_multiple_of=1)
    assert not np.any(one.embeddings[7:] == two.embeddings[7:])
    biased = dataclasses.replace(table, bias=jnp.zeros(9))
    lookup, decode = resize_vocabulary(
        (EmbeddingLookup(table), EmbeddingDecode(biased)), 12, key=key, pad_to_multiple_of=1
    )
    assert lookup.table.embeddings is decode.table.embeddings
    assert lookup.table.bias is None and decode.table.bias.shape == (12,)


def test_each_of_stacked_tables_grows_by_its_own_mean_and_covariance():
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
    for array, grown, bias, sign in zip(arrays, new.embeddings, new.bias, (1, -1)):
        rows = float64(grown)[40:5040]
        assert sample_error(rows, float64(array).mean(0), np.cov(float64(array), rowvar=False)) < 5
        assert_close(bias[40:5040], sign * rows[:, 0], 1e-4, 1e-4)  # drawn with its row
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
    new = resize_vocabulary(jax.tree.map(np.asarray, table), 9, key=key, pad_to_multiple_of=4)
    assert eqx.tree_equal(new, resize_vocabulary(table, 9, key=key, pad_to_multiple_of=4))


def test_factored_moments_of_another_vocabulary_are_left_alone():
    positions = EmbeddingTable(make_array((6, 4)), ("position", "embedding"), "position")
    factored = state_of(optax.adafactor(1e-3, min_dim_size_to_factor=2), positions)
    moments, same = resize_vocabulary((make_table("first"), factored), 9, pad_to_multiple_of=1)
    assert moments.vocab_size == 9 and eqx.tree_equal(same, factored)


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
            r"v_row.embeddings has shape \(4,\), .* Adafactor, make a new state",
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


def test_padding_must_be_asked_for_where_there_is_some():
    padded, plain = make_table("first"), EmbeddingTable(make_array((7, 4)), NAMES)
    for tree in (padded, jax.eval_shape(lambda: padded), eqx.filter(padded, False)):
        for size in 7, 9:
            message = r"tree\[1\] has 2 padding rows.*given: 1 for no padding, or the multiple"
            with pytest.raises(ValueError, match=message):
                resize_vocabulary([plain, tree], size)
    assert eqx.tree_equal(
        resize_vocabulary(plain, 9), resize_vocabulary(plain, 9, pad_to_multiple_of=1)
    )
    positions = EmbeddingTable(make_array((8, 4)), ("position", "d"), "position", padding_rows=1)
    resize_vocabulary([plain, positions], 9)  # the padding of another vocabulary is left alone


def test_a_resize_with_a_key_draws_moments_as_well():
    table: Any = EmbeddingTable(make_array((9, 4)), NAMES)
    optimizer = optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.update(table, optimizer.init(table))[1]
    key = jax.random.key(0)
    _, together = resize_vocabulary((table, state), 40, key=key)
    assert np.any(together[0].nu.embeddings[9:] < 0)
    apart = resize_vocabulary(state, 40)
    assert not np.any(apart[0].nu.embeddings[9:])
