"""How a vocabulary and a batch of tokens are split over the axes of a device mesh.

What explicit axes split, types say. What automatic and manual ones split, `rules` say.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, PyTree

from ._devices import (
    as_axes,
    as_spec,
    Axes,
    axes_of_type,
    axis_types,
    common,
    count_devices,
    explicit_axes,
    find_mesh,
    flat,
    mesh_is_unset,
    remaining,
    reshard,
    varying_axes,
)
from ._table import EmbeddingTable, find_entries, Rules


class MappedAxisError(ValueError):
    """An explicit mesh axis splits a table, and the axis that a `jax.vmap` maps over."""


class Split(NamedTuple):
    """Which mesh axes split what in one call. Axes of the table are in rows-first order."""

    mesh: AbstractMesh | None  # None if there is none
    batch: tuple[Axes, ...] = ()  # explicit and automatic ones that split the axes of the batch
    table: tuple[Axes, ...] = ()  # explicit and automatic ones that split the axes of the table
    manual_batch: Axes = ()  # manual ones that split the batch
    manual_table: tuple[Axes, ...] = ()  # manual ones that split the axes of the table
    can_tile: bool = True  # whether no automatic axis without a rule can split the vocabulary
    unruled: Axes = ()  # automatic ones without a rule, if there is none for the batch

    @property
    def mapped(self) -> set[str]:
        """The axes that must become manual for each device to see its parts alone."""
        return {*flat(self.batch), *flat(self.table)}

    @property
    def entered(self) -> set[str]:
        """The axes that become manual. JAX fails at second derivatives if explicit ones do not."""
        return {*self.mapped, *axes_of_type(self.mesh, AxisType.Explicit)}

    @property
    def in_shard_map(self) -> bool:
        """Whether a `jax.shard_map` of the user is around this call."""
        return bool(axes_of_type(self.mesh, AxisType.Manual))

    @property
    def has_parts(self) -> bool:
        """Whether explicit or automatic axes split the table, outside of any `jax.shard_map`."""
        return not self.in_shard_map and self.size(flat(self.table)) > 1

    @property
    def parts(self) -> int:
        """How many parts automatic axes make of the logits, if those without a rule split them."""
        return self.size(remaining(self.unruled, self.batch))

    @property
    def all_batch(self) -> Axes:
        return self.manual_batch + flat(self.batch)

    @property
    def manual_vocabulary(self) -> Axes:
        """The manual axes that split the vocabulary, but not the batch."""
        return remaining(self.manual_table[0], [self.manual_batch])

    @property
    def manual_shared(self) -> tuple[Axes, ...]:
        """The manual axes that split an axis of the table, and the batch as well."""
        return tuple(common(axes, self.manual_batch) for axes in self.manual_table)

    def size(self, axes: Axes) -> int:
        """How many parts the axes make."""
        return count_devices(self.mesh, axes)

    def vocab_size(self, table: EmbeddingTable) -> int:
        """The number of tokens of the whole table of which this device may have a part."""
        return table._count_tokens(table._num_rows * self.size(self.manual_table[0]))

    def arrange_lookup(self, shape: tuple[Any, ...], num_rows: int) -> "Arrangement | None":
        """How to gather the table for a lookup, or `None` to leave it to XLA.

        It is gathered only if the same mesh axes split the table and the tokens, and there are at
        least as many tokens, of the given shape, as rows. Columns that other axes split stay where
        they are.
        """
        batch, shared, (vocabulary, *others) = self._compare_axes()
        count = self.size(flat(shared))
        if count == 1:
            return None
        sizes = zip(shape, self.batch, strict=True)
        if any(not isinstance(n, int) or n % self.size(axes) != 0 for n, axes in sizes):
            return None  # a symbolic size, of `jax.export`, or rules that do not fit
        num_tokens = math.prod(shape) * count // self.size(batch)
        if num_tokens < num_rows // self.size(vocabulary):
            return None
        table = tuple(map(operator.add, (vocabulary, *others), shared))
        return Arrangement(table, vocabulary, shared, ())

    def arrange(self, num_tokens: Any, num_rows: int) -> "Arrangement":
        """Decides which rows each device works on.

        Of mesh axes that split the table as well as the batch, no device has all that its tokens
        need. Then the table is gathered, or the tokens are: the fewer. If `data` splits the batch
        and the rows, and `model` the rows, then a device works on the rows that all devices of its
        `model` have together; or on its own rows, with the tokens of all devices.

        Both numbers are those of the arrays that are handed over, which are the part of a device
        along manual axes. The number of tokens may be symbolic where nothing is split.
        """
        batch, shared, (vocabulary, *others) = self._compare_axes()
        manual, manual_shared = self.manual_vocabulary, self.manual_shared

        def divides(axes: Axes) -> bool:
            return num_rows % self.size(axes + flat(shared)) == 0

        # JAX turns parts of columns into parts of rows, by an all-to-all.
        if divides(vocabulary + flat(others)):
            vocabulary += flat(others)
        gathered = tuple(map(operator.add, manual_shared, shared))
        # A gathered manual axis must be the last that splits the rows, so none may follow it.
        kept = () if manual_shared[0] else vocabulary
        whole = Arrangement((kept + shared[0], *shared[1:]), manual + kept, gathered, ())
        if not flat(gathered) or flat(manual_shared[1:]) or not divides(vocabulary):
            return whole
        tokens = num_tokens * self.size(flat(gathered)) // self.size(batch)
        rows = num_rows * self.size(manual_shared[0]) // self.size(vocabulary)
        if not 0 < tokens < rows:  # XLA gathers no empty array
            return whole
        none = ((),) * len(shared)
        split = (vocabulary + flat(shared), *none[1:])
        of_tokens = manual_shared[0] + flat(shared)
        return Arrangement(split, manual + manual_shared[0] + split[0], none, of_tokens)

    def _compare_axes(self) -> tuple[Axes, tuple[Axes, ...], tuple[Axes, ...]]:
        """Those of the batch; of each axis of the table, those among these, and the others."""
        batch = flat(self.batch)
        shared = tuple(common(axes, batch) for axes in self.table)
        return batch, shared, tuple(remaining(axes, [batch]) for axes in self.table)

    def with_examples(self, axes: Axes) -> "Split":
        """The split of a batch with one more axis in front, which the mesh axes split."""
        return self._replace(batch=(axes, *self.batch))

    def map(
        self,
        function: Callable[..., Any],
        in_specs: tuple[Any, ...],
        out_specs: PyTree,
        arguments: tuple[PyTree, ...],
    ) -> Any:
        """`function` of the parts that each device has of the arguments."""

        def reshard_tree(spec: PartitionSpec, tree: PyTree) -> PyTree:
            axes = [*map(as_axes, spec)]
            return jax.tree.map(lambda array: reshard(self.mesh, array, axes), tree)

        arguments = jax.tree.map(
            reshard_tree, in_specs, arguments, is_leaf=lambda node: isinstance(node, PartitionSpec)
        )
        for names in filter(None, (self.entered, self.mapped)):
            mapped = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=in_specs,
                out_specs=out_specs,
                axis_names=names,
            )
            try:
                return mapped(*arguments)
            except ValueError as error:
                # No type shows which explicit axes a `jax.vmap` maps over
                if "to be a subset of mesh.axis_names" not in str(error):
                    raise
        if self.mapped:
            raise MappedAxisError(
                f"one of the mesh axes {sorted(self.mapped)} splits the table as well as the axis "
                "that this `jax.vmap` maps over. Call the method on the whole batch instead, "
                "or reshard the table first."
            )
        if self.mesh is None or not mesh_is_unset():
            return function(*arguments)
        # of arrays on an explicit mesh that is not set
        with jax.sharding.use_abstract_mesh(self.mesh):
            return function(*arguments)


class Arrangement(NamedTuple):
    """The rows that each device works on, and what is gathered for that."""

    table: tuple[Axes, ...]  # how explicit and automatic axes split the table first
    vocabulary: Axes  # the axes along which devices work on different rows
    gathered: tuple[Axes, ...]  # those over which the table is gathered, for each of its axes
    tokens: Axes  # those over which the tokens of a chunk are gathered

    @property
    def spec(self) -> PartitionSpec:
        return as_spec(self.table)

    @property
    def columns(self) -> tuple[Axes, ...]:
        """How the embedding axes are split in what each device works on."""
        pairs = zip(self.table[1:], self.gathered[1:], strict=True)
        return tuple(remaining(axes, [gathered]) for axes, gathered in pairs)


def whole_axes(table: EmbeddingTable, hidden: Array, rules: Rules | None) -> dict[str, int]:
    """The embedding axes of a table. Of those that rules split over manual axes, it has a part."""
    mesh, rules = find_mesh(hidden), {} if rules is None else rules
    manual = axes_of_type(mesh, AxisType.Manual)

    def parts(name: str) -> int:
        return count_devices(mesh, common(as_axes(rules.get(name)), manual))

    return {name: size * parts(name) for name, size in table.embedding_axes.items()}


def manual_rules(rules: Rules | None, mesh: AbstractMesh | None) -> Rules:
    """The rules, as far as they are about manual axes, or axes that do not exist."""
    types = axis_types(mesh)
    return {
        key: tuple(a for a in as_axes(axes) if types.get(a, AxisType.Manual) == AxisType.Manual)
        for key, axes in (rules or {}).items()
    }


def find_split(
    table: EmbeddingTable,
    batched: Array | None,
    batch_axes: int,
    rules: Rules | None,
    *,
    must_divide: bool = True,
) -> Split:
    """Which mesh axes split a table, and a batch of tokens that it is used on.

    **Arguments:**

    - `table`: not a stacked one.
    - `batched`: tokens or hidden vectors, of which the first `batch_axes` axes may be split;
        `None` for tokens in a NumPy array or a Python number.
    - `must_divide`: whether each axis of the batch must be a multiple of the mesh axes that split
        it.
    - `rules`: the mesh axes that split the first axis of the batch, or a `PartitionSpec` of several
        axes of the batch, under `"batch"`; and those of each axis of the table, under its name.

    **Raises:**

    A `ValueError` for rules that do not fit the mesh or the arrays.
    """
    rules = {} if rules is None else rules
    row_axis, embeddings = table._row_axis, table.embeddings
    names = row_axis.first(table.axis_names)
    mesh = find_mesh(embeddings, batched)
    types = axis_types(mesh)
    _check_rules(rules, ("batch", *names), types)
    if mesh is None:
        none = ((),) * len(names)
        return Split(None, table=none, manual_table=none, can_tile=jax.device_count() == 1)
    explicit = row_axis.first(explicit_axes(embeddings))
    table_axes = dict(zip(names, explicit, strict=True))
    split = _read_split(mesh, table_axes, batched, batch_axes, rules)
    if must_divide and batched is not None:
        for size, axes in zip(batched.shape, split.batch, strict=False):
            _check_divides(split, "batch", size, axes, "")
    advice = " Make the table with `pad_to_multiple_of`."
    for name, size, axes in zip(names, row_axis.first(embeddings.shape), split.table, strict=True):
        _check_divides(split, name, size, axes, advice)
        advice = ""  # for the other axes
    _check_manual(split, names, embeddings, batched, rules)
    return split


def _read_split(
    mesh: AbstractMesh,
    table_axes: dict[str, Axes],
    batched: Array | None,
    batch_axes: int,
    rules: Rules,
) -> Split:
    """`table_axes` are the explicit mesh axes that split each axis of the table."""
    batch = [] if batched is None else explicit_axes(batched)[:batch_axes]
    automatic = axes_of_type(mesh, AxisType.Auto)
    manual = axes_of_type(mesh, AxisType.Manual)

    def ruled(kind: Axes, key: str) -> Axes:
        return common(as_axes(rules.get(key)), kind)

    # Rules for explicit axes are not needed: types know better.
    of_batch = rules.get("batch")
    entries = of_batch if isinstance(of_batch, PartitionSpec) else [of_batch]
    for i, entry in enumerate(entries[: len(batch)]):
        batch[i] += common(as_axes(entry), automatic)
    table = tuple(axes + ruled(automatic, name) for name, axes in table_axes.items())
    vocabulary = remaining(table[0], batch)
    return Split(
        mesh=mesh,
        batch=tuple(batch),
        table=table,
        # NumPy arrays and Python numbers are the same on all devices.
        manual_batch=() if batched is None else ruled(manual, "batch"),
        manual_table=tuple(ruled(manual, name) for name in table_axes),
        can_tile=jax.device_count() == 1 or bool(vocabulary) or not remaining(automatic, batch),
        unruled=() if "batch" in rules else remaining(automatic, table),
    )


def _check_rules(rules: Rules, keys: tuple[str, ...], types: dict[str, AxisType]) -> None:
    if "batch" in rules and keys.count("batch") > 1:
        raise ValueError(
            'the rule for "batch" is that of the tokens, but this table has an axis of that name: '
            "give the axis another name."
        )
    for key in keys:
        if unknown := [axis for axis in as_axes(rules.get(key)) if axis not in types]:
            has = f"has the axes {tuple(types)}" if types else "is not set: use `jax.set_mesh`"
            raise ValueError(
                f"rules={dict(rules)} split {key!r} over the mesh axis {unknown[0]!r}, but the "
                f"mesh {has}."
            )
    for names in keys[:1], keys[1:]:  # those of the batch, and of the table
        find_entries(rules, names)


def _check_divides(split: Split, name: str, size: int, axes: Axes, advice: str) -> None:
    if size % split.size(axes) != 0:
        raise ValueError(
            f"the axis {name!r} of size {size} is split over the mesh axis {', '.join(axes)!r}, "
            f"whose size {split.size(axes)} does not divide it.{advice}"
        )


def _check_manual(
    split: Split,
    names: tuple[str, ...],
    embeddings: Array | np.ndarray,
    batched: Array | None,
    rules: Rules,
) -> None:
    """Inside `jax.shard_map`, types say along which axes an array differs, though not why."""
    of_table, of_batch = varying_axes(embeddings), varying_axes(batched)
    (name, *_), (vocabulary, *embedding) = names, split.manual_table
    for what, axes, differs in (
        (f"the table of {name!r}", flat(split.manual_table), of_table),
        ("the batch", split.manual_batch, of_batch),
    ):
        if missing := set(axes) - differs:
            raise ValueError(
                f"rules split {what} over {sorted(missing)}, along which it is the same on all "
                "devices of this `jax.shard_map`. If that is meant, leave these axes out of the "
                "rules. Else split it by the `in_specs`, and leave `check_vma=True`."
            )
    if both := set(split.manual_vocabulary) & of_batch:
        raise ValueError(
            f"the tokens must be the same along the mesh axes that split the vocabulary {name!r}, "
            f"but differ along {sorted(both)}. If these split the batch as well, say so in the "
            'rules, under "batch".'
        )
    if columns := remaining(flat(embedding), [split.manual_batch]):
        raise ValueError(
            f"the mesh axes {columns} split the embedding, but not the batch: gather the table "
            "over them by `jax.lax.all_gather`, and leave them out of the rules."
        )
    order = split.manual_vocabulary + split.manual_shared[0]
    if vocabulary != order:
        raise ValueError(
            f"of the mesh axes {vocabulary} of the vocabulary {name!r}, those that also split the "
            f"batch must come last, in the rules and in the `in_specs`: {order}."
        )
    if (unsaid := of_table - {*flat(split.manual_table)}) and name not in rules:
        raise ValueError(
            f"inside this `jax.shard_map` the table differs along {sorted(unsaid)}. If that splits "
            f"its vocabulary, say so by rules={{{name!r}: ...}}; if each device has a table of its "
            f"own, by rules={{{name!r}: None}}, also for a whole table from `jax.lax.all_gather`."
        )
