"""`jax.export`: lookup, decode and the loss, stored and loaded again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import (
    assert_close,
    cross_entropy_reference,
    decode_reference,
    FOUR_TARGETS,
    lookup_reference,
    make_array,
    make_table,
    NAMES,
)


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


def test_lookup_and_decode_export_for_any_token_count():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    (n,) = export.symbolic_shape("n")
    embeddings = jax.ShapeDtypeStruct((9, 4), jnp.float32)
    lookup = exported(use_lookup, embeddings, jax.ShapeDtypeStruct((n,), jnp.int32))
    tokens = np.asarray([0, 6, 7, -1], np.int32)
    np.testing.assert_array_equal(lookup(table.embeddings, tokens), lookup_reference(table, tokens))
    decode = exported(use_decode, embeddings, jax.ShapeDtypeStruct((n, 4), jnp.float32))
    assert_close(decode(table.embeddings, hidden), decode_reference(table, hidden))


def test_a_mapped_lookup_exports_for_any_batch_with_its_gradient():
    (n,) = export.symbolic_shape("n")
    rows = jax.ShapeDtypeStruct((90, 4), jnp.bfloat16)

    def gradient(embeddings, tokens):
        def total(embeddings):
            table = EmbeddingTable(embeddings, NAMES)
            return jnp.sum(jax.vmap(EmbeddingLookup(table))(tokens).astype("float32"))

        return jax.grad(total)(embeddings)

    # 600 repeats, which bfloat16 would not count
    call = exported(gradient, rows, jax.ShapeDtypeStruct((n, 20), jnp.int32))
    counted = call(jnp.zeros((90, 4), jnp.bfloat16), np.full((30, 20), 7, np.int32))
    assert np.asarray(counted, np.float64)[7].tolist() == [600] * 4
    assert np.count_nonzero(counted) == 4


def test_the_loss_exports_with_its_gradient():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    call = exported(use_loss, table.embeddings, hidden, jnp.asarray(FOUR_TARGETS), vjp_order=1)
    value, gradient = jax.value_and_grad(call)(table.embeddings, hidden, jnp.asarray(FOUR_TARGETS))
    expected, _, for_embeddings, *_ = cross_entropy_reference(
        EmbeddingDecode(table), hidden, FOUR_TARGETS
    )
    assert_close(value, expected)
    assert_close(gradient, for_embeddings)


def everything(embeddings, hidden, targets):
    """The arrays that each method returns, and the gradients of those that have one."""
    table = EmbeddingTable(embeddings, NAMES, padding_rows=2)
    decode, key = EmbeddingDecode(table), jax.random.key(0)

    def losses(table, hidden):
        decode = EmbeddingDecode(table)
        vectors = hidden + EmbeddingLookup(table)(targets)
        each = decode.cross_entropy(vectors, targets, reduction="none", chunk_size=3)
        ratio = decode.token_loss(lambda s: jnp.exp(s.log_prob) - s.entropy, vectors, targets)
        far = decode.divergence(vectors, decode, hidden)
        return jnp.sum(each) + ratio + far + jnp.sum(decode.top_k(vectors, 2)[0])

    results = (
        jax.value_and_grad(losses, (0, 1))(table, hidden),
        decode(hidden),
        decode.score(hidden, targets),
        decode.top_k(hidden, 2),
        decode.sample(hidden, temperature=0.0, key=key),
    )
    return jax.tree.leaves(results)


@pytest.mark.slow
def test_one_program_is_exported_for_all_platforms():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    arguments = table.embeddings, hidden, jnp.asarray(FOUR_TARGETS)
    platforms = "cpu", "cuda", "rocm", "tpu"
    stored = export.export(jax.jit(everything), platforms=platforms)(*arguments).serialize()
    loaded = export.deserialize(stored)
    assert loaded.platforms == platforms
    # chunks differ between the platforms, and so may the order of sums
    jax.tree.map(assert_close, loaded.call(*arguments), jax.jit(everything)(*arguments))


def test_what_cannot_be_exported_says_so():
    embeddings = jax.ShapeDtypeStruct((9, 4), jnp.float32)
    (n,) = export.symbolic_shape("n")
    hidden = jax.ShapeDtypeStruct((n, 4), jnp.float32)
    with pytest.raises(jax.errors.InconclusiveDimensionOperation):
        exported(use_loss, embeddings, hidden, jax.ShapeDtypeStruct((n,), jnp.int32))

    def raising(embeddings, tokens):
        return EmbeddingLookup(EmbeddingTable(embeddings, NAMES), "raise")(tokens)

    def scores(embeddings, hidden):
        return EmbeddingDecode(EmbeddingTable(embeddings, NAMES)).score(hidden, 3)

    def logits(table, hidden):
        return EmbeddingDecode(table)(hidden)

    for function, operand in (scores, embeddings), (logits, make_table("first")):
        with pytest.raises(ValueError, match="an unregistered type .*register_"):
            exported(function, operand, jax.ShapeDtypeStruct((4,), jnp.float32))

    with pytest.raises(NotImplementedError, match="callback"):
        exported(raising, embeddings, jax.ShapeDtypeStruct((3,), jnp.int32))
