"""Losses and scores of tokens over eight devices equal those of one."""

import contextlib
import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from ..helpers import compile_by_default, temporaries
from .helpers import (
    assert_trees_close,
    collectives,
    make_batch,
    make_mesh,
    make_table,
    place,
    poison,
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
    # one example without any token that counts, and one device with fewer than the others
    masked = 1, np.s_[5:, 4:]
    return table, jnp.asarray([0.5, 1.5, -0.75]), *make_batch(table, T, masked)


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


def on_mesh(setting, function, out_specs: Any = P(), rules=RULES) -> Any:
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


def differentiate(function, operands):
    """The results of a function, and the gradients of a sum of its first one."""

    def total(*operands):
        results = function(*operands)
        losses = results[0]
        return jnp.vdot(losses, random(losses.shape, seed=6)), results

    return eqx.filter_jit(jax.value_and_grad(total, (0, 1, 2, 4, 5), has_aux=True))(*operands)


@functools.cache
def on_one_device(function):
    return differentiate(functools.partial(function, None), make_operands())


def assert_equals_one_device(setting, function, out_specs: Any = P(), rules=RULES, expected=None):
    expected = on_one_device(function) if expected is None else expected
    table, closed, *batched = make_operands()
    batched = poison(*batched)
    with split(setting, table, *batched) as (table, *batched):
        operands = table, place(make_mesh(setting), closed), *batched
        actual = differentiate(on_mesh(setting, function, out_specs, rules), operands)
        assert_trees_close(actual, expected)


# Equal to one device


def mean_and_scores(rules, table, closed, hidden, targets, weights, data):
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


def losses_and_scores(rules, table, closed, hidden, targets, weights, data):
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


@pytest.mark.slow
@settings
def test_a_loss_and_its_scores_equal_those_of_one_device(setting):
    assert_equals_one_device(setting, mean_and_scores, (P(), P("data")))


@pytest.mark.slow
@settings
def test_losses_that_stay_apart_equal_those_of_one_device(setting):
    assert_equals_one_device(setting, losses_and_scores, P("data"))


@pytest.mark.slow
@settings
def test_scores_equal_those_of_one_device(setting):
    def scores(rules, table, hidden, targets):
        return EmbeddingDecode(table).score(hidden, targets, chunk_size=CHUNK_SIZE, rules=rules)

    table, _, hidden, *_ = make_operands(padding_rows=0)
    # rows 3 and 90, of different devices, have the largest logits, which are equal
    embeddings = jnp.asarray(table.embeddings).at[jnp.asarray([3, 90])].set(jnp.ones(D))
    table = EmbeddingTable(embeddings, table.axis_names)
    hidden = hidden.at[0].set(100.0)
    targets = jnp.asarray(np.arange(B * T).reshape(B, T) % V, "int32").at[0, 3].set(90)
    expected = eqx.filter_jit(functools.partial(scores, None))(table, hidden, targets)
    assert expected.is_top[0].tolist() == [i == 3 for i in [0, 1, 2, 90, 4, 5, 6, 7, 8, 9]]
    targets = targets.at[0, 4].set(3)
    expected = eqx.filter_jit(functools.partial(scores, None))(table, hidden, targets)
    assert np.flatnonzero(expected.is_top[0]).tolist() == [4]
    with split(setting, table, hidden, targets) as (table, *batched):
        function = functools.partial(on_mesh, setting)(
            lambda rules, table, _, *x: scores(rules, table, *x), P("data")
        )
        assert_trees_close(eqx.filter_jit(function)(table, jnp.zeros(()), *batched), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, spmd_axis_name, reduction",
    [
        ("automatic", None, "mean"),
        ("automatic", "data", "mean"),
        ("rules", "data", "mean"),
        ("rules", "data", "none"),
        ("explicit", None, "mean"),
        ("explicit", None, "none"),
        ("manual", None, "mean"),
    ],
)
def test_mapped_examples_equal_those_of_one_device(setting, spmd_axis_name, reduction):
    def losses(rules, *operands, name=spmd_axis_name):
        loss = functools.partial(loss_of_example, reduction, rules)
        return (jax.vmap(loss, (None, None, 0, 0, 0, 0), spmd_axis_name=name)(*operands),)

    # the mapped axis is the one that the mesh splits
    rules = {"vocabulary": "model"}
    assert_equals_one_device(setting, losses, P("data"), rules, mapped_on_one_device(reduction))


def loss_of_example(reduction, rules, table, closed, hidden, targets, weights, data):
    return EmbeddingDecode(table).token_loss(
        make_fn(closed),
        hidden,
        targets,
        data,
        weights=weights,
        reduction=reduction,
        chunk_size=CHUNK_SIZE,
        rules=rules,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_devices_are_entered_once(reduction):
    table, _, hidden, targets, weights, _ = make_operands()

    def loss(*arguments):
        return EmbeddingDecode(table).cross_entropy(
            *arguments, weights=weights, reduction=reduction, rules=RULES
        )

    with jax.set_mesh(make_mesh("rules")):
        program = str(jax.make_jaxpr(loss)(hidden, targets))
    assert program.count("shard_map[") == 1


@functools.cache
def mapped_on_one_device(reduction):
    loss = functools.partial(loss_of_example, reduction, None)
    mapped = jax.vmap(loss, (None, None, 0, 0, 0, 0))
    return differentiate(lambda *operands: (mapped(*operands),), make_operands())


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_example_of_an_explicit_mesh_has_its_own_gradients(reduction):
    def gradients(*operands):
        def loss(*operands):
            return jnp.sum(jnp.sin(loss_of_example(reduction, None, *operands)))

        gradient = jax.value_and_grad(loss, (0, 1, 2, 4, 5))
        return jax.vmap(gradient, (None, None, 0, 0, 0, 0))(*operands)

    table, closed, *batched = make_operands()
    expected = eqx.filter_jit(gradients)(table, closed, *batched)
    assert expected[1][0].embeddings.shape == (B, V, D)
    with split("explicit", table, *batched) as (table, *batched):
        closed = place(make_mesh("explicit"), closed)
        assert_trees_close(eqx.filter_jit(gradients)(table, closed, *batched), expected)


@pytest.mark.slow
def test_a_batch_may_be_split_over_an_axis_without_a_rule():
    """On a mesh of three axes, where XLA ends the process for some ways to add to the logits."""
    table, _, hidden, targets, weights, _ = make_operands()
    several = jnp.stack([targets, jnp.flip(targets)], axis=-1)
    rules, kinds = {"vocabulary": "model"}, (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "replica"), kinds)
    table = EmbeddingTable(random((V, D)), table.axis_names)

    def run(rules, *operands):
        def loss(table, hidden, targets, weights):
            shares = jnp.stack([weights + 0.5, weights + 1.0], axis=-1)
            return EmbeddingDecode(table).cross_entropy(
                hidden, targets, target_weights=shares, chunk_size=CHUNK_SIZE, rules=rules
            )

        return eqx.filter_jit(jax.value_and_grad(loss, (0, 1)))(*operands)

    expected = run(None, table, hidden, several, weights)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        batched = (place(mesh, array, "data") for array in (hidden, several, weights))
        assert_trees_close(run(rules, table, *batched), expected)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "model"])
def test_each_example_may_have_a_table_that_rules_split(axis):
    """Whatever mesh axis `spmd_axis_name` names for the examples."""
    table, closed, *batched = make_operands()
    tables = jax.tree.map(lambda x: jnp.stack([x * (1 + i / B) for i in range(B)]), table)

    def losses(rules, name, *operands):
        loss = functools.partial(loss_of_example, "mean", rules)
        mapped = jax.vmap(loss, (0, None, 0, 0, 0, 0), spmd_axis_name=name)
        return (mapped(*operands),)

    operands = tables, closed, *batched
    expected = differentiate(functools.partial(losses, None, None), operands)
    mesh, rules = make_mesh("rules"), {"vocabulary": "model"}
    with jax.set_mesh(mesh):
        tables = jax.device_put(tables, tables.shardings(mesh, rules))
        operands = tables, place(mesh, closed), *(place(mesh, x, "data") for x in batched)
        assert_trees_close(
            differentiate(functools.partial(losses, rules, axis), operands), expected
        )


@pytest.mark.parametrize("axis", ["data", "model"])
def test_gradients_of_examples_say_to_leave_spmd_axis_name_out(axis):
    def gradient(table, closed, *example):
        rules = {"vocabulary": "model"}
        return jax.grad(functools.partial(loss_of_example, "mean", rules))(table, closed, *example)

    table, closed, *batched = make_operands()
    with split("rules", table, *batched) as (table, *batched):
        of_examples = jax.vmap(gradient, (None, None, 0, 0, 0, 0), spmd_axis_name=axis)
        with pytest.raises(ValueError, match="Leave `spmd_axis_name` out"):
            jax.eval_shape(of_examples, table, closed, *batched)


@settings
def test_a_target_out_of_range_is_nan_whatever_the_loss(setting):
    def function(rules, table, closed, hidden, targets, weights, data):
        return EmbeddingDecode(table).token_loss(
            lambda scores: closed[0], hidden, targets, reduction="none", rules=rules
        )

    table, closed, hidden, targets, weights, data = make_operands()
    wrong = targets.at[0, 0].set(table.vocab_size)
    with split(setting, table, hidden, wrong, weights, data) as (table, *batched):
        losses = eqx.filter_jit(on_mesh(setting, function, P("data")))(table, closed, *batched)
    assert np.argwhere(np.isnan(np.asarray(losses))).tolist() == [[0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "model"])
def test_a_loss_may_close_over_an_array_that_a_mesh_splits(axis):
    table, _, *batched = make_operands()
    closed = jnp.linspace(0.5, 2, 8)

    def loss(table, closed, hidden, targets, weights, data):
        def fn(scores):
            return jnp.clip(scores.log_prob * jnp.tanh(closed).sum(), -20.0, 20.0)

        return EmbeddingDecode(table).token_loss(fn, hidden, targets, weights=weights)

    run = jax.value_and_grad(loss, (0, 1, 2))
    expected = eqx.filter_jit(run)(table, closed, *batched)
    with split("explicit", table, *batched) as (table, *batched):
        closed = place(make_mesh("explicit"), closed, axis)
        value, gradients = eqx.filter_jit(run)(table, closed, *batched)
        assert jax.typeof(gradients[1]).sharding.spec == P(axis)
        assert_trees_close((value, gradients), expected)


@pytest.mark.parametrize("setting", ["automatic", "rules", "explicit"])
@pytest.mark.slow
def test_a_loss_may_hand_what_it_closes_over_to_a_function_with_its_own_derivative(setting):
    """But for explicit axes, whose types JAX keeps within such a function."""
    table, closed, hidden, targets, *_ = make_operands()

    def loss(rules, table, closed, hidden, targets):
        def fn(scores):
            return -jax.nn.log_sigmoid(closed[0] * scores.log_prob)

        return (EmbeddingDecode(table).token_loss(fn, hidden, targets, rules=rules),)

    run = eqx.filter_jit(jax.value_and_grad(lambda *x: loss(None, *x)[0], (0, 1)))
    expected = run(table, closed, hidden, targets)
    with split(setting, table, hidden, targets) as (table, *batched):
        closed = place(make_mesh(setting), closed)
        on_devices = on_mesh(setting, loss)
        run = eqx.filter_jit(jax.value_and_grad(lambda *x: on_devices(*x)[0], (0, 1)))
        if setting == "explicit":
            with pytest.raises(ValueError, match=r"explicit mesh, .* one of the data"):
                run(table, closed, *batched)
        else:
            assert_trees_close(run(table, closed, *batched), expected)


# Arrays of a mesh that nothing splits


@pytest.mark.slow
@pytest.mark.parametrize("use", ["token_loss", "cross_entropy", "vmap", "decode", "lookup"])
def test_arrays_on_a_mesh_that_is_not_set_need_no_split(use):
    """Such as the last batch of an epoch, which the mesh does not divide."""

    def function(table, closed, hidden, targets, weights, data):
        decode = EmbeddingDecode(table, soft_cap=5.0)
        if use == "token_loss":
            options: Any = dict(weights=weights, chunk_size=CHUNK_SIZE)
            return decode.token_loss(make_fn(closed), hidden, targets, data, **options)
        return {
            "cross_entropy": lambda: decode.cross_entropy(hidden, targets, reduction="none"),
            "vmap": lambda: jax.vmap(decode.cross_entropy)(hidden, targets),
            "decode": lambda: decode(hidden),
            "lookup": lambda: EmbeddingLookup(table)(targets),
        }[use]()

    table, closed, *batched = make_operands()
    operands = table, closed, *(x[:7] for x in batched)

    def total(*operands):
        result = function(*operands)
        return jnp.sum(result**2), result

    run = eqx.filter_jit(jax.value_and_grad(total, (0, 1, 2, 4, 5), has_aux=True))
    expected = run(*operands)
    placed = place(make_mesh("explicit"), operands)
    assert_trees_close(run(*placed), expected)
    # without `jax.jit` JAX has no gradients of such arrays
    assert_trees_close(function(*placed), expected[0][1])


# Sums over devices


three_settings = pytest.mark.parametrize("setting", ["rules", "explicit", "manual"])


def sums(program) -> set[str]:
    """The types of what a lowered program adds over devices. XLA for CPUs compiles sums of bfloat16
    as sums of float32, XLA for accelerators does not."""
    pattern = r"all_reduce.*?stablehlo\.(\w+) .*?\}\) : \(tensor<(\S+)>\)"
    found = re.findall(pattern, program.as_text(), re.DOTALL)
    return {kind for operation, kind in found if operation == "add"}


@functools.cache
def gradients_of_256_and_ones(setting):
    """Of the embeddings, and of an array that the loss closes over: 256 comes from the tokens of
    one device, and 1 from those of each of seven others."""
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
        run = jax.jit(jax.grad(on_mesh(setting, loss), (0, 1)))
        lowered = run.lower(table, closed, *batched)
        return *lowered.compile()(table, closed, *batched), sums(lowered)


# In bfloat16, 256 + 1 is 256, and 263 is 264.


@three_settings
@pytest.mark.slow
def test_the_gradient_of_a_table_is_summed_in_float32(setting):
    table, _, types = gradients_of_256_and_ones(setting)
    assert np.asarray(table.embeddings).tolist() == [[-264], [264]]
    assert "2x1xf32" in types and "2x1xbf16" not in types


@three_settings
def test_the_gradient_of_a_closure_is_summed_in_float32(setting):
    _, closed, types = gradients_of_256_and_ones(setting)
    assert closed.dtype == jnp.bfloat16 and float(closed) == 264
    assert "bf16" not in types


@pytest.mark.slow
@three_settings
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_gradient_of_hidden_is_summed_in_float32(setting, reduction):
    rows = jnp.full((8, 1), 8.0, jnp.bfloat16).at[0].set(2048.0)
    table = EmbeddingTable(rows, ("vocabulary", "embedding"))
    hidden, targets = jnp.zeros((3, 1), jnp.bfloat16), jnp.zeros(3, "int32")

    def loss(rules, table, closed, hidden, targets):
        return EmbeddingDecode(table).token_loss(
            lambda scores: scores.logsumexp, hidden, targets, reduction=reduction, rules=rules
        )

    with split(setting, table, hidden, targets, data=1, model=8) as (table, *batched):
        function = on_mesh(setting, loss, P() if reduction == "sum" else P("data"))
        run = jax.jit(jax.grad(lambda *operands: jnp.sum(function(*operands)), 2))
        lowered = run.lower(table, jnp.zeros(()), *batched)
        gradient = lowered.compile()(table, jnp.zeros(()), *batched)
    assert np.asarray(gradient).tolist() == [[264]] * 3
    assert "3x1xf32" in sums(lowered) and "3x1xbf16" not in sums(lowered)


# What is moved


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, mapped",
    [("rules", False), ("manual", False), ("explicit", False), ("explicit", True)],
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

        loss = functools.partial(decode.token_loss, fn, chunk_size=CHUNK_SIZE)
        return jnp.sum(jax.vmap(loss)(hidden, targets, advantages))

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
        found = collectives(compile_by_default(jitted.lower(*arguments)))
    assert set(found) == {"all-reduce"}
    # a maximum and a few sums for each token of a chunk are small
    large = {shape: n for (_, shape), n in found["all-reduce"].items() if np.prod(shape) > 8 * 16}
    # those of the rows of a device, and of its tokens
    gradients = sorted([rows // 4 * D, examples // 2 * tokens * D])
    assert sorted(int(np.prod(shape)) for shape in large) == gradients, found
    assert set(large.values()) == {1}, found


@pytest.mark.parametrize("rules", [None, {}, {"batch": "data"}])
def test_more_targets_of_a_vector_hold_no_more_logits(rules):
    """Also if nothing says whether the rows of the table are split: `None` is without a mesh."""

    def loss(table, hidden, targets, weights):
        return EmbeddingDecode(table).cross_entropy(
            hidden, targets, target_weights=weights, rules=rules
        )

    def held(k):
        table, hidden = make_table(4096), random((256, D))
        targets, weights = jnp.zeros((256, k), "int32"), jnp.ones((256, k))
        operands = table, hidden, targets, weights
        alone = contextlib.nullcontext(operands)
        with alone if rules is None else split("automatic", *operands) as operands:
            lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands)
            return temporaries(compile_by_default(lowered))

    assert held(32) < 1.2 * held(1)


@pytest.mark.slow
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
        compiled = compile_by_default(run.lower(table, closed, *batched))
        for_table, for_hidden = run(table, closed, *batched)
    assert for_table.embeddings.sharding.spec == P("model", None)
    assert for_hidden.sharding.spec == P("data", None, None)
    text = compiled.as_text()
    assert text is not None
    assert f",{V // 4},{D}]" not in text and f",{V},{D}]" not in text


@pytest.mark.parametrize("alone", [False, True])
def test_a_closure_that_differs_from_device_to_device_is_refused(alone):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    table = EmbeddingTable(jnp.ones((5, 4)), ("vocabulary", "embedding"))

    def loss(table, hidden, targets):
        scale = lax.axis_index("data").astype(jnp.float32)
        decode = EmbeddingDecode(table)

        def fn(scores):
            return scale if alone else scale * scores.log_prob

        return decode.token_loss(fn, hidden, targets)

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="differs from device to device of this `jax.shard_map`"):
        jax.eval_shape(mapped, table, jnp.ones((8, 4)), jnp.zeros(8, "int32"))


@settings
def test_disable_jit_changes_no_result(setting):
    def results(rules, table, closed, hidden, targets):
        layer = EmbeddingDecode(table)
        loss = layer.cross_entropy(hidden, targets, rules=rules)
        total = lax.psum(loss, "data") if setting == "manual" else loss
        divergences = layer.divergence(hidden, layer, hidden + 1, rules=rules, reduction="none")
        return total, divergences

    table, closed, hidden, targets, *_ = make_operands()
    function = on_mesh(setting, results, (P(), P("data")))
    with split(setting, table, hidden[:, 0], targets[:, 0]) as (table, *batched):
        expected = function(table, closed, *batched)
        with jax.disable_jit():
            assert_trees_close(function(table, closed, *batched), expected)
