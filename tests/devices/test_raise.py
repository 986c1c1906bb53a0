"""`out_of_range="raise"` over several devices: the error reaches each, and none waits for another.

A device that waits for one that has failed makes XLA end the process, after 40 seconds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqx_embedding import EmbeddingLookup

from .helpers import make_mesh, make_table, on_mesh, place, SETTINGS, split


V, B, T = 96, 8, 10
MESSAGE = "the vocabulary 'vocabulary' has 96 tokens, so tokens must be at least 0 and below 96"
meshes = pytest.mark.parametrize("data, model", [(2, 1), (1, 2), (2, 2), (2, 4)])


def lookup(rules, table, tokens, out_of_range: Any = "raise"):
    return EmbeddingLookup(table, out_of_range)(tokens, rules=rules)


def one_token_out_of_range():
    return jnp.zeros((B, T), "int32").at[5, 3].set(V)


@pytest.fixture(scope="module", autouse=True)
def last_call_succeeds():
    """JAX keeps the error of a device's last callback, and shows it when the process ends."""
    yield
    with split("automatic", make_table(V), jnp.zeros((B, T), "int32")) as arguments:
        jax.block_until_ready(jax.jit(lookup, static_argnums=0)(None, *arguments))
    jax.effects_barrier()


def assert_raises(function, *arguments):
    with pytest.raises(RuntimeError, match=MESSAGE):
        jax.block_until_ready(function(*arguments))


@meshes
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.slow
def test_each_device_raises(setting, data, model):
    tokens = jnp.arange(B * T).reshape(B, T)
    arguments = make_table(V), tokens, one_token_out_of_range()
    with split(setting, *arguments, data=data, model=model) as (table, tokens, wrong):

        def gradient(table, tokens):
            vectors = on_mesh(setting, lookup, ["data"])
            return jax.grad(lambda table: jnp.sum(vectors(table, tokens) ** 2))(table)

        for function in (on_mesh(setting, lookup, ["data"]), gradient):
            jitted = jax.jit(function)
            assert_raises(jitted, table, wrong)
            vectors = jitted(table, tokens)  # the devices go on
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(vectors))


def test_vectors_and_gradients_are_those_of_the_other_policies():
    def value_and_gradient(rules, table, tokens, out_of_range):
        def total(table):
            return jnp.sum(lookup(rules, table, tokens, out_of_range) ** 2)

        return lookup(rules, table, tokens, out_of_range), jax.grad(total)(table)

    arguments = make_table(V), jnp.arange(B * T).reshape(B, T)
    expected = value_and_gradient(None, *arguments, "nan")
    with split("explicit", *arguments) as (table, tokens):
        actual = jax.jit(value_and_gradient, static_argnums=(0, 3))(None, table, tokens, "raise")
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_each_device_raises_outside_of_jit():
    with split("automatic", make_table(V), one_token_out_of_range()) as (table, tokens):
        assert_raises(lookup, None, table, tokens)


def test_each_device_raises_on_a_mesh_that_is_not_set():
    mesh = make_mesh("automatic")
    table, tokens = place(mesh, make_table(V), "model"), one_token_out_of_range()
    tokens = place(mesh, tokens, "data")
    assert_raises(jax.jit(lookup, static_argnums=0), None, table, tokens)


def test_each_device_raises_for_one_of_the_examples_of_vmap():
    def each(table, tokens):
        return jax.vmap(lambda tokens: lookup(None, table, tokens))(tokens)

    with split("rules", make_table(V), one_token_out_of_range()) as (table, tokens):
        assert_raises(jax.jit(each), table, tokens)
        assert_raises(each, table, tokens)


@pytest.mark.parametrize("axis", ["data", "model"])
def test_each_device_raises_where_one_of_two_axes_is_manual(axis):
    split_table, split_tokens = (P(), P("data")) if axis == "data" else (P("model"), P())
    rules = {"vocabulary": "model"} if axis == "model" else None

    def function(table, tokens):
        return jax.shard_map(
            lambda *arguments: lookup(rules, *arguments),
            in_specs=(split_table, split_tokens),
            out_specs=split_tokens,
            axis_names={axis},
        )(table, tokens)

    with split("rules", make_table(V), one_token_out_of_range()) as (table, tokens):
        assert_raises(jax.jit(function), table, tokens)
        assert np.all(np.isfinite(jax.jit(function)(table, jnp.zeros_like(tokens))))
