"""What goes wrong around this library, and what happens then: the table of it is README.md."""

import copy
import dataclasses
import functools
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.experimental import checkify
from jaxtyping import TypeCheckError

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
    cross_entropy_reference,
    decode_reference,
    float64,
    lookup_gradient_reference,
    lookup_reference,
    make_array,
    make_table,
    python_environment,
    run_python,
    VOCAB_SIZE,
)


NAMES = ("vocabulary", "embedding")
TOKENS = np.asarray([0, 6, 3, 3], np.int32)
TARGETS = np.asarray([1, 2, 6, 0], np.int32)
WEIGHTS = np.asarray([1, 0, 2, 1], np.float32)


def test_every_test_that_the_table_names_exists():
    folder = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (folder / "README.md").read_text())
    assert len(named) > 60
    for file, test in named:
        assert f"def {test}(" in (folder / file).read_text(), f"{file}::{test}"


# NaN and infinity


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_seen_by_its_own_tokens_alone(poison):
    table = make_table("first")
    rows = jnp.asarray(table.embeddings).at[5].set(poison)
    broken = eqx.tree_at(lambda t: t.embeddings, table, rows)
    np.testing.assert_array_equal(EmbeddingLookup(broken)(TOKENS), lookup_reference(table, TOKENS))
    assert np.array_equal(EmbeddingLookup(broken)(5), np.full(4, poison), equal_nan=True)
    gradient = eqx.filter_grad(lambda t: jnp.sum(EmbeddingLookup(t)(TOKENS)))(broken)
    expected = lookup_gradient_reference(table, TOKENS, np.ones((4, 4)))
    np.testing.assert_array_equal(gradient.embeddings, expected)
    # Every token competes with it, but where it is banned: a product with infinity may be -inf.
    hidden = make_array((4, 4), seed=1)
    losses = EmbeddingDecode(broken).cross_entropy(hidden, TARGETS, reduction="none")
    logits = float64(EmbeddingDecode(broken)(hidden))[:, 5]
    np.testing.assert_array_equal(np.isfinite(losses), logits == -np.inf)
    assert not np.isnan(poison) or np.isnan(losses).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_hidden_vector_that_is_not_finite_costs_its_own_loss_alone(poison):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    broken = hidden.at[2, 0].set(poison)

    def total(hidden):
        losses = layer.cross_entropy(hidden, TARGETS, reduction="none", chunk_size=2)
        return jnp.sum(losses), losses

    (value, losses), gradient = jax.value_and_grad(total, has_aux=True)(broken)
    expected, for_hidden, *_ = cross_entropy_reference(layer, hidden, TARGETS, reduction="none")
    others = np.arange(4) != 2
    assert np.isnan(value) and np.isnan(losses[2]) and np.isnan(gradient[2]).all()
    assert_close(losses[others], expected[others])
    assert_close(gradient[others], for_hidden[others])
    assert_close(layer(broken)[others], decode_reference(layer.table, hidden)[others])


@pytest.mark.parametrize("disable_jit, reduction", [(False, "mean"), (True, "none")])
def test_jax_debug_nans_finds_no_nan_where_all_is_in_range(disable_jit, reduction):
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    targets = jnp.where(WEIGHTS == 0, -100, TARGETS)

    def loss(table):
        losses = EmbeddingDecode(table).cross_entropy(
            EmbeddingLookup(table)(jnp.asarray(TOKENS)) + hidden,
            targets,
            weights=jnp.asarray(WEIGHTS),
            label_smoothing=0.1,
            reduction=reduction,
        )
        return jnp.sum(losses)

    with jax.debug_nans(True), jax.disable_jit(disable_jit):
        value, gradient = eqx.filter_value_and_grad(loss)(table)
        expected, *_ = cross_entropy_reference(
            EmbeddingDecode(table),
            lookup_reference(table, TOKENS) + float64(hidden),
            TARGETS,
            WEIGHTS,
            label_smoothing=0.1,
            reduction=reduction,
        )
        assert_close(value, np.sum(expected))
        assert np.isfinite(gradient.embeddings).all()
        for out_of_range in ("raise", "clip"):
            EmbeddingLookup(table, out_of_range)(jnp.asarray(TOKENS))
        with pytest.raises(FloatingPointError):
            EmbeddingLookup(table)(jnp.asarray([7]))
        with pytest.raises(FloatingPointError):
            EmbeddingDecode(table).cross_entropy(hidden, targets)


def test_jax_debug_nans_points_at_the_nan_of_the_caller_and_not_at_the_library():
    layer = EmbeddingDecode(make_table("first"))

    @jax.jit
    def step(hidden):
        return jnp.log(-1 - layer.cross_entropy(hidden, TARGETS))

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="encountered in log"):
        step(make_array((4, 4), seed=1))


def test_jax_debug_infs_finds_the_infinity_that_stands_for_padding():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    with jax.debug_infs(True), jax.disable_jit(True), pytest.raises(FloatingPointError):
        layer.cross_entropy(hidden, TARGETS)


def test_large_logits_give_the_loss_that_they_are():
    table = EmbeddingTable(jnp.asarray([[1e18], [1e30], [-1e30]]), NAMES)
    losses = EmbeddingDecode(table).cross_entropy(jnp.ones((3, 1)), np.arange(3), reduction="none")
    assert_close(losses, [1e30, 0, 2e30])
    capped = EmbeddingDecode(table, soft_cap=5.0)
    assert_close(capped.cross_entropy(jnp.full((1, 1), 1e8), np.asarray([2])), 10 + np.log(2))


@pytest.mark.parametrize("vocab_size, offset", [(2600, 1e4), (2600, -1e5), (64, 1e30), (64, 1e37)])
def test_label_smoothing_loses_nothing_to_the_size_of_the_logits(vocab_size, offset):
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


def test_a_soft_cap_or_z_loss_that_float32_cannot_compute_with_is_refused():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    expected = EmbeddingDecode(table)(hidden)
    assert_close(EmbeddingDecode(table, soft_cap=1e30)(hidden), expected)
    loss = EmbeddingDecode(table).cross_entropy(hidden, TARGETS, z_loss=1e30)
    assert_close(
        loss / 1e30,
        cross_entropy_reference(EmbeddingDecode(table), hidden, TARGETS, z_loss=1e30)[0] / 1e30,
    )
    for number in (1e31, 10**400):
        with pytest.raises(ValueError, match="soft_cap must be positive and at most 1e.30"):
            EmbeddingDecode(table, soft_cap=number)
        with pytest.raises(ValueError, match="z_loss must be at least 0 and at most 1e.30"):
            EmbeddingDecode(table).cross_entropy(hidden, TARGETS, z_loss=number)


# Tokens that a bias bans


def banned(bias, **options):
    bias = jnp.pad(jnp.asarray(bias, jnp.float32), (0, 2), constant_values=jnp.nan)
    return EmbeddingDecode(dataclasses.replace(make_table("first"), bias=bias), **options)


def test_a_banned_token_costs_what_the_formula_says():
    hidden = make_array((4, 4), seed=1)
    layer = banned([0, 0, 0, 0, 0, -np.inf, 0])
    for z_loss in (0.0, 0.1):

        def loss(layer_and_hidden):
            layer, hidden = layer_and_hidden
            return layer.cross_entropy(hidden, TARGETS, z_loss=z_loss)

        value, (for_layer, for_hidden) = eqx.filter_value_and_grad(loss)((layer, hidden))
        expected, *wanted = cross_entropy_reference(layer, hidden, TARGETS, z_loss=z_loss)
        actual = value, for_hidden, for_layer.table.embeddings, for_layer.table.bias
        for one, other in zip(actual, (expected, *wanted), strict=False):
            assert_close(one, other)
        assert for_layer.table.bias[5] == 0 and not np.any(for_layer.table.embeddings[5])
    assert layer.cross_entropy(hidden[0], 5) == np.inf  # it has no probability
    assert layer.cross_entropy(hidden, TARGETS, label_smoothing=0.1) == np.inf  # wanted a little
    assert np.isnan(banned(np.full(7, -np.inf)).cross_entropy(hidden, TARGETS))


def test_a_soft_cap_lifts_a_ban_for_it_comes_after_the_bias():
    layer = banned([0, 0, 0, 0, 0, -np.inf, 0], soft_cap=2.0)
    hidden = make_array((4, 4), seed=1)
    np.testing.assert_array_equal(layer(hidden)[:, 5], -2)
    expected, *_ = cross_entropy_reference(layer, hidden, TARGETS)
    assert_close(layer.cross_entropy(hidden, TARGETS), expected)


# Weights


@pytest.mark.parametrize(
    "weights", [np.asarray([2**40, 0, 0, 0]), np.asarray([2**63, 0, 0, 0], np.uint64)], ids=str
)
def test_an_integer_weight_of_64_bits_counts_as_much_as_it_says(weights):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    mean = layer.cross_entropy(hidden, TARGETS, weights=weights)
    expected, *_ = cross_entropy_reference(layer, hidden, TARGETS, weights)
    assert_close(mean, expected)
    assert mean > 0


def test_a_weight_of_nan_or_infinity_costs_its_own_loss_alone_and_the_mean():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    expected, *_ = cross_entropy_reference(layer, hidden, TARGETS, reduction="none")
    for weight in (np.nan, np.inf):
        weights = np.asarray([1, weight, 1, 1], np.float32)
        losses = layer.cross_entropy(hidden, TARGETS, weights=weights, reduction="none")
        np.testing.assert_allclose(losses, expected * weights, rtol=1e-5)
        assert np.isnan(layer.cross_entropy(hidden, TARGETS, weights=weights))


def test_weights_that_cancel_have_no_mean():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    weights = np.asarray([1, -1, 1, -1])
    assert not np.isfinite(layer.cross_entropy(hidden, TARGETS, weights=weights))
    expected, *_ = cross_entropy_reference(layer, hidden, TARGETS, weights, reduction="sum")
    assert_close(layer.cross_entropy(hidden, TARGETS, weights=weights, reduction="sum"), expected)


@pytest.mark.parametrize("scale", [1e-60, 1e-40, 1e-30, 1e-20, 1e19, 1e38])
def test_weights_of_any_magnitude_have_the_same_mean(scale):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    expected, for_hidden, _, _, for_weights = cross_entropy_reference(
        layer, hidden, TARGETS, WEIGHTS
    )
    of_host = float64(WEIGHTS) * scale
    assert_close(layer.cross_entropy(hidden, TARGETS, weights=of_host), expected)
    if 1e-38 < scale:  # else zero to JAX on a device

        def loss(hidden, weights):
            return layer.cross_entropy(hidden, TARGETS, weights=weights)

        weights = jnp.asarray(of_host, "float32")
        value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, weights)
        assert_close(value, expected)
        assert_close(gradients[0], for_hidden)
        if scale < 1e38:  # else zero to JAX on a device, too
            assert_close(float64(gradients[1]) * scale, for_weights)


@pytest.mark.parametrize("small", [1e-30, 1e-60])
def test_a_small_weight_does_not_hide_a_target_out_of_range(small):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    targets, weights = np.where(TARGETS == 2, -1, TARGETS), np.asarray([1, small, 1e30, 1])
    assert np.isnan(layer.cross_entropy(hidden, targets, weights=weights))
    losses = layer.cross_entropy(hidden, targets, weights=weights, reduction="none")
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, False])


def test_a_weight_of_64_bits_made_in_the_64_bit_mode_is_not_narrowed():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    for weights in np.asarray([2**32, 1, 1, 1]), np.asarray([1e-300, 1, 1, 1]):
        with jax.enable_x64(True):
            given = jnp.asarray(weights)
        for reduction in ("sum", "mean"):
            expected, *_ = cross_entropy_reference(
                layer, hidden, TARGETS, weights, reduction=reduction
            )
            loss = layer.cross_entropy(hidden, TARGETS, weights=given, reduction=reduction)
            assert_close(loss, expected)
        broken = np.where(np.arange(4) == 0, -5, TARGETS)
        assert np.isnan(layer.cross_entropy(hidden, broken, weights=given))
        with pytest.raises(TypeError, match="weights of (int|float)64 are traced outside"):
            jax.jit(lambda w: layer.cross_entropy(hidden, TARGETS, weights=w))(given)


def test_a_token_of_weight_zero_poisons_nothing_under_an_infinite_cotangent():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)

    def total(layer, weights, root):
        losses = layer.cross_entropy(hidden, TARGETS, weights=weights, reduction="none")
        return jnp.sum(root(losses))  # the slope of a root at 0 is infinite

    weights = jnp.asarray(WEIGHTS)
    gradient = eqx.filter_grad(total)(layer, weights, jnp.sqrt)
    expected = eqx.filter_grad(total)(layer, weights, lambda x: jnp.where(x > 0, x, 1.0) ** 0.5)
    assert np.isfinite(gradient.table.embeddings).all()
    assert_close(gradient.table.embeddings, expected.table.embeddings)
    for_weights = jax.grad(lambda w: total(layer, w, jnp.sqrt))(weights)
    assert np.isfinite(for_weights).all() and for_weights[1] == 0


def test_a_loss_that_is_left_out_poisons_no_gradient():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    broken, targets = hidden.at[1].set(jnp.nan), np.where(TARGETS == 2, -1, TARGETS)
    keep = np.arange(4) != 1

    def total(layer, hidden):
        losses = layer.cross_entropy(hidden, targets, reduction="none")
        return jnp.sum(jnp.where(keep, losses, 0.0))

    gradient = eqx.filter_grad(total)(layer, broken)
    _, _, expected, *_ = cross_entropy_reference(
        layer, hidden, TARGETS, keep.astype(float), reduction="sum"
    )
    assert_close(gradient.table.embeddings, expected)


def test_many_weights_of_a_small_dtype_are_summed_in_float32():
    layer = EmbeddingDecode(make_table("first"))
    hidden, targets = jnp.ones((70_000, 4)), np.zeros(70_000, int)
    expected, *_ = cross_entropy_reference(layer, hidden[:1], targets[:1])
    for dtype in ("float16", "uint8"):
        weights = np.full(70_000, 200, dtype)
        assert_close(layer.cross_entropy(hidden, targets, weights=weights), expected, rtol=1e-4)


def test_weights_that_are_no_real_numbers_are_refused():
    layer = EmbeddingDecode(make_table("first"))
    with pytest.raises(TypeError, match="weights must be bool, integer or floating, got complex64"):
        layer.cross_entropy(jnp.ones(4), 1, weights=np.complex64(1j))


# What is given


def test_an_array_of_64_bits_made_in_the_64_bit_mode_and_used_outside_is_not_narrowed():
    with jax.enable_x64(True):
        tokens = jnp.asarray([3, 2**32 + 3, -(2**32) + 3])
        unsigned = jnp.asarray([3, 2**32 + 3, 2**63 + 3], jnp.uint64)
    table = make_table("first")
    layer, hidden = EmbeddingDecode(table), make_array((3, 4), seed=1)
    for given in (tokens, unsigned):
        vectors = EmbeddingLookup(table)(given)
        np.testing.assert_array_equal(vectors, lookup_reference(table, given.tolist()))
        with pytest.raises(Exception, match="a token is out of range"):
            EmbeddingLookup(table, "raise")(given)
        losses = layer.cross_entropy(hidden, given, reduction="none")
        np.testing.assert_array_equal(np.isnan(losses), [False, True, True])
        for name, use in (
            ("tokens", EmbeddingLookup(table)),
            ("targets", lambda given: layer.cross_entropy(hidden, given)),
        ):
            with pytest.raises(TypeError, match=f"{name} of u?int64 are traced outside of JAX's"):
                jax.jit(lambda given, use=use: use(given))(given)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_traced_targets_are_compared_at_64_bits(dtype):
    with jax.enable_x64(True):
        layer, hidden = EmbeddingDecode(make_table("first")), make_array((3, 4), seed=1)
        targets = jnp.asarray([3, 2**32 + 3, 2**63 - 1], dtype)

        @jax.jit
        def loss(targets):
            return layer.cross_entropy(hidden, targets, reduction="none")

        np.testing.assert_array_equal(np.isnan(loss(targets)), [False, True, True])


def test_what_stands_in_the_place_of_the_embeddings_is_looked_at_when_it_is_used():
    table, hidden = make_table("middle"), make_array((4, 2, 3), seed=1)
    uses = (
        lambda table: EmbeddingLookup(table)(TOKENS),
        lambda table: EmbeddingDecode(table)(hidden),
        lambda table: EmbeddingDecode(table).cross_entropy(hidden, TARGETS),
    )

    def replaced(array):
        return eqx.tree_at(lambda t: t.embeddings, table, array)

    restored = replaced(np.asarray(table.embeddings))  # as many checkpoints give it back
    masked = replaced(np.ma.masked_array(np.asarray(table.embeddings), False))
    skeleton = eqx.filter_eval_shape(lambda: table)
    for use in uses:
        np.testing.assert_array_equal(use(restored), use(table))
        for other, name in (
            (skeleton, "ShapeDtypeStruct"),
            (replaced(None), "NoneType"),
            (masked, "MaskedArray"),  # whose mask would be lost
        ):
            with pytest.raises(ValueError, match=f"has {name} in place of its embeddings.*combine"):
                use(other)


def test_embeddings_of_another_rank_or_dtype_are_looked_at_when_they_are_used():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    for array, error, message in (
        (jnp.ones(9), ValueError, r"shape \(9,\) have 1 axes, but 2 are named"),
        (np.ones((9, 4), np.int8), TypeError, "embeddings must be floating, got int8"),
        (jnp.ones((9, 4), jnp.complex64), TypeError, "embeddings must be floating, got complex64"),
    ):
        broken = eqx.tree_at(lambda t: t.embeddings, table, array)
        for use in (
            lambda table: EmbeddingLookup(table)(TOKENS),
            lambda table: EmbeddingDecode(table)(hidden),
            lambda table: EmbeddingDecode(table).cross_entropy(hidden, TARGETS),
        ):
            with pytest.raises(error, match=message):
                use(broken)


def test_a_bias_may_be_an_array_of_numpy_as_checkpoints_restore_it():
    layer = EmbeddingDecode(make_table("first", with_bias=True))
    hidden = make_array((4, 4), seed=2)

    def replaced(bias):
        return eqx.tree_at(lambda d: d.table.bias, layer, bias)

    restored = replaced(np.asarray(layer.table.bias))
    np.testing.assert_array_equal(restored(hidden), layer(hidden))
    assert restored.cross_entropy(hidden, TARGETS) == layer.cross_entropy(hidden, TARGETS)
    skeleton = replaced(jax.ShapeDtypeStruct((9,), jnp.float32))
    masked = replaced(np.ma.masked_array(np.ones(9, np.float32), True))
    for broken, name in (skeleton, "ShapeDtypeStruct"), (masked, "MaskedArray"):
        for use in broken, lambda hidden: broken.cross_entropy(hidden, TARGETS):
            with pytest.raises(ValueError, match=f"has {name} in place of its bias.*combine"):
                use(hidden)
    integers = replaced(np.ones(9, np.int32))
    for use in integers, lambda hidden: integers.cross_entropy(hidden, TARGETS):
        with pytest.raises(TypeError, match="bias must be floating, got int32"):
            use(hidden)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (10,), (9, 1)], ids=str)
def test_a_bias_that_was_replaced_is_held_against_the_vocabulary_again(shape):
    layer = EmbeddingDecode(make_table("first", with_bias=True))
    layer, hidden = eqx.tree_at(lambda d: d.table.bias, layer, jnp.ones(shape)), make_array((4, 4))
    for use in layer, lambda hidden: layer.cross_entropy(hidden, TARGETS):
        message = rf"bias must have shape \(9,\).*got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            use(hidden)


def test_names_of_axes_are_strings_each_of_them():
    for names in (1, "vocabulary"), ("vocabulary", 1):
        for _ in range(20):  # the type checks look at one name, at random
            with pytest.raises((ValueError, TypeCheckError)):
                EmbeddingTable(jnp.ones((3, 3)), names)  # pyright: ignore[reportArgumentType]


def test_the_trained_part_of_a_model_is_no_model():
    table = EmbeddingTable(make_array((12, 4)), NAMES, padding_rows=4)
    trained, _ = partition_rows(table, [0, 1, 2])
    for use in (
        lambda: EmbeddingLookup(trained)(TOKENS),
        lambda: EmbeddingDecode(trained)(jnp.ones((4, 4))),
        lambda: EmbeddingDecode(trained).cross_entropy(jnp.ones((4, 4)), TARGETS),
    ):
        with pytest.raises(ValueError, match="3 rows, 4 of them padding.*`combine_rows` first"):
            use()
    # without padding nothing shows that its tables are a part: they count from their first row
    trained, _ = partition_rows(make_table("first"), [4, 6, 1])
    rows = EmbeddingLookup(trained, "clip")(np.asarray([0]))
    np.testing.assert_array_equal(rows, make_table("first").embeddings[4][None])


def test_frozen_rows_that_were_resized_are_refused():
    for size in (3, 6, 12):
        trained, frozen = partition_rows(EmbeddingTable(make_array((9, 4)), NAMES), [4, 6])
        with pytest.raises(ValueError, match=f"{size} tokens, but had 9.*before you resize"):
            combine_rows(trained, resize_vocabulary(frozen, size))


def test_parts_of_two_calls_fit_and_the_rows_of_the_frozen_part_hold():
    table = make_table("first")
    (trained, _), (_, frozen) = partition_rows(table, [1, 2]), partition_rows(table, [3, 4])
    combined = combine_rows(trained, frozen).embeddings
    np.testing.assert_array_equal(combined[3:5], table.embeddings[1:3])


def test_a_resize_with_a_key_draws_rows_for_moments_as_for_a_model():
    table: Any = EmbeddingTable(make_array((9, 4)), NAMES)
    optimizer = optax.adam(1e-3)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.update(table, optimizer.init(table))[1]
    key = jax.random.key(0)
    _, together = resize_vocabulary((table, state), 40, key=key)
    assert np.any(together[0].nu.embeddings[9:] < 0)
    apart = resize_vocabulary(state, 40)
    assert not np.any(apart[0].nu.embeddings[9:])


def test_the_error_for_targets_names_them():
    layer = EmbeddingDecode(make_table("first"))
    with pytest.raises(TypeError, match="targets must be integers, got float32"):
        layer.cross_entropy(jnp.ones(4), np.float32(1))


def test_a_masked_array_is_refused_for_its_mask_would_be_lost():
    masked: np.ndarray = np.ma.masked_equal([1, 2, 3, 4], 2)
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    layer = EmbeddingDecode(table)
    for name, call in {
        "tokens": lambda: EmbeddingLookup(table)(masked),
        "targets": lambda: layer.cross_entropy(hidden, masked),
        "weights": lambda: layer.cross_entropy(hidden, TARGETS, weights=masked),
        "rows": lambda: partition_rows(table, masked),
    }.items():
        with pytest.raises(TypeError, match=f"{name} must not be a masked array"):
            call()


@pytest.mark.parametrize(
    "tokens",
    [
        np.arange(6, dtype=np.int64)[::-1],
        np.arange(12).reshape(6, 2)[::2, 1],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(6, dtype=">i4"),
        np.arange(6, dtype=">u8"),
        np.broadcast_to(np.asarray(3), (2, 3)),
    ],
    ids=["reversed", "strided", "Fortran", "big-endian", "unsigned big-endian", "broadcast"],
)
def test_tokens_lie_in_memory_as_they_like(tokens):
    table, layer = make_table("first"), EmbeddingDecode(make_table("first"))
    tokens = np.minimum(tokens, 6, out=tokens.copy() if not tokens.flags.writeable else tokens)
    np.testing.assert_array_equal(EmbeddingLookup(table)(tokens), lookup_reference(table, tokens))
    hidden = make_array((*tokens.shape, 4), seed=1)
    expected, *_ = cross_entropy_reference(layer, hidden, tokens)
    assert_close(layer.cross_entropy(hidden, tokens), expected)


def test_a_function_that_jax_transforms_gets_ids_that_are_narrowed_already():
    # and with them the row of another token: what is here sees no difference
    table = make_table("first")
    lookup, far = EmbeddingLookup(table), np.asarray([2**32 + 3])
    other = np.asarray(table.embeddings[3:4])
    assert np.isnan(lookup(far)).all()
    np.testing.assert_array_equal(jax.jit(lambda ids: lookup(ids))(far), other)
    np.testing.assert_array_equal(jax.vmap(lookup)(far), other)
    np.testing.assert_array_equal(jax.lax.map(lookup, far), other)
    with jax.enable_x64(True):
        assert np.isnan(jax.vmap(lookup)(far)).all()


def test_numbers_of_numpy_are_as_good_as_those_of_python(tmp_path):
    key, hidden = jax.random.key(0), make_array((4, 4), seed=1)
    table = EmbeddingTable.from_config(
        np.int64(7), {"embedding": np.uint8(4)}, pad_to_multiple_of=np.int32(4), key=key
    )
    same = EmbeddingTable.from_config(7, {"embedding": 4}, pad_to_multiple_of=4, key=key)
    assert eqx.tree_equal(table, same)
    by_hand = EmbeddingTable(table.embeddings, NAMES, padding_rows=np.int64(1))
    assert eqx.tree_equal(by_hand, same) and type(by_hand.padding_rows) is int
    assert type(table.vocab_size) is int
    layer = EmbeddingDecode(table, soft_cap=np.float32(0.5))
    assert type(layer.soft_cap) is float
    np.testing.assert_array_equal(layer(hidden), EmbeddingDecode(table, soft_cap=0.5)(hidden))

    def loss(smoothing, z_loss, chunk_size):
        return layer.cross_entropy(
            hidden, TARGETS, label_smoothing=smoothing, z_loss=z_loss, chunk_size=chunk_size
        )

    assert loss(np.float32(0.25), np.float16(0.5), np.int64(2)) == loss(0.25, 0.5, 2)
    assert loss(np.int32(0), np.int8(1), None) == loss(0, 1, None)
    grown = resize_vocabulary(table, np.int64(9), key=key, pad_to_multiple_of=np.int16(8))
    assert eqx.tree_equal(grown, resize_vocabulary(table, 9, key=key, pad_to_multiple_of=8))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_table_of_float8_is_summed_in_float32(dtype):
    table = EmbeddingTable(jnp.asarray([[0.5, 1.5], [1, 2], [-1, 3]], dtype), NAMES)
    vectors = EmbeddingLookup(table)(np.asarray([1, 2, 3]))
    assert vectors.dtype == dtype
    np.testing.assert_array_equal(float64(vectors), [[1, 2], [-1, 3], [np.nan, np.nan]])
    tokens, eighth = np.full(256, 1), jnp.full((256, 2), 0.125)
    gradient = eqx.filter_grad(
        lambda t: jnp.sum(EmbeddingLookup(t)(tokens).astype(jnp.float32) * eighth)
    )(table)
    np.testing.assert_array_equal(float64(gradient.embeddings), [[0, 0], [32, 32], [0, 0]])
    hidden = jnp.asarray([[1, 2], [0.5, -1]], dtype)
    layer = EmbeddingDecode(table)
    expected, *_ = cross_entropy_reference(layer, hidden, np.asarray([0, 1]))
    assert_close(layer.cross_entropy(hidden, np.asarray([0, 1])), expected)


def test_a_table_without_nan_cannot_answer_with_it():
    table = EmbeddingTable(jnp.asarray([[0.5], [1], [3]], "float4_e2m1fn"), NAMES)
    with pytest.raises(ValueError, match='float4_e2m1fn has no NaN.*"raise" or "clip"'):
        EmbeddingLookup(table)(np.asarray([1]))
    clipped = EmbeddingLookup(table, "clip")(np.asarray([1, 9, -9]))
    assert float64(clipped).tolist() == [[1], [3], [0.5]]


def test_a_vocabulary_of_one_token_costs_nothing_and_learns_nothing():
    table = EmbeddingTable(make_array((3, 4)), NAMES, padding_rows=2)
    hidden, zeros = make_array((5, 4), seed=1), np.zeros(5, int)
    np.testing.assert_array_equal(EmbeddingLookup(table)([0, 0][0]), table.embeddings[0])
    assert np.isnan(EmbeddingLookup(table)(1)).all()
    np.testing.assert_array_equal(EmbeddingLookup(table, "clip")(9), table.embeddings[0])
    assert_close(EmbeddingDecode(table)(hidden), decode_reference(table, hidden))

    def loss(table, **options):
        return EmbeddingDecode(table).cross_entropy(hidden, zeros, **options)

    value, gradient = eqx.filter_value_and_grad(loss)(table, label_smoothing=0.5)
    assert value == 0 and not np.any(gradient.embeddings)
    expected, *_ = cross_entropy_reference(EmbeddingDecode(table), hidden, zeros, z_loss=0.1)
    assert_close(loss(table, z_loss=0.1), expected)


# Derivatives of derivatives


@pytest.mark.parametrize("chunk_size, second", [(None, jax.jacfwd), (2, jax.jacrev)])
def test_the_second_derivative_of_the_loss_is_that_of_the_loss_from_logits(chunk_size, second):
    with jax.enable_x64(True):
        table = make_table("first", "float64")
        hidden = make_array((4, 4), "float64", seed=1)
        weights = jnp.asarray(WEIGHTS, "float64")

        def ours(embeddings, hidden):
            layer = EmbeddingDecode(EmbeddingTable(embeddings, NAMES, padding_rows=2), 2.0)
            return layer.cross_entropy(
                hidden,
                TARGETS,
                weights=weights,
                label_smoothing=0.1,
                z_loss=0.1,
                chunk_size=chunk_size,
            )

        def plain(embeddings, hidden):
            z = 2 * jnp.tanh(hidden @ embeddings[:VOCAB_SIZE].T / 2)
            lse = jax.nn.logsumexp(z, -1)
            wanted = 0.9 * jax.nn.one_hot(TARGETS, VOCAB_SIZE) + 0.1 / VOCAB_SIZE
            losses = lse - jnp.sum(wanted * z, -1) + 0.1 * lse**2
            return jnp.sum(weights * losses) / jnp.sum(weights)

        args = table.embeddings, hidden
        actual = second(jax.jacrev(ours, (0, 1)), (0, 1))(*args)
        expected = jax.hessian(plain, (0, 1))(*args)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_jacobian_of_losses_that_stay_apart_is_one_gradient_for_each():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)

    def losses(embeddings):
        changed = eqx.tree_at(lambda layer: layer.table.embeddings, layer, embeddings)
        return changed.cross_entropy(hidden, TARGETS, reduction="none")

    jacobian = jax.jacrev(losses)(layer.table.embeddings)
    for i in range(4):
        _, _, expected, *_ = cross_entropy_reference(layer, hidden[i], TARGETS[i])
        assert_close(jacobian[i], expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_4096_losses_under_vmap_counts_past_256(reduction):
    table = EmbeddingTable(jnp.zeros((2, 1), jnp.bfloat16), NAMES)
    hidden, targets = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros(4096, "int32")

    def total(table):
        layer = EmbeddingDecode(table)
        return jnp.sum(
            jax.vmap(lambda h, y: layer.cross_entropy(h, y, reduction=reduction))(hidden, targets)
        )

    assert eqx.filter_grad(total)(table).embeddings.tolist() == [[-2048], [2048]]


@pytest.mark.parametrize("wide", [False, True])
def test_a_scan_adds_gradients_in_the_dtype_that_the_table_has_outside_of_it(wide):
    # JAX adds the gradients of the steps of a scan in the dtype of what it closes over: a table of
    # bfloat16 counts to 256 there, and one that was cast before the scan does not stop.
    tokens = jnp.full(1000, 2)

    @jax.grad
    def gradient(table):
        if wide:
            table = jax.tree.map(lambda x: x.astype(jnp.float32), table)
        one = jnp.zeros((), table.embeddings.dtype) + 1

        def step(total, token):
            return total + jnp.sum(EmbeddingLookup(table)(token) * one), None

        return jax.lax.scan(step, one, tokens)[0].astype(jnp.float32)

    table = EmbeddingTable(jnp.ones((5, 1), jnp.bfloat16), NAMES)
    assert gradient(table).embeddings.ravel().tolist() == [0, 0, 1000 if wide else 256, 0, 0]


# Modes of JAX and Equinox


def test_without_jit_everything_is_the_same():
    table = make_table("middle", with_bias=True)
    layer = EmbeddingDecode(table, 3.0)
    key = jax.random.key(0)

    @eqx.filter_jit
    def everything(layer):
        def loss(layer):
            hidden = jnp.tanh(EmbeddingLookup(layer.table)(jnp.asarray(TOKENS)))
            loss = layer.cross_entropy(hidden, TARGETS, weights=WEIGHTS, chunk_size=2)
            return loss + jnp.sum(layer(hidden) ** 2)

        trained, frozen = partition_rows(layer, [2, 5])
        return (
            eqx.filter_value_and_grad(loss)(layer),
            resize_vocabulary(layer, 9, key=key, pad_to_multiple_of=4),
            combine_rows(jax.tree.map(lambda x: x + 1, trained), frozen),
        )

    expected = everything(layer)
    with jax.disable_jit():
        actual = everything(layer)
        with pytest.raises(RuntimeError, match="the vocabulary 'vocabulary' has 7 tokens"):
            EmbeddingLookup(table, "raise")(jnp.asarray(7))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_close, actual, expected)


RAISING = """
import json
import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_embedding import EmbeddingLookup, EmbeddingTable

table = EmbeddingTable(jnp.ones((5, 2)), ("vocabulary", "embedding"))
lookup = eqx.filter_jit(EmbeddingLookup(table, "raise"))
try:
    result = jax.block_until_ready(lookup(jnp.asarray([1, 5])))
    print(json.dumps(jnp.isnan(result).tolist()))
except RuntimeError as error:
    print(json.dumps(str(error)))
"""


def test_a_check_stays_where_only_the_gradient_is_needed():
    # the gradient of a sum needs no vector, and XLA computes none
    table = make_table("first")

    def total(table, tokens):
        return jnp.sum(EmbeddingLookup(table, "raise")(tokens))

    gradient = eqx.filter_jit(eqx.filter_grad(total))
    tokens = jnp.asarray([3, 3])
    expected = lookup_gradient_reference(table, tokens, np.ones((2, 4)))
    np.testing.assert_array_equal(gradient(table, tokens).embeddings, expected)
    with pytest.raises(RuntimeError, match="7 tokens"):
        gradient(table, jnp.asarray([3, 9]))


def test_checkify_finds_a_token_out_of_range_and_no_other_fault():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)

    @jax.jit
    @functools.partial(checkify.checkify, errors=checkify.all_checks)
    def loss(table, tokens):
        vectors = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(vectors + hidden, TARGETS, weights=WEIGHTS)

    error, value = loss(table, jnp.asarray(TOKENS))
    error.throw()
    expected, *_ = cross_entropy_reference(
        EmbeddingDecode(table), lookup_reference(table, TOKENS) + float64(hidden), TARGETS, WEIGHTS
    )
    assert_close(value, expected)
    error, _ = loss(table, jnp.asarray([0, 6, 3, 7]))
    assert "out-of-bounds" in str(error.get())


def test_no_tracer_leaks_and_no_key_is_used_twice():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)

    def loss(table, tokens):
        vectors = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(vectors + hidden, TARGETS, chunk_size=2)

    tokens = jnp.asarray([TOKENS, TARGETS])
    with jax.checking_leaks(), jax.debug_key_reuse(True):
        each = eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0))(table, tokens)
        whole = eqx.filter_jit(eqx.filter_grad(lambda t: loss(t, tokens[0]) + loss(t, tokens[1])))
        assert_close(whole(table).embeddings, jnp.sum(each.embeddings, 0))
        made = EmbeddingTable.from_config(5, {"embedding": 4}, key=jax.random.key(0))
        tables = table, make_table("last", with_bias=True)
        grown = resize_vocabulary(tables, 9, key=jax.random.key(1), pad_to_multiple_of=1)
    assert len(np.unique(made.embeddings)) == 20
    assert len(np.unique(grown[0].embeddings[7:])) == 8


@pytest.mark.parametrize(
    "setting, expected",
    [("raise", "5 tokens"), ("nan", [[True] * 2] * 2), ("off", [[False] * 2, [True] * 2])],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_eqx_on_error_is_followed_in_each_setting(setting, expected, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    result = run_python(RAISING, EQX_ON_ERROR=setting, XLA_FLAGS=flags)
    assert result == expected or (setting == "raise" and expected in result)


def test_eqx_on_error_breakpoint_opens_the_debugger_with_the_message():
    process = subprocess.run(
        [sys.executable, "-c", RAISING],
        env=python_environment(EQX_ON_ERROR="breakpoint"),
        input="c\n",
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "the vocabulary 'vocabulary' has 5 tokens" in process.stdout + process.stderr
    assert "(jdb)" in process.stdout


def test_sixteen_threads_may_make_the_first_calls_at_once():
    code = """
import json, sys, threading
import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

assert "beartype" not in sys.modules, "it is imported by the first call"
array = jnp.arange(15.0).reshape(5, 3) / 10
gate, results = threading.Barrier(16), {}

def work(i):
    gate.wait()
    table = EmbeddingTable(array, ("vocabulary", "embedding"))
    tokens = jnp.arange(i % 4 + 1, dtype="int32")

    def loss(table):
        return EmbeddingDecode(table).cross_entropy(EmbeddingLookup(table)(tokens), tokens)

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(table)
    results[i] = [float(value), gradient.embeddings.tolist()]

threads = [threading.Thread(target=work, args=[i]) for i in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([results.get(i) for i in range(16)]))
"""
    results = run_python(code)
    table = EmbeddingTable(jnp.arange(15.0).reshape(5, 3) / 10, NAMES)
    for i, result in enumerate(results):
        assert result == results[i % 4]
        tokens = np.arange(i % 4 + 1)
        value, *_ = cross_entropy_reference(
            EmbeddingDecode(table), lookup_reference(table, tokens), tokens
        )
        assert_close(result[0], value)


# Copies


@pytest.mark.parametrize(
    "copied",
    [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_tables_and_layers_are_copied_whole(copied):
    table = make_table("middle", "bfloat16", with_bias=True)
    layer = EmbeddingDecode(table, 3.0, "float32")
    lookup = EmbeddingLookup(table, "clip")
    for original in (table, layer, lookup):
        again = copied(original)
        assert type(again) is type(original) and eqx.tree_equal(again, original)
        assert jax.tree.structure(again) == jax.tree.structure(original)
    np.testing.assert_array_equal(copied(lookup)(9), lookup(9))
    np.testing.assert_array_equal(
        copied(layer)(jnp.ones((2, 3), "bfloat16")), layer(jnp.ones((2, 3), "bfloat16"))
    )


def test_two_copies_of_a_table_are_two_parameters_each_with_the_gradient_of_its_own_use():
    table = make_table("first")
    model = {"lookup": EmbeddingLookup(table), "decode": EmbeddingDecode(table)}

    def loss(model):
        return model["decode"].cross_entropy(model["lookup"](TOKENS), TARGETS)

    gradient = eqx.filter_grad(loss)(model)
    hidden = lookup_reference(table, TOKENS)
    _, for_hidden, for_decode, *_ = cross_entropy_reference(model["decode"], hidden, TARGETS)
    for_lookup = lookup_gradient_reference(table, TOKENS, for_hidden)
    assert_close(gradient["lookup"].table.embeddings, for_lookup)
    assert_close(gradient["decode"].table.embeddings, for_decode)
    after = eqx.apply_updates(model, gradient)
    one, other = after["lookup"].table.embeddings, after["decode"].table.embeddings
    assert np.any(np.asarray(one) != np.asarray(other)), "they part ways at the first update"


def test_a_table_that_was_donated_is_an_error_and_no_old_value():
    table = make_table("first")
    lookup = EmbeddingLookup(table)
    doubled = jax.jit(lambda table: jax.tree.map(lambda x: 2 * x, table), donate_argnums=0)(table)
    for use in (lambda: lookup(TOKENS), lambda: EmbeddingDecode(table)(jnp.ones(4))):
        with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
            use()
    np.testing.assert_array_equal(
        EmbeddingLookup(doubled)(TOKENS), 2 * lookup_reference(make_table("first"), TOKENS)
    )


# Export


def exported(function, *shapes, vjp_order=0):
    """A function that went through bytes."""
    bytes_ = export.export(jax.jit(function))(*shapes).serialize(vjp_order)
    return export.deserialize(bytes_).call


def use_lookup(embeddings, tokens):
    return EmbeddingLookup(EmbeddingTable(embeddings, NAMES, padding_rows=2))(tokens)


def use_decode(embeddings, hidden):
    return EmbeddingDecode(EmbeddingTable(embeddings, NAMES, padding_rows=2))(hidden)


def use_loss(embeddings, hidden, targets):
    layer = EmbeddingDecode(EmbeddingTable(embeddings, NAMES, padding_rows=2))
    return layer.cross_entropy(hidden, targets, chunk_size=3)


def test_lookup_and_decode_are_exported_for_any_number_of_tokens():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    (n,) = export.symbolic_shape("n")
    embeddings = jax.ShapeDtypeStruct((9, 4), jnp.float32)
    lookup = exported(use_lookup, embeddings, jax.ShapeDtypeStruct((n,), jnp.int32))
    tokens = np.asarray([0, 6, 7, -1], np.int32)
    np.testing.assert_array_equal(lookup(table.embeddings, tokens), lookup_reference(table, tokens))
    decode = exported(use_decode, embeddings, jax.ShapeDtypeStruct((n, 4), jnp.float32))
    assert_close(decode(table.embeddings, hidden), decode_reference(table, hidden))


def test_the_loss_is_exported_with_its_gradient_for_a_known_number_of_tokens():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    call = exported(use_loss, table.embeddings, hidden, jnp.asarray(TARGETS), vjp_order=1)
    value, gradient = jax.value_and_grad(call)(table.embeddings, hidden, jnp.asarray(TARGETS))
    expected, _, for_embeddings, *_ = cross_entropy_reference(
        EmbeddingDecode(table), hidden, TARGETS
    )
    assert_close(value, expected)
    assert_close(gradient, for_embeddings)


def test_what_cannot_be_exported_says_so():
    embeddings = jax.ShapeDtypeStruct((9, 4), jnp.float32)
    (n,) = export.symbolic_shape("n")
    hidden = jax.ShapeDtypeStruct((n, 4), jnp.float32)
    with pytest.raises(jax.errors.InconclusiveDimensionOperation):
        exported(use_loss, embeddings, hidden, jax.ShapeDtypeStruct((n,), jnp.int32))

    def raising(embeddings, tokens):
        return EmbeddingLookup(EmbeddingTable(embeddings, NAMES), "raise")(tokens)

    with pytest.raises(NotImplementedError, match="callback"):
        exported(raising, embeddings, jax.ShapeDtypeStruct((3,), jnp.int32))
