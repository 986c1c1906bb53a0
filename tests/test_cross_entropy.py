"""`EmbeddingDecode.cross_entropy`: the loss and its gradients, in bounded memory."""

import dataclasses
import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import (
    assert_close,
    compile_by_default,
    cross_entropy_reference,
    decode_gradient_reference,
    decode_reference,
    float64,
    FOUR_TARGETS,
    FOUR_WEIGHTS,
    LAYOUTS,
    lookup_reference,
    make_array,
    make_hidden,
    make_layer,
    make_table,
    NAMES,
    rounding,
    temporaries,
    token_losses_reference,
    VOCAB_SIZE,
)


BATCH = (2, 5)
TARGETS = np.arange(10).reshape(BATCH) % VOCAB_SIZE
WEIGHTS = np.asarray([[1, 0, 2, 0.5, 1], [3, 1, 0, 1, 0.25]], np.float32)


def flat_layer(vocab_size, size, dtype="float32"):
    rows = make_array((vocab_size, size), "float32", seed=4) / size**0.5
    return EmbeddingDecode(EmbeddingTable(rows.astype(dtype), ("vocabulary", "embedding")))


def value_and_gradients(layer, hidden, targets, weights=None, cotangent=None, **options):
    """The loss and its gradients with respect to hidden, embeddings, bias and weights."""

    def loss(operands):
        layer, hidden, weights = operands
        loss = layer.cross_entropy(hidden, targets, weights=weights, **options)
        return (loss if cotangent is None else jnp.sum(loss * cotangent)), loss

    (_, value), (layer, hidden, weights) = eqx.filter_jit(
        eqx.filter_value_and_grad(loss, has_aux=True)
    )((layer, hidden, weights))
    return value, hidden, layer.table.embeddings, layer.table.bias, weights


COMBINATIONS = list(
    itertools.product([None, 2.0], [0.0, 0.1], [0.0, 0.01], [False, True], ["mean", "sum", "none"])
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_float64(layout):
    # the layouts share the product of the options, each combination once
    mine = COMBINATIONS[list(LAYOUTS).index(layout) :: len(LAYOUTS)]
    for soft_cap, smoothing, z_loss, weighted, reduction in mine:
        layer = make_layer(layout, with_bias=weighted, soft_cap=soft_cap)
        hidden = make_hidden(layer, BATCH)
        weights = jnp.asarray(WEIGHTS) if weighted else None
        cotangent = make_array(BATCH, seed=3) if reduction == "none" else None
        value, *gradients = value_and_gradients(
            layer,
            hidden,
            TARGETS,
            weights,
            cotangent,
            label_smoothing=smoothing,
            z_loss=z_loss,
            reduction=reduction,
            chunk_size=3 if z_loss else None,
        )
        expected, *wanted = cross_entropy_reference(
            layer,
            hidden,
            TARGETS,
            weights,
            1.0 if cotangent is None else float64(cotangent),
            label_smoothing=smoothing,
            z_loss=z_loss,
            reduction=reduction,
        )
        assert_close(value, expected)
        for actual, other in zip(gradients, wanted, strict=True):
            if actual is not None:
                assert_close(actual, other)


@pytest.mark.parametrize("vocab_size", [1, 2, 257, 50257])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_the_error_is_no_larger_than_that_of_optax_from_logits(vocab_size, dtype):
    layer = flat_layer(vocab_size, 16, dtype)
    hidden = make_array((33, 16), dtype, seed=2)
    targets = np.random.default_rng(5).integers(0, vocab_size, 33)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def plain(operands):
        layer, hidden = operands
        layer = EmbeddingDecode(layer.table, logits_dtype=jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(layer(hidden), targets)
        return jnp.mean(losses)

    ours = value_and_gradients(layer, hidden, targets, chunk_size=8)[:3]
    value, (layer_gradient, hidden_gradient) = plain((layer, hidden))
    theirs = value, hidden_gradient, layer_gradient.table.embeddings
    losses, d_logits = token_losses_reference(layer, hidden, targets)
    exact = (
        losses.mean(),
        *decode_gradient_reference(layer.table, hidden, d_logits / len(losses))[:2],
    )
    for one, other, wanted in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        error, budget = (np.abs(float64(a) - wanted).max() for a in (one, other))
        assert error <= 1.1 * budget + 1e-6 * np.abs(wanted).max() + 1e-12


@pytest.mark.slow
def test_finite_differences_agree_in_float64():
    with jax.enable_x64(True):
        layer = make_layer("middle", "float64", True, 2.0)
        assert layer.table.bias is not None
        hidden = make_hidden(layer, BATCH, dtype="float64")
        weights = jnp.asarray(WEIGHTS, jnp.float64)

        @jax.jit
        def loss(hidden, embeddings, bias, weights):
            table = dataclasses.replace(layer.table, embeddings=embeddings, bias=bias)
            changed = dataclasses.replace(layer, table=table)
            options: Any = dict(label_smoothing=0.1, z_loss=0.01, chunk_size=3)
            return changed.cross_entropy(hidden, TARGETS, weights=weights, **options)

        operands = hidden, layer.table.embeddings, layer.table.bias, jnp.add(weights, 0.5)
        gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*operands)
        assert gradients[0].dtype == loss(*operands).dtype == jnp.float64
        for i, gradient in enumerate(gradients):
            direction = make_array(gradient.shape, "float64", seed=6)
            up, down = (
                loss(*operands[:i], operands[i] + step * direction, *operands[i + 1 :])
                for step in (1e-5, -1e-5)
            )
            slope = (float(up) - float(down)) / 2e-5
            assert slope == pytest.approx(float(jnp.sum(gradient * direction)), rel=1e-8)


@pytest.mark.parametrize("weights_dtype", [bool, np.int32, np.uint8, np.float16, np.float32])
def test_weights_may_be_of_any_real_dtype(weights_dtype):
    layer = make_layer()
    hidden = make_hidden(layer, BATCH)
    weights = np.asarray([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], weights_dtype)
    loss = layer.cross_entropy(hidden=hidden, targets=TARGETS, weights=weights)
    losses, _ = token_losses_reference(layer, hidden, TARGETS)
    assert_close(loss, losses[weights != 0].mean())


@pytest.mark.parametrize("weight", [2.5, -2.5])
def test_the_mean_of_a_single_token_is_its_loss_whatever_its_weight(weight):
    layer = make_layer()
    hidden, weights = make_hidden(layer, BATCH), np.zeros(BATCH, np.float32)
    weights[1, 2] = weight
    losses, _ = token_losses_reference(layer, hidden, TARGETS)
    assert_close(layer.cross_entropy(hidden, TARGETS, weights=weights), losses[1, 2])


@pytest.mark.slow
def test_a_single_row_of_padding_has_no_part_beside_a_bias_and_a_cap_below_one():
    embeddings = make_array((VOCAB_SIZE + 1, 4)).at[-1].set(jnp.nan)
    bias = make_array((VOCAB_SIZE + 1,), seed=1).at[-1].set(jnp.nan)
    table = EmbeddingTable(embeddings, ("vocabulary", "embedding"), padding_rows=1, bias=bias)
    layer = EmbeddingDecode(table, soft_cap=0.5)
    hidden = make_hidden(layer, BATCH)
    losses, _ = token_losses_reference(layer, hidden, TARGETS)
    value, *gradients = value_and_gradients(layer, hidden, TARGETS, jnp.ones(BATCH))
    assert_close(value, losses.mean())
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.slow
def test_a_token_of_weight_zero_poisons_nothing(reduction, poison):
    """Nor does a token whose target is ignored, whatever its weight."""
    layer = make_layer(with_bias=True)
    hidden = make_hidden(layer, BATCH)
    masked = WEIGHTS == 0
    ignored = masked & (np.cumsum(masked).reshape(BATCH) % 2 == 0)
    assert 0 < ignored.sum() < masked.sum()
    run = functools.partial(
        value_and_gradients,
        layer,
        cotangent=jnp.ones(BATCH) if reduction == "none" else None,
        reduction=reduction,
    )
    poisoned = run(
        jnp.where(masked[..., None], poison, hidden),
        np.where(ignored, -1, np.where(masked, -100, TARGETS)),
        weights=jnp.asarray(np.where(ignored, 2, WEIGHTS)),
        ignore_index=-1,
    )
    expected = run(hidden, TARGETS, weights=jnp.asarray(WEIGHTS))
    expected = (*expected[:-1], jnp.where(ignored, 0, expected[-1]))  # of the weights
    for one, other in zip(poisoned, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("counted", [0, 17, 33])
def test_one_counted_token_fills_its_chunk_alone(counted):
    """The rest of the chunk repeats it: masked vectors may be NaN."""
    layer, hidden = flat_layer(9, 4), make_array((34, 4), seed=1)
    targets, weights = jnp.arange(34) % 9, jnp.zeros(34).at[counted].set(2.0)
    alone = value_and_gradients(layer, hidden[counted], targets[counted], weights[counted])
    poisoned = jnp.where(weights[:, None] == 0, jnp.nan, hidden)
    value, d_hidden, d_rows, *_ = value_and_gradients(
        layer, poisoned, targets, weights, chunk_size=16
    )
    assert_close(value, alone[0])
    assert_close(d_rows, alone[2])
    np.testing.assert_allclose(d_hidden[counted], alone[1], 1e-5, 1e-6)
    assert np.count_nonzero(d_hidden) == 4


def test_without_any_weight_the_mean_and_its_gradients_are_zero():
    layer = make_layer(with_bias=True)
    hidden = jnp.full_like(make_hidden(layer, BATCH), jnp.nan)
    for array in value_and_gradients(layer, hidden, TARGETS - 100, jnp.zeros(BATCH)):
        assert not np.any(array)


@pytest.mark.parametrize("target", [-1, VOCAB_SIZE, VOCAB_SIZE + 1, 2**32 + 1, 2**63 - 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_target_out_of_range_gives_nan(target, reduction):
    layer = make_layer()
    targets = TARGETS.astype(np.int64)
    targets[0, 2] = target
    loss = layer.cross_entropy(make_hidden(layer, BATCH), targets, reduction=reduction)
    expected = np.zeros(BATCH, bool)
    expected[0, 2] = True
    np.testing.assert_array_equal(np.isnan(loss), expected if reduction == "none" else True)


def test_gradients_of_a_target_out_of_range_are_nan():
    layer = make_layer()
    targets = np.where(TARGETS == 2, -1, TARGETS)
    _, hidden, embeddings, *_ = value_and_gradients(layer, make_hidden(layer, BATCH), targets)
    np.testing.assert_array_equal(np.isnan(hidden[..., 0]), TARGETS == 2)
    assert np.all(np.isnan(embeddings[:VOCAB_SIZE]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
@pytest.mark.slow
def test_targets_may_be_of_any_integer_dtype(dtype):
    layer = flat_layer(257, 4)
    hidden = make_array((3, 4), seed=2)
    targets = np.asarray([0, 100, 127], dtype)
    expected = layer.cross_entropy(hidden, jnp.asarray([0, 100, 127]))
    assert layer.cross_entropy(hidden, targets) == expected
    assert layer.cross_entropy(hidden[1], 100) == layer.cross_entropy(hidden[1], targets[1])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_the_largest_unsigned_number_may_be_ignored(dtype):
    layer, hidden = flat_layer(257, 4), make_array((3, 4), seed=2)
    expected = layer.cross_entropy(hidden[1:], jnp.asarray([100, 127]))
    for as_array in (np.asarray, jnp.asarray):  # JAX makes 32 bits of 64
        targets = as_array(np.asarray([0, 100, 127], dtype))
        targets = as_array([np.iinfo(targets.dtype).max, 100, 127], targets.dtype)
        index = int(targets[0])
        assert_close(layer.cross_entropy(hidden, targets, ignore_index=index), expected)
        assert_close(layer.score(hidden, targets, ignore_index=index).log_prob[0], 0)


def test_large_logits_overflow_nothing():
    layer = flat_layer(257, 4)
    hidden = 1e4 * make_array((33, 4), seed=2)
    targets = np.arange(33)
    value, for_hidden, for_embeddings, *_ = value_and_gradients(layer, hidden, targets)
    losses, d_logits = token_losses_reference(layer, hidden, targets)
    exact = decode_gradient_reference(layer.table, hidden, d_logits / 33)
    assert_close(value, losses.mean())
    assert_close(for_hidden, exact[0], atol=1e-4)
    assert_close(for_embeddings, exact[1], atol=1e-4 * np.abs(exact[1]).max())


@pytest.mark.slow
def test_tokens_that_the_bias_bans_leave_the_others_alone():
    layer = flat_layer(1600, 4)
    banned = jnp.where(jnp.arange(1600) < 1300, -jnp.inf, 0.0)  # whole tiles of them
    hidden, targets = make_array((5, 4), seed=2), np.arange(5)
    layer = EmbeddingDecode(dataclasses.replace(layer.table, bias=banned))
    value, _, embeddings, *_ = value_and_gradients(layer, hidden, targets + 1300)
    rest = EmbeddingDecode(EmbeddingTable(layer.table.embeddings[1300:], ("vocabulary", "d")))
    expected, _, for_rest, *_ = value_and_gradients(rest, hidden, targets)
    assert_close(value, expected)
    assert_close(embeddings, np.concatenate([np.zeros((1300, 4)), for_rest]))


def test_padding_rows_have_no_part_whatever_they_hold():
    for rows in (9, 1600):
        array = make_array((rows, 4))
        table = EmbeddingTable(array.at[-2:].set(jnp.nan), ("vocabulary", "d"), padding_rows=2)
        same = EmbeddingTable(array[:-2], ("vocabulary", "d"))
        hidden, targets = make_array((5, 4), seed=2), np.arange(5)
        value, for_hidden, embeddings, *_ = value_and_gradients(
            EmbeddingDecode(table), hidden, targets
        )
        others = value_and_gradients(EmbeddingDecode(same), hidden, targets)
        assert_close(value, others[0])
        assert_close(for_hidden, others[1])
        assert_close(embeddings[:-2], others[2])
        assert not np.any(embeddings[-2:])


@pytest.mark.parametrize("highest", ["first", "last"])
@pytest.mark.parametrize("vocab_size, padding_rows", [(2597, 3), (2049, 0)])
@pytest.mark.slow
def test_a_vocabulary_of_several_tiles_is_one_vocabulary(vocab_size, padding_rows, highest):
    """Also without gradients, where the statistics are kept up to date from tile to tile, and if
    the last tile has a single row."""
    axes = ("vocabulary", "embedding")
    rows = make_array((vocab_size + padding_rows, 4)).at[vocab_size:].set(jnp.nan)
    bias = np.linspace(-4, 4, vocab_size, dtype=np.float32)[:: 1 if highest == "last" else -1]
    bias = jnp.asarray(bias.copy())
    padded = jnp.pad(bias, (0, padding_rows), constant_values=jnp.nan)
    table = EmbeddingTable(rows, axes, padding_rows=padding_rows, bias=padded)
    same = EmbeddingTable(rows[:vocab_size], axes, bias=bias)
    targets = np.asarray([0, 1, 1023, 1024, 1025, 2047, 2048, vocab_size - 1])
    hidden, weights = make_array((8, 4), seed=2), jnp.linspace(0.5, 2, 8)
    options: Any = dict(label_smoothing=0.1, z_loss=0.01)
    layer = EmbeddingDecode(table, 5.0)
    expected, *wanted = cross_entropy_reference(
        EmbeddingDecode(same, 5.0), hidden, targets, weights, **options
    )
    assert_close(layer.cross_entropy(hidden, targets, weights=weights, **options), expected)
    value, *gradients = value_and_gradients(layer, hidden, targets, weights, **options)
    assert_close(value, expected)
    wanted[1] = np.concatenate([wanted[1], np.zeros((padding_rows, 4))])
    wanted[2] = np.concatenate([wanted[2], np.zeros(padding_rows)])
    for actual, other in zip(gradients, wanted, strict=True):
        assert_close(actual, other)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_hidden_may_have_any_batch_shape(batch, reduction):
    layer = make_layer("middle", with_bias=True)
    hidden = make_hidden(layer, batch)
    targets = np.ones(batch, int)
    cotangent = jnp.ones(batch) if reduction == "none" else None
    value, for_hidden, *_ = value_and_gradients(
        layer, hidden, targets, cotangent=cotangent, reduction=reduction
    )
    assert for_hidden.shape == hidden.shape
    if reduction == "none":
        assert value.shape == batch
        assert_close(value, token_losses_reference(layer, hidden, targets)[0])
    elif hidden.size == 0:
        assert value == 0


@pytest.mark.parametrize(
    "hidden_dtype, table_dtype, expected",
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("float16", "float16", "float32"),
        ("float64", "bfloat16", "float64"),
    ],
)
def test_the_loss_has_float32_at_least_and_gradients_the_dtypes_of_their_operands(
    hidden_dtype, table_dtype, expected
):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        layer = EmbeddingDecode(make_table("last", table_dtype), logits_dtype=jnp.float16)
        hidden = make_hidden(layer, BATCH, dtype=hidden_dtype)
        value, for_hidden, embeddings, *_ = value_and_gradients(layer, hidden, TARGETS)
    assert value.dtype == expected
    assert (for_hidden.dtype, embeddings.dtype) == (hidden_dtype, table_dtype)
    losses, d_logits = token_losses_reference(layer, hidden, TARGETS)
    exact = decode_gradient_reference(layer.table, hidden, d_logits / losses.size)
    assert_close(value, losses.mean())
    for actual, wanted in zip((for_hidden, embeddings), exact[:2], strict=True):
        assert_close(actual, wanted, rtol=rounding(actual.dtype), atol=1e-6)


def test_the_gradient_of_a_bfloat16_table_counts_past_256():
    table = EmbeddingTable(jnp.zeros((2, 1), jnp.bfloat16), ("vocabulary", "d"))
    hidden = jnp.ones((4096, 1), jnp.bfloat16)
    targets = np.zeros(4096, int)
    _, _, embeddings, *_ = value_and_gradients(
        EmbeddingDecode(table), hidden, targets, reduction="sum", chunk_size=64
    )
    assert embeddings.tolist() == [[-2048], [2048]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_half_precision_gradient_of_100_000_tokens_is_the_exact_one_rounded_once(dtype):
    layer = make_layer("first", dtype)
    hidden = make_array((100_000, 4), dtype, seed=2)
    targets = np.full(100_000, 3)
    value, _, embeddings, *_ = value_and_gradients(layer, hidden, targets)
    expected, _, wanted, *_ = cross_entropy_reference(layer, hidden, targets)
    assert_close(value, expected)
    assert embeddings.dtype == dtype
    assert_close(embeddings, wanted, rtol=0.5 * rounding(dtype) + 2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_tied_gradient_of_100_000_repeats_loses_no_more_than_its_roundings(dtype):
    rows = (float64(make_table("first").embeddings) / 4).astype(jnp.dtype(dtype))
    table = EmbeddingTable(jnp.asarray(rows), ("vocabulary", "embedding"), padding_rows=2)
    tokens = np.full(100_000, 3)
    targets = np.random.default_rng(0).integers(0, 3, 100_000)

    @jax.jit
    @jax.value_and_grad
    def loss(table):
        hidden = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(hidden, targets, reduction="sum")

    value, gradient = loss(table)
    hidden = lookup_reference(table, tokens)
    expected, for_hidden, for_decode, *_ = cross_entropy_reference(
        EmbeddingDecode(table), hidden, targets, reduction="sum"
    )
    for_lookup = np.zeros_like(for_decode)
    for_lookup[3] = for_hidden.sum(0)
    assert_close(value, expected)
    # The vectors' gradients are rounded each, then the sums of both uses, and the sum of these.
    roundings = np.abs(for_hidden).sum(0) + np.abs(for_lookup) + np.abs(for_decode)
    roundings = roundings + np.abs(for_lookup + for_decode)
    error = np.abs(float64(gradient.embeddings) - for_lookup - for_decode)
    assert np.all(error <= 0.5 * rounding(dtype) * roundings + 1e-5 * roundings.max())
    assert np.abs(for_lookup[3]).min() > 4096, "where half precision would have stopped counting"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Compiles new programs as for a GPU. Others should not have their shapes."""

    def run(*operands, cpu, default, tpu=None):
        return default(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", run)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_plan_for_an_accelerator_gives_the_same_numbers(dtype, as_on_a_gpu):
    layer, hidden = flat_layer(50261, 4, dtype), make_array((64, 4), dtype, seed=2)
    targets = np.arange(64)
    value, for_hidden, embeddings, *_ = value_and_gradients(layer, hidden, targets)
    losses, d_logits = token_losses_reference(layer, hidden, targets)
    exact = decode_gradient_reference(layer.table, hidden, d_logits / 64)
    assert_close(value, losses.mean())
    # Each probability is below what float16 resolves: the factors must be wider, in which the
    # sum is; those of bfloat16 are rounded, each on its own.
    factors = rounding(dtype) if dtype == "bfloat16" else 8 * rounding("float32")
    for actual, wanted in zip((for_hidden, embeddings), exact[:2], strict=True):
        smallest = float(jnp.finfo(actual.dtype).smallest_subnormal)
        atol = 0.5 * smallest + factors * np.abs(wanted).max()
        assert_close(actual, wanted, 0.6 * rounding(dtype) + 20 * rounding("float32"), atol)


def test_an_accelerator_skips_chunks_of_masked_tokens(as_on_a_gpu):
    layer, hidden = flat_layer(51, 5), make_array((67, 5), seed=2)
    targets = np.where(np.arange(67) % 3 > 0, -100, np.arange(67) % 51)
    actual = value_and_gradients(layer, hidden, targets, ignore_index=-100, chunk_size=16)[:3]
    counted = value_and_gradients(layer, hidden[::3], targets[::3])[:3]
    assert_close(actual[0], counted[0])
    assert_close(actual[1][::3], counted[1])
    assert not np.any(np.delete(actual[1], np.s_[::3], axis=0))
    assert_close(actual[2], counted[2])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.slow
def test_a_table_with_the_vocabulary_last_runs_in_half_precision(dtype, tokens):
    """For which XLA for CPUs, as it compiles by default, can make a product that it cannot run."""
    table = EmbeddingTable(make_array((8, 24)), NAMES[::-1])
    layer, hidden = EmbeddingDecode(table, dtype=dtype), make_array((tokens, 8), seed=2)
    targets = np.arange(tokens) % 24

    @jax.jit
    def losses(layer, hidden):
        loss, gradient = jax.value_and_grad(lambda x: x.cross_entropy(hidden, targets))(layer)
        divergence = layer.divergence(hidden, layer, 2 * hidden)
        return loss, gradient, divergence, layer.top_k(hidden, 3)

    loss, gradient, divergence, _ = compile_by_default(losses.lower(layer, hidden))(layer, hidden)
    expected, _, for_table, *_ = cross_entropy_reference(EmbeddingDecode(table), hidden, targets)
    assert_close(loss, expected, 10 * rounding(dtype))
    assert_close(gradient.table.embeddings, for_table, 10 * rounding(dtype), 4 * rounding(dtype))
    assert divergence > 0


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_an_accelerator_keeps_small_probabilities_beside_narrow_factors(dtype, as_on_a_gpu):
    layer, hidden = flat_layer(311, 4), make_array((61, 4), seed=2)
    targets = np.arange(61)
    narrow = EmbeddingDecode(layer.table, dtype=dtype)
    actual = value_and_gradients(narrow, hidden, targets)
    rounded = EmbeddingDecode(EmbeddingTable(flat_layer(311, 4, dtype).table.embeddings, NAMES))
    expected = cross_entropy_reference(rounded, hidden.astype(dtype), targets)
    for one, other in zip(actual[:3], expected[:3], strict=True):
        assert_close(one, other, atol=1e-7)


# Transformations


@pytest.fixture(scope="module")
def case():
    layer = make_layer("first", with_bias=True)
    hidden = make_hidden(layer, (3, 10))
    targets = jnp.asarray(np.arange(30).reshape(3, 10) % VOCAB_SIZE)

    def loss(layer, hidden, targets):
        return layer.cross_entropy(hidden, targets, chunk_size=4)

    one_by_one = [eqx.filter_grad(loss)(layer, h, t) for h, t in zip(hidden, targets, strict=True)]
    return layer, hidden, targets, loss, jax.tree.map(lambda *g: jnp.stack(g), *one_by_one)


@pytest.mark.slow
def test_it_works_under_vmap_of_grad(case):
    layer, hidden, targets, loss, expected = case
    gradients = eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0, 0))(layer, hidden, targets)
    jax.tree.map(assert_close, gradients, expected)


@pytest.mark.slow
def test_it_works_under_grad_of_vmap(case):
    layer, hidden, targets, loss, expected = case

    def total(layer):
        return jnp.sum(eqx.filter_vmap(loss, in_axes=(None, 0, 0))(layer, hidden, targets))

    summed = jax.tree.map(lambda g: jnp.sum(g, 0), expected)
    jax.tree.map(assert_close, eqx.filter_grad(total)(layer), summed)


def test_gradients_accumulate_under_scan_and_checkpoint(case):
    layer, hidden, targets, loss, expected = case

    def total(layer):
        def step(sum_, batch):
            return sum_ + jax.checkpoint(loss)(layer, *batch), None

        return jax.lax.scan(step, jnp.zeros(()), (hidden, targets))[0]

    summed = jax.tree.map(lambda g: jnp.sum(g, 0), expected)
    jax.tree.map(assert_close, eqx.filter_grad(total)(layer), summed)


# Memory


def temporaries_of(function, *operands):
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    return temporaries(compile_by_default(jax.jit(function).lower(*shapes)))


def sizes(N, D, V):
    return (
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((N, D), jnp.float32),
        jax.ShapeDtypeStruct((N,), jnp.int32),
    )


def cross_entropy(embeddings, hidden, targets, **options):
    table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
    return EmbeddingDecode(table).cross_entropy(hidden, targets, **options)


@pytest.mark.slow
@pytest.mark.parametrize("N, D, V", [(2048, 256, 50257), (1024, 512, 16384)])
def test_temporaries_are_smaller_than_the_gradient_of_the_table(N, D, V):
    operands = sizes(N, D, V)
    assert temporaries_of(jax.value_and_grad(cross_entropy, (0, 1)), *operands) < V * D * 4
    assert temporaries_of(cross_entropy, *operands) < N * V * 4 / 20

    def apart(*operands):
        return jnp.sum(cross_entropy(*operands, reduction="none") ** 2)

    # its gradient scales that of the table in place
    assert temporaries_of(jax.grad(apart, (0, 1)), *operands) < V * D * 4


@pytest.mark.slow
def test_a_smaller_chunk_takes_less_memory():
    memory = [
        temporaries_of(
            jax.grad(functools.partial(cross_entropy, chunk_size=chunk_size)),
            *sizes(2048, 256, 50257),
        )
        for chunk_size in (64, 128, 256)
    ]
    assert memory == sorted(set(memory))


def test_chunks_of_one_token_take_the_memory_of_no_more_tokens_than_there_are():
    N, D = 1000, 64
    one = jax.grad(functools.partial(cross_entropy, chunk_size=1), 1)
    assert temporaries_of(one, *sizes(N, D, 32)) < 4 * N * D * 4


@pytest.mark.slow
def test_a_tied_step_allocates_one_gradient_of_the_table():
    N, D, V = 512, 64, 16384

    def step(embeddings, weight, tokens):
        table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
        hidden = jnp.tanh(EmbeddingLookup(table)(tokens[:-1]) @ weight)
        return EmbeddingDecode(table).cross_entropy(hidden, tokens[1:], chunk_size=32)

    shapes = (
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((D, D), jnp.float32),
        jax.ShapeDtypeStruct((N + 1,), jnp.int32),
    )
    # The output holds one gradient; a second would have to be among the temporaries.
    assert temporaries_of(jax.value_and_grad(step, (0, 1)), *shapes) < V * D * 4


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reduction="average"), "reduction"),
        (dict(label_smoothing=1.0), "label_smoothing"),
        (dict(label_smoothing=-0.1), "label_smoothing"),
        (dict(z_loss=-1e-4), "z_loss"),
        (dict(z_loss=float("nan")), "z_loss"),
        (dict(z_loss=float("inf")), "z_loss"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(weights=np.ones(5)), r"weights must have the shape \(2, 5\)"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    layer = make_layer()
    with pytest.raises(ValueError, match=message):
        layer.cross_entropy(make_hidden(layer, BATCH), TARGETS, **options)


def test_a_chunk_may_be_a_single_token():
    layer = make_layer()
    hidden = make_hidden(layer, BATCH)
    loss = layer.cross_entropy(hidden, TARGETS, chunk_size=1)
    assert_close(loss, token_losses_reference(layer, hidden, TARGETS)[0].mean())


def test_shapes_that_do_not_fit_are_refused():
    layer = make_layer()
    hidden = make_hidden(layer, BATCH)
    with pytest.raises(ValueError, match=r"targets must have the shape \(2, 5\)"):
        layer.cross_entropy(hidden, TARGETS.ravel())
    with pytest.raises(ValueError, match=r"embedding=4"):
        layer.cross_entropy(hidden[..., :3], TARGETS)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.slow
def test_nan_in_a_hidden_vector_spoils_only_its_loss(poison):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    broken = hidden.at[2, 0].set(poison)

    def total(hidden):
        losses = layer.cross_entropy(hidden, FOUR_TARGETS, reduction="none", chunk_size=2)
        return jnp.sum(losses), losses

    (value, losses), gradient = jax.value_and_grad(total, has_aux=True)(broken)
    expected, for_hidden, *_ = cross_entropy_reference(
        layer, hidden, FOUR_TARGETS, reduction="none"
    )
    others = np.arange(4) != 2
    assert np.isnan(value) and np.isnan(losses[2]) and np.isnan(gradient[2]).all()
    assert_close(losses[others], expected[others])
    assert_close(gradient[others], for_hidden[others])
    assert_close(layer(broken)[others], decode_reference(layer.table, hidden)[others])


def test_logits_of_1e30_give_a_finite_loss():
    table = EmbeddingTable(jnp.asarray([[1e18], [1e30], [-1e30]]), NAMES)
    losses = EmbeddingDecode(table).cross_entropy(jnp.ones((3, 1)), np.arange(3), reduction="none")
    assert_close(losses, [1e30, 0, 2e30])
    capped = EmbeddingDecode(table, soft_cap=5.0)
    assert_close(capped.cross_entropy(jnp.full((1, 1), 1e8), np.asarray([2])), 10 + np.log(2))


@pytest.mark.parametrize("vocab_size, offset", [(2600, 1e4), (2600, -1e5), (64, 1e30), (64, 1e37)])
@pytest.mark.slow
def test_label_smoothing_is_exact_for_large_logits(vocab_size, offset):
    noise = make_array((vocab_size, 1), seed=1)
    rows = jnp.asarray(offset + float64(noise), jnp.float32)
    layer, hidden = EmbeddingDecode(EmbeddingTable(rows, NAMES)), jnp.ones((2, 1))
    targets = np.asarray([0, vocab_size - 1])
    expected, *_ = cross_entropy_reference(layer, hidden, targets, label_smoothing=0.1)
    if offset >= 1e30:
        expected = np.log(vocab_size)  # the logits are equal, which float64 loses in their sum

    def loss(hidden):
        return layer.cross_entropy(hidden, targets, label_smoothing=0.1)

    assert_close(loss(hidden), expected)
    assert_close(jax.value_and_grad(loss)(hidden)[0], expected)


def test_soft_caps_and_z_losses_above_1e30_are_refused():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    expected = EmbeddingDecode(table)(hidden)
    assert_close(EmbeddingDecode(table, soft_cap=1e30)(hidden), expected)
    loss = EmbeddingDecode(table).cross_entropy(hidden, FOUR_TARGETS, z_loss=1e30)
    assert_close(
        loss / 1e30,
        cross_entropy_reference(EmbeddingDecode(table), hidden, FOUR_TARGETS, z_loss=1e30)[0]
        / 1e30,
    )
    for number in (1e31, 10**400):
        with pytest.raises(ValueError, match="soft_cap must be at least 1e-30 and at most 1e.30"):
            EmbeddingDecode(table, soft_cap=number)
        with pytest.raises(ValueError, match="z_loss must be at least 0 and at most 1e.30"):
            EmbeddingDecode(table).cross_entropy(hidden, FOUR_TARGETS, z_loss=number)


@pytest.mark.slow
def test_soft_caps_whose_inverse_overflows_are_refused():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    layer = EmbeddingDecode(table, soft_cap=1e-30)
    gradients = [
        jax.grad(lambda hidden: layer.cross_entropy(hidden, FOUR_TARGETS))(1e-30 * hidden),
        jax.grad(lambda hidden: jnp.sum(jnp.sin(layer(hidden) * 1e30)) * 1e-30)(1e-30 * hidden),
    ]
    assert all(np.any(gradient != 0) & np.all(np.isfinite(gradient)) for gradient in gradients)
    for number in (1e-31, 1e-38, 5e-324):
        with pytest.raises(ValueError, match="soft_cap must be at least 1e-30 and at most 1e.30"):
            EmbeddingDecode(table, soft_cap=number)


def banned(bias, **options):
    bias = jnp.pad(jnp.asarray(bias, jnp.float32), (0, 2), constant_values=jnp.nan)
    return EmbeddingDecode(dataclasses.replace(make_table("first"), bias=bias), **options)


@pytest.mark.slow
def test_a_bias_of_minus_infinity_bans_a_token():
    hidden = make_array((4, 4), seed=1)
    layer = banned([0, 0, 0, 0, 0, -np.inf, 0])
    for z_loss in (0.0, 0.1):

        def loss(layer_and_hidden):
            layer, hidden = layer_and_hidden
            return layer.cross_entropy(hidden, FOUR_TARGETS, z_loss=z_loss)

        value, (for_layer, for_hidden) = eqx.filter_value_and_grad(loss)((layer, hidden))
        expected, *wanted = cross_entropy_reference(layer, hidden, FOUR_TARGETS, z_loss=z_loss)
        actual = value, for_hidden, for_layer.table.embeddings, for_layer.table.bias
        for one, other in zip(actual, (expected, *wanted), strict=False):
            assert_close(one, other)
        assert for_layer.table.bias[5] == 0 and not np.any(for_layer.table.embeddings[5])
    assert layer.cross_entropy(hidden[0], 5) == np.inf  # it has no probability
    assert (
        layer.cross_entropy(hidden, FOUR_TARGETS, label_smoothing=0.1) == np.inf
    )  # wanted a little
    assert np.isnan(banned(np.full(7, -np.inf)).cross_entropy(hidden, FOUR_TARGETS))


def test_a_soft_cap_lifts_a_ban():
    layer = banned([0, 0, 0, 0, 0, -np.inf, 0], soft_cap=2.0)
    hidden = make_array((4, 4), seed=1)
    np.testing.assert_array_equal(layer(hidden)[:, 5], -2)
    expected, *_ = cross_entropy_reference(layer, hidden, FOUR_TARGETS)
    assert_close(layer.cross_entropy(hidden, FOUR_TARGETS), expected)


def test_a_nan_weight_spoils_its_loss_and_the_mean():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    expected, *_ = cross_entropy_reference(layer, hidden, FOUR_TARGETS, reduction="none")
    for weight in (np.nan, np.inf):
        weights = np.asarray([1, weight, 1, 1], np.float32)
        losses = layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights, reduction="none")
        np.testing.assert_allclose(losses, expected * weights, rtol=1e-5)
        assert np.isnan(layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights))


def test_weights_that_cancel_have_no_mean():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    weights = np.asarray([1, -1, 1, -1])
    assert not np.isfinite(layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights))
    expected, *_ = cross_entropy_reference(layer, hidden, FOUR_TARGETS, weights, reduction="sum")
    assert_close(
        layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights, reduction="sum"), expected
    )


@pytest.mark.parametrize("scale", [1e-60, 1e-40, 1e-30, 1e-20, 1e19, 1e38])
def test_weights_of_any_magnitude_have_the_same_mean(scale):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    expected, for_hidden, _, _, for_weights = cross_entropy_reference(
        layer, hidden, FOUR_TARGETS, FOUR_WEIGHTS
    )
    of_host = float64(FOUR_WEIGHTS) * scale
    assert_close(layer.cross_entropy(hidden, FOUR_TARGETS, weights=of_host), expected)
    if 1e-38 < scale:  # else zero to JAX on a device

        def loss(hidden, weights):
            return layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights)

        weights = jnp.asarray(of_host, "float32")
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, weights)
        assert_close(value, expected)
        assert_close(gradients[0], for_hidden)
        if scale < 1e38:  # else zero to JAX on a device, too
            assert_close(float64(gradients[1]) * scale, for_weights)


@pytest.mark.parametrize("small", [1e-30, 1e-60])
def test_a_tiny_weight_hides_no_target_out_of_range(small):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    targets, weights = (
        np.where(FOUR_TARGETS == 2, -1, FOUR_TARGETS),
        np.asarray([1, small, 1e30, 1]),
    )
    assert np.isnan(layer.cross_entropy(hidden, targets, weights=weights))
    losses = layer.cross_entropy(hidden, targets, weights=weights, reduction="none")
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, False])


@pytest.mark.slow
def test_weight_zero_absorbs_an_infinite_cotangent():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)

    def total(layer, weights, root):
        losses = layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights, reduction="none")
        return jnp.sum(root(losses))  # the slope of a root at 0 is infinite

    weights = jnp.asarray(FOUR_WEIGHTS)
    gradient = eqx.filter_grad(total)(layer, weights, jnp.sqrt)
    expected = eqx.filter_grad(total)(layer, weights, lambda x: jnp.where(x > 0, x, 1.0) ** 0.5)
    assert np.isfinite(gradient.table.embeddings).all()
    assert_close(gradient.table.embeddings, expected.table.embeddings)
    for_weights = jax.grad(lambda w: total(layer, w, jnp.sqrt))(weights)
    assert np.isfinite(for_weights).all() and for_weights[1] == 0


def test_an_unused_loss_spoils_no_gradient():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    broken, targets = hidden.at[1].set(jnp.nan), np.where(FOUR_TARGETS == 2, -1, FOUR_TARGETS)
    keep = np.arange(4) != 1

    def total(layer, hidden):
        losses = layer.cross_entropy(hidden, targets, reduction="none")
        return jnp.sum(jnp.where(keep, losses, 0.0))

    gradient = eqx.filter_grad(total)(layer, broken)
    _, _, expected, *_ = cross_entropy_reference(
        layer, hidden, FOUR_TARGETS, keep.astype(float), reduction="sum"
    )
    assert_close(gradient.table.embeddings, expected)


def test_weights_of_small_dtypes_are_summed_in_float32():
    layer = EmbeddingDecode(make_table("first"))
    hidden, targets = jnp.ones((70_000, 4)), np.zeros(70_000, int)
    expected, *_ = cross_entropy_reference(layer, hidden[:1], targets[:1])
    for dtype in ("float16", "uint8"):
        weights = np.full(70_000, 200, dtype)
        assert_close(layer.cross_entropy(hidden, targets, weights=weights), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size, second", [(None, jax.jacfwd), (2, jax.jacrev)])
def test_the_second_derivative_is_that_from_logits(chunk_size, second):
    with jax.enable_x64(True):
        table = make_table("first", "float64")
        hidden = make_array((4, 4), "float64", seed=1)
        weights = jnp.asarray(FOUR_WEIGHTS, "float64")

        def ours(embeddings, hidden):
            layer = EmbeddingDecode(EmbeddingTable(embeddings, NAMES, padding_rows=2), 2.0)
            return layer.cross_entropy(
                hidden,
                FOUR_TARGETS,
                weights=weights,
                label_smoothing=0.1,
                z_loss=0.1,
                chunk_size=chunk_size,
            )

        def plain(embeddings, hidden):
            z = 2 * jnp.tanh(hidden @ embeddings[:VOCAB_SIZE].T / 2)
            lse = jax.nn.logsumexp(z, -1)
            wanted = 0.9 * jax.nn.one_hot(FOUR_TARGETS, VOCAB_SIZE) + 0.1 / VOCAB_SIZE
            losses = lse - jnp.sum(wanted * z, -1) + 0.1 * lse**2
            return jnp.sum(weights * losses) / jnp.sum(weights)

        args = table.embeddings, hidden
        actual = second(jax.jacrev(ours, (0, 1)), (0, 1))(*args)
        expected = jax.hessian(plain, (0, 1))(*args)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_jacobian_has_one_gradient_for_each_loss():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)

    def losses(embeddings):
        changed = eqx.tree_at(lambda layer: layer.table.embeddings, layer, embeddings)
        return changed.cross_entropy(hidden, FOUR_TARGETS, reduction="none")

    jacobian = jax.jacrev(losses)(layer.table.embeddings)
    for i in range(4):
        _, _, expected, *_ = cross_entropy_reference(layer, hidden[i], FOUR_TARGETS[i])
        assert_close(jacobian[i], expected)
