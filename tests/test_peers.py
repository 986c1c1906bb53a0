"""What the first table of the README says of `eqx.nn.Embedding` and penzai is so."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penzai import pz

from eqx_embedding import EmbeddingLookup, EmbeddingTable


AXES = ("vocabulary", "embedding")


def equinox_lookup(array, tokens):
    return jax.vmap(eqx.nn.Embedding(weight=array))(tokens)


def penzai_lookup(array, tokens):
    embeddings = pz.ParameterValue(label="table", value=pz.nx.wrap(array).tag(*AXES))
    table = pz.nn.EmbeddingTable.from_attributes(embeddings=embeddings, vocabulary_axis=AXES[0])
    named_tokens = pz.nx.wrap(tokens).tag("batch")
    return pz.nn.EmbeddingLookup(table)(named_tokens).unwrap("batch", AXES[1])


def our_lookup(array, tokens):
    return EmbeddingLookup(EmbeddingTable(array, AXES))(tokens)


PEERS = pytest.mark.parametrize("lookup", [equinox_lookup, penzai_lookup])


@pytest.mark.parametrize("token", [7, -1, 2**32 + 1], ids=["past the end", "negative", "64 bits"])
@PEERS
def test_a_token_out_of_range_gets_the_vector_of_another_row_from_peers(lookup, token):
    array = jnp.arange(10.0).reshape(5, 2)
    tokens = np.asarray([token])
    assert any(np.array_equal(lookup(array, tokens)[0], row) for row in array)
    assert np.isnan(our_lookup(array, tokens)).all()


@PEERS
def test_the_gradient_of_a_bfloat16_table_stops_counting_at_256_in_peers(lookup):
    array, tokens = jnp.zeros((5, 2), jnp.bfloat16), np.zeros(4096, np.int32)

    def total(lookup, array):
        return jnp.sum(lookup(array, tokens).astype(jnp.float32))

    assert float(jax.grad(total, argnums=1)(lookup, array)[0, 0]) == 256
    assert float(jax.grad(total, argnums=1)(our_lookup, array)[0, 0]) == 4096


def test_a_penzai_table_in_an_equinox_model_gets_no_gradient(getkey):
    class Model(eqx.Module):
        table: pz.nn.EmbeddingTable

    model = Model(pz.nn.EmbeddingTable.from_config("table", getkey(), 5, {"embedding": 2}))
    tokens = pz.nx.wrap(jnp.zeros(4, "int32")).tag("batch")

    def loss(model):
        vectors = pz.nn.EmbeddingLookup(model.table)(tokens)
        return jnp.sum(vectors.unwrap("batch", "embedding"))

    assert jax.tree.leaves(eqx.filter_grad(loss)(model)) == []
