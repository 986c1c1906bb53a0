"""`target_weights` of `EmbeddingDecode.cross_entropy`, against NumPy in float64 and optax."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_embedding import EmbeddingDecode

from .helpers import (
    assert_close,
    decode_gradient_reference,
    decode_reference,
    float64,
    log_softmax,
    make_array,
    make_table,
    plain_logits,
    rounding,
    VOCAB_SIZE,
)


N, K = 19, 3
CHUNK_SIZE = 16
RANDOM = np.random.default_rng(0)
TARGETS = RANDOM.integers(0, VOCAB_SIZE, (N, K)).astype(np.int32)
TARGETS[:, 2] = TARGETS[:, 0]  # twice
TARGET_WEIGHTS = RANDOM.uniform(0.1, 2, (N, K)).astype(np.float32)
WEIGHTS = np.where(np.arange(N) % 5 == 1, 0, RANDOM.uniform(0.5, 2, N)).astype(np.float32)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}


def soft_reference(layer, hidden, targets, target_weights, weights, *, label_smoothing, z_loss):
    """The weighted mean of the losses, and its gradients with respect to hidden, embeddings, bias
    and target weights, in float64."""
    z = decode_reference(layer.table, hidden, layer.soft_cap)
    e, K, log_p = label_smoothing, z.shape[-1], log_softmax(z)
    wanted = np.zeros(z.shape)
    for k in range(targets.shape[-1]):
        np.add.at(wanted, (np.arange(len(z)), targets[:, k]), float64(target_weights)[:, k])
    lse = (z - log_p)[:, :1]
    losses = -(((1 - e) * wanted + e / K) * log_p).sum(-1) + z_loss * lse[:, 0] ** 2
    total = ((1 - e) * wanted.sum(-1, keepdims=True) + e + 2 * z_loss * lse) * np.exp(log_p)
    share = float64(weights) / float64(weights).sum()
    cotangent = share[:, None] * (total - (1 - e) * wanted - e / K)
    for_weights = -(1 - e) * share[:, None] * np.take_along_axis(log_p, targets, -1)
    gradients = decode_gradient_reference(layer.table, hidden, cotangent, layer.soft_cap)
    return (share * losses).sum(), *gradients, for_weights


def value_and_gradients(layer, hidden, targets, target_weights, **options):
    def loss(layer, hidden, target_weights):
        return layer.cross_entropy(hidden, targets, target_weights=target_weights, **options)

    value, (d_layer, *others) = eqx.filter_jit(jax.value_and_grad(loss, (0, 1, 2)))(
        layer, hidden, target_weights
    )
    return value, others[0], d_layer.table.embeddings, d_layer.table.bias, others[1]


def make_layer(soft_cap=3.0, dtype="float32"):
    return EmbeddingDecode(make_table("first", dtype, with_bias=True), soft_cap)


def make_hidden(dtype="float32"):
    return make_array((N, 4), dtype, seed=5)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.slow
def test_soft_targets_match_numpy(dtype, soft_cap):
    layer, hidden = make_layer(soft_cap, dtype), make_hidden(dtype)
    target_weights = jnp.asarray(TARGET_WEIGHTS, dtype)
    options: Any = OPTIONS | {"weights": WEIGHTS, "chunk_size": CHUNK_SIZE}
    actual = value_and_gradients(layer, hidden, TARGETS, target_weights, **options)
    expected = soft_reference(layer, hidden, TARGETS, target_weights, WEIGHTS, **OPTIONS)
    tolerance = max(8 * rounding(dtype), 1e-6 if dtype != "float64" else 1e-12)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance, tolerance)


@pytest.mark.slow
def test_a_full_distribution_matches_optax():
    layer, hidden = make_layer(), make_hidden()
    labels = np.random.default_rng(1).dirichlet(np.ones(VOCAB_SIZE), N).astype(np.float32)
    targets = np.broadcast_to(np.arange(VOCAB_SIZE), labels.shape)

    def plain(layer, hidden, labels):
        smooth = optax.losses.smooth_labels(labels, 0.1)
        return jnp.mean(optax.losses.softmax_cross_entropy(plain_logits(layer, hidden), smooth))

    actual = value_and_gradients(layer, hidden, targets, labels, label_smoothing=0.1)
    value, (d_layer, d_hidden, d_labels) = jax.value_and_grad(plain, (0, 1, 2))(
        layer, hidden, labels
    )
    # optax mixes each label with the mean of all, which sums to 1 only for a distribution
    expected = value, d_hidden, d_layer.table.embeddings, d_layer.table.bias, d_labels
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_one_soft_target_is_a_plain_target(reduction):
    layer, hidden, targets = make_layer(), make_hidden(), TARGETS[:, 0]
    options: Any = OPTIONS | {"reduction": reduction, "weights": WEIGHTS, "return_scores": True}
    soft = layer.cross_entropy(
        hidden, targets[:, None], target_weights=np.ones((N, 1), bool), **options
    )
    plain = layer.cross_entropy(hidden, targets, **options)
    jax.tree.map(assert_close, soft, plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.slow
def test_a_target_of_weight_zero_has_no_part(reduction, traced):
    layer, hidden = make_layer(), make_hidden()
    target_weights = TARGET_WEIGHTS.copy()
    target_weights[:, 1] = 0
    given = TARGETS.copy()
    given[:, 1] = RANDOM.choice([-5, VOCAB_SIZE, 2**31 - 1, 3], N)

    def total(targets, layer, hidden, target_weights):
        losses = layer.cross_entropy(
            hidden, targets, target_weights=target_weights, reduction=reduction
        )
        return jnp.sum(losses)

    def gradients(targets, target_weights):
        function = functools.partial(jax.value_and_grad(total, (1, 2, 3)))
        function = eqx.filter_jit(function) if traced else function
        return function(targets, layer, hidden, jnp.asarray(target_weights))

    value, (d_layer, d_hidden, d_weights) = gradients(given, target_weights)
    others = [0, 2]
    expected, (e_layer, e_hidden, e_weights) = gradients(
        TARGETS[:, others], target_weights[:, others]
    )
    jax.tree.map(assert_close, (value, d_layer, d_hidden), (expected, e_layer, e_hidden))
    assert_close(d_weights[:, others], e_weights)
    assert not np.any(d_weights[:, 1])


def test_a_target_out_of_range_makes_the_loss_nan():
    targets = TARGETS.copy()
    targets[3, 1], targets[4, 0] = VOCAB_SIZE, -1
    losses = make_layer().cross_entropy(
        make_hidden(), targets, target_weights=TARGET_WEIGHTS, reduction="none"
    )
    np.testing.assert_array_equal(np.isnan(losses), np.isin(np.arange(N), [3, 4]))


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.slow
def test_ignored_targets_and_tokens_have_no_part(host):
    """A token all of whose targets are ignored does not count for the mean."""
    layer, hidden, targets = make_layer(), make_hidden(), TARGETS.copy()
    targets[:, 1] = -100
    targets[::4] = -100
    hidden = hidden.at[::4].set(jnp.nan)
    target_weights = TARGET_WEIGHTS.copy()
    target_weights[::4] = np.nan
    target_weights[:, 1] = np.nan
    if not host:
        targets, target_weights = jnp.asarray(targets), jnp.asarray(target_weights)
    (value, scores), (d_hidden, d_weights) = jax.value_and_grad(
        lambda hidden, target_weights: layer.cross_entropy(
            hidden, targets, target_weights=target_weights, ignore_index=-100, return_scores=True
        ),
        (0, 1),
        has_aux=True,
    )(hidden, jnp.asarray(target_weights))
    counts = np.arange(N) % 4 != 0
    some = hidden[counts], TARGETS[counts][:, [0, 2]], TARGET_WEIGHTS[counts][:, [0, 2]]
    expected, d_some, *_, for_weights = soft_reference(
        layer, *some, np.ones(counts.sum()), label_smoothing=0, z_loss=0
    )
    assert_close(value, expected)
    assert_close(d_hidden[counts], d_some)
    assert_close(d_weights[counts][:, [0, 2]], for_weights)
    assert not np.any(d_weights[:, 1])
    for array in d_hidden, d_weights, *scores:
        assert not np.any(array[~counts])


def test_the_scores_sum_over_the_targets():
    layer, hidden = make_layer(), make_hidden()
    logits = decode_reference(layer.table, hidden, layer.soft_cap)
    target_weights = np.ones((N, K), np.float32)
    target_weights[0] = [1, 2, 2]
    targets = TARGETS.copy()
    targets[0] = [0, logits[0].argmax(), 1]
    _, scores = layer.cross_entropy(
        hidden, targets, target_weights=target_weights, return_scores=True
    )
    log_p = np.take_along_axis(log_softmax(logits), targets, -1)
    assert_close(scores.log_prob, (target_weights * log_p).sum(-1))
    largest = np.where(np.arange(N) == 0, targets[:, 1], targets[:, 0])
    np.testing.assert_array_equal(scores.is_top, logits.argmax(-1) == largest)
    assert scores.is_top[0]


@pytest.mark.slow
def test_weights_of_zero_alone_cost_nothing():
    layer, hidden = make_layer(), make_hidden()
    value, *gradients = value_and_gradients(
        layer, hidden, TARGETS, TARGET_WEIGHTS, weights=np.zeros(N)
    )
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


@pytest.mark.slow
def test_mapped_examples_are_tokens_of_one_call():
    layer, hidden = make_layer(), make_array((2, N, 4), seed=6)
    targets = jnp.stack([TARGETS, (TARGETS + 1) % VOCAB_SIZE])
    target_weights = jnp.stack([TARGET_WEIGHTS, TARGET_WEIGHTS[::-1]])

    def loss(layer, hidden, targets, target_weights):
        return layer.cross_entropy(
            hidden, targets, target_weights=target_weights, return_scores=True, weights=WEIGHTS
        )

    mapped = eqx.filter_jit(jax.vmap(loss, (None, 0, 0, 0)))(layer, hidden, targets, target_weights)
    alone = [loss(layer, *example) for example in zip(hidden, targets, target_weights)]
    jax.tree.map(assert_close, mapped, jax.tree.map(lambda *parts: jnp.stack(parts), *alone))

    def total(layer, hidden):
        return jnp.sum(jax.vmap(loss, (None, 0, 0, 0))(layer, hidden, targets, target_weights)[0])

    def one_by_one(layer, hidden):
        examples = zip(hidden, targets, target_weights)
        return jnp.sum(jnp.stack([loss(layer, *example)[0] for example in examples]))

    gradients = [
        eqx.filter_jit(jax.grad(function, (0, 1)))(layer, hidden)
        for function in (total, one_by_one)
    ]
    jax.tree.map(assert_close, *gradients)


def test_the_second_derivative_is_that_from_logits():
    layer, hidden = make_layer(), make_hidden()[:5]
    targets, target_weights = TARGETS[:5], jnp.asarray(TARGET_WEIGHTS[:5])

    def ours(hidden, target_weights):
        return layer.cross_entropy(hidden, targets, target_weights=target_weights)

    def plain(hidden, target_weights):
        log_p = jax.nn.log_softmax(plain_logits(layer, hidden))
        return -jnp.mean(jnp.sum(target_weights * jnp.take_along_axis(log_p, targets, 1), 1))

    def squared(loss):
        def norm(*arguments):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*arguments))

        return eqx.filter_jit(jax.grad(norm, (0, 1)))(hidden, target_weights)

    jax.tree.map(assert_close, squared(ours), squared(plain))


def test_an_empty_batch_costs_nothing():
    empty = np.zeros((0, K), np.int32)
    loss = make_layer().cross_entropy(
        jnp.zeros((0, 4)), empty, target_weights=empty.astype(np.float32)
    )
    assert loss == 0


def test_wrong_target_weights_are_clear_errors():
    layer, hidden = make_layer(), make_hidden()
    call = functools.partial(layer.cross_entropy, hidden)
    with pytest.raises(ValueError, match=r"target_weights must have the shape \(19, 3\) of targ"):
        call(TARGETS, target_weights=TARGET_WEIGHTS[:, :2])
    with pytest.raises(ValueError, match=r"targets must have the shape \(19,\) .* one more axis"):
        call(TARGETS[:, 0], target_weights=TARGET_WEIGHTS[:, 0])
    with pytest.raises(ValueError, match="one more axis"):
        call(TARGETS[:, :0], target_weights=TARGET_WEIGHTS[:, :0])
    with pytest.raises(ValueError, match=r"targets must have the shape \(19,\)"):
        call(TARGETS)
    with pytest.raises(TypeError, match="target_weights"):
        call(TARGETS, target_weights=TARGETS.astype(complex))
    with pytest.raises(TypeError) as error:
        call(TARGETS, target_weights=TARGET_WEIGHTS.tolist())
    assert any("use jnp.asarray" in note for note in error.value.__notes__)


def test_host_weights_too_small_for_float32_count():
    """They are compared with zero before they are narrowed."""
    targets = np.array([[VOCAB_SIZE]] * N)
    loss = make_layer().cross_entropy(
        make_hidden(), targets, target_weights=np.full((N, 1), 1e-300)
    )
    assert np.isnan(loss)


@pytest.mark.slow
def test_scores_of_float32_tables_in_the_64_bit_mode():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((N, 4), seed=1)
    options: Any = dict(target_weights=TARGET_WEIGHTS, return_scores=True)
    expected = layer.cross_entropy(hidden, TARGETS, **options)
    with jax.enable_x64(True):
        actual = layer.cross_entropy(hidden, TARGETS, **options)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)
