"""The same numbers as penzai's `EmbeddingTable`, `EmbeddingLookup` and `EmbeddingDecode`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from penzai import pz

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import (
    as_embeddings,
    assert_close,
    lookup_reference,
    make_array,
    make_table,
    rows_first,
)


def to_penzai(table: EmbeddingTable):
    """Penzai's table with the same embeddings; penzai has no padding rows, so neither has this."""
    rows = table.vocab_size
    axis = table.axis_names.index(table.vocabulary_axis)
    array = jax.lax.slice_in_dim(table.embeddings, 0, rows, axis=axis)
    embeddings = pz.nx.wrap(array).tag(*table.axis_names)
    parameter = pz.ParameterValue(label="embeddings", value=embeddings)
    return pz.nn.EmbeddingTable(parameter, table.vocabulary_axis)


def name(array, *names):
    return pz.nx.wrap(jnp.asarray(array)).tag("batch", "position", *names)


EMBEDDING_AXES = {
    "none": {},
    "one": {"embedding": 8},
    "two": {"heads": 2, "features": 3},
}


def draw_both(embedding_axes, penzai_options=None, **options):
    root = jax.random.key(7)
    theirs = pz.nn.EmbeddingTable.from_config(
        "tokens", root, 7, embedding_axes, **options, **(penzai_options or {})
    )
    key = pz.nn.derive_param_key(root, "tokens.embeddings")
    return theirs.embeddings.value, key


@pytest.mark.parametrize("embedding_axes", EMBEDDING_AXES)
def test_a_new_table_is_penzais_bit_for_bit(embedding_axes):
    axes = EMBEDDING_AXES[embedding_axes]
    theirs, key = draw_both(axes)
    ours = EmbeddingTable.from_config(7, axes, key=key)
    assert theirs.dtype == ours.embeddings.dtype
    np.testing.assert_array_equal(ours.embeddings, theirs.unwrap("vocabulary", *axes))


def test_a_new_table_is_penzais_bit_for_bit_in_each_dtype(dtype):
    theirs, key = draw_both({"embedding": 8}, dtype=dtype)
    ours = EmbeddingTable.from_config(7, {"embedding": 8}, dtype=dtype, key=key)
    assert theirs.dtype == ours.embeddings.dtype == dtype
    np.testing.assert_array_equal(ours.embeddings, theirs.unwrap("vocabulary", "embedding"))


def test_other_initializers_have_their_counterpart():
    theirs, key = draw_both({"embedding": 8}, {"initializer": pz.nn.xavier_uniform_initializer})
    initializer = initializers.variance_scaling(
        1.0, "fan_avg", "uniform", in_axis=(), out_axis=1, batch_axis=0
    )
    ours = EmbeddingTable.from_config(7, {"embedding": 8}, initializer=initializer, key=key)
    np.testing.assert_array_equal(ours.embeddings, theirs.unwrap("vocabulary", "embedding"))


@pytest.mark.parametrize("layout", ["first", "middle", "last"])
def test_lookup_and_decode_agree_with_penzai_for_the_vocabulary_anywhere(layout):
    table = make_table(layout)
    theirs, names = to_penzai(table), tuple(table.embedding_axes)
    tokens = np.asarray([[0, 6, 3], [3, 1, 3]], np.int32)
    vectors = EmbeddingLookup(table)(jnp.asarray(tokens))
    expected = pz.nn.EmbeddingLookup(theirs)(name(tokens))
    np.testing.assert_array_equal(vectors, expected.unwrap("batch", "position", *names))

    hidden = make_array((2, 3, *table.embedding_axes.values()), seed=1)
    logits = EmbeddingDecode(table)(hidden)
    expected = pz.nn.EmbeddingDecode(theirs)(name(hidden, *names))
    assert_close(logits, expected.unwrap("batch", "position", "vocabulary"))


@pytest.mark.slow
def test_the_tied_gradient_agrees_with_penzai():
    table = make_table("middle")
    tokens = np.asarray([[0, 6, 3], [3, 1, 3]], np.int32)
    cotangent = make_array((2, 3, table.vocab_size), seed=1)

    @eqx.filter_grad
    def ours(table):
        hidden = jnp.tanh(EmbeddingLookup(table)(jnp.asarray(tokens)))
        return jnp.sum(cotangent * EmbeddingDecode(table)(hidden))

    @jax.grad
    def theirs(table):
        hidden = pz.nx.nmap(jnp.tanh)(pz.nn.EmbeddingLookup(table)(name(tokens)))
        logits = pz.nn.EmbeddingDecode(table)(hidden)
        return jnp.sum(cotangent * logits.unwrap("batch", "position", "vocabulary"))

    expected = theirs(to_penzai(table)).embeddings.value.unwrap("vocabulary", "heads", "features")
    actual = ours(table).embeddings
    assert_close(actual, as_embeddings(table, np.asarray(expected)))


def test_penzai_clamps_and_wraps_a_token_that_is_out_of_range_here():
    table = make_table("first")
    tokens = np.asarray([[7, 100, -1]], np.int32)
    theirs = pz.nn.EmbeddingLookup(to_penzai(table))(name(tokens))
    rows = rows_first(table)
    np.testing.assert_array_equal(
        theirs.unwrap("position", "batch", "embedding")[:, 0], rows[[6, 6, 6]]
    )
    assert np.all(np.isnan(EmbeddingLookup(table)(tokens)))
    clipped = EmbeddingLookup(table, "clip")(tokens)
    np.testing.assert_array_equal(clipped, lookup_reference(table, tokens, clip=True))


def test_a_penzai_table_in_an_equinox_module_gets_no_gradient_and_ours_does():
    class Model(eqx.Module):
        table: object

    theirs = pz.nn.EmbeddingTable.from_config("tokens", jax.random.key(0), 7, {"embedding": 8})
    ours = EmbeddingTable.from_config(7, {"embedding": 8}, key=jax.random.key(0))
    assert jax.tree.leaves(eqx.filter(Model(theirs), eqx.is_inexact_array)) == []
    assert len(jax.tree.leaves(eqx.filter(Model(ours), eqx.is_inexact_array))) == 1
