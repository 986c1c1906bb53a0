"""`EmbeddingDecode.token_loss`: any loss of the scores of tokens, against plain logits."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eqx_embedding import EmbeddingDecode, TokenScores
from eqx_embedding._blockwise._reference import reference_loss

from .helpers import (
    assert_close,
    assert_trees_close,
    assert_trees_equal,
    cross_entropy_reference,
    make_array,
    make_layer as make_any_layer,
    make_table,
    plain_loss,
    scores_reference,
    VOCAB_SIZE,
)


BATCH = (3, 11)
TARGETS = (np.arange(33).reshape(BATCH) % VOCAB_SIZE).astype(np.int32)
MASK = np.arange(33).reshape(BATCH) % 5 != 1
CHUNK_SIZE = 16  # two chunks, and a token unless some are masked
REDUCTIONS = ("mean", "sum", "none")


# What a user could write


class ScaledLoss(eqx.Module):
    scale: jax.Array

    def __call__(self, scores, a, b):
        return -self.scale[0] * jnp.exp(a) * scores.log_prob + self.scale[1] * scores.entropy


@jax.custom_vjp
def double_gradient(x):
    return x


double_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def cross_entropy(c):
    return lambda scores, a, b: -scores.log_prob


def smoothed_with_z_loss(c):
    def loss(scores, a, b):
        return -0.9 * scores.log_prob - 0.1 * scores.mean_log_prob + 0.01 * scores.logsumexp**2

    return loss


def focal(c):
    return lambda scores, a, b: -((1 - jnp.exp(scores.log_prob)) ** 2) * scores.log_prob


def unlikelihood(c):
    return lambda scores, a, b: -jnp.log1p(-jnp.exp(scores.log_prob))


def clipped_policy_gradient(c):
    def loss(scores, advantage, b):
        ratio = jnp.exp(scores.log_prob - b[0])
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.minimum(ratio * advantage, clipped * advantage) - c[0] * scores.entropy

    return loss


def distillation(c):
    return lambda scores, a, b: jnp.exp(a / c[1]) * (a - scores.log_prob)


def with_control_flow(c):
    def loss(scores, a, b):
        def step(carry, inputs):
            x, y = inputs
            return jnp.tanh(carry * x) + y * scores.entropy, carry

        last, carries = lax.scan(step, scores.log_prob, (b, c))
        chosen = lax.cond(a > 0, lambda x: x * a, lambda x: x**2, last)
        return double_gradient(jax.nn.relu(chosen)) + jnp.sum(carries)

    return loss


def without_scores(c):
    return lambda scores, a, b: jnp.sum(b * c) * a


def accuracy(c):
    return lambda scores, a, b: scores.is_top


def where_top(c):
    return lambda scores, a, b: jnp.where(scores.is_top, scores.log_prob * a, scores.entropy)


LOSSES = (
    cross_entropy,
    smoothed_with_z_loss,
    focal,
    unlikelihood,
    clipped_policy_gradient,
    distillation,
    with_control_flow,
    without_scores,
    accuracy,
    where_top,
    ScaledLoss,
)


def all_losses(c, factors):
    """Each times a factor, whose derivative is the loss."""

    def loss(scores, a, b):
        losses = [jnp.asarray(make(c)(scores, a, b), factors.dtype) for make in LOSSES]
        return jnp.vdot(factors, jnp.stack(losses))

    return loss


# The case


def make_layer(dtype="float32", padding=np.nan, with_bias=True):
    """The padding rows are NaN, and so are their biases, so that a leak shows."""
    return make_any_layer("middle", dtype, with_bias, soft_cap=4.0, padding=padding)


def make_operands(dtype="float32", padding=np.nan):
    """Layer, hidden, weights, two arrays of data, and one to close over."""
    layer = make_layer(dtype, padding)
    weights = np.where(MASK, 0.5 + np.arange(33).reshape(BATCH) / 33, 0)
    return (
        layer,
        make_array((*BATCH, *layer.table.embedding_axes.values()), dtype, seed=2),
        jnp.asarray(weights, dtype),
        make_array(BATCH, dtype, seed=3),
        make_array((*BATCH, 3), dtype, seed=4),
        jnp.asarray([0.5, 1.5, -0.75], dtype),
    )


def ours(fn, layer, hidden, targets, *data, **options):
    return layer.token_loss(fn, hidden, targets, *data, chunk_size=CHUNK_SIZE, **options)


@eqx.filter_jit
def differentiate(token_loss, make, reduction, operands, targets=TARGETS, cotangent=None) -> Any:
    """The loss, and its gradients with respect to all operands."""

    def loss(operands):
        layer, hidden, weights, a, b, *closed_over = operands
        fn, options = make(*closed_over), dict(weights=weights, reduction=reduction)
        loss = token_loss(fn, layer, hidden, jnp.asarray(targets), a, b, **options)
        return (loss if cotangent is None else jnp.vdot(loss, cotangent)), loss

    (_, loss), gradients = eqx.filter_value_and_grad(loss, has_aux=True)(operands)
    return loss, gradients


def make_cotangent(reduction, dtype="float32"):
    return make_array(BATCH, dtype, seed=5) if reduction == "none" else None


# Values and gradients


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_values_and_gradients_are_those_of_plain_logits(reduction):
    with jax.enable_x64(True):
        cotangent = make_cotangent(reduction, "float64")
        factors = make_array((len(LOSSES),), "float64", seed=6)
        actual, expected = (
            differentiate(
                token_loss,
                all_losses,
                reduction,
                (*make_operands("float64", padding), factors),
                targets=TARGETS,
                cotangent=cotangent,
            )
            for token_loss, padding in ((ours, np.nan), (plain_loss, 0.0))
        )
        assert_trees_close(actual, expected, 1e-10, 1e-12)


def test_the_mean_of_is_top_is_the_accuracy():
    operands = layer, hidden, weights, *_ = make_operands()
    value, gradients = differentiate(ours, accuracy, "mean", operands)
    is_top = scores_reference(layer, hidden, TARGETS).is_top
    assert_close(value, np.average(is_top, weights=weights))
    for_weights = (np.where(MASK, is_top, 0) - float(value)) / np.sum(weights)
    assert_close(gradients[2], for_weights)
    assert not any(np.any(g) for g in jax.tree.leaves((gradients[:2], gradients[3:])))


@pytest.mark.slow
def test_a_mean_and_a_sum_are_those_of_the_losses_of_tokens():
    layer, hidden, weights, *_ = make_operands()

    def loss(reduction):
        def fn(scores):
            return scores.entropy

        return layer.token_loss(fn, hidden, TARGETS, weights=weights, reduction=reduction)

    losses = loss("none")
    assert losses.shape == BATCH and losses.dtype == jnp.float32
    assert_close(loss("sum"), np.sum(losses))
    assert_close(loss("mean"), np.sum(losses) / np.sum(weights))


@pytest.mark.slow
def test_gradients_of_half_precision_are_rounded_once():
    def small(c):
        def loss(scores, a, b):
            assert scores.log_prob.dtype == jnp.float32
            a, b, wide = (x.astype("float32") for x in (a, b, c))
            loss = jnp.exp(a) * wide[0] * scores.log_prob + b[0] * b[1] * scores.entropy
            return loss + wide[1] ** 2

        return loss

    def run(token_loss, operands):
        return differentiate(token_loss, small, "mean", operands)

    operands = make_operands("float16", padding=0.0)
    value, gradients = run(ours, operands)
    wide = jax.tree.map(lambda x: x.astype("float32"), operands)
    expected, wanted = run(plain_loss, wide)
    assert value.dtype == jnp.float32
    assert_close(value, expected)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.float16
        assert_close(one, other, rtol=2**-11 + 1e-5, atol=1e-5)


@pytest.mark.parametrize("batch, reduction", [((), "mean"), ((0,), "mean"), ((1, 0, 3), "none")])
def test_a_batch_may_have_any_shape(batch, reduction):
    layer = make_layer(padding=0.0)
    hidden = make_array((*batch, *layer.table.embedding_axes.values()), seed=2)
    targets, data = jnp.ones(batch, "int32"), make_array((*batch, 2), seed=3)

    def loss(token_loss, hidden, data):
        def fn(scores, d):
            return -d[0] * scores.log_prob + d[1]

        loss = token_loss(fn, layer, hidden, targets, data, reduction=reduction)
        return jnp.sum(loss), loss

    run = eqx.filter_jit(lambda f, *a: jax.value_and_grad(loss, (1, 2), has_aux=True)(f, *a))
    (_, value), gradients = run(ours, hidden, data)
    if 0 in batch:
        assert value.shape == (batch if reduction == "none" else ()) and not np.any(value)
        assert [g.shape for g in gradients] == [hidden.shape, data.shape]
    else:
        (_, expected), wanted = run(plain_loss, hidden, data)
        assert_trees_close((value, gradients), (expected, wanted), 1e-5, 1e-6)


@pytest.mark.parametrize("reduction, masked", [("mean", False), ("none", True)])
@pytest.mark.slow
def test_integers_and_keys_may_be_data_or_closed_over(masked, reduction):
    layer, hidden, weights, a, *_ = make_operands(padding=0.0)
    weights = weights if masked else None
    key, keys = jax.random.key(3), jax.random.split(jax.random.key(1), BATCH)
    classes, costs = jnp.asarray([2, 0, 1]), make_array((3,), seed=5)
    flags = jnp.asarray(MASK)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(operands, token_loss, key, keys, classes):
        hidden, a, costs = operands

        def fn(scores, a, key_of_token, index, flag, number):
            cost = costs[classes[index]]
            noise = jax.random.key_data(key)[1].astype("float32")
            noise *= jax.random.uniform(key_of_token)
            return jnp.where(flag, cost, number.astype("float32")) * a * noise * scores.log_prob

        data = a, keys, jnp.asarray(TARGETS % 3), flags, jnp.asarray(TARGETS, "uint8")
        targets = jnp.asarray(TARGETS)
        return jnp.sum(
            token_loss(fn, layer, hidden, targets, *data, weights=weights, reduction=reduction)
        )

    operands = hidden, a, costs
    actual = loss(operands, ours, key, keys, classes)
    assert_trees_close(actual, loss(operands, plain_loss, key, keys, classes), 1e-5, 1e-6)


@pytest.mark.parametrize("constant", [True, 2.5, np.float64(1.5), jnp.ones(())])
def test_a_loss_may_be_a_constant(constant):
    layer = make_layer()
    hidden = make_array(tuple(layer.table.embedding_axes.values()))
    loss = layer.token_loss(lambda scores: constant, hidden, 3)
    assert loss.dtype == jnp.float32
    assert_close(loss, float(constant))


def test_data_may_be_python_numbers_and_host_arrays():
    layer = make_layer()
    hidden = make_array(tuple(layer.table.embedding_axes.values()))

    def loss(data):
        return layer.token_loss(lambda scores, x: -x * scores.log_prob, hidden, 3, data)

    assert_close(loss(2.0), 2 * loss(jnp.ones(())))
    assert loss(np.float64(2.0)) == loss(np.full((), 2, np.float32)) == loss(2.0)


@pytest.mark.parametrize("masked", [False, True])
def test_data_may_have_no_numbers_for_each_token(masked):
    layer, weights = make_layer(), MASK.astype("float32") if masked else None
    hidden, empty = (
        make_array((*BATCH, *layer.table.embedding_axes.values())),
        jnp.zeros((*BATCH, 0)),
    )

    def loss(empty):
        def of_token(scores, x):
            return jnp.sum(x) - scores.log_prob

        return layer.token_loss(of_token, hidden, TARGETS, empty, weights=weights)

    value, grad = jax.value_and_grad(loss)(empty)
    assert_close(value, layer.cross_entropy(hidden, TARGETS, weights=weights))
    assert grad.shape == empty.shape


# Scores beside a loss


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("method", ["token_loss", "cross_entropy"])
@pytest.mark.slow
def test_scores_come_with_the_loss_and_without_gradient(method, reduction):
    layer, hidden, weights, *_ = make_operands()
    targets = np.where(MASK, TARGETS, -100)
    cotangent = 1.0 if reduction == "mean" else np.asarray(make_cotangent(reduction))
    options = dict(ignore_index=-100, weights=weights, reduction=reduction, return_scores=True)

    @eqx.filter_jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(hidden):
        losses = {
            "cross_entropy": layer.cross_entropy,
            "token_loss": functools.partial(layer.token_loss, lambda scores: -scores.log_prob),
        }
        loss, scores = losses[method](hidden, targets, chunk_size=CHUNK_SIZE, **options)
        total = jnp.sum(loss * cotangent) + sum(jnp.sum(score) for score in scores[:4])
        return total, (loss, scores)

    (_, (loss, scores)), gradient = run(hidden)
    expected, wanted, *_ = cross_entropy_reference(
        layer, hidden, TARGETS, weights, cotangent, reduction=reduction
    )
    assert_close(loss, expected)
    assert_close(gradient, wanted)
    assert type(scores) is TokenScores
    for actual, score in zip(scores, scores_reference(layer, hidden, TARGETS), strict=True):
        assert_close(actual, np.where(MASK, score, 0))


def test_ignored_targets_have_weight_zero():
    layer, hidden, weights, a, b, c = make_operands()
    ignored, poisoned = np.where(MASK, TARGETS, -100), np.where(MASK, a, np.nan)
    positive = np.asarray(weights) + 2
    loss = functools.partial(ours, clipped_policy_gradient(c), layer, hidden)
    expected = loss(TARGETS, a, b, weights=positive * MASK)
    assert_close(loss(ignored, poisoned, b, ignore_index=-100, weights=positive), expected)


# Only what is used is computed


def lowered(fn, *, gradients=False, reduction="mean", return_scores=False, V=64):
    """The text of a program of one chunk and one tile."""

    def loss(rows, hidden, targets):
        table = dataclasses.replace(make_table("first"), embeddings=rows, padding_rows=0)
        return EmbeddingDecode(table).token_loss(
            fn, hidden, targets, reduction=reduction, return_scores=return_scores
        )

    def total(*arguments):
        return jnp.sum(loss(*arguments))

    shapes = (
        jax.ShapeDtypeStruct((V, 8), jnp.float32),
        jax.ShapeDtypeStruct((16, 8), jnp.float32),
        jax.ShapeDtypeStruct((16,), jnp.int32),
    )
    function = jax.value_and_grad(total, (0, 1)) if gradients else loss
    return jax.jit(function).lower(*shapes).as_text()


def reductions(fn, **options):
    """How often the program reduces an array: each score but `log_prob` and `logsumexp`, which
    share theirs, needs a sum or a search of its own."""
    return lowered(fn, **options).count("stablehlo.reduce(")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.slow
def test_statistics_that_are_not_used_are_not_computed(gradients):
    count = functools.partial(reductions, gradients=gradients)
    few = count(lambda scores: -scores.log_prob)
    assert count(lambda scores: scores.logsumexp) == few
    assert count(lambda scores: -scores.mean_log_prob) == few + 1
    assert count(lambda scores: -scores.entropy) == few + 1
    assert count(lambda scores: scores.is_top) == few + 1
    assert count(lambda scores: scores.mean_log_prob * scores.entropy) == few + 2
    if not gradients:
        assert count(lambda scores: -scores.log_prob, return_scores=True) == few + 3


def unused_in_a_loop(scores):
    def step(carry, _):
        log_prob, entropy = carry
        return (log_prob * 0.5, entropy + 1), None

    (log_prob, _), _ = lax.scan(step, (scores.log_prob, scores.entropy), length=3)
    return log_prob


@pytest.mark.parametrize(
    "fn",
    [
        jax.jit(lambda scores: -scores.log_prob),
        jax.jit(lambda scores: -jax.jit(lambda s: s._replace(log_prob=s[0] * 2))(scores).log_prob),
        jax.checkpoint(lambda scores: -scores.log_prob),
        unused_in_a_loop,
    ],
    ids=["jit", "nested jit", "checkpoint", "scan"],
)
def test_what_an_inner_function_drops_is_not_computed(fn):
    assert reductions(fn) == reductions(lambda scores: -scores.log_prob)


@pytest.mark.slow
def test_products_are_as_few_as_can_be():
    """Of all hidden vectors with the whole table, 2NVD operations each."""

    def count(**options):
        return lowered(lambda scores: -scores.log_prob, **options).count("stablehlo.dot_general")

    for reduction in REDUCTIONS:
        assert count(reduction=reduction) == 1
        assert count(reduction=reduction, return_scores=True) == 1
    assert count(reduction="mean", gradients=True) == 3
    assert count(reduction="none", gradients=True) == 4


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_that_nobody_asks_for_is_not_computed(masked):
    """Such as that of a frozen table."""

    def loss(rows, hidden, weights, data):
        table = dataclasses.replace(make_table("first"), embeddings=rows, padding_rows=0)
        return EmbeddingDecode(table).token_loss(
            lambda scores, a: -a * scores.log_prob,
            hidden,
            np.zeros(64, np.int32),
            data,
            weights=weights if masked else None,
            chunk_size=16,
        )

    shapes = (2048, 8), (64, 8), (64,), (64,)  # two tiles, four chunks
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    options: Any = {"xla_backend_optimization_level": 0}

    def products(*numbers):
        lowered = jax.jit(jax.grad(loss, numbers)).lower(*operands)
        text = lowered.compile(compiler_options=options).as_text()
        assert text is not None
        return text.count(" dot(")

    # the logits, and then each gradient of a matrix
    found = {wrt: products(*wrt) for wrt in ((0, 1), (1,), (3,))}
    assert found == {(0, 1): 3, (1,): 2, (3,): 1}


# Tokens that do not count


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_masked_reaches_nothing(reduction, poison):
    with jax.enable_x64(True):
        cotangent = make_cotangent(reduction, "float64")
        factors = make_array((len(LOSSES),), "float64", seed=6)
        operands = layer, hidden, weights, a, b, c = make_operands("float64")
        poisoned = (
            layer,
            np.where(MASK[..., None, None], hidden, poison),
            weights,
            np.where(MASK, a, poison),
            np.where(MASK[..., None], b, poison),
            c,
        )
        actual, expected = (
            differentiate(
                ours, all_losses, reduction, (*x, factors), targets=t, cotangent=cotangent
            )
            for x, t in (
                (operands, TARGETS),
                (poisoned, np.where(MASK, TARGETS, np.int32(-100))),
            )
        )
        assert_trees_equal(actual, expected)
        _, (_, for_hidden, _, for_a, for_b, *_) = actual
        assert not any(np.any(np.asarray(g)[~MASK]) for g in (for_hidden, for_a, for_b))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_data_may_be_outside_of_a_domain(reduction):
    """The logarithm below is NaN for all but numbers above 1, whatever stands for masked data."""
    layer, hidden, weights, a, *_ = make_operands()
    c, data = jnp.asarray([0.5, 2.0]), np.where(MASK, 2 + np.abs(a), -1)

    @eqx.filter_jit
    @jax.value_and_grad
    def loss(c, data):
        def fn(scores, x):
            return c[0] * jnp.log(x - 1) * scores.log_prob + c[1] / (scores.logsumexp - 9)

        losses = ours(fn, layer, hidden, TARGETS, data, weights=weights, reduction=reduction)
        return jnp.sum(losses)

    clean = loss(c, jnp.asarray(np.where(MASK, data, 3.0)))
    assert_trees_equal(loss(c, jnp.asarray(data)), clean)
    assert np.all(np.isfinite(clean[1]))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mapped", ["batch", "examples", "examples and closure"])
def test_examples_without_tokens_may_be_outside_of_a_domain(mapped, reduction):
    """Whatever stands for data of masked tokens, the root below has no gradient there."""
    layer, hidden, *_ = make_operands()
    weights, data = np.array([1.0, 0.0, 0.0])[:, None] * np.ones(BATCH), 2 * np.ones(BATCH)

    def total(c, hidden, targets, weights, data):
        def fn(scores, x):
            return c * jnp.sqrt(x - 1) * scores.entropy

        losses = layer.token_loss(
            fn, hidden, targets, data, weights=weights, reduction=reduction, chunk_size=CHUNK_SIZE
        )
        return jnp.sum(losses)

    if mapped != "batch":
        axis = 0 if mapped == "examples and closure" else None
        total = jax.vmap(total, (axis, 0, 0, 0, 0))
    c = jnp.ones(3) if mapped == "examples and closure" else jnp.ones(())
    gradient = eqx.filter_jit(jax.grad(lambda *x: jnp.sum(total(*x)), (0, 3)))
    for_c, for_weights = gradient(c, jnp.asarray(hidden), TARGETS, weights, data)
    expected = plain_loss(lambda scores: scores.entropy, layer, hidden[:1], TARGETS[:1])
    count = 1 if reduction == "mean" else BATCH[1]
    np.testing.assert_allclose(np.sum(for_c), expected * count, rtol=1e-5)
    assert np.all(np.isfinite(for_weights))


def test_a_loss_is_that_of_the_reference():
    layer, hidden, weights, a, b, c = make_operands()
    rows, bias = layer.table._rows_first()
    N, D = TARGETS.size, rows[0].size
    tokens = (jnp.asarray(x).reshape(N, *x.shape[2:]) for x in (TARGETS, a, b))
    rows = rows[:VOCAB_SIZE].reshape(VOCAB_SIZE, D)
    bias = None if bias is None else bias[:VOCAB_SIZE]
    expected = reference_loss(
        clipped_policy_gradient(c), jnp.ravel(weights), jnp.reshape(hidden, (N, D)), rows, *tokens,
        bias=bias, soft_cap=layer.soft_cap,
    )  # fmt: skip
    actual = layer.token_loss(
        clipped_policy_gradient(c), hidden, TARGETS, a, b, weights=weights, reduction="sum"
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_with_all_tokens_masked_everything_is_zero(reduction):
    with jax.enable_x64(True):
        cotangent = make_cotangent(reduction, "float64")
        factors = make_array((len(LOSSES),), "float64", seed=6)
        layer, hidden, weights, a, b, c = make_operands("float64")
        hidden, a, b = (np.full(x.shape, np.nan) for x in (hidden, a, b))
        operands = layer, hidden, jnp.zeros(BATCH, "float64"), a, b, c, factors
        results = differentiate(
            ours, all_losses, reduction, operands, targets=TARGETS, cotangent=cotangent
        )
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("fn", [lambda s: s.logsumexp, lambda s: s.is_top, lambda s: 1.0])
def test_a_target_out_of_range_makes_any_loss_nan(fn, reduction):
    layer = make_layer()
    hidden = make_array((4, *layer.table.embedding_axes.values()), seed=2)
    targets = np.asarray([0, 1, VOCAB_SIZE, 2])
    loss = layer.token_loss(fn, hidden, targets, reduction=reduction)
    expected = [False, False, True, False] if reduction == "none" else True
    np.testing.assert_array_equal(np.isnan(loss), expected)


# Errors


class Pair(eqx.Module):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda scores, b: scores.log_prob * b, r"shape \(\), but returned float32\[3\]"),
        (lambda scores, b: b[:0], r"shape \(\), but returned float32\[0\]"),
        (lambda scores, b: np.ones((1, 1)), r"shape \(\), but returned float\d*\[1,1\]"),
        (lambda scores, b: lax.complex(*scores[:2]), r"real number .* returned complex64\[\]"),
        (lambda scores, b: 1j, r"real number .* returned ~?complex64\[\]"),
        (lambda scores, b: jax.random.key(0), r"real number .* returned key"),
        (lambda scores, b: (b, scores), r"real number .* returned tuple.*return_scores=True"),
        (lambda scores, b: (scores.log_prob, b), "returned tuple"),
        (lambda scores, b: (scores.log_prob,), "returned tuple"),
        (lambda scores, b: [scores.log_prob], "returned list"),
        (lambda scores, b: scores, "returned TokenScores"),
        (lambda scores, b: Pair(*scores[:2]), "returned Pair"),
        (lambda scores, b: None, "returned None"),
        (lambda scores, b: "loss", "returned str"),
    ],
)
def test_a_loss_that_is_no_real_scalar_is_refused(result, message):
    layer, hidden, _, _, b, _ = make_operands()
    with pytest.raises(TypeError, match=message) as info:
        layer.token_loss(result, hidden, TARGETS, b)
    assert "(3,)" in str(info.value)  # the shape of the data of one token


def assert_a_batch(scores, b):
    assert b.ndim == 2


@pytest.mark.parametrize(
    "fn",
    [
        lambda scores: scores.log_prob,  # without the data
        lambda scores, b: jnp.mean(scores.log_prob, axis=-1),  # for a batch
        assert_a_batch,
    ],
)
def test_an_error_of_a_loss_says_what_it_is_called_with(fn):
    layer, hidden, _, _, b, _ = make_operands()
    with pytest.raises((TypeError, ValueError, IndexError, AssertionError)) as info:
        layer.token_loss(fn, hidden, TARGETS, b)
    (note,) = [note for note in info.value.__notes__ if note.startswith("fn is called with")]
    assert "scores of one token" in note and "[(3,)]" in note


def test_a_loss_that_names_an_axis_is_refused():
    layer, hidden, *_ = make_operands()

    def fn(scores):
        return scores.log_prob - lax.pmean(scores.log_prob, "examples")

    def loss(hidden, targets):
        return layer.token_loss(fn, hidden, targets)

    with pytest.raises(ValueError, match=r"fn names the axes \['examples'\]"):
        jax.vmap(loss, axis_name="examples")(hidden, TARGETS)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, 10), r"\(3, 11\) .* data\[1\] of shape \(3, 10\)"),
        ((11, 3), r"\(3, 11\) .* data\[1\] of shape \(11, 3\)"),
        ((3,), r"\(3, 11\) .* data\[1\] of shape \(3,\)"),
        ((33,), r"\(3, 11\) .* data\[1\] of shape \(33,\)"),
        ((1, 11), r"\(3, 11\) .* data\[1\] of shape \(1, 11\)"),
        ((), r"\(3, 11\) .* data\[1\] of shape \(\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [np.zeros, jnp.zeros])
def test_data_without_the_shape_of_the_batch_are_refused(shape, message, kind):
    layer, hidden, _, a, *_ = make_operands()
    with pytest.raises(ValueError, match=message):
        layer.token_loss(lambda scores, x, y: x, hidden, TARGETS, a, kind(shape))


def test_text_as_data_is_refused():
    layer, hidden, *_ = make_operands()
    with pytest.raises(TypeError, match=r"data\[0\] must be an array of numbers, got array"):
        layer.token_loss(lambda scores, x: scores.log_prob, hidden, TARGETS, TARGETS.astype(str))


@pytest.mark.slow
def test_host_integers_that_jax_would_narrow_are_refused():
    layer, hidden, *_ = make_operands()
    data = TARGETS.astype(np.int64)

    def loss(data, value=0):
        def fn(scores, x):
            return jnp.where(x == value, 1.0, 0.0)

        return layer.token_loss(fn, hidden, TARGETS, data)

    assert_close(loss(data), np.mean(TARGETS == 0))
    for value in 2**31, -(2**31) - 1, 2**63 - 1:
        data[1, 2] = value
        with pytest.raises(ValueError, match=r"data\[0\] of int64 does not fit int32"):
            loss(data)
    with jax.enable_x64(True):
        assert_close(loss(data, 2**63 - 1), 1 / 33)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reduction="average"), "reduction must be"),
        (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
        (dict(weights=np.ones(11)), r"weights must have the shape \(3, 11\) .* got \(11,\)"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    layer, hidden, *_ = make_operands()
    with pytest.raises(ValueError, match=message):
        layer.token_loss(lambda scores: scores.log_prob, hidden, TARGETS, **options)


def test_masked_arrays_are_refused_as_data():
    layer, hidden, *_ = make_operands()
    data = np.ma.masked_array(np.zeros(BATCH), MASK)
    with pytest.raises(TypeError, match=r"data\[0\] .* masked array"):
        layer.token_loss(lambda scores, x: x, hidden, TARGETS, data)


# Compilation


class Scale(eqx.Module):
    scale: jax.Array

    def __call__(self, scores):
        return self.scale * scores.log_prob


def control_flow(c):
    def loss(scores):
        def step(carry, x):
            return jnp.tanh(carry * x), None

        last, _ = lax.scan(step, scores.log_prob, c * jnp.ones(3))
        return lax.cond(last > 0, lambda x: x, lambda x: x * c, last)

    return loss


def inner_jit(c):
    return jax.jit(lambda scores: jax.jit(lambda x: x * c)(scores.log_prob))


def constants(c):
    numbers = np.arange(3.0, dtype=np.float32)
    return lambda scores: c * jnp.sum(numbers) * scores.log_prob + 0.5


@pytest.mark.parametrize("make", [Scale, control_flow, inner_jit, constants])
def test_a_function_defined_anew_is_not_compiled_anew(make, caplog):
    layer = make_layer(with_bias=False)
    hidden = make_array((5, *layer.table.embedding_axes.values()), seed=2)
    targets = np.arange(5)

    def call(c):
        return jax.value_and_grad(lambda c: layer.token_loss(make(c), hidden, targets))(c)

    first, other = call(jnp.ones(())), jnp.asarray(np.float32(2.0))
    with jax.log_compiles():
        caplog.clear()
        again = call(jnp.ones(())), call(other)
    assert again[0] == first and again[1] != first
    assert not [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]


@pytest.mark.slow
def test_functions_that_compute_something_else_are_told_apart():
    """Also if they differ by no more than a number, its sign, or an array that they close over."""
    layer = make_layer(with_bias=False)
    hidden = make_array(tuple(layer.table.embedding_axes.values()), seed=2)
    ones, counts = jnp.ones(3), jnp.arange(3.0)

    def loss(fn):
        return float(layer.token_loss(fn, hidden, 3))

    one = loss(lambda scores: -scores.log_prob)
    assert loss(lambda scores: -2 * scores.log_prob) == pytest.approx(2 * one)
    assert loss(lambda scores: jnp.copysign(1.0, 0.0 * jnp.exp(scores[0]) - 0.0)) == 1
    assert loss(lambda scores: jnp.copysign(1.0, 0.0 * -jnp.exp(scores[0]) - 0.0)) == -1
    assert loss(lambda scores: jnp.sum(ones)) == 3
    assert loss(lambda scores: jnp.sum(counts + 1)) == 6
    assert loss(lambda scores: jax.jit(lambda x: x * counts[1])(scores[0])) == -one
    assert loss(lambda scores: jax.jit(lambda x: x * counts[2])(scores[0])) == -2 * one


def test_a_loss_may_have_a_loop_that_cannot_be_compared():
    """Its derivative, a function of Equinox, has neither a hash nor an equal."""
    layer = make_layer(with_bias=False)
    hidden = make_array(tuple(layer.table.embedding_axes.values()), seed=2)

    def loss(factor):
        def doubled(scores):
            start = 0, -scores.log_prob
            return eqxi.while_loop(
                lambda state: state[0] < 2,
                lambda state: (state[0] + 1, factor * state[1]),
                start,
                kind="checkpointed",
                max_steps=3,
            )[1]

        return layer.token_loss(doubled, hidden, 3)

    one = loss(1.0)
    assert loss(2.0) == pytest.approx(4 * one) and loss(3.0) == pytest.approx(9 * one)


# Transformations


@eqx.filter_jit
def second_derivative(mode, token_loss, make, reduction, operands, direction):
    """The product of the matrix of second derivatives with a direction."""
    params, static = eqx.partition(operands, eqx.is_array)

    def loss(params):
        layer, hidden, weights, a, b, c = eqx.combine(params, static)
        options = dict(weights=weights, reduction=reduction)
        losses = token_loss(make(c), layer, hidden, jnp.asarray(TARGETS), a, b, **options)
        return jnp.sum(losses**2)

    if mode == "forward over reverse":
        return jax.jvp(jax.grad(loss), (params,), (direction,))[1]

    def slope(params):
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)
        return sum(jax.tree.leaves(products))

    return jax.grad(slope)(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, reduction", [(clipped_policy_gradient, "mean"), (smoothed_with_z_loss, "none")]
)
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_are_those_of_plain_logits(make, reduction, mode):
    with jax.enable_x64(True):
        operands = make_operands("float64", padding=0.0)
        direction = [make_array(x.shape, "float64", seed=7) for x in jax.tree.leaves(operands)]
        direction[3] = jnp.where(MASK, direction[3], 0)  # weights of zero stay zero
        direction = jax.tree.unflatten(jax.tree.structure(operands), direction)
        arguments = make, reduction, operands, direction
        actual = second_derivative(mode, ours, *arguments)
        expected = second_derivative("reverse over reverse", plain_loss, *arguments)
        assert_trees_close(actual, expected, 1e-9, 1e-11)


@pytest.mark.slow
def test_it_works_under_scan_and_checkpoint():
    """Also if the loss closes over what the scan carries, and over its inputs."""
    layer, hidden, weights, a, b, c = make_operands(padding=0.0)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def total(operands, token_loss):
        layer, batches, c = operands

        @jax.checkpoint
        def step(carry, batch):
            hidden, targets, a, b, weights = batch

            def fn(scores, a, b):
                loss = clipped_policy_gradient(c * carry)(scores, a, b)
                return loss + targets[0].astype("float32") * carry

            loss = token_loss(fn, layer, hidden, targets, a, b, weights=weights, reduction="sum")
            return carry + 0.01 * loss, None

        return lax.scan(step, jnp.ones(()), batches)[0]

    operands = layer, (hidden, jnp.asarray(TARGETS), a, b, weights), c
    assert_trees_close(total(operands, ours), total(operands, plain_loss), 1e-5, 1e-5)
