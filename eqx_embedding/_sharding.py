"""How a vocabulary and a batch of tokens are split over the axes of a device mesh.

A mesh axis is of one of three types. An explicit one is part of the types of the arrays that it
splits. An automatic one is hidden while JAX traces. Along a manual one, that of a `jax.shard_map`
around us, an array is only the part of one device. Of the last two, `rules` say what they split.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ._table import EmbeddingTable, Rules


Axes = tuple[str, ...]


class Split(NamedTuple):
    """Which mesh axes split what in one call."""

    mesh: AbstractMesh | None  # None if there is none
    batch: tuple[Axes, ...] = ()  # explicit and automatic ones that split the axes of the batch
    vocabulary: Axes = ()  # explicit and automatic ones that split the vocabulary
    manual_batch: Axes = ()  # manual ones that split the batch
    manual_vocabulary: Axes = ()  # manual ones that split the vocabulary
    known: bool = True  # whether no other axis can split the vocabulary

    @property
    def mapped(self) -> Axes:
        """The axes that must become manual for each device to see its parts alone."""
        return tuple(axis for axes in (*self.batch, self.vocabulary) for axis in axes)

    @property
    def all_batch(self) -> Axes:
        return self.manual_batch + tuple(axis for axes in self.batch for axis in axes)

    @property
    def all_vocabulary(self) -> Axes:
        return self.manual_vocabulary + self.vocabulary

    def size(self, axes: Axes) -> int:
        """How many parts the axes make."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)

    def vocab_size(self, table: EmbeddingTable) -> int:
        """The number of tokens of the whole table of which this device may have a part."""
        return table._count_tokens(table._num_rows * self.size(self.manual_vocabulary))

    def sharding(self, axes: Sequence[Axes]) -> NamedSharding | None:
        """Of an array whose axes are split by the given mesh axes, if any of them is explicit."""
        if self.mesh is None or AxisType.Explicit not in self.mesh.axis_types:
            return None
        explicit = {
            axis
            for axis, kind in zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        }
        return NamedSharding(
            self.mesh, _spec([tuple(a for a in entry if a in explicit) for entry in axes])
        )

    def place(self, array: Array, axes: Sequence[Axes]) -> Array:
        """The same array, with the first of its axes split by the given explicit mesh axes."""
        sharding = self.sharding(axes)
        if sharding is None or (_mesh_is_unset() and not isinstance(array, Tracer)):
            return array  # outside of `jax.jit`, JAX cannot tell the devices of such a mesh
        return jax.reshard(array, sharding)

    def with_examples(self, axes: Axes) -> "Split":
        """Of a batch with one more axis in front, which the mesh axes split."""
        vocabulary = remaining(self.vocabulary, [axes])
        return self._replace(batch=(axes, *self.batch), vocabulary=vocabulary)

    def map(
        self,
        function: Callable[..., Any],
        in_specs: tuple[Any, ...],
        out_specs: PyTree,
        arguments: tuple[PyTree, ...],
    ) -> Any:
        """`function` of the parts that each device has of the arguments."""

        def place(spec: PartitionSpec, tree: PyTree) -> PyTree:
            return jax.tree.map(lambda array: self.place(array, as_entries(spec)), tree)

        arguments = jax.tree.map(
            place, in_specs, arguments, is_leaf=lambda node: isinstance(node, PartitionSpec)
        )
        if self.mapped:
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=in_specs,
                out_specs=out_specs,
                axis_names=set(self.mapped),
            )
            return function(*arguments)
        if self.mesh is None or not _mesh_is_unset():
            return function(*arguments)
        # of arrays on an explicit mesh that is not set
        with jax.sharding.use_abstract_mesh(self.mesh):
            return function(*arguments)


def _mesh_is_unset() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def as_entries(spec: PartitionSpec) -> list[Axes]:
    return [as_axes(entry) for entry in spec]


def _spec(axes: Iterable[Axes]) -> PartitionSpec:
    return PartitionSpec(*(entry or None for entry in axes))


def without_padding(rows: Array, split: Split, vocab_size: int) -> Array:
    """The rows that this device has of a table, with zeros for the padding rows."""
    mesh_axes = split.manual_vocabulary
    if len(rows) * split.size(mesh_axes) == vocab_size:
        return rows
    start = lax.axis_index(mesh_axes) * len(rows) if mesh_axes else 0
    row = lax.broadcasted_iota(np.int32, rows.shape, 0) + start
    return jnp.where(row < vocab_size, rows, jnp.zeros((), rows.dtype))


def as_axes(entry: str | tuple[str, ...] | None) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def find_mesh(*arrays: Array | None) -> AbstractMesh | None:
    """The mesh to compute on: the one that is set, or else that of the type of an array."""
    meshes = [
        jax.sharding.get_abstract_mesh(),
        *(jax.typeof(a).sharding.mesh for a in arrays if a is not None),
    ]
    return next((mesh for mesh in meshes if not mesh.empty), None)


def explicit_axes(array: Array) -> list[Axes]:
    """The explicit mesh axes that split each axis of an array."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return [as_axes(entry) for entry in spec + (None,) * (array.ndim - len(spec))]


def remaining(axes: Axes, taken: Sequence[Axes]) -> Axes:
    """The mesh axes without those that split another axis of the same array: none splits two."""
    return tuple(axis for axis in axes if all(axis not in others for others in taken))


def varying_axes(*arrays: Array | None) -> frozenset[str]:
    """The manual mesh axes along which any of the arrays differs."""
    types = (jax.typeof(array).manual_axis_type for array in arrays if array is not None)
    return frozenset[str]().union(*(of_array.varying for of_array in types))


def sum_over(axes: Iterable[str], array: Array) -> Array:
    """The sum of an array over manual mesh axes."""
    axes = tuple(sorted(axes))
    return lax.psum(array, axes) if axes else array


def find_split(
    table: EmbeddingTable,
    rows: Array,
    batched: Array | None,
    batch_axes: int,
    rules: Rules | None,
) -> Split:
    """Which mesh axes split the vocabulary of a table, and a batch of tokens that it is used on.

    **Arguments:**

    - `table`: not a stacked one; `rows`: its embeddings, the vocabulary axis first.
    - `batched`: tokens or hidden vectors, of which the first `batch_axes` axes may be split;
        `None` for tokens of the host.
    - `rules`: the mesh axes that split the first axis of the batch, under `"batch"`, and the
        vocabulary, under its name.

    **Raises:**

    A `ValueError` for rules that do not fit the mesh or the arrays.
    """
    name, rules = table.vocabulary_axis, {} if rules is None else rules
    mesh = find_mesh(rows, batched)
    types = {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    _check_rules(rules, ("batch", name), types)
    if mesh is None:
        return Split(None, known=jax.device_count() == 1)
    split = _read_split(mesh, rows, batched, batch_axes, rules, name)
    if split.batch and batched is not None:
        _check_divides(split, "batch", batched.shape[0], split.batch[0], "")
    advice = " Make the table with `pad_to_multiple_of`."
    _check_divides(split, name, len(rows), split.vocabulary, advice)
    _check_manual(split, name, rows, batched, has_rule=name in rules)
    return split


def _read_split(
    mesh: AbstractMesh,
    rows: Array,
    batched: Array | None,
    batch_axes: int,
    rules: Rules,
    name: str,
) -> Split:
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    batch = [] if batched is None else explicit_axes(batched)[:batch_axes]

    def ruled(kind: AxisType, key: str) -> Axes:
        return tuple(axis for axis in as_axes(rules.get(key)) if types[axis] == kind)

    # Rules for explicit axes are not needed: types know better.
    if batch:
        batch[0] += ruled(AxisType.Auto, "batch")
    # An axis that splits the batch, too, cannot stay with the vocabulary: the table is gathered.
    vocabulary = remaining(explicit_axes(rows)[0] + ruled(AxisType.Auto, name), batch)
    automatic = tuple(axis for axis, kind in types.items() if kind == AxisType.Auto)
    return Split(
        mesh=mesh,
        batch=tuple(batch),
        vocabulary=vocabulary,
        manual_batch=ruled(AxisType.Manual, "batch"),
        manual_vocabulary=ruled(AxisType.Manual, name),
        known=jax.device_count() == 1 or bool(vocabulary) or not remaining(automatic, batch),
    )


def _check_rules(rules: Rules, keys: tuple[str, ...], types: dict[str, AxisType]) -> None:
    for key in keys:
        if unknown := [axis for axis in as_axes(rules.get(key)) if axis not in types]:
            has = f"has the axes {tuple(types)}" if types else "is not set: use `jax.set_mesh`"
            raise ValueError(
                f"rules={dict(rules)} split {key!r} over the mesh axis {unknown[0]!r}, but the "
                f"mesh {has}."
            )


def _check_divides(split: Split, name: str, size: int, axes: Axes, advice: str) -> None:
    if size % split.size(axes) != 0:
        raise ValueError(
            f"the axis {name!r} of size {size} is split over the mesh axis {', '.join(axes)!r}, "
            f"whose size {split.size(axes)} does not divide it.{advice}"
        )


def _check_manual(
    split: Split, name: str, rows: Array, batched: Array | None, has_rule: bool
) -> None:
    """Inside `jax.shard_map`, types say along which axes an array differs, though not why."""
    of_table, of_batch = varying_axes(rows), varying_axes(batched)
    for what, axes, differs in (
        (f"the table of {name!r}", split.manual_vocabulary, of_table),
        ("the batch", split.manual_batch, of_batch),
    ):
        if missing := set(axes) - differs:
            raise ValueError(
                f"rules split {what} over {sorted(missing)}, along which it is the same on all "
                "devices of this `jax.shard_map`: say so by its `in_specs`, and leave "
                "`check_vma=True`."
            )
    if both := set(split.manual_vocabulary) & of_batch:
        raise ValueError(
            f"the tokens must be the same along the mesh axes that split the vocabulary {name!r}, "
            f"but differ along {sorted(both)}: gather them, or the table, by "
            "`jax.lax.all_gather`."
        )
    if (unsaid := of_table - {*split.manual_vocabulary}) and not has_rule:
        raise ValueError(
            f"inside this `jax.shard_map` the table differs along {sorted(unsaid)}. If that splits "
            f"its vocabulary, say so by rules={{{name!r}: ...}}; if each device has a table of its "
            f"own, by rules={{{name!r}: None}}."
        )
