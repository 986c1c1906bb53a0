"""Whatever is drawn, all that this library computes is what numpy computes in float64.

`python -m pytest tests/test_properties.py --hypothesis-profile=full` draws 230 examples for each
test. Values vary freely, shapes and options little, for each of them is compiled.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from eqx_embedding import (
    combine_rows,
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    load_safetensors,
    partition_rows,
    resize_vocabulary,
    save_safetensors,
)

from .helpers import (
    assert_close,
    cross_entropy_reference,
    decode_gradient_reference,
    decode_reference,
    float64,
    LAYOUTS,
    lookup_gradient_reference,
    lookup_reference,
    PADDING_ROWS,
    rounding,
    rows_first,
    VOCAB_SIZE,
)


DTYPES = ["float16", "bfloat16", "float32", "float64"]
NARROW = ["int8", "uint8", "int16", "int32", "uint32"]
INTEGERS = {"float64": [*NARROW, "int64", "uint64"]}  # 64 bits on a device only in 64-bit mode

# How the first axes of a batch of shape (2, 3) are gone through; the outermost comes first.
WRAPS = {
    "whole": (),
    "checkpoint": ("checkpoint",),
    "vmap": ("vmap",),
    "scan": ("scan",),
    "vmap of vmap": ("vmap", "vmap"),
    "checkpoint of scan of vmap": ("checkpoint", "scan", "vmap"),
    "vmap of checkpoint of scan": ("vmap", "checkpoint", "scan"),
}
BATCH = (2, 3)


def wrapped(steps, function):
    """`function(layer, *arrays)`, under the steps of one of the `WRAPS`."""
    if not steps:
        return function
    first, inner = steps[0], wrapped(steps[1:], function)
    if first == "checkpoint":
        return jax.checkpoint(inner)

    def through(layer, *arrays):
        if first == "vmap":
            return jax.vmap(lambda arrays: inner(layer, *arrays))(arrays)
        return jax.lax.scan(lambda carry, arrays: (carry, inner(layer, *arrays)), None, arrays)[1]

    return through


def outer_axes(steps):
    """How many axes of the batch the steps take away."""
    return sum(step != "checkpoint" for step in steps)


def mode(dtype):
    """The context in which JAX has this dtype."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def floats(draw, shape, dtype, bound=2):
    """An array of this dtype, as numpy has it."""
    elements = st.floats(-bound, bound, width=16)
    return draw(hnp.arrays(np.float64, shape, elements=elements)).astype(jnp.dtype(dtype))


@st.composite
def tables(draw, layouts=tuple(LAYOUTS)):
    """A dtype, a layout and the numbers of a table: no strategy runs JAX."""
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(layouts))
    return dtype, LAYOUTS[layout], floats(draw, tuple(LAYOUTS[layout].values()), dtype)


def made(drawn):
    dtype, axes, array = drawn
    with mode(dtype):
        return dtype, EmbeddingTable(jnp.asarray(array), tuple(axes), padding_rows=PADDING_ROWS)


def assert_rounded(actual, expected, dtype, slack=2e3, more=0.0, roundings=1):
    """Equal to the reference, computed in float32 at least, and rounded to `dtype` once."""
    assert actual.dtype == dtype
    computed = slack * min(rounding(dtype), rounding("float32"))
    # a number too small for float16 is rounded to a multiple of its smallest
    more += computed + float(jnp.finfo(dtype).smallest_subnormal)
    assert_close(actual, expected, rtol=0.501 * roundings * rounding(dtype) + computed, atol=more)


# Lookup


@functools.cache
def lookup_and_gradient(wrap, out_of_range):
    def lookup(table, tokens):
        return EmbeddingLookup(table, out_of_range)(tokens)

    @jax.jit
    def run(table, tokens, cotangent):
        function = wrapped(WRAPS[wrap], lookup)
        vectors, pullback = jax.vjp(lambda table: function(table, tokens), table)
        return vectors, pullback(cotangent)[0].embeddings

    return run


@given(tables(), st.sampled_from(list(WRAPS)), st.sampled_from(["nan", "raise", "clip"]), st.data())
@pytest.mark.slow
def test_a_lookup_and_its_gradient_are_those_of_numpy(drawn, wrap, out_of_range, data):
    dtype, table = made(drawn)
    integer = data.draw(st.sampled_from(INTEGERS.get(dtype, NARROW)))
    ends = np.iinfo(integer)
    ids = st.integers(max(ends.min, -3), 12) | st.sampled_from([ends.min, ends.max])
    tokens = data.draw(hnp.arrays(integer, BATCH, elements=ids))
    cotangent = floats(data.draw, BATCH + tuple(table.embedding_axes.values()), dtype)
    run = lookup_and_gradient(wrap, out_of_range)
    with mode(dtype):
        if out_of_range == "raise" and np.any((tokens < 0) | (tokens >= VOCAB_SIZE)):
            with pytest.raises(Exception, match="a token is out of range"):
                jax.block_until_ready(run(table, jnp.asarray(tokens), jnp.asarray(cotangent)))
            return
        vectors, gradient = run(table, jnp.asarray(tokens), jnp.asarray(cotangent))
    clip = out_of_range == "clip"
    np.testing.assert_array_equal(float64(vectors), lookup_reference(table, tokens, clip))
    expected = lookup_gradient_reference(table, tokens, cotangent, clip)
    # JAX adds the gradients of the parts of a scan in the dtype of the table, and rounds each time.
    steps = WRAPS[wrap]
    parts = int(np.prod(BATCH[: outer_axes(steps)])) if "scan" in steps else 0
    total = np.max(lookup_gradient_reference(table, tokens, np.abs(cotangent), clip))
    assert_rounded(gradient, expected, dtype, slack=20, more=parts * rounding(dtype) * total)


HOST_IDS = (
    st.integers(-3, 12)
    | st.integers(-(2**63), 2**63 - 1)
    | st.sampled_from([2**32, 2**32 + 3, -(2**32) + 3, 2**31])
)


@pytest.mark.slow
@given(
    tables(["first", "middle"]),
    hnp.arrays(np.int64, hnp.array_shapes(min_dims=0, max_dims=2, max_side=2), elements=HOST_IDS),
    st.booleans(),
)
def test_ids_of_the_host_are_looked_up_as_numbers_without_a_size(drawn, ids, unsigned):
    dtype, table = made(drawn)
    tokens = ids.astype(np.uint64) if unsigned else ids
    with mode(dtype):
        for out_of_range in ("nan", "clip"):
            vectors = EmbeddingLookup(table, out_of_range)(tokens)
            expected = lookup_reference(table, tokens, clip=out_of_range == "clip")
            np.testing.assert_array_equal(float64(vectors), expected)


# Decode


@functools.cache
def decode_and_gradients(wrap):
    @jax.jit
    def run(layer, hidden, cotangent):
        def function(layer, hidden):
            return wrapped(WRAPS[wrap], lambda layer, hidden: layer(hidden))(layer, hidden)

        arrays, static = eqx.partition(layer, eqx.is_array)
        logits, pullback = jax.vjp(lambda a, h: function(eqx.combine(a, static), h), arrays, hidden)
        for_layer, for_hidden = pullback(cotangent)
        return logits, for_hidden, for_layer.table.embeddings, for_layer.table.bias

    return run


def draw_bias(draw, dtype, table, bans=False):
    """The table, sometimes with a bias, which sometimes bans the last token."""
    if not draw(st.booleans()):
        return table
    bias = floats(draw, (VOCAB_SIZE + PADDING_ROWS,), dtype)
    bias[VOCAB_SIZE:] = np.nan
    if bans and draw(st.booleans()):
        bias[VOCAB_SIZE - 1] = -np.inf
    return dataclasses.replace(table, bias=jnp.asarray(bias))


@given(tables(), st.sampled_from(list(WRAPS)), st.sampled_from([None, 2.0]), st.data())
@pytest.mark.slow
def test_logits_and_their_gradients_are_those_of_numpy(drawn, wrap, soft_cap, data):
    dtype, table = made(drawn)
    with mode(dtype):
        table = draw_bias(data.draw, dtype, table)
        layer = EmbeddingDecode(table, soft_cap)
        hidden = floats(data.draw, BATCH + tuple(table.embedding_axes.values()), dtype)
        cotangent = floats(data.draw, BATCH + (VOCAB_SIZE,), dtype)
        logits, *gradients = decode_and_gradients(wrap)(
            layer, jnp.asarray(hidden), jnp.asarray(cotangent)
        )
    assert_rounded(logits, decode_reference(table, hidden, soft_cap), dtype, slack=50)
    expected = decode_gradient_reference(table, hidden, cotangent, soft_cap)
    for actual, wanted in zip(gradients, expected, strict=True):
        if actual is not None:
            # the gradients' products have factors in the dtype of the logits, each rounded
            tolerance = 60 * min(rounding(dtype), rounding("float32") * 4) + 2 * rounding(dtype)
            scale = 1 + np.abs(wanted).max(initial=0)
            assert actual.dtype == dtype
            assert_close(actual, wanted, rtol=0, atol=tolerance * scale)


# The loss


# label smoothing, z-loss, soft cap, chunk size: each value of one beside each of another
LOSSES = [
    (0.0, 0.0, None, None),
    (0.0, 0.0, 2.0, 1),
    (0.0, 0.01, None, 4),
    (0.0, 0.01, 2.0, 100),
    (0.1, 0.0, None, 100),
    (0.1, 0.0, 2.0, None),
    (0.1, 0.01, None, 1),
    (0.1, 0.01, 2.0, 4),
]


@functools.cache
def loss_and_gradients(wrap, smoothing, z_loss, chunk_size, reduction):
    def loss(layer, hidden, targets, weights):
        return layer.cross_entropy(
            hidden,
            targets,
            weights=weights,
            label_smoothing=smoothing,
            z_loss=z_loss,
            chunk_size=chunk_size,
            reduction=reduction,
        )

    @jax.jit
    def run(layer, hidden, targets, weights, cotangent):
        arrays, static = eqx.partition(layer, eqx.is_array)

        def function(arrays, hidden, weights):
            layer = eqx.combine(arrays, static)
            return wrapped(WRAPS[wrap], loss)(layer, hidden, targets, weights)

        value, pullback = jax.vjp(function, arrays, hidden, weights)
        for_layer, for_hidden, for_weights = pullback(cotangent)
        return value, for_hidden, for_layer.table.embeddings, for_layer.table.bias, for_weights

    return run


def loss_reference(layer, hidden, targets, weights, cotangent, axes, options):
    """The reference, for each of the outer axes of the batch by itself."""
    results: list[Any] = [
        cross_entropy_reference(
            layer, hidden[i], targets[i], weights[i], float64(cotangent)[i], **options
        )
        for i in np.ndindex(BATCH[:axes])
    ]
    value, for_hidden, for_embeddings, for_bias, for_weights = zip(*results, strict=True)
    return (
        np.reshape(value, BATCH[:axes] + np.shape(value[0])),
        np.reshape(for_hidden, hidden.shape),
        sum(for_embeddings),
        sum(for_bias),
        np.reshape(for_weights, BATCH),
        max(np.abs(gradients).sum(0).max() for gradients in (for_embeddings, for_bias)),
    )


@given(
    tables(),
    st.sampled_from(list(WRAPS)),
    st.sampled_from(LOSSES),
    st.sampled_from(["mean", "sum", "none"]),
    st.data(),
)
@pytest.mark.slow
def test_the_loss_and_its_gradients_are_those_of_numpy(drawn, wrap, options, reduction, data):
    dtype, table = made(drawn)
    smoothing, z_loss, soft_cap, chunk_size = options
    wide = "float64" if dtype == "float64" else "float32"
    steps = WRAPS[wrap]
    axes = outer_axes(steps)
    with mode(dtype):
        table = draw_bias(data.draw, dtype, table, bans=smoothing == 0 and soft_cap is None)
        layer = EmbeddingDecode(table, soft_cap)
        banned = table.bias is not None and bool(np.isinf(table.bias[VOCAB_SIZE - 1]))
        hidden = floats(data.draw, BATCH + tuple(table.embedding_axes.values()), dtype)
        ids = st.integers(0, VOCAB_SIZE - 1 - banned)
        targets = data.draw(hnp.arrays(np.int32, BATCH, elements=ids))
        weight = st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])
        weights = data.draw(hnp.arrays(wide, BATCH, elements=weight))
        if reduction == "mean":
            weights = weights * np.asarray(data.draw(st.sampled_from([1, 1e-30, 1e30])), wide)
        cotangent = floats(data.draw, BATCH[:axes], wide)
        if reduction == "none":
            cotangent = floats(data.draw, BATCH, wide)
        given_targets = np.where(weights == 0, -100, targets)
        given_hidden = hidden.copy()
        given_hidden[weights == 0] = np.nan
        value, *gradients = loss_and_gradients(wrap, smoothing, z_loss, chunk_size, reduction)(
            layer, *map(jnp.asarray, (given_hidden, given_targets, weights, cotangent))
        )
    settings = dict(label_smoothing=smoothing, z_loss=z_loss, reduction=reduction)
    expected, *wanted, total = loss_reference(
        layer, hidden, targets, weights, cotangent, axes, settings
    )
    assert_rounded(value, expected, wide, slack=200)
    assert_rounded(gradients[0], wanted[0], dtype)
    # JAX rounds the gradient of each part of a batch to the dtype of the operand, adds it in scan
    # to those before, and rounds again.
    parts = int(np.prod(BATCH[:axes])) if axes else 0
    more = parts * rounding(dtype) * total
    if gradients[2] is not None:
        assert_rounded(gradients[2], wanted[2], dtype, more=more)
    outer = float64(weights).reshape(BATCH[:axes] + (-1,)).sum(-1)
    roundings = 1
    if dtype == "bfloat16":
        # the gradients of logits may be rounded, as factors of a product
        size = np.sum(outer > 0) if reduction == "mean" else np.sum(outer)
        size = size * np.abs(float64(cotangent)).max() * np.abs(float64(hidden)).max()
        more += rounding(dtype) * size
        # that of a single chunk is rounded before it is multiplied by the cotangent, too
        roundings = 1 if reduction == "none" else 2
    assert_rounded(gradients[1], wanted[1], dtype, more=more, roundings=roundings)
    # that of weights is `(losses - mean) / total`: small weights enlarge what rounds the losses
    enlarged = 1.0
    if reduction == "mean":
        enlarged = np.where(outer == 0, 1, outer).reshape(BATCH[:axes] + (1,) * (2 - axes))
    assert gradients[3].dtype == wide
    assert_close(
        float64(gradients[3]) * enlarged, wanted[3] * enlarged, rtol=2e-4, atol=2e3 * rounding(wide)
    )


@pytest.mark.slow
@given(
    tables(["first", "last"]),
    hnp.arrays(np.int64, 6, elements=HOST_IDS),
    hnp.arrays(np.int32, 6, elements=st.integers(0, 1)),
)
def test_only_a_target_out_of_range_at_a_weight_other_than_zero_is_nan(drawn, targets, weights):
    dtype, table = made(drawn)
    with mode(dtype):
        hidden = jnp.ones((6, *table.embedding_axes.values()), dtype)
        layer = EmbeddingDecode(table)
        losses = layer.cross_entropy(hidden, targets, weights=weights, reduction="none")
        mean = layer.cross_entropy(hidden, targets, weights=weights)
    bad = ((targets < 0) | (targets >= VOCAB_SIZE)) & (weights != 0)
    np.testing.assert_array_equal(np.isnan(losses), bad)
    assert np.isnan(mean) == bad.any()
    np.testing.assert_array_equal(np.asarray(losses)[weights == 0], 0)


# A tied model


@functools.cache
def tied(wrap):
    def loss(table, tokens, targets):
        hidden = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(hidden, targets, reduction="none")

    @jax.jit
    def run(table, tokens, targets):
        def total(table):
            return jnp.sum(wrapped(WRAPS[wrap], loss)(table, tokens, targets))

        return jax.value_and_grad(total)(table)

    return run


@pytest.mark.slow
@given(
    tables(),
    st.sampled_from(list(WRAPS)),
    *[hnp.arrays(np.int32, BATCH, elements=st.integers(0, VOCAB_SIZE - 1))] * 2,
)
def test_the_gradient_of_a_tied_table_is_the_sum_of_both_uses(drawn, wrap, tokens, targets):
    dtype, table = made(drawn)
    with mode(dtype):
        value, gradient = tied(wrap)(table, jnp.asarray(tokens), jnp.asarray(targets))
    hidden = lookup_reference(table, tokens)
    expected, for_hidden, for_decode, *_ = cross_entropy_reference(
        EmbeddingDecode(table), hidden, targets, reduction="sum"
    )
    for_lookup = lookup_gradient_reference(table, tokens, for_hidden)
    assert_close(value, expected, rtol=1e-5, atol=1e-4)
    # each use is rounded to the dtype, what the lookup hands on as well
    scale = 1 + np.abs(for_hidden).max() * for_hidden.size + np.abs(for_decode).max()
    tolerance = 2 * rounding(dtype) + 100 * min(rounding(dtype), rounding("float32"))
    assert_close(gradient.embeddings, for_lookup + for_decode, rtol=0, atol=tolerance * scale)
    padding = np.moveaxis(float64(gradient.embeddings), table.axis_names.index("vocabulary"), 0)
    np.testing.assert_array_equal(padding[VOCAB_SIZE:], 0)


# Vocabularies and rows


@pytest.mark.slow
@given(
    tables(),
    st.lists(st.tuples(st.sampled_from([1, 3, 7, 8, 12]), st.sampled_from([1, 4])), max_size=3),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)
def test_resizing_again_and_again_keeps_what_was_never_cut(drawn, steps, seed, with_bias):
    dtype, table = made(drawn)
    with mode(dtype):
        rows = rows_first(table)
        if with_bias:
            bias = jnp.arange(1, VOCAB_SIZE + PADDING_ROWS + 1, dtype=dtype)
            table = dataclasses.replace(table, bias=bias)
        tree = {"decode": EmbeddingDecode(table), "other": jnp.ones(3)}
        key = None if seed is None else jax.random.key(seed)
        kept, size = VOCAB_SIZE, VOCAB_SIZE
        for size, multiple in steps:
            tree = resize_vocabulary(tree, size, key=key, pad_to_multiple_of=multiple)
            kept = min(kept, size)
            assert tree["decode"].table.padding_rows == -size % multiple
    new = tree["decode"].table
    assert new.vocab_size == size and new.embeddings.dtype == dtype
    np.testing.assert_array_equal(rows_first(new)[:kept], rows[:kept])
    if steps:
        axis = new.axis_names.index("vocabulary")
        np.testing.assert_array_equal(np.moveaxis(float64(new.embeddings), axis, 0)[size:], 0)
        if key is None:
            np.testing.assert_array_equal(rows_first(new)[kept:], 0)
    assert np.isfinite(float64(new.embeddings)).all()
    if with_bias:
        assert new.bias.shape == (size + new.padding_rows,) and new.bias.dtype == dtype
        np.testing.assert_array_equal(float64(new.bias)[:kept], np.arange(1, kept + 1))
        if steps:
            np.testing.assert_array_equal(float64(new.bias)[size:], 0)
            if key is None:
                np.testing.assert_array_equal(float64(new.bias)[kept:], 0)
        assert np.isfinite(float64(new.bias)).all()
    np.testing.assert_array_equal(tree["other"], 1)


@functools.cache
def gradient_of_rows():
    def total(trained, frozen, tokens, cotangent):
        vectors = EmbeddingLookup(combine_rows(trained, frozen))(tokens)
        return jnp.sum(vectors * cotangent)

    return eqx.filter_jit(eqx.filter_value_and_grad(total))


@pytest.mark.slow
@given(
    tables(),
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=3, max_size=3, unique=True),
    hnp.arrays(np.int32, BATCH, elements=st.integers(0, VOCAB_SIZE - 1)),
    st.data(),
)
def test_rows_alone_are_changed_and_have_the_gradient_of_the_whole(drawn, rows, tokens, data):
    dtype, table = made(drawn)
    axis = table.axis_names.index("vocabulary")
    cotangent = floats(data.draw, BATCH + tuple(table.embedding_axes.values()), dtype)
    with mode(dtype):
        trained, frozen = partition_rows(table, rows)
        assert eqx.tree_equal(combine_rows(trained, frozen), table)
        changed = combine_rows(jax.tree.map(lambda x: x * 0 + 1, trained), frozen)
        _, gradient = gradient_of_rows()(
            trained, frozen, jnp.asarray(tokens), jnp.asarray(cotangent)
        )
    expected = np.array(table.embeddings)
    expected[(slice(None),) * axis + (rows,)] = 1
    np.testing.assert_array_equal(changed.embeddings, expected)
    whole = lookup_gradient_reference(table, tokens, cotangent)
    assert_rounded(gradient.embeddings, np.take(whole, rows, axis), dtype, slack=20)


# Files


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@given(
    st.sampled_from(DTYPES),
    st.lists(st.tuples(NAMES, st.integers(1, 3)), min_size=1, max_size=3, unique_by=lambda t: t[0]),
    NAMES.filter(lambda name: name != "__metadata__"),
    st.data(),
)
@pytest.mark.slow
def test_any_table_comes_back_from_a_file_bit_for_bit(tmp_path_factory, dtype, axes, name, data):
    path = tmp_path_factory.mktemp("files") / "table.safetensors"
    names, shape = tuple(name for name, _ in axes), tuple(size for _, size in axes)
    vocabulary = data.draw(st.sampled_from(range(len(axes))))
    padding_rows = data.draw(st.integers(0, shape[vocabulary] - 1))
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    bits = data.draw(st.binary(min_size=size, max_size=size))
    array = np.frombuffer(bits, jnp.dtype(dtype)).reshape(shape)
    bias_bits = data.draw(st.none() | st.binary(min_size=8 * 3, max_size=8 * 3))
    with mode(dtype):
        bias = None
        if bias_bits is not None:
            bias = jnp.asarray(np.frombuffer(bias_bits, jnp.dtype(dtype))[: shape[vocabulary]])
        table = EmbeddingTable(jnp.asarray(array), names, names[vocabulary], padding_rows, bias)
        save_safetensors(table, path, name)
        back = load_safetensors(path)
        again = load_safetensors(path, name, axis_names=names)
    assert np.asarray(back.embeddings).tobytes() == np.asarray(table.embeddings).tobytes()
    for loaded in (back, again):
        assert loaded.embeddings.shape == shape and loaded.embeddings.dtype == dtype
        assert loaded.axis_names == names and loaded.vocabulary_axis == names[vocabulary]
        assert loaded.padding_rows == padding_rows
        assert (loaded.bias is None) == (bias is None)
        assert bias is None or np.asarray(loaded.bias).tobytes() == np.asarray(bias).tobytes()
