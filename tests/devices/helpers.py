"""Meshes of eight devices, a table split over them, and what a compiled program communicates."""

import collections
import contextlib
import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqx_embedding import EmbeddingTable


RULES = {"batch": "data", "vocabulary": "model"}
SETTINGS = ("automatic", "rules", "explicit", "manual")


def make_mesh(setting: str, data: int = 2, model: int = 4) -> jax.sharding.Mesh:
    kind = AxisType.Explicit if setting == "explicit" else AxisType.Auto
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), (kind, kind), devices=devices)


def random(shape, seed=0):
    """Normal numbers, in float64 if JAX is in 64-bit mode."""
    draw = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(draw, jnp.result_type(float))


def make_table(rows: int, padding_rows: int = 0) -> EmbeddingTable:
    """Its padding rows are NaN, so that a leak shows."""
    embeddings = random((rows, 8)).at[rows - padding_rows :].set(jnp.nan)
    return EmbeddingTable(embeddings, ("vocabulary", "embedding"), padding_rows=padding_rows)


def with_bias(table: EmbeddingTable) -> EmbeddingTable:
    bias = random(table.vocab_size + table.padding_rows, seed=4).at[table.vocab_size :].set(jnp.nan)
    return dataclasses.replace(table, bias=bias)


def make_batch(table: EmbeddingTable, length: int, masked: tuple):
    """Hidden vectors, targets, weights and data of eight sequences, with the weights at the indices
    `masked` zero."""
    draw, shape = np.random.default_rng(0), (8, length)
    targets = draw.integers(0, table.vocab_size, shape)
    weights = np.where(draw.random(shape) < 0.4, 0, draw.uniform(0.5, 2, shape))
    for index in masked:
        weights[index] = 0
    return (
        random((*shape, 8), seed=1),
        jnp.asarray(targets, "int32"),
        jnp.asarray(weights, "float32"),
        random((*shape, 3), seed=3),
    )


def poison(hidden, targets, weights, data):
    """The batch, with NaN wherever the weights leave a token out."""
    mask = (weights != 0)[..., None]
    hidden, data = (jnp.where(mask, x, jnp.nan) for x in (hidden, data))
    return hidden, targets, weights, data


def place(mesh, tree, *axes):
    """Splits arrays over a mesh, on their first axes if `axes` are given."""
    arrays, others = eqx.partition(tree, eqx.is_array_like)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, P(*axes))), others)


def on_mesh(setting, function, out_axes, mesh=None):
    """`function(rules, table, *batched)` of a table split over its vocabulary and of arrays split
    over their first axis, in one of the `SETTINGS`."""
    if setting != "manual":
        rules = RULES if setting == "rules" else None
        return lambda *arguments: function(rules, *arguments)

    def inside(table, *batched):
        return jax.shard_map(
            lambda *arguments: function(RULES, *arguments),
            in_specs=(P("model"), *(P("data") for _ in batched)),
            out_specs=P(*out_axes),
        )(table, *batched)

    return inside


@contextlib.contextmanager
def split(setting, table, *batched, data=2, model=4):
    """The arguments, split over a mesh that is set."""
    mesh = make_mesh(setting, data, model)
    with jax.set_mesh(mesh):
        yield place(mesh, table, "model"), *(place(mesh, array, "data") for array in batched)


def collectives(compiled) -> dict[str, collections.Counter]:
    """For each kind of collective of a compiled program, the shapes that it moves."""
    found = collections.defaultdict(collections.Counter)
    pattern = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
    for shapes, kind in re.findall(pattern, compiled.as_text()):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            found[kind][dtype, tuple(int(size) for size in sizes.split(",") if size)] += 1
    return found


def assert_trees_close(actual, expected):
    tolerance = 1e-12 if jnp.result_type(float) == "float64" else 1e-5
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), tolerance, tolerance)
