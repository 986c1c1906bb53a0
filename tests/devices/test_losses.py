"""Losses and scores of tokens over eight devices equal those of one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from ..helpers import quick_jit
from .helpers import (
    assert_trees_close,
    collectives,
    make_mesh,
    make_table,
    place,
    random,
    RULES,
    SETTINGS,
    split,
    with_bias,
)


V, B, T, D = 96, 8, 10, 8
CHUNK_SIZE = 16  # of the 40 tokens of a device
settings = pytest.mark.parametrize("setting", SETTINGS)


def make_operands(padding_rows=3):
    """A table, an array to close over, hidden, targets, weights and data."""
    table = with_bias(make_table(V, padding_rows))
    draw = np.random.default_rng(0)
    targets = draw.integers(0, table.vocab_size, (B, T))
    # one example without any token that counts, and one device with fewer than the others
    weights = np.where(draw.random((B, T)) < 0.4, 0, draw.uniform(0.5, 2, (B, T)))
    weights[1] = weights[5:, 4:] = 0
    closed = jnp.asarray([0.5, 1.5, -0.75])
    return (
        table,
        closed,
        random((B, T, D), seed=1),
        jnp.asarray(targets, "int32"),
        jnp.asarray(weights, "float32"),
        random((B, T, 3), seed=3),
    )


def make_fn(closed):
    def fn(scores, data):
        def step(carry, x):
            a, b = x
            return jnp.tanh(carry * a) + b * scores.entropy, carry

        last, carries = lax.scan(step, jnp.zeros(()), (data, closed))
        ratio = jnp.exp(scores.log_prob + closed[0])
        clipped = jnp.minimum(ratio * data[0], jnp.clip(ratio, 0.8, 1.2) * data[0])
        return last + jnp.sum(carries) - clipped + 0.01 * scores.mean_log_prob * scores.logsumexp

    return fn


def on_mesh(setting, function, out_specs: Any = P(), rules=RULES):
    """`function(rules, table, closed, *batched)` in one of the `SETTINGS`."""
    if setting != "manual":
        given = rules if setting == "rules" else None
        return functools.partial(function, given)

    def inside(table, closed, *batched):
        return jax.shard_map(
            functools.partial(function, rules),
            in_specs=(P("model"), P(), *(P("data") for _ in batched)),
            out_specs=out_specs,
        )(table, closed, *batched)

    return inside


def assert_equal_on_mesh(setting, function, operands, out_specs: Any = P(), rules=RULES):
    """The results of a function, and the gradients of a sum of its first one."""
    numbers = (0, 1, 2, 4, 5)

    def differentiate(function):
        def total(*operands):
            results = function(*operands)
            losses = results[0]
            return jnp.vdot(losses, random(losses.shape, seed=6)), results

        def with_targets(*operands):
            return jax.value_and_grad(total, numbers, has_aux=True)(*operands)

        return quick_jit(with_targets)

    expected = differentiate(functools.partial(function, None))(*operands)
    table, closed, *batched = operands
    with split(setting, table, *batched) as (table, *batched):
        run = differentiate(on_mesh(setting, function, out_specs, rules))
        assert_trees_close(run(table, closed, *batched), expected)


# Equal to one device


@settings
def test_a_loss_and_its_scores_equal_those_of_one_device(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        return EmbeddingDecode(table, soft_cap=5.0).token_loss(
            make_fn(closed),
            hidden,
            targets,
            data,
            weights=weights,
            return_scores=True,
            chunk_size=CHUNK_SIZE,
            rules=rules,
        )

    assert_equal_on_mesh(setting, function, make_operands(), (P(), P("data")))


@settings
def test_losses_that_stay_apart_equal_those_of_one_device(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        return EmbeddingDecode(table).token_loss(
            make_fn(closed),
            hidden,
            jnp.where(weights == 0, -100, targets),
            data,
            ignore_index=-100,
            reduction="none",
            return_scores=True,
            chunk_size=CHUNK_SIZE,
            rules=rules,
        )

    assert_equal_on_mesh(setting, function, make_operands(), P("data"))


@settings
def test_scores_equal_those_of_one_device(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        options: Any = dict(weights=weights, chunk_size=CHUNK_SIZE, rules=rules)
        scores = EmbeddingDecode(table).score(hidden, targets, **options)
        return jnp.stack(scores[:4], -1), scores.is_top

    table, closed, hidden, targets, weights, data = make_operands(padding_rows=0)
    # some targets are top; two equal rows of different devices tie for others
    embeddings, bias = jnp.asarray(table.embeddings), jnp.asarray(table.bias)
    embeddings = embeddings.at[90].set(20 * embeddings[3]).at[3].multiply(20)
    bias = bias.at[90].set(bias[3])
    table = dataclasses.replace(table, embeddings=embeddings, bias=bias)
    logits = EmbeddingDecode(table)(hidden)
    targets = jnp.argmax(logits, -1).astype("int32")
    assert jnp.any(targets == 3) and not jnp.any(targets == 90)
    targets = jnp.where((targets == 3) & (jnp.arange(T) % 2 == 0)[None], 90, targets)
    operands = table, closed, hidden, targets, weights, data
    is_top = EmbeddingDecode(table).score(hidden, targets).is_top
    np.testing.assert_array_equal(is_top, targets != 90)
    assert_equal_on_mesh(setting, function, operands, P("data"))


@settings
def test_mapped_examples_equal_those_of_one_device(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        def of_example(hidden, targets, weights, data):
            return EmbeddingDecode(table).token_loss(
                make_fn(closed),
                hidden,
                targets,
                data,
                weights=weights,
                return_scores=True,
                chunk_size=CHUNK_SIZE,
                rules=rules,
            )

        return jax.vmap(of_example)(hidden, targets, weights, data)

    # the mapped axis is the one that the mesh splits
    rules = {"vocabulary": "model"}
    assert_equal_on_mesh(setting, function, make_operands(), P("data"), rules)


def test_each_example_of_an_explicit_mesh_has_its_own_gradients():
    def function(table, closed, hidden, targets, weights, data):
        def loss(table, closed, hidden, targets, weights, data):
            def fn(scores, data):
                return closed[0] * data[0] * scores.entropy - scores.log_prob

            return EmbeddingDecode(table).token_loss(
                fn, hidden, targets, data, weights=weights, chunk_size=CHUNK_SIZE
            )

        gradient = jax.value_and_grad(loss, (0, 1, 2, 4, 5))
        return jax.vmap(gradient, (None, None, 0, 0, 0, 0))(
            table, closed, hidden, targets, weights, data
        )

    table, closed, *batched = make_operands()
    expected = quick_jit(function)(table, closed, *batched)
    assert expected[1][0].embeddings.shape == (B, V, D)
    with split("explicit", table, *batched) as (table, *batched):
        closed = place(make_mesh("explicit"), closed)
        assert_trees_close(quick_jit(function)(table, closed, *batched), expected)


@settings
def test_a_target_out_of_range_is_nan_whatever_the_loss(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        return EmbeddingDecode(table).token_loss(
            lambda scores: closed[0], hidden, targets, reduction="none", rules=rules
        )

    table, closed, hidden, targets, weights, data = make_operands()
    wrong = targets.at[0, 0].set(table.vocab_size)
    with split(setting, table, hidden, wrong, weights, data) as (table, *batched):
        losses = quick_jit(on_mesh(setting, function, P("data")))(table, closed, *batched)
    assert np.argwhere(np.isnan(np.asarray(losses))).tolist() == [[0, 0]]


@settings
def test_what_is_masked_reaches_no_device(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        def loss(table, closed, hidden, data):
            return EmbeddingDecode(table).token_loss(
                make_fn(closed),
                hidden,
                targets,
                data,
                weights=weights,
                chunk_size=CHUNK_SIZE,
                rules=rules,
            )

        value, gradients = jax.value_and_grad(loss, (0, 1))(table, closed, hidden, data)
        return value, gradients

    table, closed, hidden, targets, weights, data = make_operands()
    mask = (weights != 0)[..., None]
    poisoned = jnp.where(mask, hidden, jnp.nan), targets, weights, jnp.where(mask, data, jnp.nan)
    with split(setting, table, *poisoned) as (table_, *batched):
        run = quick_jit(on_mesh(setting, function, (P(), (P("model"), P()))))
        actual = run(table_, closed, *batched)
    expected = quick_jit(functools.partial(function, None))(table, closed, *poisoned)
    assert np.isfinite(expected[0])
    assert_trees_close(actual, expected)


# Arrays of a mesh that nothing splits


def test_arrays_on_a_mesh_that_is_not_set_need_no_split():
    """As the last batch of an epoch, which the mesh does not divide."""

    def everything(table, closed, hidden, targets, weights, data):
        vectors = EmbeddingLookup(table)(targets)
        decode = EmbeddingDecode(table, soft_cap=5.0)
        hidden = hidden + vectors
        options: Any = dict(weights=weights, chunk_size=CHUNK_SIZE)

        def fn(scores, data):
            return closed[0] * data[0] * scores.entropy - scores.log_prob

        mean, scores = decode.token_loss(fn, hidden, targets, data, return_scores=True, **options)
        losses = decode.cross_entropy(hidden, targets, reduction="none", **options)
        of_examples = jax.vmap(decode.cross_entropy)(hidden, targets)
        total = mean + jnp.sum(losses**2) + jnp.sum(of_examples**2)
        return total + jnp.mean(decode(hidden) ** 2), (scores, losses, of_examples)

    operands = tuple(jax.tree.map(lambda x: x[:7], x) for x in make_operands()[2:])
    operands = *make_operands()[:2], *operands
    run = jax.value_and_grad(everything, (0, 1, 2, 4, 5), has_aux=True)
    expected = quick_jit(run)(*operands)
    placed = place(make_mesh("explicit"), operands)
    # without `jax.jit`, JAX itself cannot differentiate arrays of a mesh that is not set
    assert_trees_close(quick_jit(run)(*placed), expected)


# Sums over devices


@pytest.mark.parametrize("setting", ["rules", "explicit", "manual"])
@pytest.mark.parametrize("of", ["embeddings", "closure"])
def test_sums_over_tokens_of_devices_are_in_float32(setting, of):
    """256 of one device and 1 of each of seven others is 256 in bfloat16, whatever the order
    that begins with 256, and 264 where 263 is rounded once."""
    table = EmbeddingTable(jnp.zeros((2, 1), jnp.bfloat16), ("vocabulary", "embedding"))
    closed, hidden = jnp.ones((), jnp.bfloat16), jnp.ones((8, 1), jnp.bfloat16)
    targets, weights = jnp.zeros(8, "int32"), jnp.ones(8).at[0].set(256.0)

    def loss(rules, table, closed, hidden, targets, weights):
        def fn(scores):
            return -2 * scores.log_prob + closed.astype("float32")

        return EmbeddingDecode(table).token_loss(
            fn, hidden, targets, weights=weights, reduction="sum", rules=rules
        )

    with split(setting, table, hidden, targets, weights, data=8, model=1) as (table, *batched):
        run = quick_jit(jax.grad(on_mesh(setting, loss), (0, 1)))
        for_table, for_closed = run(table, closed, *batched)
    if of == "embeddings":
        assert np.asarray(for_table.embeddings).tolist() == [[-264], [264]]
    else:
        assert float(for_closed) == 264


@pytest.mark.parametrize("setting", ["rules", "explicit", "manual"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sums_over_rows_of_devices_are_in_float32(setting, reduction):
    rows = jnp.full((8, 1), 8.0, jnp.bfloat16).at[0].set(2048.0)
    table = EmbeddingTable(rows, ("vocabulary", "embedding"))
    hidden, targets = jnp.zeros((3, 1), jnp.bfloat16), jnp.zeros(3, "int32")

    def loss(rules, table, closed, hidden, targets):
        def fn(scores):
            return scores.logsumexp

        return EmbeddingDecode(table).token_loss(
            fn, hidden, targets, reduction=reduction, rules=rules
        )

    with split(setting, table, hidden, targets, data=1, model=8) as (table, *batched):
        out_specs = P() if reduction == "sum" else P("data")
        function = on_mesh(setting, loss, out_specs)
        run = quick_jit(jax.grad(lambda *x: jnp.sum(function(*x)), 2))
        assert np.asarray(run(table, jnp.zeros(()), *batched)).tolist() == [[264]] * 3


# What is moved


@pytest.mark.parametrize(
    "setting, mapped",
    [
        ("rules", False),
        ("explicit", False),
        ("explicit", True),
        ("manual", False),
        ("manual", True),
    ],
)
def test_any_loss_moves_a_few_numbers_a_token_and_gradients_once(setting, mapped):
    rows, examples, tokens = 2048, 16, 32

    def loss(rules, table, closed, hidden, targets, advantages):
        def fn(scores, advantage):
            ratio = jnp.exp(scores.log_prob)
            clipped = jnp.clip(ratio, 0.8, 1.2)
            surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
            return -surrogate - closed * scores.entropy

        decode = EmbeddingDecode(table)
        if not mapped:
            return decode.token_loss(
                fn, hidden, targets, advantages, chunk_size=CHUNK_SIZE, rules=rules
            )

        def of_example(*operands):
            given = rules and {"vocabulary": "model"}
            return decode.token_loss(fn, *operands, chunk_size=CHUNK_SIZE, rules=given)

        losses = jax.vmap(of_example)(hidden, targets, advantages)
        total = jnp.sum(losses)
        return lax.psum(total, "data") if setting == "manual" else total

    operands = (
        random((examples, tokens, D), seed=1),
        jnp.zeros((examples, tokens), "int32"),
        random((examples, tokens), seed=2),
    )
    with split(setting, make_table(rows), *operands) as (table, *batched):
        arguments = table, jnp.ones(()), *batched
        shardings = jax.tree.map(lambda a: a.sharding, (table, batched[0]))
        run = jax.value_and_grad(on_mesh(setting, loss), (0, 2))
        jitted = jax.jit(run, out_shardings=(None, shardings))
        found = collectives(jitted.lower(*arguments).compile())
    assert set(found) == {"all-reduce"}
    moved = found["all-reduce"]
    gradients = {
        "f32": [rows // 4 * D, examples // 2 * tokens * D],  # of a device's rows and tokens
    }
    large = [(shape[1], count) for shape, count in moved.items() if np.prod(shape[1]) > 8 * 16]
    assert sorted(int(np.prod(shape)) for shape, _ in large) == sorted(gradients["f32"]), moved
    assert all(count == 1 for _, count in large), moved


def test_examples_split_over_an_explicit_mesh_share_the_table():
    """No device has all examples, and none has a gradient of the table for each of its own."""
    table, closed, *batched = make_operands()

    def loss(table, closed, hidden, targets, weights, data):
        def of_example(hidden, targets, weights, data):
            return EmbeddingDecode(table).token_loss(
                make_fn(closed), hidden, targets, data, weights=weights
            )

        return jnp.mean(jax.vmap(of_example)(hidden, targets, weights, data))

    with split("explicit", table, *batched) as (table, *batched):
        run = jax.jit(jax.grad(loss, (0, 2)))
        compiled = run.lower(table, closed, *batched).compile()
        for_table, for_hidden = run(table, closed, *batched)
    assert for_table.embeddings.sharding.spec == P("model", None)
    assert for_hidden.sharding.spec == P("data", None, None)
    text = compiled.as_text()
    assert text is not None
    assert f",{V // 4},{D}]" not in text and f",{V},{D}]" not in text
