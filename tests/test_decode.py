"""`EmbeddingDecode`: the logits, and their gradients. The loss has test_cross_entropy.py."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .helpers import (
    assert_close,
    compile_by_default,
    cross_entropy_reference,
    decode_gradient_reference,
    decode_reference,
    float64,
    LAYOUTS,
    make_array,
    make_hidden,
    make_layer,
    make_table,
    NAMES,
    PADDING_ROWS,
    rounding,
    scores_reference,
    temporaries,
    VOCAB_SIZE,
)


OPTIONS = {
    "plain": (False, None),
    "bias": (True, None),
    "capped": (False, 2.0),
    "capped-bias": (True, 3),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_products_with_each_embedding_plus_bias_then_capped(layout, options, dtype):
    with_bias, soft_cap = OPTIONS[options]
    layer = make_layer(layout, dtype, with_bias, soft_cap)
    hidden = make_hidden(layer, (2, 3), dtype)
    logits = layer(hidden)
    assert logits.shape == (2, 3, VOCAB_SIZE)
    assert logits.dtype == dtype
    expected = decode_reference(layer.table, hidden, soft_cap)
    # The products accumulate in float32 at least, and are rounded once.
    accumulated = 30 * min(rounding(dtype), rounding("float32"))
    assert_close(logits, expected, rtol=rounding(dtype) / 2 + accumulated, atol=accumulated)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_hidden_table_and_bias_and_no_padding_row(layout, options):
    with_bias, soft_cap = OPTIONS[options]
    layer = make_layer(layout, "float32", with_bias, soft_cap)
    hidden = make_hidden(layer, (2, 3))
    cotangent = make_array((2, 3, VOCAB_SIZE), seed=3)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradients(layer_and_hidden):
        layer, hidden = layer_and_hidden
        return jnp.sum(layer(hidden) * cotangent)

    layer_gradient, hidden_gradient = gradients((layer, hidden))
    for_hidden, for_embeddings, for_bias = decode_gradient_reference(
        layer.table, hidden, cotangent, soft_cap
    )
    assert_close(hidden_gradient, for_hidden)
    assert_close(layer_gradient.table.embeddings, for_embeddings)
    assert np.count_nonzero(for_embeddings) == for_embeddings.size * VOCAB_SIZE // 9
    if with_bias:
        assert_close(layer_gradient.table.bias, for_bias)
    else:
        assert layer_gradient.table.bias is None


@pytest.mark.slow
def test_gradients_have_the_dtypes_of_their_operands(dtype):
    layer = make_layer("middle", dtype, True, 3.0)
    hidden = make_hidden(layer, (2, 3), dtype)
    cotangent = make_array((2, 3, VOCAB_SIZE), dtype, seed=3)
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    _, pullback = jax.vjp(
        lambda params, hidden: eqx.combine(params, static)(hidden), params, hidden
    )
    layer_gradient, hidden_gradient = pullback(cotangent)
    actual = (hidden_gradient, layer_gradient.table.embeddings, layer_gradient.table.bias)
    expected = decode_gradient_reference(layer.table, hidden, cotangent, 3.0)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        scale = np.abs(other).max()
        assert_close(one, other, rtol=0, atol=4 * rounding(dtype) * scale)


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 0), (1, 2, 3)], ids=str)
def test_hidden_may_have_any_batch_shape(batch):
    layer = make_layer("middle", with_bias=True)
    hidden = make_hidden(layer, batch)
    logits = layer(hidden)
    assert logits.shape == (*batch, VOCAB_SIZE)
    expected = decode_reference(layer.table, hidden)
    assert_close(logits, expected)


def test_padding_rows_have_no_logit_whatever_they_hold():
    table = make_table("first")
    poisoned = eqx.tree_at(
        lambda table: table.embeddings,
        table,
        jnp.asarray(table.embeddings).at[-PADDING_ROWS:].set(jnp.nan),
    )
    hidden = make_array((3, 4), seed=2)
    logits = EmbeddingDecode(poisoned)(hidden)
    np.testing.assert_array_equal(logits, EmbeddingDecode(table)(hidden))


# Dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_half_precision_are_summed_in_float32(dtype):
    # 0.25 added 16384 times stops at 64 in bfloat16, at 512 in float16.
    table = EmbeddingTable(jnp.full((3, 16384), 0.25, dtype), ("vocabulary", "embedding"))
    hidden = jnp.ones(16384, dtype)
    assert EmbeddingDecode(table)(hidden).tolist() == [4096, 4096, 4096]
    table = EmbeddingTable(jnp.ones((2, 4099), dtype), ("vocabulary", "embedding"))
    logits = EmbeddingDecode(table, logits_dtype=jnp.float32)(jnp.ones(4099, dtype))
    assert logits.dtype == jnp.float32
    assert logits.tolist() == [4099, 4099]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_gradient_adds_4096_vectors(dtype):
    table = EmbeddingTable(jnp.ones((2, 1), dtype), ("vocabulary", "embedding"))
    hidden = jnp.ones((4096, 1), dtype)
    gradient = eqx.filter_grad(
        lambda table: jnp.sum(EmbeddingDecode(table, logits_dtype=jnp.float32)(hidden))
    )(table)
    assert gradient.embeddings.tolist() == [[4096], [4096]]


@pytest.mark.parametrize(
    "logits_dtype", ["float16", jnp.bfloat16, np.float32, jnp.dtype("float64")]
)
def test_logits_dtype_is_the_dtype_of_the_logits(logits_dtype, dtype):
    with jax.enable_x64(True):
        table = make_table("first", dtype)
        hidden = make_array((3, 4), dtype, seed=2)
        logits = EmbeddingDecode(table, logits_dtype=logits_dtype)(hidden)
    assert logits.dtype == jnp.dtype(logits_dtype)
    computed_in = min(rounding("float32"), rounding(dtype))
    tolerance = rounding(logits_dtype) + 10 * computed_in
    expected = decode_reference(table, hidden)
    assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "hidden_dtype, table_dtype, bias_dtype, expected",
    [
        ("bfloat16", "float32", None, "float32"),
        ("float32", "bfloat16", None, "float32"),
        ("float16", "bfloat16", None, "float32"),
        ("bfloat16", "bfloat16", "float32", "float32"),
        ("float32", "float32", "bfloat16", "float32"),
        ("float32", "float32", "float64", "float64"),
        ("float64", "float16", None, "float64"),
    ],
)
def test_operands_of_several_dtypes_promote_as_in_jax(
    hidden_dtype, table_dtype, bias_dtype, expected
):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        table = make_table("middle", table_dtype)
        bias = None if bias_dtype is None else make_array((9,), bias_dtype, seed=1)
        layer = EmbeddingDecode(dataclasses.replace(table, bias=bias), 3.0)
        hidden = make_hidden(layer, (2,), hidden_dtype)
        logits = layer(hidden)
    assert logits.dtype == expected
    reference = decode_reference(layer.table, hidden, 3.0)
    assert_close(logits, reference)


def test_operands_of_several_dtypes_are_refused_under_strict_promotion():
    with pytest.raises(jax.dtypes.TypePromotionError):
        EmbeddingDecode(make_table("first"))(jnp.zeros(4, "bfloat16"))


# Mixed precision


def rounded(array, dtype) -> np.ndarray:
    return float64(np.asarray(array).astype(jnp.dtype(dtype)))


def make_mixed(dtype, table_dtype="float32", **options):
    """A layer, and one for the references, whose embeddings are rounded to `dtype`."""
    table = make_table("middle", table_dtype, with_bias=True)
    exact = dataclasses.replace(table, embeddings=rounded(table.embeddings, dtype))
    given: Any = dict(soft_cap=3.0) | options
    return EmbeddingDecode(table, dtype=dtype, **given), EmbeddingDecode(exact, **given)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_are_products_of_factors_of_the_given_dtype(dtype):
    layer, exact = make_mixed(dtype, logits_dtype=jnp.float32)
    hidden = make_hidden(layer, (2, 3))
    logits = layer(hidden)
    assert_close(logits, decode_reference(exact.table, rounded(hidden, dtype), 3.0))
    plain = dataclasses.replace(layer, dtype=None)
    assert np.abs(logits - plain(hidden)).max() > 4 * rounding("float32")


@pytest.mark.parametrize("hidden_dtype", ["float32", "bfloat16"])
def test_gradients_of_mixed_precision_are_not_rounded(hidden_dtype):
    layer, exact = make_mixed("bfloat16", logits_dtype=jnp.float32)
    hidden = make_hidden(layer, (2, 3), hidden_dtype)
    cotangent = make_array((2, 3, VOCAB_SIZE), seed=3)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(table, hidden):
        return jnp.vdot(dataclasses.replace(layer, table=table)(hidden), cotangent)

    for_table, for_hidden = gradients(layer.table, hidden)
    expected = decode_gradient_reference(
        exact.table, rounded(hidden, "bfloat16"), cotangent, soft_cap=3.0
    )
    assert (for_table.embeddings.dtype, for_hidden.dtype) == ("float32", hidden_dtype)
    tolerance = 1e-5 if hidden_dtype == "float32" else rounding("bfloat16")
    assert_close(for_hidden, expected[0], tolerance)
    assert_close(for_table.embeddings, expected[1])
    assert_close(for_table.bias, expected[2])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_mixed_precision_rounds_factors_alone(reduction):
    layer, exact = make_mixed("bfloat16")
    hidden, targets = make_hidden(layer, (2, 3)), np.arange(6).reshape(2, 3)
    cotangent = 1.0 if reduction == "mean" else np.asarray(make_array((2, 3), seed=3))
    options: Any = dict(reduction=reduction, label_smoothing=0.1, z_loss=0.01)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(table, hidden):
        layer_ = dataclasses.replace(layer, table=table)
        loss = layer_.cross_entropy(hidden, targets, **options)
        return jnp.sum(loss * cotangent), loss

    (_, loss), (for_table, for_hidden) = run(layer.table, hidden)
    expected = cross_entropy_reference(
        exact, rounded(hidden, "bfloat16"), targets, None, cotangent, **options
    )
    gradients = for_hidden, for_table.embeddings, for_table.bias
    assert {array.dtype.name for array in (loss, *gradients)} == {"float32"}
    for actual, wanted in zip((loss, *gradients), expected, strict=False):
        assert_close(actual, wanted)
    scores = layer.score(hidden, targets)
    for actual, wanted in zip(
        scores, scores_reference(exact, rounded(hidden, "bfloat16"), targets), strict=True
    ):
        assert_close(actual, wanted)


@pytest.mark.parametrize(
    "logits_dtype, dtype, expected",
    [
        (None, None, "float32"),
        (None, "bfloat16", "bfloat16"),
        (None, jnp.float16, "float16"),
        ("float16", "bfloat16", "float16"),
        (jnp.float32, "bfloat16", "float32"),
        ("bfloat16", None, "bfloat16"),
    ],
)
def test_the_dtype_of_the_logits_goes_before_that_of_factors(logits_dtype, dtype, expected):
    layer = EmbeddingDecode(make_table("first"), logits_dtype=logits_dtype, dtype=dtype)
    logits = jax.eval_shape(layer, jnp.zeros((2, 4)))
    assert logits.dtype == expected
    # losses and scores are float32 at least
    for loss in layer.cross_entropy, lambda *x: layer.score(*x).entropy:
        assert jax.eval_shape(loss, jnp.zeros((2, 4)), np.zeros(2, int)).dtype == jnp.float32


def test_operands_of_several_dtypes_need_no_promotion_to_a_given_one():
    layer = EmbeddingDecode(make_table("first", "float16"), dtype=jnp.float32)
    hidden = make_array((3, 4), "bfloat16")
    logits = layer(hidden)
    assert logits.dtype == jnp.float32
    assert_close(logits, decode_reference(layer.table, hidden))
    losses = layer.cross_entropy(hidden, np.arange(3), reduction="none")
    assert_close(losses, -scores_reference(layer, hidden, np.arange(3)).log_prob)


# The cap


def test_a_soft_cap_bounds_the_logits_and_leaves_small_ones():
    table = EmbeddingTable(jnp.asarray([[1e-3], [1.0], [-1e9]]), ("vocabulary", "embedding"))
    logits = EmbeddingDecode(table, soft_cap=30)(jnp.asarray([[1.0], [1e9]]))
    assert np.all(np.abs(logits) <= 30)
    assert logits[0, 0] == pytest.approx(1e-3)
    assert logits[1].tolist() == [30, 30, -30]


# Errors


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((3, 5), r"embedding axes \(embedding=4\) of the table, got the shape \(3, 5\)"),
        ((), r"embedding axes \(embedding=4\) of the table, got the shape \(\)"),
        ((4, 3), r"embedding axes \(embedding=4\) of the table, got the shape \(4, 3\)"),
    ],
    ids=str,
)
def test_a_hidden_vector_of_another_size_is_an_error_that_names_the_axis(shape, expected):
    with pytest.raises(ValueError, match=expected):
        EmbeddingDecode(make_table("first"))(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(5, 3, 2), (5, 6), (3,), (2, 3, 5)], ids=str)
def test_a_missing_or_misplaced_embedding_axis_is_an_error_that_names_them_all(shape):
    message = rf"\(heads=2, features=3\) of the table, got the shape \({shape[0]}, ?"
    with pytest.raises(ValueError, match=message):
        EmbeddingDecode(make_table("middle"))(jnp.zeros(shape))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"soft_cap": 0}, "soft_cap must be at least 1e-30 and at most 1e.30, got 0"),
        ({"soft_cap": -30.0}, "soft_cap must be at least 1e-30 and at most 1e.30, got -30"),
        ({"soft_cap": float("inf")}, "soft_cap must be at least 1e-30 and at most 1e.30, got inf"),
        ({"soft_cap": float("nan")}, "soft_cap must be at least 1e-30 and at most 1e.30, got nan"),
        ({"logits_dtype": jnp.int32}, "logits must be floating, got logits_dtype=int32"),
        ({"logits_dtype": "complex64"}, "logits must be floating, got logits_dtype=complex64"),
        ({"dtype": jnp.int8}, "factors must be floating, got dtype=int8"),
        (
            {"dtype": "bloat16"},
            "factors must be floating, got dtype='bloat16', which is not a dtype",
        ),
    ],
)
def test_an_option_that_makes_no_logits_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingDecode(make_table("first"), **options)


# Transformations


def test_the_embeddings_and_the_bias_are_all_that_transformations_see():
    layer = EmbeddingDecode(make_table("first", with_bias=True), 3.0, "float32")
    embeddings, bias = jax.tree.leaves(layer)
    assert embeddings is layer.table.embeddings and bias is layer.table.bias


def test_a_key_is_accepted_and_ignored(getkey):
    layer = make_layer("first")
    hidden = make_hidden(layer, (3,))
    np.testing.assert_array_equal(layer(hidden=hidden, key=getkey()), layer(hidden))
    with pytest.raises(TypeError, match="positional"):
        layer(hidden, None)  # pyright: ignore[reportCallIssue]


def test_forward_mode_agrees_with_reverse_mode():
    layer = make_layer("middle", with_bias=True, soft_cap=3.0)
    hidden = make_hidden(layer, (3,))
    params, static = eqx.partition((layer, hidden), eqx.is_inexact_array)
    directions = jax.tree.map(lambda leaf: make_array(leaf.shape, seed=4), params)
    cotangent = make_array((3, VOCAB_SIZE), seed=5)

    def logits(params):
        layer, hidden = eqx.combine(params, static)
        return layer(hidden)

    value, tangent = jax.jvp(logits, (params,), (directions,))
    expected = decode_reference(layer.table, hidden, 3.0)
    assert_close(value, expected)
    hidden_gradient, table_gradient, bias_gradient = decode_gradient_reference(
        layer.table, hidden, cotangent, 3.0
    )
    layer_direction, hidden_direction = directions
    reverse = (
        np.sum(hidden_gradient * float64(hidden_direction))
        + np.sum(table_gradient * float64(layer_direction.table.embeddings))
        + np.sum(bias_gradient * float64(layer_direction.table.bias))
    )
    forward = np.sum(float64(tangent) * float64(cotangent))
    assert forward == pytest.approx(reverse, rel=1e-5)


@pytest.mark.parametrize("argument", ["hidden", "array"])
def test_a_derivative_in_one_argument_multiplies_by_no_zeros(argument):
    """XLA for CPUs of JAX 0.12 sums the product with an array of zeros to any number."""
    arguments = {"hidden": make_array((5, 4), "bfloat16"), "array": make_array((7, 4), "bfloat16")}

    def slope(x):
        def logits(x):
            given = arguments | {argument: x}
            return EmbeddingDecode(EmbeddingTable(given["array"], NAMES))(given["hidden"])

        return jax.jvp(logits, (x,), (x,))

    # The logits, and how they change: by themselves, since they are linear in each argument.
    assert str(jax.make_jaxpr(slope)(arguments[argument])).count("dot_general[") == 2
    assert_close(*slope(arguments[argument]), rtol=0.01)


def test_vmap_over_layers_and_over_hidden_vectors_is_a_loop():
    names = ("embedding", "vocabulary")
    arrays, biases = make_array((3, 4, 9)), make_array((3, 9), seed=1)

    @eqx.filter_vmap
    def stack(array, bias):
        return EmbeddingDecode(EmbeddingTable(array, names, padding_rows=2, bias=bias), 3.0)

    layers = stack(arrays, biases)
    hidden = make_array((3, 5, 4), seed=2)
    logits = eqx.filter_vmap(lambda layer, hidden: layer(hidden))(layers, hidden)
    for i in range(3):
        layer = jax.tree.map(lambda leaf: leaf[i], layers)
        expected = decode_reference(layer.table, hidden[i], 3.0)
        assert_close(logits[i], expected)
        one_by_one = jax.vmap(layer)(hidden[i])
        assert_close(one_by_one, expected)


@pytest.mark.parametrize("batch", [(), (1,), (30,)], ids=str)
def test_not_even_a_nan_in_a_padding_row_reaches_logits_or_gradients(batch):
    rows = make_array((9, 4))
    poisoned = rows.at[-2:].set(jnp.nan)
    bias = jnp.ones(9).at[-2:].set(jnp.nan)
    table = EmbeddingTable(poisoned, ("vocabulary", "d"), padding_rows=2, bias=bias)
    hidden = make_array((*batch, 4), seed=1)

    def total(hidden, table):
        return jnp.sum(EmbeddingDecode(table)(hidden))

    value, (gradient, table_gradient) = jax.value_and_grad(total, (0, 1))(hidden, table)
    expected = float64(rows[:-2]).sum(axis=0)
    tokens = np.prod(batch)
    assert_close(value, (float64(hidden) @ expected).sum() + 7 * tokens)
    assert_close(gradient, np.broadcast_to(expected, hidden.shape))
    assert_close(table_gradient.bias, [tokens] * 7 + [0, 0])
    assert not np.any(table_gradient.embeddings[-2:])


# Memory


def as_stored(names, rows, size):
    return (rows, size) if names[0] == "vocabulary" else (size, rows)


def decode_temporaries(decode, dtype, *shapes):
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return temporaries(compile_by_default(jax.jit(decode).lower(*arrays)))


ORDERS = [("vocabulary", "d"), ("d", "vocabulary")]


@pytest.mark.parametrize("names", ORDERS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.slow
def test_decoding_one_token_with_padding_copies_no_table(dtype, batch, with_bias, names):
    rows, size = 4096, 256

    def decode(embeddings, bias, hidden):
        bias = bias if with_bias else None
        table = EmbeddingTable(embeddings, names, padding_rows=60, bias=bias)
        return EmbeddingDecode(table)(hidden)

    held = decode_temporaries(decode, dtype, as_stored(names, rows, size), (rows,), (*batch, size))
    # a few times the logits, where the table is 256 times as large
    assert held < 4 * rows * 4


@pytest.mark.parametrize("names", ORDERS, ids=str)
@pytest.mark.parametrize(
    "map_tokens, tokens",
    [(lambda decode: decode, 8), (jax.vmap, 8), (jax.vmap, 1)],
    ids=["batch", "vmap", "vmap-of-one"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_several_tokens_copies_no_table(dtype, map_tokens, tokens, names):
    rows, size = 4096, 256

    def decode(embeddings, hidden):
        return map_tokens(EmbeddingDecode(EmbeddingTable(embeddings, names)))(hidden)

    held = decode_temporaries(decode, dtype, as_stored(names, rows, size), (tokens, size))
    assert held < 4 * tokens * rows * 2


@pytest.mark.parametrize("names", ORDERS, ids=str)
@pytest.mark.slow
def test_one_token_decodes_alike_in_half_precision(names):
    """With all that JAX can do to a product of one vector, which has a form of its own."""
    array = make_array((7, 4)).astype("bfloat16")
    embeddings = array if names[0] == "vocabulary" else array.T
    hidden = make_array((3, 4), seed=1).astype("bfloat16")

    def decode(hidden, embeddings):
        table = EmbeddingTable(embeddings, names, padding_rows=1)
        return EmbeddingDecode(table, logits_dtype=jnp.float32)(hidden)

    def total(hidden, embeddings):
        return jnp.sum(jnp.sin(decode(hidden, embeddings)))

    def total_of_each(hidden, embeddings):
        return jnp.sum(jax.vmap(lambda x: total(x, embeddings))(hidden))

    expected = float64(hidden) @ float64(array)[:-1].T
    for i in range(3):
        assert_close(decode(hidden[i], embeddings), expected[i], rtol=1e-5)
    assert_close(jax.vmap(decode, (0, None))(hidden, embeddings), expected, rtol=1e-5)
    tables = jnp.stack([embeddings] * 3)
    assert_close(jax.vmap(decode)(hidden, tables), expected, rtol=1e-5)
    gradients = [jax.grad(f, (0, 1))(hidden, embeddings) for f in (total, total_of_each)]
    for one, each in zip(*gradients, strict=True):
        assert_close(one, each)

    def second(f):
        return jax.grad(lambda h: jnp.sum(jnp.cos(jax.grad(f)(h, embeddings))))(hidden)

    assert_close(second(total_of_each), second(total))
