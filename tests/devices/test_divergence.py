"""Divergences and soft targets over eight devices equal those of one."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from ..helpers import compile_by_default
from .helpers import (
    assert_trees_close,
    collectives,
    make_mesh,
    make_table,
    place,
    random,
    RULES,
    SETTINGS,
    with_bias,
)


pytestmark = pytest.mark.slow

B, T, D = 8, 10, 8
KINDS = "forward", "reverse", "jensen_shannon"
settings = pytest.mark.parametrize("setting", SETTINGS)


def make_arguments(their_rows=96, their_padding_rows=3):
    """A student, hidden, hidden of a teacher, weights, and the teacher."""
    weights = np.where(np.arange(B * T).reshape(B, T) % 3 == 1, 0, 1.5)
    weights[1] = 0
    batch = random((B, T, D), seed=1), random((B, T, D), seed=2), jnp.asarray(weights, "float32")
    hidden, theirs = (jnp.where(weights[..., None] == 0, jnp.nan, x) for x in batch[:2])
    teacher = jax.tree.map(lambda x: -x, make_table(their_rows, their_padding_rows))
    return with_bias(make_table(96, 3)), hidden, theirs, batch[2], teacher


def make_loss(rules, kind, reduction="mean", mesh_axes=()):
    def loss(table, hidden, theirs, weights, teacher):
        losses = EmbeddingDecode(table, 3.0).divergence(
            hidden,
            EmbeddingDecode(teacher),
            theirs,
            kind=kind,
            temperature=1.5,
            weights=weights,
            reduction=reduction,
            chunk_size=16,
            rules=rules,
        )
        return jax.lax.psum(jnp.sum(losses), mesh_axes)

    return loss


def on_mesh(setting, kind, axis="model", of_teacher: Any = "model", rules=RULES, reduction="mean"):
    """The loss and its gradients, of a table and a teacher that are split over mesh axes."""
    mesh_axes = "data" if setting == "manual" and reduction == "none" else ()
    rules = None if setting in ("automatic", "explicit") else rules
    loss = make_loss(rules, kind, reduction, mesh_axes)
    if setting == "manual":
        data = P("data")
        loss = jax.shard_map(
            loss, in_specs=(P(axis), data, data, data, P(of_teacher)), out_specs=P()
        )
    return eqx.filter_jit(jax.value_and_grad(loss, (0, 1)))


def place_all(mesh, arguments, axis="model", of_teacher: Any = "model"):
    table, *batched, teacher = arguments
    batched = (place(mesh, array, "data") for array in batched)
    return place(mesh, table, axis), *batched, place(mesh, teacher, of_teacher)


def expect(arguments, kind, reduction="mean"):
    return eqx.filter_jit(jax.value_and_grad(make_loss(None, kind, reduction), (0, 1)))(*arguments)


@settings
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_vocabulary_gives_the_same(setting, kind):
    arguments = make_arguments()
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        actual = on_mesh(setting, kind)(*place_all(mesh, arguments))
    assert_trees_close(actual, expect(arguments, kind))


@pytest.mark.parametrize("setting", ["rules", "explicit"])
@pytest.mark.parametrize(
    "their_rows, their_padding_rows, of_teacher",
    [(93, 0, None), (104, 11, "model"), (96, 3, "data"), (96, 3, None)],
)
def test_the_teacher_may_lie_otherwise(setting, their_rows, their_padding_rows, of_teacher):
    """With other padding rows, whole on each device, or split over other axes."""
    arguments = make_arguments(their_rows, their_padding_rows)
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        placed = place_all(mesh, arguments, of_teacher=of_teacher)
        actual = on_mesh(setting, "reverse", of_teacher=of_teacher)(*placed)
    assert_trees_close(actual, expect(arguments, "reverse"))


@pytest.mark.parametrize("setting", ["rules", "explicit", "manual"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_fully_sharded_table_gives_the_same(setting, reduction):
    """Rows over the axis of the tokens: they are gathered, or, if fewer, the tokens are."""
    rules = RULES | {"vocabulary": "data"}
    mesh = make_mesh(setting)
    for T in 2, 40:
        table, *batched, teacher = make_arguments()
        batched = [jnp.concatenate([array] * 4, axis=1)[:, :T] for array in batched]
        arguments = table, *batched, teacher
        with jax.set_mesh(mesh):
            split = on_mesh(setting, "jensen_shannon", "data", "data", rules, reduction)
            actual = split(*place_all(mesh, arguments, "data", "data"))
        assert_trees_close(actual, expect(arguments, "jensen_shannon", reduction))


@pytest.mark.parametrize("setting", ["rules", "explicit"])
def test_no_table_and_no_logits_are_gathered(setting):
    arguments = make_arguments()
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        function = jax.jit(jax.grad(make_loss(RULES, "reverse"), (0, 1)))
        compiled = compile_by_default(function.lower(*place_all(mesh, arguments)))
    found = collectives(compiled)
    assert not found["all-gather"] and not found["all-to-all"]
    # Not the 24 x 16 logits of a chunk: nothing is larger than the gradient of 40 vectors
    assert max(np.prod(sizes) for _, sizes in found["all-reduce"]) <= 40 * D


def test_a_shard_map_wants_tables_split_alike():
    arguments = make_arguments(their_rows=104, their_padding_rows=11)
    mesh = make_mesh("manual")
    with jax.set_mesh(mesh):
        placed = place_all(mesh, arguments)
        with pytest.raises(ValueError, match="same number of rows of student .* 24 and 26"):
            on_mesh("manual", "forward")(*placed)


def test_a_shard_map_wants_the_vocabulary_of_the_teacher_split_by_the_same_rule():
    *others, teacher = make_arguments()
    teacher = EmbeddingTable(teacher.embeddings, ("tokens", "embedding"), "tokens", padding_rows=3)
    mesh = make_mesh("manual")
    with jax.set_mesh(mesh):
        placed = place_all(mesh, (*others, teacher), of_teacher=None)
        with pytest.raises(
            ValueError, match=r"must be those of the student, \('model',\), got \(\)"
        ):
            on_mesh("manual", "forward", of_teacher=None)(*placed)


@settings
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_soft_targets_give_the_same(setting, reduction):
    table, hidden, _, weights, _ = make_arguments()
    draw = np.random.default_rng(0)
    targets = jnp.asarray(draw.integers(-3, 93, (B, T, 4)), "int32")
    targets = targets.at[..., 3].set(targets[..., 2])
    target_weights = jnp.where(targets < 0, 0, jnp.asarray(draw.uniform(size=(B, T, 4)), "float32"))

    def make(rules, mesh_axes=()):
        def loss(table, hidden, targets, target_weights, weights):
            losses = EmbeddingDecode(table).cross_entropy(
                hidden,
                targets,
                target_weights=target_weights,
                weights=weights,
                label_smoothing=0.1,
                reduction=reduction,
                chunk_size=16,
                rules=rules,
            )
            return jax.lax.psum(jnp.sum(losses), mesh_axes)

        return loss

    mesh_axes = "data" if setting == "manual" and reduction == "none" else ()
    loss = make(None if setting in ("automatic", "explicit") else RULES, mesh_axes)
    mesh = make_mesh(setting)
    batched = hidden, targets, target_weights, weights
    expected = eqx.filter_jit(jax.value_and_grad(make(None), (0, 1, 3)))(table, *batched)
    if setting == "manual":
        data = P("data")
        loss = jax.shard_map(loss, in_specs=(P("model"), *[data] * 4), out_specs=P())
    with jax.set_mesh(mesh):
        placed = place(mesh, table, "model"), *(place(mesh, array, "data") for array in batched)
        actual = eqx.filter_jit(jax.value_and_grad(loss, (0, 1, 3)))(*placed)
    assert_trees_close(actual, expected)
