"""Finding the tables of a vocabulary in a tree, and their arrays."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ._devices import varying_axes
from ._inputs import check_byte_order
from ._table import EmbeddingTable, find_row_axis, RowAxis


class Place(NamedTuple):
    """Where the rows of an array of a table are."""

    field: str  # "embeddings" or "bias"
    row_axis: RowAxis
    num_stacked: int  # how many axes are in front of the named ones

    def of_one(self) -> "Place":
        """The place in one array of a stack."""
        return Place(self.field, RowAxis(self.row_axis.position - 1), self.num_stacked - 1)


def is_table_of(vocabulary_axis: str) -> Callable[[Any], bool]:
    """An `is_leaf` for `jax.tree.map` that makes the tables of this vocabulary leaves."""
    return lambda node: _is_table(node) and node.vocabulary_axis == vocabulary_axis


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or its skeleton, and not a mask or `None`."""
    return hasattr(leaf, "shape")


def find_tables(
    tree: PyTree, vocabulary_axis: str, required: bool = True
) -> dict[str, EmbeddingTable]:
    """The tables of a vocabulary, by the paths that error messages show.

    Unless they are `required`, a tree may have no tables at all.
    """
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_table)
    tables = {f"tree{jax.tree_util.keystr(path)}": x for path, x in nodes if _is_table(x)}
    found = {path: x for path, x in tables.items() if x.vocabulary_axis == vocabulary_axis}
    if not found and (required or tables):
        names = ", ".join(dict.fromkeys(repr(x.vocabulary_axis) for x in tables.values()))
        raise ValueError(
            f"no table has the vocabulary axis {vocabulary_axis!r}: this tree has "
            + (f"tables of {names}." if names else "no tables.")
        )
    return found


def find_vocab_size(tables: dict[str, EmbeddingTable], advice: str) -> int:
    """The number of tokens of these tables, which must be the same, or 0 if none has arrays.

    `advice` says what to do with the state of an optimizer that has another form.
    """
    sizes: dict[int, str] = {}
    for path, table in tables.items():
        for field, names in table._axes_of_arrays.items():
            array = getattr(table, field)
            if not is_array(array):
                _check_holds_no_arrays(f"{path}.{field}", array, advice)
                continue
            check_byte_order(f"{path}.{field}", array)
            check_same_on_devices(array)
            place = find_place(table, field, array)
            if place.num_stacked < 0:
                raise ValueError(
                    f"{path}.{field} has shape {array.shape}, but its axes are {names}. If this is "
                    "the state of an optimizer that does not keep one number for each parameter, "
                    f"such as Adafactor, {advice}"
                )
            size = table._count_tokens(place.row_axis.of(array.shape))
            sizes.setdefault(size, f"{path}.{field}")
    if len(sizes) > 1:
        raise ValueError(
            "the tables of one vocabulary must have the same size, got "
            + ", ".join(f"{size} tokens at {path}" for size, path in sizes.items())
            + ". Give different vocabularies different names, with `vocabulary_axis`."
        )
    return next(iter(sizes), 0)


def _check_holds_no_arrays(path: str, node: Any, advice: str) -> None:
    if any(map(is_array, jax.tree.leaves(node))):
        raise ValueError(
            f"{path} has a {type(node).__name__} of arrays in place of an array. If this is the "
            f"state of an optimizer, such as SM3, {advice}"
        )


def check_same_on_devices(array: Any) -> None:
    """Raises a `ValueError` if a device has only a part of the array, in a `jax.shard_map`."""
    if isinstance(array, jax.Array) and (axes := varying_axes(array)):
        raise ValueError(
            f"inside this `jax.shard_map` the table differs along {sorted(axes)}, so that tokens "
            "are not the numbers of its rows: take, put, train or resize rows outside of it."
        )


def check_structures(
    what: str,
    tree: PyTree,
    other: PyTree,
    is_leaf: Callable[[Any], bool],
    advice: str,
    expected: str = "the tree",
) -> None:
    """Raises a `ValueError` that names the first path at which two trees differ.

    The message calls them `expected` and `what`.
    """
    flat = [jax.tree_util.tree_flatten_with_path(x, is_leaf=is_leaf) for x in (tree, other)]
    if flat[0][1] == flat[1][1]:
        return
    paths, others = ([jax.tree_util.keystr(path) for path, _ in leaves] for leaves, _ in flat)
    first = next((a or b for a, b in itertools.zip_longest(paths, others) if a != b), "")
    raise ValueError(
        f"{what} must have the structure of {expected}, but they differ"
        + (f" at {first}" if first else " in what is not an array")
        + f": {advice}"
    )


def map_fields(
    function: Callable[[str], Any], table: EmbeddingTable, padding_rows: int | None = None
) -> EmbeddingTable:
    """The table with `function(field)` in place of each array.

    The new table has `padding_rows` padding rows, or with `None` as many as the old one.
    """
    padding_rows = table.padding_rows if padding_rows is None else padding_rows
    # Build with a dummy array to pass `__check_init__`, then swap in the real leaves
    names, vocabulary_axis = table.axis_names, table.vocabulary_axis
    shape = [padding_rows + 1 if name == vocabulary_axis else 1 for name in names]
    return eqx.tree_at(
        lambda table: [getattr(table, field) for field in table._axes_of_arrays],
        EmbeddingTable(np.zeros(shape), names, vocabulary_axis, padding_rows),
        [function(field) for field in table._axes_of_arrays],
        is_leaf=lambda leaf: leaf is None,
    )


def map_arrays(
    function: Callable[..., Any],
    table: EmbeddingTable,
    *others: EmbeddingTable,
    padding_rows: int | None = None,
) -> EmbeddingTable:
    """The table with `function(place, array, *arrays_of_others)` in place of each array.

    Anything else in place of an array does not change.
    """

    def change(field: str) -> Any:
        arrays = array, *rest = [getattr(x, field) for x in (table, *others)]
        if len({*map(is_array, arrays)}) > 1:
            raise ValueError(
                f"both tables must have an array for their {field}, or neither, got "
                f"{' and '.join(type(x).__name__ for x in arrays)}."
            )
        return function(find_place(table, field, array), array, *rest) if is_array(array) else array

    return map_fields(change, table, padding_rows)


def find_place(table: EmbeddingTable, field: str, array: Any) -> Place:
    """Where the rows of this array in a field are. `num_stacked` is negative if it lacks axes."""
    names = table._axes_of_arrays[field]
    num_stacked = len(array.shape) - len(names)
    row_axis = find_row_axis(names, table.vocabulary_axis, num_stacked)
    return Place(field, row_axis, num_stacked)


def _is_table(node: Any) -> bool:
    return isinstance(node, EmbeddingTable)
