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


def test_the_loss_exports_with_its_gradient():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    call = exported(use_loss, table.embeddings, hidden, jnp.asarray(FOUR_TARGETS), vjp_order=1)
    value, gradient = jax.value_and_grad(call)(table.embeddings, hidden, jnp.asarray(FOUR_TARGETS))
    expected, _, for_embeddings, *_ = cross_entropy_reference(
        EmbeddingDecode(table), hidden, FOUR_TARGETS
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
