"""The likeliest tokens and draws over several devices equal those of one."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from eqx_embedding import EmbeddingDecode

from ..helpers import compile_by_default
from .helpers import collectives, make_table, on_mesh, place, random, SETTINGS, split, with_bias


V, PADDING_ROWS, B, T, D = 600, 5, 8, 3, 8  # 75 rows for each of 8 devices: blocks go across them
settings = pytest.mark.parametrize("setting", SETTINGS)


def make_operands():
    """Logits far apart, so that rounding changes no order, one vector with a NaN, and the
    temperatures."""
    table = with_bias(make_table(V, PADDING_ROWS))
    hidden = 2 * random((B, T, D), seed=1).at[1, 0].set(jnp.nan)
    return table, hidden, jnp.linspace(0.0, 2.0, B * T, dtype="float32").reshape(B, T)


def search(rules, table, hidden, temperature):
    decode = EmbeddingDecode(table, soft_cap=30.0)
    draw = functools.partial(decode.sample, hidden, key=jax.random.key(3), rules=rules)
    return (
        decode.top_k(hidden, 1, rules=rules),
        decode.top_k(hidden, 7, rules=rules),
        decode.top_k(hidden, 200, chunk_size=16, rules=rules),
        draw(temperature=temperature),
        draw(temperature=0),
        draw(temperature=temperature, top_k=5, chunk_size=16),
    )


@functools.cache
def on_one_device():
    return eqx.filter_jit(functools.partial(search, None))(*make_operands())


def assert_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(e.dtype, jnp.integer):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(e))
        else:
            np.testing.assert_allclose(np.asarray(a), np.asarray(e), 1e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("data, model", [(2, 4), (1, 8), (8, 1)])
@settings
def test_tokens_are_those_of_one_device(setting, data, model):
    with split(setting, *make_operands(), data=data, model=model) as operands:
        assert_equal(eqx.filter_jit(on_mesh(setting, search, ["data"]))(*operands), on_one_device())


@pytest.mark.slow
@settings
def test_a_table_split_over_the_axis_of_the_batch_is_searched(setting):
    rules = {"batch": "data", "vocabulary": "data"}

    def function(given, *operands):
        return search(rules if given else None, *operands)

    def inside(*operands):
        return jax.shard_map(
            functools.partial(search, rules), in_specs=P("data"), out_specs=P("data")
        )(*operands)

    with split(setting, *make_operands(), data=8, model=1) as (table, *batched):
        table = place(jax.sharding.get_mesh(), table, "data")
        run = inside if setting == "manual" else on_mesh(setting, function, ["data"])
        assert_equal(eqx.filter_jit(run)(table, *batched), on_one_device())


@pytest.mark.slow
@pytest.mark.slow
def test_a_batch_may_be_split_over_an_axis_without_a_rule():
    """On a mesh of three axes, where XLA ends the process for some ways to take the logits."""
    table, hidden, _ = make_operands()
    rules, kinds = {"vocabulary": "model"}, (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "replica"), kinds)

    def function(rules, table, hidden):
        decode, key = EmbeddingDecode(table), jax.random.key(3)
        return decode.top_k(hidden, 2, rules=rules), decode.sample(hidden, key=key, rules=rules)

    expected = eqx.filter_jit(functools.partial(function, None))(table, hidden)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        operands = table, place(mesh, hidden, "data")
        assert_equal(eqx.filter_jit(functools.partial(function, rules))(*operands), expected)


@pytest.mark.slow
@settings
def test_the_examples_of_a_vmap_are_drawn_alone(setting):
    table, hidden, temperature = make_operands()
    keys = jax.random.split(jax.random.key(5), B)

    def each(rules, table, hidden, temperature, keys):
        def one(hidden, temperature, key):
            decode = EmbeddingDecode(table)
            given = None if rules is None else rules | {"batch": None}
            drawn = decode.sample(hidden, temperature=temperature, key=key, rules=given)
            return drawn, decode.top_k(hidden, 3, rules=given)

        return jax.vmap(one)(hidden, temperature, keys)

    expected = [
        each(None, table, h[None], t[None], k[None]) for h, t, k in zip(hidden, temperature, keys)
    ]
    expected = jax.tree.map(lambda *parts: jnp.concatenate(parts), *expected)
    with split(setting, table, hidden, temperature, keys) as operands:
        assert_equal(eqx.filter_jit(on_mesh(setting, each, ["data"]))(*operands), expected)


@pytest.mark.slow
def test_no_logits_move_between_devices():
    with split("explicit", *make_operands()) as (table, hidden, _):

        def function(table, hidden):
            decode = EmbeddingDecode(table)
            return decode.top_k(hidden, 7), decode.sample(hidden, key=jax.random.key(0))

        compiled = compile_by_default(jax.jit(function).lower(table, hidden))
    moved = [shape for shapes in collectives(compiled).values() for _, shape in shapes]
    tokens = B * T // 2
    assert moved
    assert max(np.prod(shape) for shape in moved) <= tokens * 4 * 7


def test_a_key_that_differs_along_the_vocabulary_is_refused():
    def inside(table, hidden):
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("model"))
        rules = {"batch": "data", "vocabulary": "model"}
        return EmbeddingDecode(table).sample(hidden, key=key, rules=rules)

    with split("manual", *make_operands()) as (table, hidden, _):
        mapped = jax.shard_map(inside, in_specs=(P("model"), P("data")), out_specs=P("data"))
        with pytest.raises(ValueError, match=r"must be the same .* differ along \['model'\]"):
            jax.eval_shape(mapped, table, hidden)


@pytest.mark.slow
@pytest.mark.parametrize("second", [False, True])
@settings
def test_log_probabilities_have_the_gradients_of_one_device(setting, second):
    table, hidden, _ = make_operands()
    # NaN of padding rows reaches second derivatives
    table = jax.tree.map(jnp.nan_to_num, table) if second else table
    hidden = jnp.where(jnp.isnan(hidden), 1.0, hidden)

    def gradients(function, *operands):
        def total(*operands):
            log_probs, _ = function(*operands)
            return jnp.vdot(jnp.sin(log_probs), random(log_probs.shape, seed=6))

        gradient = jax.grad(total, (0, 1))
        if not second:
            return eqx.filter_jit(gradient)(*operands)

        def along(*operands):
            direction = jax.tree.map(lambda x: x / 10, operands)
            return jax.jvp(gradient, operands, direction)[1]

        return eqx.filter_jit(along)(*operands)

    def function(rules, table, hidden):
        return EmbeddingDecode(table).top_k(hidden, 3, rules=rules)

    expected = gradients(functools.partial(function, None), table, hidden)
    with split(setting, table, hidden) as operands:
        assert_equal(gradients(on_mesh(setting, function, ["data"]), *operands), expected)


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.slow
def test_a_loss_may_draw_its_targets(top_k):
    table, hidden, _ = make_operands()
    hidden = jnp.where(jnp.isnan(hidden), 1.0, hidden)
    rules = {"batch": "data", "vocabulary": "model"}

    def gradients(rules, *operands):
        def loss(operands):
            table, hidden = operands
            decode = EmbeddingDecode(table)
            tokens = decode.sample(hidden, key=jax.random.key(3), top_k=top_k, rules=rules)
            return decode.cross_entropy(hidden, tokens, rules=rules)

        return eqx.filter_jit(eqx.filter_grad(loss))(operands)

    expected = gradients(None, table, hidden)
    with split("explicit", table, hidden, data=2, model=4) as operands:
        assert_equal(gradients(rules, *operands), expected)
