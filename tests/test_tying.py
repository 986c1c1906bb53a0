"""One table for lookup and decode: stored once, trained as one parameter, under every
transformation of Equinox."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, ArrayLike

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import (
    assert_close,
    compile_by_default,
    compiled_memory,
    cross_entropy_reference,
    decode_gradient_reference,
    decode_reference,
    float64,
    FOUR_TARGETS,
    FOUR_TOKENS,
    lookup_gradient_reference,
    lookup_reference,
    make_array,
    make_table,
    NAMES,
    VOCAB_SIZE,
)


class Model(eqx.Module):
    """The smallest tied model: it stores the table once and makes the layers where it is called."""

    table: EmbeddingTable

    def __call__(self, tokens) -> Array:
        hidden = jnp.tanh(EmbeddingLookup(self.table)(tokens))
        return EmbeddingDecode(self.table)(hidden)


TOKENS = np.asarray([0, 3, 3, 6, 2], np.int32)
TARGETS = np.asarray([3, 3, 6, 2, 1], np.int32)


def make_model(layout="first", seed=0):
    return Model(make_table(layout, seed=seed))


def loss(model, tokens: ArrayLike = TOKENS, targets: ArrayLike = TARGETS):
    logits = model(jnp.asarray(tokens))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets))
    return jnp.mean(losses)


def loss_reference(table):
    """The loss and its gradient with respect to the table, in float64."""
    vectors = lookup_reference(table, TOKENS)
    logits = decode_reference(table, np.tanh(vectors))
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    positions = np.arange(len(TARGETS))
    loss = -np.mean(np.log(probabilities[positions, TARGETS]))
    cotangent = probabilities.copy()
    cotangent[positions, TARGETS] -= 1
    cotangent /= len(TARGETS)
    for_hidden, for_decode, _ = decode_gradient_reference(table, np.tanh(vectors), cotangent)
    for_vectors = for_hidden * (1 - np.tanh(vectors) ** 2)
    for_lookup = lookup_gradient_reference(table, TOKENS, for_vectors)
    return loss, for_lookup, for_decode


@pytest.mark.parametrize("layout", ["first", "middle", "last"])
def test_the_tied_gradient_is_the_sum_of_both_uses(layout):
    model = make_model(layout)
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)
    expected, for_lookup, for_decode = loss_reference(model.table)
    assert value == pytest.approx(expected, rel=1e-5)
    assert np.any(for_lookup != 0) and np.any(for_decode != 0)
    assert_close(gradient.table.embeddings, for_lookup + for_decode)


def test_a_model_that_stores_its_table_once_has_one_parameter():
    model = make_model()
    assert len(jax.tree.leaves(model)) == 1
    eqx.tree_check(model)


def test_tree_check_finds_a_table_that_is_stored_twice():
    table = make_table("first")
    with pytest.raises(ValueError, match="`EmbeddingTable` appears in the PyTree multiple times"):
        eqx.tree_check((EmbeddingLookup(table), EmbeddingDecode(table)))


def test_layers_are_views_of_the_array_of_their_table():
    table = make_table("first")
    assert EmbeddingLookup(table).table.embeddings is table.embeddings
    assert EmbeddingDecode(table).table.embeddings is table.embeddings


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adamw(0.1)], ids=["sgd", "adamw"])
def test_optax_trains_the_one_table_and_both_uses_follow(optimizer):
    model = make_model()
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(gradient, state, params)
        return eqx.apply_updates(model, updates), state, value

    after, losses = model, []
    for _ in range(5):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by its step count
            after, state, value = step(after, state)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert jax.tree.structure(after) == jax.tree.structure(model)
    hidden = np.tanh(lookup_reference(after.table, TOKENS))
    assert_close(after(jnp.asarray(TOKENS)), decode_reference(after.table, hidden))


def make_shared():
    table = make_table("middle")
    layers = [EmbeddingLookup(table), eqx.nn.Lambda(jnp.tanh), EmbeddingDecode(table)]
    return eqx.nn.Shared(
        eqx.nn.Sequential(layers), lambda model: model[2].table, lambda model: model[0].table
    )


def test_shared_ties_the_tables_of_layers_in_a_sequential():
    shared = make_shared()
    arrays = eqx.filter(shared, eqx.is_inexact_array)
    assert len(jax.tree.leaves(arrays)) == 1
    model = shared()
    assert model[0].table.embeddings is model[2].table.embeddings
    expected = decode_reference(model[0].table, np.tanh(lookup_reference(model[0].table, TOKENS)))
    assert_close(model(jnp.asarray(TOKENS)), expected)


def test_shared_tables_stay_tied_after_optax_updates():
    shared = make_shared()
    optimizer = optax.adam(0.1)
    state = optimizer.init(eqx.filter(shared, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(shared, state):
        value, gradient = eqx.filter_value_and_grad(lambda shared: loss(shared()))(shared)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(shared, updates), state, value, gradient

    before = shared()[0].table
    with jax.numpy_dtype_promotion("standard"):
        shared, state, value, gradient = step(shared, state)
        once_more, *_ = step(shared, state)
    expected, for_lookup, for_decode = loss_reference(before)
    assert value == pytest.approx(expected, rel=1e-5)
    actual = gradient.pytree[0].table.embeddings
    assert_close(actual, for_lookup + for_decode)
    model = once_more()
    assert model[0].table.embeddings is model[2].table.embeddings
    assert np.all(model[0].table.embeddings[:, :VOCAB_SIZE] != before.embeddings[:, :VOCAB_SIZE])


# Memory


@pytest.mark.parametrize("names", [("vocabulary", "embedding"), ("embedding", "vocabulary")])
def test_the_tied_gradient_takes_one_buffer_of_the_size_of_the_table(names):
    size = 4 * 2048 * 64
    shape = (2048, 64) if names[0] == "vocabulary" else (64, 2048)
    model = Model(EmbeddingTable(jnp.zeros(shape), names))
    tokens = jnp.zeros(4, "int32")
    gradient = jax.jit(jax.grad(lambda model: loss(model, tokens, tokens)))
    memory = compiled_memory(compile_by_default(gradient.lower(model)))
    assert memory.output_size_in_bytes == pytest.approx(size, rel=0.01)
    assert memory.temp_size_in_bytes < size / 2


def test_a_donated_table_is_updated_in_place():
    @eqx.filter_jit(donate="all")
    def descend(model):
        gradient = eqx.filter_grad(loss)(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))

    model: Any = make_model()
    before, pointer = (
        float64(model.table.embeddings),
        model.table.embeddings.unsafe_buffer_pointer(),
    )
    _, for_lookup, for_decode = loss_reference(model.table)
    after = descend(model)
    assert model.table.embeddings.is_deleted()
    assert after.table.embeddings.unsafe_buffer_pointer() == pointer
    assert_close(after.table.embeddings, before - 0.1 * (for_lookup + for_decode))


# Transformations


def test_filter_jit_vmap_and_eval_shape_leave_the_model_what_it_is():
    model = make_model()
    expected = model(jnp.asarray(TOKENS))
    assert_close(eqx.filter_jit(model)(jnp.asarray(TOKENS)), expected)
    assert_close(eqx.filter_vmap(model)(jnp.asarray(TOKENS)), expected)
    shape = eqx.filter_eval_shape(model, jnp.asarray(TOKENS))
    assert (shape.shape, shape.dtype) == (expected.shape, expected.dtype)
    again = eqx.filter_jit(lambda model: model)(model)
    assert eqx.tree_equal(again, model)


def test_partition_and_combine_take_a_model_apart_and_together():
    model = make_model()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert static.table.embeddings is None
    assert static.table.axis_names == model.table.axis_names
    assert eqx.tree_equal(eqx.combine(params, static), model)
    mask = jax.tree.map(lambda _: True, model)
    assert mask.table.embeddings is True
    masked, rest = eqx.partition(model, mask)
    assert eqx.tree_equal(masked, model) and rest.table.embeddings is None
    assert "EmbeddingTable" in repr((static, mask, eqx.filter_eval_shape(lambda: model)))


def test_tree_at_replaces_the_embeddings_of_a_model():
    model, other = make_model(), make_model(seed=1)
    changed = eqx.tree_at(lambda model: model.table.embeddings, model, other.table.embeddings)
    assert eqx.tree_equal(changed, other)
    assert not eqx.tree_equal(changed, model)


def test_scan_over_stacked_tables_is_a_loop_with_the_gradient_of_each():
    stacked = eqx.filter_vmap(lambda rows: EmbeddingTable(rows, ("vocabulary", "embedding")))(
        make_array((3, 9, 4))
    )
    tokens = jnp.asarray(TOKENS)

    def sum_of_losses(tables):
        dynamic, static = eqx.partition(tables, eqx.is_array)

        def body(total, dynamic):
            table = eqx.combine(dynamic, static)
            return total + loss(Model(table), tokens), table.vocab_size

        return jax.lax.scan(body, jnp.zeros(()), dynamic)[0]

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(sum_of_losses))(stacked)
    tables = [jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(3)]
    expected = [loss_reference(table) for table in tables]
    assert value == pytest.approx(sum(loss for loss, _, _ in expected), rel=1e-5)
    for i, (_, for_lookup, for_decode) in enumerate(expected):
        assert_close(gradient.embeddings[i], for_lookup + for_decode)


@pytest.mark.slow
def test_checkpoint_recomputes_to_the_same_gradient():
    model = make_model("last")
    value, gradient = eqx.filter_value_and_grad(eqx.filter_checkpoint(loss))(model)
    again, plain = eqx.filter_value_and_grad(jax.checkpoint(loss))(model)
    expected, for_lookup, for_decode = loss_reference(model.table)
    assert value == again == pytest.approx(expected, rel=1e-5)
    for actual in (gradient, plain):
        assert_close(actual.table.embeddings, for_lookup + for_decode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_table_is_saved_and_loaded_into_a_skeleton(tmp_path, dtype, getkey):
    def make(key):
        return Model(
            EmbeddingTable.from_config(
                5, {"embedding": 2}, "bytes", dtype=dtype, pad_to_multiple_of=4, key=key
            )
        )

    model = make(getkey())
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    skeleton = eqx.filter_eval_shape(make, getkey())
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", skeleton)
    assert eqx.tree_equal(loaded, model)
    assert loaded.table.axis_names == ("bytes", "embedding")
    assert loaded.table.vocab_size == 5


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.slow
def test_a_row_that_is_not_finite_spoils_only_its_token(poison):
    table = make_table("first")
    rows = jnp.asarray(table.embeddings).at[5].set(poison)
    broken = eqx.tree_at(lambda t: t.embeddings, table, rows)
    np.testing.assert_array_equal(
        EmbeddingLookup(broken)(FOUR_TOKENS), lookup_reference(table, FOUR_TOKENS)
    )
    assert np.array_equal(EmbeddingLookup(broken)(5), np.full(4, poison), equal_nan=True)
    gradient = eqx.filter_grad(lambda t: jnp.sum(EmbeddingLookup(t)(FOUR_TOKENS)))(broken)
    expected = lookup_gradient_reference(table, FOUR_TOKENS, np.ones((4, 4)))
    np.testing.assert_array_equal(gradient.embeddings, expected)
    # Every token competes with it, but where it is banned: a product with infinity may be -inf.
    hidden = make_array((4, 4), seed=1)
    losses = EmbeddingDecode(broken).cross_entropy(hidden, FOUR_TARGETS, reduction="none")
    logits = float64(EmbeddingDecode(broken)(hidden))[:, 5]
    np.testing.assert_array_equal(np.isfinite(losses), logits == -np.inf)
    assert not np.isnan(poison) or np.isnan(losses).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.slow
def test_a_float8_table_is_summed_in_float32(dtype):
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


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.slow
def test_the_gradient_of_a_float8_table_is_rounded_once(dtype):
    table = EmbeddingTable(jnp.zeros((4, 1), dtype), NAMES)
    tokens, weights = 100_000, 1 / 1024

    @jax.jit
    @jax.grad
    def gradient(table):
        layer, hidden = EmbeddingDecode(table, dtype="bfloat16"), jnp.ones((tokens, 1))
        targets = jnp.zeros(tokens, "int32")
        return layer.cross_entropy(
            hidden, targets, weights=jnp.full(tokens, weights), reduction="sum"
        )

    exact = jnp.asarray([[-0.75], [0.25], [0.25], [0.25]]) * (tokens * weights)
    np.testing.assert_array_equal(float64(gradient(table).embeddings), exact.astype(dtype))


@pytest.mark.slow
def test_a_vocabulary_of_one_token_has_no_loss():
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


def test_two_copies_of_a_table_diverge():
    table = make_table("first")
    model = {"lookup": EmbeddingLookup(table), "decode": EmbeddingDecode(table)}

    def loss(model):
        return model["decode"].cross_entropy(model["lookup"](FOUR_TOKENS), FOUR_TARGETS)

    gradient = eqx.filter_grad(loss)(model)
    hidden = lookup_reference(table, FOUR_TOKENS)
    _, for_hidden, for_decode, *_ = cross_entropy_reference(model["decode"], hidden, FOUR_TARGETS)
    for_lookup = lookup_gradient_reference(table, FOUR_TOKENS, for_hidden)
    assert_close(gradient["lookup"].table.embeddings, for_lookup)
    assert_close(gradient["decode"].table.embeddings, for_decode)
    after = eqx.apply_updates(model, gradient)
    one, other = after["lookup"].table.embeddings, after["decode"].table.embeddings
    assert np.any(np.asarray(one) != np.asarray(other)), "they part ways at the first update"


def test_a_donated_table_cannot_be_used():
    table = make_table("first")
    lookup = EmbeddingLookup(table)
    doubled = jax.jit(lambda table: jax.tree.map(lambda x: 2 * x, table), donate_argnums=0)(table)
    for use in (lambda: lookup(FOUR_TOKENS), lambda: EmbeddingDecode(table)(jnp.ones(4))):
        with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
            use()
    np.testing.assert_array_equal(
        EmbeddingLookup(doubled)(FOUR_TOKENS),
        2 * lookup_reference(make_table("first"), FOUR_TOKENS),
    )
