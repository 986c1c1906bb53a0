"""Growing and shrinking a vocabulary."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._devices import as_axes, Axes, count_devices
from .._inputs import as_named_int, check_byte_order, Whole
from .._suggest import suggest, suggest_key
from .._table import EmbeddingTable, RowAxis
from .._tree import (
    check_same_on_devices,
    find_tables,
    find_vocab_size,
    is_table_of,
    map_arrays,
    Place,
)
from ._join import join_trees
from ._new_rows import check_pieces, make_rows, Means, Pieces


# How to resize the state of an optimizer, whatever it keeps
FRESH = (
    "give `resize_vocabulary` the state of the resized model, with "
    "`fresh=optimizer.init(eqx.filter(model, eqx.is_array))`."
)


@suggest(key=suggest_key)
def resize_vocabulary(
    tree: PyTree,
    vocab_size: Whole,
    vocabulary_axis: str = "vocabulary",
    *,
    key: PRNGKeyArray | None = None,
    pieces: Pieces | None = None,
    fresh: PyTree | None = None,
    pad_to_multiple_of: Whole | None = None,
) -> PyTree:
    """Grows or shrinks every table of a vocabulary, and its bias with it.

    ```python
    new_model = resize_vocabulary(model, 50300, key=key)
    fresh = optimizer.init(eqx.filter(new_model, eqx.is_array))
    new_state = resize_vocabulary(opt_state, 50300, fresh=fresh)
    ```

    Rows of old tokens are kept bit for bit, and so is everything else in the tree. A table that is
    stored once stays stored once, also inside `eqx.nn.Shared`.

    With a key, a new row is the mean of the old ones plus a little noise, as
    [Hewitt, 2021](https://nlp.stanford.edu/~johnhew/vocab-expansion.html) recommends. The noise has
    the covariance of the old rows times 1e-5, the factor that Hewitt's code has. With the mean
    alone, the logit of a new token is the mean of the old logits, so a new token is at most as
    likely as the old ones are on average, and `M` new tokens beside `V` old ones raise the loss on
    old text by at most `log(1 + M / V)` nats (by Jensen's inequality, and without a soft cap). The
    bias of a new token is the median of the old ones minus log(100), which makes the token a
    hundred times less likely than with the median.

    Without a key and `fresh`, new rows and their biases are zero.

    Padding rows that become tokens are filled like other new rows. New padding rows are zero.

    **Arguments:**

    - `tree`: a model, the state of an optimizer, or any other PyTree with an
        [`eqx_embedding.EmbeddingTable`][]. A skeleton, from `eqx.filter_eval_shape`, gets the new
        shapes. Anything else in place of an array of a table does not change, such as the `None`
        that `eqx.partition` puts there.
    - `vocab_size`: the new number of tokens, without padding.
    - `vocabulary_axis`: which vocabulary, by the `vocabulary_axis` of its tables. Tables of other
        vocabularies, such as positions, do not change. Defaults to `"vocabulary"`.
    - `key`: a `jax.random.key` for the new rows of a model. The row of a token depends on the key,
        the number of the token and the old rows of its table. So two fields with one array get the
        same rows, also under `eqx.filter_jit`, and the number of new tokens does not matter.
        Rows with infinity or NaN are left out of the mean; if no other row is left, new ones are
        NaN. Defaults to `None`.
    - `pieces`: for new tokens, the old tokens that each replaces, such as `{50257: [464, 3290]}`.
        Their rows and biases are the means of those. Defaults to `None`.
    - `fresh`: for the state of an optimizer, the state that the same optimizer makes for the
        resized model. All new rows come from it, and padding. It is right for every optimizer.
        Without it new rows are zero, which suits states of moments alone: some optimizers also keep
        parameters, step sizes or positive numbers in their state. Leaves outside of the tables keep
        their values, but for arrays that differ from those of `fresh` in one axis, by the number of
        rows: they are joined. Defaults to `None`.
    - `pad_to_multiple_of`: rows of zeros are added until the number of rows is a multiple of this.
        Defaults to `None`: no padding, or as many rows as `fresh` has. Without `fresh`, that is an
        error if a table has padding rows now.

    **Returns:**

    The tree with its tables resized. A table that already has this size keeps its arrays. A table
    that is split over a mesh stays split, and is not gathered.

    **Raises:**

    A `ValueError`:

    - for a size below 1;
    - if `pad_to_multiple_of` is `None` and a table has padding rows;
    - if the tree has no table of this vocabulary, or its tables differ in size: different
        vocabularies need different names;
    - if an array lacks axes of its table, as the factored moments of Adafactor do, or a list is in
        its place, as in SM3: use `fresh`;
    - if `pieces` are not old tokens for new ones;
    - if `key` or `pieces` are given for a tree with tables in the state of an optimizer of optax;
    - if `fresh` is given beside `key`, `pieces` or `pad_to_multiple_of`, or does not fit the tree:
        the error names the path;
    - if the mesh axes that split a table do not divide its new number of rows;
    - inside a `jax.shard_map` along which a table differs.
    """
    size, multiple = _check_size(vocab_size, pad_to_multiple_of)
    if fresh is not None:
        if not key is pieces is pad_to_multiple_of is None:
            raise ValueError(
                "new rows and padding come from fresh, so that key, pieces and pad_to_multiple_of "
                "must not be given with it."
            )
        return join_trees(tree, fresh, size, vocabulary_axis, _join_arrays)
    tables = find_tables(tree, vocabulary_axis)
    if key is not None or pieces is not None:
        _check_no_state(tree, vocabulary_axis)
    if pad_to_multiple_of is None:
        _check_unpadded(tables)
    sizes = _Sizes(find_vocab_size(tables, FRESH), size, -size % multiple)
    means = check_pieces(pieces, sizes.old_tokens, size)
    is_table = is_table_of(vocabulary_axis)
    resized: dict[tuple[int, Place], Any] = {}  # so that one array in two tables stays one array

    def resize_array(place: Place, array: Any) -> Any:
        which = id(array), place
        if which not in resized:
            resized[which] = _resize_array(sizes, place, array, key, means)
        return resized[which]

    def resize(node: Any) -> Any:
        if not is_table(node):
            return node
        return map_arrays(resize_array, node, padding_rows=sizes.padding_rows)

    return jax.tree.map(resize, tree, is_leaf=is_table)


def _check_no_state(tree: PyTree, vocabulary_axis: str) -> None:
    """Means of old rows are no moments: Adam would divide by the root of a negative one."""

    def is_state(node: Any) -> bool:
        kind = type(node)
        return kind.__module__.split(".")[0] == "optax" and kind.__name__.endswith("State")

    is_table = is_table_of(vocabulary_axis)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_state):
        if is_state(node) and any(map(is_table, jax.tree.leaves(node, is_leaf=is_table))):
            raise ValueError(
                f"key and pieces are for the rows of a model, but tree{jax.tree_util.keystr(path)} "
                f"is the state of an optimizer, {type(node).__name__}: resize the model alone, "
                f"then {FRESH}"
            )


class _Sizes(NamedTuple):
    old_tokens: int
    tokens: int
    padding_rows: int

    @property
    def rows(self) -> int:
        return self.tokens + self.padding_rows


def _check_size(vocab_size: Whole, multiple: Whole | None) -> tuple[int, int]:
    size = as_named_int("vocab_size", vocab_size)
    multiple = 1 if multiple is None else as_named_int("pad_to_multiple_of", multiple)
    if min(size, multiple) < 1:
        raise ValueError(
            f"vocab_size and pad_to_multiple_of must be at least 1, got {size} and {multiple}."
        )
    return size, multiple


def _check_unpadded(tables: dict[str, EmbeddingTable]) -> None:
    for path, table in tables.items():
        if table.padding_rows > 0:
            raise ValueError(
                f"{path} has {table.padding_rows} padding rows, so pad_to_multiple_of must be "
                "given: 1 for no padding, or the multiple that the number of rows should be."
            )


def _resize_array(
    sizes: _Sizes, place: Place, array: Any, key: PRNGKeyArray | None, means: Means | None
) -> Any:
    """The array or skeleton with its new number of rows, split over a mesh as before."""
    row_axis = place.row_axis
    if sizes.old_tokens == sizes.tokens and row_axis.of(array.shape) == sizes.rows:
        return array
    sharding = _mesh_sharding(array)
    if sharding is not None:
        # A spec may be shorter than the shape
        spec = *sharding.spec, *[None] * (len(array.shape) - len(sharding.spec))
        _check_mesh_divides(sharding, as_axes(row_axis.of(spec)), sizes.rows)
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(shape=row_axis.replace(array.shape, [sizes.rows]))
    return _call_on_mesh(functools.partial(_change_rows, sizes, place, means), array, key)


def _call_on_mesh(change: Callable[..., Array], array: Any, other: Any) -> Array:
    """`change(array, other)`, split over a mesh as the array is."""
    sharding = _mesh_sharding(array)
    if sharding is None:
        return change(jnp.asarray(array), other)
    # In one program each device makes only its own rows, and the mesh need not divide those without
    # padding
    explicit = jax.typeof(array).sharding
    placed: Any = change
    if AxisType.Explicit in explicit.mesh.axis_types:
        placed = jax.sharding.auto_axes(change, out_sharding=explicit)
    # Automatic axes of a traced array cannot be seen, so the compiler decides
    out_sharding = None if isinstance(array, Tracer) else sharding
    return jax.jit(placed, out_shardings=out_sharding)(array, other)


def _mesh_sharding(array: Any) -> NamedSharding | None:
    """How a mesh splits an array or a skeleton, or `None` if it is not on a mesh."""
    traced = isinstance(array, Tracer)
    sharding = jax.typeof(array).sharding if traced else getattr(array, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if on_mesh else None


def _check_mesh_divides(sharding: NamedSharding, mesh_axes: Axes, rows: int) -> None:
    parts = count_devices(sharding.mesh, mesh_axes)
    if rows % parts != 0:
        raise ValueError(
            f"the vocabulary is split over the mesh axis {', '.join(mesh_axes)!r}, whose size "
            f"{parts} does not divide {rows} rows. Give pad_to_multiple_of={parts}."
        )


def _change_rows(
    sizes: _Sizes, place: Place, means: Means | None, array: Array, key: PRNGKeyArray | None
) -> Array:
    """The old rows that are kept, then new rows, then padding rows."""
    if place.num_stacked > 0:  # beside others, so that the caller cannot use `eqx.filter_vmap`
        keys = None if key is None else jax.random.split(key, len(array))
        change = functools.partial(_change_rows, sizes, place.of_one(), means)
        return eqx.filter_vmap(change)(array, keys)
    rows = place.row_axis.move_first(array)[: min(sizes.old_tokens, sizes.tokens)]
    new = make_rows(sizes.tokens - len(rows), place.field == "bias", rows, key, means)
    padding = jnp.zeros((sizes.padding_rows, *rows.shape[1:]), rows.dtype)
    return place.row_axis.move_back(jnp.concatenate([rows, new, padding]))


def _join_arrays(row_axis: RowAxis, kept: int, old: Any, new: Any) -> Any:
    """The rows before `kept` of the old array, and the others of the new one."""
    skeletons = [isinstance(array, jax.ShapeDtypeStruct) for array in (old, new)]
    if any(skeletons):
        if not all(skeletons):
            raise ValueError("the tree and fresh must both be skeletons, or neither.")
        return new

    check_same_on_devices(old)
    check_byte_order("the tree", old)
    check_byte_order("fresh", new)

    def join(old: Array, new: Array | np.ndarray) -> Array:
        rows, new_rows = map(row_axis.move_first, (old, new))
        joined = jnp.concatenate([rows[:kept], new_rows[kept:].astype(old.dtype)])
        return row_axis.move_back(joined)

    return _call_on_mesh(join, old, new)
