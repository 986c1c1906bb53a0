"""What callers may pass: host arrays, 64-bit ids, weights of any dtype, numbers of NumPy."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_embedding import (
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    partition_rows,
    put_rows,
    resize_vocabulary,
    save_safetensors,
    take_rows,
    unique_tokens,
)

from .helpers import (
    assert_close,
    cross_entropy_reference,
    FOUR_TARGETS,
    FOUR_WEIGHTS,
    lookup_reference,
    make_array,
    make_table,
    NAMES,
)


ONES = np.ones(4, int)


@pytest.mark.parametrize(
    "weights", [np.asarray([2**40, 0, 0, 0]), np.asarray([2**63, 0, 0, 0], np.uint64)], ids=str
)
def test_integer_weights_above_2_31_count_in_full(weights):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    mean = layer.cross_entropy(hidden, FOUR_TARGETS, weights=weights)
    expected, *_ = cross_entropy_reference(layer, hidden, FOUR_TARGETS, weights)
    assert_close(mean, expected)
    assert mean > 0


def test_weights_from_the_64_bit_mode_are_not_narrowed():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    for weights in np.asarray([2**32, 1, 1, 1]), np.asarray([1e-300, 1, 1, 1]):
        with jax.enable_x64(True):
            given = jnp.asarray(weights)
        for reduction in ("sum", "mean"):
            expected, *_ = cross_entropy_reference(
                layer, hidden, FOUR_TARGETS, weights, reduction=reduction
            )
            loss = layer.cross_entropy(hidden, FOUR_TARGETS, weights=given, reduction=reduction)
            assert_close(loss, expected)
        broken = np.where(np.arange(4) == 0, -5, FOUR_TARGETS)
        assert np.isnan(layer.cross_entropy(hidden, broken, weights=given))
        with pytest.raises(TypeError, match="weights of (int|float)64 are traced outside"):
            jax.jit(lambda w: layer.cross_entropy(hidden, FOUR_TARGETS, weights=w))(given)


@pytest.mark.parametrize("scale", [1e39, 1e-50])
@pytest.mark.parametrize("ignore_index", [None, int(FOUR_TARGETS[1])])
def test_float64_weights_are_scaled_before_they_are_narrowed(scale, ignore_index):
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    weights = np.asarray([1.0, 2.0, 0.5, 0.0])
    counts = np.asarray(FOUR_TARGETS) != ignore_index
    expected, *_ = cross_entropy_reference(layer, hidden, FOUR_TARGETS, weights * counts)
    with jax.enable_x64(True):
        loss = layer.cross_entropy(
            hidden, FOUR_TARGETS, weights=jnp.asarray(weights * scale), ignore_index=ignore_index
        )
    assert_close(loss, expected)


def test_complex_weights_are_refused():
    layer = EmbeddingDecode(make_table("first"))
    with pytest.raises(TypeError, match="weights must be bool, integer or floating, got complex64"):
        layer.cross_entropy(jnp.ones(4), 1, weights=np.complex64(1j))


def test_ids_from_the_64_bit_mode_are_not_narrowed():
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


def test_the_error_for_float_targets_names_them():
    layer = EmbeddingDecode(make_table("first"))
    with pytest.raises(TypeError, match="targets must be integers, got float32"):
        layer.cross_entropy(jnp.ones(4), np.float32(1))


def test_masked_arrays_are_refused():
    masked: np.ndarray = np.ma.masked_equal([1, 2, 3, 4], 2)
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    layer = EmbeddingDecode(table)
    for name, call in {
        "tokens": lambda: EmbeddingLookup(table)(masked),
        "targets": lambda: layer.cross_entropy(hidden, masked),
        "weights": lambda: layer.cross_entropy(hidden, FOUR_TARGETS, weights=masked),
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
def test_tokens_may_have_any_memory_layout(tokens):
    table, layer = make_table("first"), EmbeddingDecode(make_table("first"))
    tokens = np.minimum(tokens, 6, out=tokens.copy() if not tokens.flags.writeable else tokens)
    np.testing.assert_array_equal(EmbeddingLookup(table)(tokens), lookup_reference(table, tokens))
    hidden = make_array((*tokens.shape, 4), seed=1)
    expected, *_ = cross_entropy_reference(layer, hidden, tokens)
    assert_close(layer.cross_entropy(hidden, tokens), expected)


def big_endian(array) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder(">"))


@pytest.mark.slow
def test_big_endian_arguments_are_converted():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    shares = np.asarray([[0.25], [1.0], [0.5], [2.0]], np.float32)

    def results(convert):
        vectors, weights, soft = map(convert, (hidden, FOUR_WEIGHTS, shares))
        return (
            layer(vectors),
            layer.cross_entropy(vectors, convert(FOUR_TARGETS), weights=weights),
            layer.cross_entropy(vectors, FOUR_TARGETS[:, None], target_weights=soft),
            layer.token_loss(lambda s, w: s.entropy * w, vectors, FOUR_TARGETS, weights),
            layer.divergence(hidden, layer, convert(np.flip(hidden))),
            layer.sample(vectors, temperature=weights, key=jax.random.key(0)),
        )

    assert eqx.tree_equal(results(big_endian), results(np.asarray))


@pytest.mark.parametrize("field", ["embeddings", "bias"])
def test_a_big_endian_table_says_how_to_convert_it(field, tmp_path):
    good = make_table("first", with_bias=True)
    wrong = eqx.tree_at(lambda table: getattr(table, field), good, replace_fn=big_endian)
    tokens, layer, hidden = np.arange(3), EmbeddingDecode(wrong), make_array((4, 4), seed=1)
    for call in (
        lambda: dataclasses.replace(wrong),
        lambda: EmbeddingLookup(wrong)(tokens),
        lambda: layer(hidden),
        lambda: layer.cross_entropy(hidden, FOUR_TARGETS),
        lambda: EmbeddingDecode(good).divergence(hidden, layer, hidden),
        lambda: resize_vocabulary(wrong, 9, pad_to_multiple_of=1),
        lambda: resize_vocabulary(good, 7, fresh=wrong),
        lambda: resize_vocabulary(wrong, 7, fresh=good),
        lambda: partition_rows(wrong, tokens),
        lambda: take_rows(wrong, tokens),
        lambda: put_rows(wrong, tokens, take_rows(good, tokens)),
        lambda: put_rows(good, np.arange(9), wrong),
        lambda: save_safetensors(wrong, tmp_path / "table.safetensors"),
    ):
        with pytest.raises(TypeError, match=r"got '>f4': use `array.astype"):
            call()


def test_a_big_endian_dtype_is_refused():
    for call in (
        lambda: EmbeddingTable.from_config(
            7, {"embedding": 4}, dtype=np.dtype(">f4"), key=jax.random.key(0)
        ),
        lambda: EmbeddingDecode(make_table("first"), dtype=">f4"),
        lambda: EmbeddingDecode(make_table("first"), logits_dtype=">f4"),
    ):
        with pytest.raises(ValueError, match=r"dtype='>f4': use .*dtype='float32'"):
            call()


@pytest.mark.slow
def test_jax_narrows_ids_before_a_transformed_function():
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


@pytest.mark.slow
def test_numpy_numbers_serve_as_sizes_and_options(tmp_path):
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
            hidden, FOUR_TARGETS, label_smoothing=smoothing, z_loss=z_loss, chunk_size=chunk_size
        )

    assert loss(np.float32(0.25), np.float16(0.5), np.int64(2)) == loss(0.25, 0.5, 2)
    assert loss(np.int32(0), np.int8(1), None) == loss(0, 1, None)
    grown = resize_vocabulary(table, np.int64(9), key=key, pad_to_multiple_of=np.int16(8))
    assert eqx.tree_equal(grown, resize_vocabulary(table, 9, key=key, pad_to_multiple_of=8))


@pytest.mark.parametrize(
    "name, call",
    [
        ("ignore_index", lambda t, h: EmbeddingDecode(t).cross_entropy(h, ONES, ignore_index=True)),
        ("chunk_size", lambda t, h: EmbeddingDecode(t).cross_entropy(h, ONES, chunk_size=True)),
        ("k", lambda t, h: EmbeddingDecode(t).top_k(h, True)),
        ("vocab_size", lambda t, h: resize_vocabulary(t, True, pad_to_multiple_of=1)),
        ("pad_to_multiple_of", lambda t, h: resize_vocabulary(t, 9, pad_to_multiple_of=True)),
        ("size", lambda t, h: unique_tokens(ONES, True)),
        (
            "a key of pieces",
            lambda t, h: resize_vocabulary(t, 9, pad_to_multiple_of=1, pieces={"a": [1]}),
        ),
    ],
)
def test_a_switch_or_text_is_no_number(name, call):
    """`ignore_index=True` would be the token 1."""
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got (True|'a')"):
        call(make_table("first"), make_array((4, 4), seed=1))
