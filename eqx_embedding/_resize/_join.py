"""Joins the state of an optimizer with a new state, made for a vocabulary of another size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from .._table import EmbeddingTable, RowAxis
from .._tree import check_structures, find_place, find_tables, is_array, is_table_of, map_fields


Join = Callable[[RowAxis, int, Any, Any], Any]


def join_trees(
    tree: PyTree, fresh: PyTree, tokens: int, vocabulary_axis: str, join_arrays: Join
) -> PyTree:
    """The leaves of `tree`, and from `fresh` the rows of a vocabulary that it does not have.

    An array of a table says by its names where its rows are. Other leaves say it by their shapes,
    which differ in one axis: the vectors and lists of Adafactor and SM3.

    `join_arrays(row_axis, kept, old, new)` joins the rows before `kept` of `old` with the rest of
    `new`.
    """
    is_table = is_table_of(vocabulary_axis)
    advice = "it must be the state that the same optimizer makes from the resized model."
    check_structures("fresh", tree, fresh, is_table, advice)
    if not any(map(is_table, jax.tree.leaves(tree, is_leaf=is_table))):
        _check_same_shapes(tree, fresh, vocabulary_axis)
        return tree  # as that of SGD, which has no state
    tables = [find_tables(x, vocabulary_axis) for x in (tree, fresh)]
    first, new_first = (next(iter(found.values())) for found in tables)
    sizes: dict[int, str] = {}  # of the old vocabulary, as the leaves say
    kept_shapes: dict[str, tuple[int, ...]] = {}  # of leaves in tables that do not change

    def join_leaf(leaf: _Leaf) -> Any:
        old, new = leaf.old, leaf.new
        if not is_array(old) and not is_array(new):
            return old
        row_axis = _find_row_axis(leaf, tokens + leaf.new_table.padding_rows)
        if row_axis is None:
            if leaf.in_table:
                kept_shapes[leaf.path] = tuple(old.shape)
            return old
        old_tokens = row_axis.of(old.shape) - leaf.table.padding_rows
        sizes.setdefault(old_tokens, leaf.path)
        return join_arrays(row_axis, min(old_tokens, tokens), old, new)

    def join_node(path: Any, old: Any, new: Any) -> Any:
        if is_table(old):
            return _join_table(join_leaf, advice, path, old, new)
        return join_leaf(_Leaf("tree" + jax.tree_util.keystr(path), old, new, first, new_first))

    joined = jax.tree_util.tree_map_with_path(join_node, tree, fresh, is_leaf=is_table)
    _check_old_rows(sizes, kept_shapes, tokens, first.padding_rows)
    return joined


def _join_table(
    join_leaf: Callable[["_Leaf"], Any],
    advice: str,
    path: Any,
    table: EmbeddingTable,
    new_table: EmbeddingTable,
) -> Any:
    name = jax.tree_util.keystr(path)

    def join_field(field: str) -> Any:
        def join(path: Any, old: Any, new: Any) -> Any:
            where = f"tree{name}.{field}{jax.tree_util.keystr(path)}"
            whole = None if path else field
            return join_leaf(_Leaf(where, old, new, table, new_table, True, whole))

        fields = getattr(table, field), getattr(new_table, field)
        check_structures(f"fresh{name}.{field}", *fields, lambda _: False, advice)
        return jax.tree_util.tree_map_with_path(join, *fields)

    return map_fields(join_field, new_table)


def _check_same_shapes(tree: PyTree, fresh: PyTree, vocabulary_axis: str) -> None:
    """Raises a `ValueError` for a state without tables that depends on their size all the same."""
    leaves, new_leaves = map(jax.tree_util.tree_leaves_with_path, (tree, fresh))
    for (path, old), (_, new) in zip(leaves, new_leaves, strict=True):
        if is_array(old) and is_array(new) and tuple(old.shape) != tuple(new.shape):
            find_tables(tree, vocabulary_axis, required=False)  # is another vocabulary meant?
            raise ValueError(
                f"tree{jax.tree_util.keystr(path)} has the shape {tuple(old.shape)}, and "
                f"{tuple(new.shape)} in fresh, but is in no table, so its rows cannot be found. "
                "Use fresh as the new state."
            )


def _check_old_rows(
    sizes: dict[int, str], kept_shapes: dict[str, tuple[int, ...]], tokens: int, padding: int
) -> None:
    """Raises a `ValueError` unless the leaves agree about the number of old rows."""
    if not sizes and not any(kept_shapes.values()):
        return  # all tables are empty, as in a state of `optax.masked` without them
    if len(sizes) != 1:
        raise ValueError(
            f"fresh must be made from the resized model, with {tokens} tokens, and the tree from "
            "one before, but "
            + ", ".join(f"{path} has {size} tokens" for size, path in sizes.items())
            + ("." if sizes else "no array of the two has rows of this vocabulary.")
        )
    old_rows = next(iter(sizes)) + padding
    if unclear := [path for path, shape in kept_shapes.items() if old_rows in shape]:
        raise ValueError(
            f"{unclear[0]} has {old_rows} numbers, as many as there are old rows, so it may have "
            "one for each row. Use fresh as the new state."
        )


class _Leaf(NamedTuple):
    """A leaf of the two trees."""

    path: str
    old: Any
    new: Any
    table: EmbeddingTable  # that it is in, or else the first of the tree
    new_table: EmbeddingTable
    in_table: bool = False
    field: str | None = None  # of the table, if the leaf is its value


def _find_row_axis(leaf: _Leaf, num_rows: int) -> RowAxis | None:
    """The axis of the new rows, padding included, or `None` if the old leaf does not change."""
    old_shape, new_shape = (tuple(x.shape) if is_array(x) else None for x in (leaf.old, leaf.new))
    if old_shape is not None and new_shape is not None and len(old_shape) == len(new_shape):
        axes = [RowAxis(i) for i in range(len(new_shape))]
        differ = [axis for axis in axes if axis.of(old_shape) != axis.of(new_shape)]
        fitting = [axis for axis in axes if axis.of(new_shape) == num_rows]
        if leaf.field is not None:
            place = find_place(leaf.new_table, leaf.field, leaf.new)
            # Padding rows may have become tokens, so that no size differs
            if place.num_stacked >= 0 and differ in ([], [place.row_axis]):
                if place.row_axis in fitting:
                    return place.row_axis
        if not differ:
            return fitting[0] if leaf.in_table and len(fitting) == 1 else None
        if len(differ) == 1 and differ[0] in fitting:
            return differ[0]
    raise ValueError(
        f"{leaf.path} has the shape {old_shape}, and {new_shape} in fresh, which must be the same "
        f"but for one axis, of {num_rows} rows in fresh. If these are other numbers for another "
        "vocabulary, use fresh as the new state."
    )
