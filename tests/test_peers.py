"""What docs/comparison.md says of `eqx.nn.Embedding`, penzai and haliax is so."""

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


def make_haliax(array):
    """A haliax embedding. haliax 1.4 is a pre-release, and is tested where it is installed."""
    hax = pytest.importorskip("haliax")
    weight = hax.named(array, AXES)
    return hax, hax.nn.Embedding(weight, weight.axes[0], weight.axes[1])


def haliax_lookup(array, tokens):
    hax, embedding = make_haliax(array)
    return embedding(hax.named(tokens, "batch")).array


def our_lookup(array, tokens):
    return EmbeddingLookup(EmbeddingTable(array, AXES))(tokens)


PEERS = pytest.mark.parametrize("lookup", [equinox_lookup, penzai_lookup, haliax_lookup])


@pytest.mark.parametrize("token", [7, -1, 2**32 + 1], ids=["past the end", "negative", "64 bits"])
@PEERS
def test_peers_return_another_row_for_a_wrong_token(lookup, token):
    array = jnp.arange(10.0).reshape(5, 2)
    tokens = np.asarray([token])
    vector = lookup(array, tokens)[0]
    if lookup is haliax_lookup and token == 7:
        assert np.isnan(vector).all()
    else:
        assert any(np.array_equal(vector, row) for row in array)
    assert np.isnan(our_lookup(array, tokens)).all()


@PEERS
@pytest.mark.slow
def test_a_bfloat16_gradient_stops_at_256_in_peers(lookup):
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


def test_a_haliax_table_in_an_equinox_model_gets_a_gradient():
    hax, embedding = make_haliax(jnp.zeros((5, 2)))
    tokens = hax.named(np.zeros(4, np.int32), "batch")
    gradient = eqx.filter_grad(lambda embedding: jnp.sum(embedding(tokens).array))(embedding)
    np.testing.assert_array_equal(gradient.weight.array[0], [4, 4])


def new_in_equinox(vocab_size, size, key):
    return eqx.nn.Embedding(vocab_size, size, key=key).weight


def new_in_penzai(vocab_size, size, key):
    table = pz.nn.EmbeddingTable.from_config("table", key, vocab_size, {"embedding": size})
    return table.embeddings.value.unwrap(*AXES)


def new_in_haliax(vocab_size, size, key):
    hax = pytest.importorskip("haliax")
    axes = hax.Axis("vocabulary", vocab_size), hax.Axis("embedding", size)
    return hax.nn.Embedding.init(*axes, key=key).weight.array


def new_here(vocab_size, size, key):
    return EmbeddingTable.from_config(vocab_size, {"embedding": size}, key=key).embeddings


@pytest.mark.parametrize(
    "make, expected",
    [(new_in_equinox, 1), (new_in_penzai, 1 / 8), (new_in_haliax, 1 / 64), (new_here, 1 / 8)],
)
def test_new_tables_have_these_standard_deviations(make, expected, getkey):
    deviation = float(jnp.std(make(5000, 64, getkey())))
    assert deviation == pytest.approx(expected, rel=0.03)
