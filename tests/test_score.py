"""`EmbeddingDecode.score`: the scores of each target, and their gradients."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingTable, TokenScores
from eqx_embedding._blockwise._reference import reference_scores

from .helpers import (
    assert_close,
    assert_trees_close,
    assert_trees_equal,
    decode_reference,
    float64,
    make_array,
    make_hidden,
    make_layer as make_any_layer,
    plain_scores,
    rounding,
    scores_reference,
    VOCAB_SIZE,
)


BATCH = (3, 11)
TARGETS = (np.arange(33).reshape(BATCH) % VOCAB_SIZE).astype(np.int32)
CHUNK_SIZE = 16  # two chunks and a token
FLOATS = ("log_prob", "mean_log_prob", "entropy", "logsumexp")


# The padding rows are NaN, and so are their biases, so that a leak shows.
make_layer = functools.partial(make_any_layer, with_bias=True, padding=np.nan)


def flat_layer(rows, bias=None, padding_rows=0):
    """Padded with NaN."""
    rows = np.pad(rows, ((0, padding_rows), (0, 0)), constant_values=np.nan)
    if bias is not None:
        bias = np.pad(bias.astype(rows.dtype), (0, padding_rows), constant_values=np.nan)
        bias = jnp.asarray(bias)
    axes = ("vocabulary", "embedding")
    table = EmbeddingTable(jnp.asarray(rows), axes, padding_rows=padding_rows, bias=bias)
    return EmbeddingDecode(table)


def mark(*places):
    """True at these places of the batch."""
    return np.isin(np.arange(33).reshape(BATCH), places)


def score_of(layer, hidden, targets, weights=None, **options) -> TokenScores:
    return layer.score(hidden, targets, weights=weights, **options)


score = eqx.filter_jit(score_of)


def assert_scores(actual, expected, rtol=1e-5, atol=1e-6):
    assert type(actual) is TokenScores
    for name in FLOATS:
        assert_close(getattr(actual, name), getattr(expected, name), rtol, atol)
    assert actual.is_top.dtype == bool
    np.testing.assert_array_equal(actual.is_top, expected.is_top)


# Values


@pytest.mark.parametrize(
    "layout, with_bias, soft_cap",
    [("first", True, None), ("middle", False, 2.0), ("last", True, 3), ("alone", False, None)],
)
def test_scores_are_those_of_all_logits(layout, with_bias, soft_cap):
    layer = make_layer(layout, with_bias=with_bias, soft_cap=soft_cap)
    hidden = make_hidden(layer, BATCH)
    targets = decode_reference(layer.table, hidden, soft_cap).argmax(-1)
    targets = np.where(mark(*range(0, 33, 2)), targets, TARGETS)
    expected = scores_reference(layer, hidden, targets)
    assert expected.is_top.any() and not expected.is_top.all()
    assert_scores(score(layer, hidden, targets, chunk_size=CHUNK_SIZE), expected)


def test_scores_have_the_precision_of_float32_at_least(dtype):
    layer = make_layer("middle", dtype, soft_cap=3.0)
    hidden = make_hidden(layer, BATCH, dtype=dtype)
    scores = score(layer, hidden, TARGETS)
    wide = "float64" if dtype == "float64" else "float32"
    assert {s.dtype.name for s in scores} == {wide, "bool"}
    tolerance = 30 * rounding(wide)
    assert_scores(scores, scores_reference(layer, hidden, TARGETS), tolerance, tolerance)


def test_a_temperature_divides_vectors_bias_and_cap():
    layer, temperature = make_layer("last", soft_cap=4.0), 0.7
    hidden, bias = make_hidden(layer, BATCH), layer.table.bias
    assert bias is not None
    divided = dataclasses.replace(layer.table, bias=bias / temperature)
    scores = EmbeddingDecode(divided, 4.0 / temperature).score(hidden / temperature, TARGETS)
    log_probs = jax.nn.log_softmax(layer(hidden) / temperature)
    expected = jnp.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
    assert_close(scores.log_prob, expected)


def test_scores_do_not_depend_on_the_dtype_of_the_logits():
    layer = make_layer()
    hidden = make_hidden(layer, BATCH)
    rounded = dataclasses.replace(layer, logits_dtype=jnp.bfloat16)
    scores = score(rounded, hidden, TARGETS)
    jax.tree.map(np.testing.assert_array_equal, scores, score(layer, hidden, TARGETS))


@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (1, 2, 3)], ids=str)
def test_scores_have_the_shape_of_the_batch(batch):
    layer = make_layer("middle")
    hidden, targets = make_hidden(layer, batch), np.full(batch, 3)
    scores = score(layer, hidden, targets)
    assert {s.shape for s in scores} == {batch}
    assert_scores(scores, scores_reference(layer, hidden, targets))


@pytest.mark.parametrize(
    "vocab_size, padding_rows, highest", [(2049, 0, "first"), (2600, 5, "last")]
)
def test_tiles_make_one_vocabulary(vocab_size, padding_rows, highest):
    bias = np.linspace(-4, 4, vocab_size)[:: 1 if highest == "last" else -1]
    layer = flat_layer(make_array((vocab_size, 4)), bias, padding_rows)
    targets = np.asarray([0, 1, 1023, 1024, 1025, 2047, 2048, vocab_size - 1, 0, 0])
    hidden = make_array((10, 4), seed=2)
    top = decode_reference(layer.table, hidden).argmax(-1)
    targets[-2:] = top[-2:]
    expected = scores_reference(layer, hidden, targets)
    assert expected.is_top[-2:].all()
    # entropies of a few nats are differences of larger numbers
    assert_scores(score(layer, hidden, targets), expected, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 2600])
def test_of_equal_logits_the_lower_token_is_top(vocab_size):
    layer = flat_layer(np.zeros((vocab_size, 4), np.float32), padding_rows=1)
    targets = np.asarray([0, vocab_size // 2, vocab_size - 1])
    scores = score(layer, make_array((3, 4)), targets)
    np.testing.assert_array_equal(scores.is_top, targets == 0)
    assert_close(scores.log_prob, [-np.log(vocab_size)] * 3)
    assert_close(scores.entropy, [np.log(vocab_size)] * 3)


def test_equal_logits_of_different_tiles_tie():
    rows = np.zeros((2600, 4), np.float32)
    rows[[700, 1500, 2599]] = 1.0
    scores = score(flat_layer(rows), jnp.ones((4, 4)), np.asarray([700, 1500, 2599, 0]))
    assert scores.is_top.tolist() == [True, False, False, False]


def test_large_logits_lose_no_precision():
    # whole numbers, whose products and sums are exact
    rows = np.random.default_rng(0).integers(-99, 100, (2600, 4))
    hidden = np.random.default_rng(1).integers(-9999, 10000, (9, 4))
    # the two best tokens of the last vector are one logit apart
    rows[5], rows[2000], hidden[-1] = 100, [100, 100, 100, 99], [9999, 9999, 9999, 1]
    layer, hidden = flat_layer(rows.astype(np.float32)), jnp.asarray(hidden, jnp.float32)
    targets = np.asarray([0, 1, 2, 1023, 1024, 2047, 2048, 2599, 2000])
    expected = scores_reference(layer, hidden, targets)
    assert expected.log_prob[-1] == pytest.approx(-1.3132617)
    assert_scores(score(layer, hidden, targets), expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("vocab_size, first", [(7, 3), (2600, 1300)])
def test_banned_tokens_have_no_part(vocab_size, first):
    """Bias -inf: 0 log 0 is 0. In the larger vocabulary whole tiles are banned."""
    rows, hidden = np.asarray(make_array((vocab_size, 4))), make_array((5, 4), seed=2)
    bias = np.where(np.arange(vocab_size) < first, -np.inf, 0.25)
    layer, rest = flat_layer(rows, bias, 2), flat_layer(rows[first:], bias[first:])
    targets = np.arange(5) % (vocab_size - first)
    scores = score(layer, hidden, targets + first)
    expected = scores_reference(rest, hidden, targets)
    assert_scores(scores, expected._replace(mean_log_prob=np.full(5, -np.inf)))
    banned = score(layer, hidden, np.zeros(5, int))
    assert banned.log_prob.tolist() == [-np.inf] * 5 and not np.any(banned.is_top)
    assert_close(banned.entropy, expected.entropy)


@pytest.mark.slow
def test_the_only_token_that_is_not_banned_is_certain():
    bias = np.where(np.arange(7) == 4, 0.0, -np.inf)
    layer = flat_layer(make_array((7, 4)), bias)
    scores = score(layer, make_array((2, 4), seed=2), np.asarray([4, 0]))
    assert scores.entropy.tolist() == [0, 0] and scores.log_prob.tolist() == [0, -np.inf]
    assert scores.is_top.tolist() == [True, False]


@pytest.mark.parametrize("vocab_size", [7, 2600])
def test_a_nan_stays_with_its_token_which_is_never_top(vocab_size):
    layer = flat_layer(make_array((vocab_size, 4)), padding_rows=1)
    hidden = np.array(make_array((3, 4), seed=2))
    targets = np.argmax(decode_reference(layer.table, hidden), -1)
    hidden[1] = np.nan
    for target in 0, 1, vocab_size - 1:
        targets[1] = target
        scores = score(layer, hidden, targets)
        assert np.isnan(scores.log_prob).tolist() == [False, True, False]
        assert np.isnan(scores.entropy).tolist() == [False, True, False]
        assert scores.is_top.tolist() == [True, False, True]


@pytest.mark.parametrize("row", [0, 2599])
def test_beside_a_row_of_nan_no_token_is_top(row):
    """The largest logit is not known, in whatever tile the row is."""
    rows, hidden = np.array(make_array((2600, 4))), make_array((3, 4), seed=2)
    best = int(np.argmax(float64(rows) @ float64(hidden)[0]))
    rows[row] = np.nan
    scores = score(flat_layer(rows), hidden, np.asarray([best, 0, 2599]))
    assert np.isnan(scores.log_prob).all()
    assert not np.any(scores.is_top)


# Tokens without part


@pytest.mark.parametrize("kind", ["weights", "mask", "ignore_index", "both"])
def test_tokens_of_weight_zero_have_zeros(kind):
    layer = make_layer(soft_cap=3.0)
    hidden = make_hidden(layer, BATCH)
    mask = mark(0, 2, 3, 6, 7, 9, *range(12, 33, 3))
    ignored = np.where(mask, TARGETS, -100)
    first = mark(*range(11))  # what "both" leaves to `ignore_index`
    weights = np.where(mask, -0.25, 0.0).astype(np.float32)
    options = {
        "weights": dict(weights=jnp.asarray(weights)),
        "mask": dict(weights=mask),
        "ignore_index": dict(ignore_index=-100),
        "both": dict(weights=mask | first, ignore_index=-100),
    }[kind]
    targets = np.where(first | mask, ignored, 2**31 - 1) if kind == "both" else ignored
    poisoned = np.where(mask[..., None], hidden, np.nan)
    scores = score(layer, poisoned, targets, chunk_size=CHUNK_SIZE, **options)
    expected = scores_reference(layer, hidden, TARGETS)
    counted: Any = [np.where(mask, e, 0) for e in expected]
    assert_scores(scores, TokenScores(*counted))


@pytest.mark.parametrize(
    "ignore_index, dtype, ignored",
    [
        (3, "int32", 2),
        (np.int64(3), "uint8", 2),
        (-100, "uint8", 0),
        (259, "uint8", 0),  # which is 3 in eight bits
        (2**32 + 3, "int32", 0),
        (2**40, "int64", 1),
    ],
)
def test_an_ignored_target_is_compared_as_it_is(ignore_index, dtype, ignored):
    targets = np.asarray([3, 1, 6, 3], dtype)
    if dtype == "int64":
        targets[2] = 2**40
    layer = make_layer()
    scores = layer.score(make_hidden(layer, (4,)), targets, ignore_index=ignore_index)
    assert np.sum(np.asarray(scores.logsumexp) == 0) == ignored
    assert not np.any(np.isnan(scores.log_prob))


@pytest.mark.parametrize("target", [-1, VOCAB_SIZE, VOCAB_SIZE + 1, 2**32 + 1, 2**63 - 1])
def test_a_target_out_of_range_has_no_log_probability(target):
    layer = make_layer()
    hidden, targets = make_hidden(layer, BATCH), TARGETS.astype(np.int64)
    expected = scores_reference(layer, hidden, targets)
    targets[0, 2] = target
    scores = layer.score(hidden, targets)  # under jit, JAX would narrow them
    assert np.isnan(scores.log_prob[0, 2]) and not scores.is_top[0, 2]
    log_prob = np.where(mark(2), np.nan, expected.log_prob)
    assert_scores(scores, expected._replace(log_prob=log_prob, is_top=expected.is_top & ~mark(2)))


# Gradients


def differentiate(scores_of, layer, hidden, targets, cotangents):
    """The gradients of a sum of scores with respect to layer and hidden."""

    @eqx.filter_grad
    def gradients(operands):
        scores = scores_of(*operands, targets)
        return sum(jnp.vdot(c, s) for c, s in zip(cotangents, scores, strict=False))

    return gradients((layer, hidden))


ours: Any = eqx.filter_jit(
    functools.partial(differentiate, functools.partial(score_of, chunk_size=CHUNK_SIZE))
)
plain: Any = eqx.filter_jit(functools.partial(differentiate, plain_scores))


def make_cotangents(zeros=(), dtype="float32"):
    """For each of the four scores; zero at some places of the batch."""
    draw = make_array((4, *BATCH), dtype, seed=3)
    return np.where(mark(*zeros), 0, draw).astype(draw.dtype)


@pytest.mark.parametrize(
    "layout, with_bias, soft_cap", [("middle", True, 2.0), ("last", False, None)]
)
@pytest.mark.slow
def test_gradients_are_those_of_plain_logits(layout, with_bias, soft_cap):
    options = dict(with_bias=with_bias, soft_cap=soft_cap)
    with jax.enable_x64(True):
        layer = make_layer(layout, "float64", **options)
        finite = make_layer(layout, "float64", padding=0.0, **options)
        hidden, targets = make_hidden(layer, BATCH, dtype="float64"), jnp.asarray(TARGETS)
        # each score alone, where the cotangents of the others are zero; and all of them
        for factors in (*np.eye(4), np.ones(4)):
            cotangents = make_cotangents(dtype="float64") * factors[:, None, None]
            expected = plain(finite, hidden, targets, cotangents)
            assert_trees_close(ours(layer, hidden, targets, cotangents), expected, 1e-10, 1e-13)


def test_gradients_of_tiles_are_those_of_plain_logits():
    with jax.enable_x64(True):
        layer = flat_layer(make_array((2049, 4), "float64"), np.linspace(-2, 2, 2049))
        operands = (
            make_array((6, 4), "float64", seed=2),
            jnp.asarray([0, 1023, 1024, 2047, 2048, 5]),
            make_array((4, 6), "float64", seed=3),
        )
        expected = plain(layer, *operands)
        assert_trees_close(ours(layer, *operands), expected, 1e-10, 1e-13)


def test_a_token_of_cotangents_zero_poisons_nothing():
    layer = make_layer("last")
    hidden, cotangents = make_hidden(layer, BATCH), make_cotangents(zeros=(2, 6))
    poisoned = np.where(mark(2)[..., None, None], np.nan, hidden)
    poisoned = np.where(mark(6)[..., None, None], np.inf, poisoned)
    targets = np.where(mark(2), -1, TARGETS)
    actual = ours(layer, poisoned, targets, cotangents)
    assert_trees_equal(actual, ours(layer, hidden, TARGETS, cotangents))


def test_only_a_log_probability_needs_its_target():
    layer = make_layer("last")
    hidden, wrong, cotangents = make_hidden(layer, BATCH), np.full(BATCH, -1), make_cotangents()
    cotangents[0] = 0
    actual = ours(layer, hidden, wrong, cotangents)
    assert_trees_equal(actual, ours(layer, hidden, TARGETS, cotangents))
    cotangents[0, 0, 2] = 1
    of_layer, of_hidden = ours(layer, hidden, wrong, cotangents)
    np.testing.assert_array_equal(np.isnan(of_hidden).all((-1, -2)), mark(2))
    assert np.isnan(of_layer.table.embeddings[..., :VOCAB_SIZE]).all()


@pytest.mark.slow
def test_gradients_pass_banned_tokens():
    rows, hidden = np.asarray(make_array((7, 4))), make_array((*BATCH, 4), seed=2)
    bias = np.where(np.arange(7) < 3, -np.inf, 0.25)
    layer, rest = flat_layer(rows, bias, 2), flat_layer(rows[3:], bias[3:])
    targets, cotangents = TARGETS % 4, make_cotangents()
    cotangents[1] = 0  # the mean of the log-probabilities is -inf
    of_layer, of_hidden = ours(layer, hidden, targets + 3, cotangents)
    of_rest, expected = plain(rest, hidden, jnp.asarray(targets), cotangents)
    assert_close(of_hidden, expected)
    wanted = np.pad(of_rest.table.embeddings, ((3, 2), (0, 0)))
    assert_close(of_layer.table.embeddings, wanted)
    assert_close(of_layer.table.bias, np.pad(of_rest.table.bias, (3, 2)))


@pytest.mark.slow
def test_gradients_of_half_precision_are_rounded_once():
    layer = make_layer("middle", "bfloat16", padding=0.0)
    hidden, targets, cotangents = (
        make_hidden(layer, BATCH, dtype="bfloat16"),
        TARGETS,
        make_cotangents(),
    )
    actual = ours(layer, hidden, targets, cotangents)
    wide = jax.tree.map(lambda a: a.astype("float32"), (layer, hidden))
    expected = plain(*wide, jnp.asarray(targets), cotangents)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(actual)} == {"bfloat16"}
    expected = jax.tree.map(lambda e, a: e.astype(a.dtype), expected, actual)
    assert_trees_close(actual, expected, rtol=rounding("bfloat16") / 2 + 1e-5, atol=1e-5)


def test_weights_and_top_tokens_have_no_gradient():
    layer = make_layer()
    hidden = make_hidden(layer, BATCH)

    def total(hidden, weights):
        scores = layer.score(hidden, TARGETS, weights=weights)
        accuracy = jnp.mean(jnp.where(scores.is_top, 1.0, 0.0))
        return accuracy + 0 * jnp.sum(scores.log_prob)

    for_hidden, for_weights = eqx.filter_jit(jax.grad(total, (0, 1)))(hidden, jnp.full(BATCH, 0.5))
    assert not np.any(for_hidden) and not np.any(for_weights)


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(weights=np.ones(5)), r"weights must have the shape \(3, 11\) .* got \(5,\)"),
        (dict(rules={"batch": "data"}), "mesh axis 'data', but the mesh is not set"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    layer = make_layer()
    with pytest.raises(ValueError, match=message):
        layer.score(make_hidden(layer, BATCH), TARGETS, **options)


def test_targets_of_another_shape_are_refused():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"targets must have the shape \(3, 11\) .* got \(33,\)"):
        layer.score(make_hidden(layer, BATCH), TARGETS.ravel())


@pytest.mark.slow
def test_scores_are_those_of_the_reference_in_the_kernel():
    rows, bias = (np.asarray(make_array(shape, seed=1)) for shape in ((257, 4), (257,)))
    layer = dataclasses.replace(flat_layer(rows, bias), soft_cap=3.0)
    hidden, targets = make_array((33, 4), seed=2), jnp.arange(33, dtype="int32")
    expected = reference_scores(hidden, jnp.asarray(rows), targets, jnp.asarray(bias), 3.0)
    assert_scores(score(layer, hidden, targets, chunk_size=CHUNK_SIZE), expected)
