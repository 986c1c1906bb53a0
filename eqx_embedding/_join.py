"""Joins the state of an optimizer with a new state, made for a vocabulary of another size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from ._table import EmbeddingTable
from ._tree import check_structures, find_place, find_tables, is_array, is_table_of, map_fields


Join = Callable[[int, int, Any, Any], Any]


def join_trees(
    tree: PyTree, fresh: PyTree, tokens: int, vocabulary_axis: str, join_arrays: Join
) -> PyTree:
    """The leaves of `tree`, and from `fresh` the rows of a vocabulary that it does not have.

    An array of a table says by its names where its rows are. Other leaves say it by their shapes,
    which differ in one axis: the vectors and lists of Adafactor and SM3.

    `join_arrays(axis, kept, old, new)` joins the rows before `kept` of `old` and the rest of `new`.
    """
    is_table = is_table_of(vocabulary_axis)
    advice = "it must be the state that the same optimizer makes from the resized model."
    check_structures("fresh", tree, fresh, is_table, advice)
    tables = [find_tables(x, vocabulary_axis, required=False) for x in (tree, fresh)]
    if not any(tables):
        return tree  # as that of SGD, which has no state
    first, new_first = (next(iter(found.values())) for found in tables)
    sizes: dict[int, str] = {}  # of the old vocabulary, as the leaves say
    kept_shapes: dict[str, tuple[int, ...]] = {}  # of leaves in tables that do not change

    def join_leaf(
        rows: _Rows, in_table: bool, field: str | None, path: Any, old: Any, new: Any
    ) -> Any:
        if not is_array(old) and not is_array(new):
            return old
        axis = _find_axis(rows, in_table, field, path, old, new)
        if axis is None:
            if in_table:
                kept_shapes[path] = tuple(old.shape)
            return old
        old_tokens = old.shape[axis] - rows.old.padding_rows
        sizes.setdefault(old_tokens, path)
        return join_arrays(axis, min(old_tokens, tokens), old, new)

    def join_node(path: Any, old: Any, new: Any) -> Any:
        name = "tree" + jax.tree_util.keystr(path)
        if not is_table(old):
            return join_leaf(_Rows(first, new_first, tokens), False, None, name, old, new)

        def join_field(field: str) -> Any:
            def join(path: Any, *leaves: Any) -> Any:
                where = f"{name}.{field}{jax.tree_util.keystr(path)}"
                rows, place = _Rows(old, new, tokens), None if path else field
                return join_leaf(rows, True, place, where, *leaves)

            fields = getattr(old, field), getattr(new, field)
            inner = f"fresh{jax.tree_util.keystr(path)}.{field}"
            check_structures(inner, *fields, lambda _: False, advice)
            return jax.tree_util.tree_map_with_path(join, *fields)

        return map_fields(join_field, new)

    joined = jax.tree_util.tree_map_with_path(join_node, tree, fresh, is_leaf=is_table)
    _check_old_rows(sizes, kept_shapes, tokens, first.padding_rows)
    return joined


def _check_old_rows(
    sizes: dict[int, str], kept_shapes: dict[str, tuple[int, ...]], tokens: int, padding: int
) -> None:
    """Raises a `ValueError` unless the leaves agree about the number of old rows."""
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


class _Rows(NamedTuple):
    old: EmbeddingTable
    new: EmbeddingTable
    tokens: int

    @property
    def num_rows(self) -> int:
        """Of the new table, padding included."""
        return self.tokens + self.new.padding_rows


def _find_axis(
    rows: _Rows, in_table: bool, field: str | None, path: str, old: Any, new: Any
) -> int | None:
    """The axis of the vocabulary, or `None` if the old leaf does not change."""
    old_shape, new_shape = (tuple(x.shape) if is_array(x) else None for x in (old, new))
    if old_shape is not None and new_shape is not None and len(old_shape) == len(new_shape):
        sizes = zip(old_shape, new_shape, strict=True)
        differ = [axis for axis, (before, after) in enumerate(sizes) if before != after]
        place = None if field is None else find_place(rows.new, field, new)
        # Padding rows may have become tokens, so that no size differs
        if place is not None and place.num_stacked >= 0 and differ in ([], [place.axis]):
            if new_shape[place.axis] == rows.num_rows:
                return place.axis
        if not differ and in_table and new_shape.count(rows.num_rows) == 1:
            return new_shape.index(rows.num_rows)
        if not differ:
            return None
        if len(differ) == 1 and new_shape[differ[0]] == rows.num_rows:
            return differ[0]
    raise ValueError(
        f"{path} has the shape {old_shape}, and {new_shape} in fresh, which must be the same but "
        f"for one axis, of {rows.num_rows} rows in fresh. If these are other numbers for another "
        "vocabulary, use fresh as the new state."
    )
