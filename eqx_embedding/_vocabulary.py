"""Growing and shrinking the vocabulary of every table in a PyTree."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._inputs import as_int, at_least_float32, Whole
from ._sharding import as_axes, Split
from ._table import EmbeddingTable


def resize_vocabulary(
    tree: PyTree,
    vocab_size: Whole,
    vocabulary_axis: str = "vocabulary",
    *,
    key: PRNGKeyArray | None = None,
    pad_to_multiple_of: Whole = 1,
) -> PyTree:
    """Grows or shrinks every table of a vocabulary, and its bias with it.

    ```python
    model = resize_vocabulary(model, 50300, key=key)
    opt_state = resize_vocabulary(opt_state, 50300)
    ```

    The rows of tokens that stay are kept bit for bit, and so is everything else. A table that is
    stored once stays stored once, within `eqx.nn.Shared` as well.

    With a key, new rows are drawn from the normal distribution with the mean and covariance of the
    old ones, as in [Hewitt, 2021](https://nlp.stanford.edu/~johnhew/vocab-expansion.html), and the
    bias of a new token together with its row. What is drawn for a token does not depend on how
    many tokens are new. Each table gets a draw of its own, unless two hold the same array. Without
    a key, new rows and their bias are zero, which is what the state of an optimizer wants.

    Padding is made anew: rows of padding that become tokens are filled as other new rows are.

    **Arguments:**

    - `tree`: a model, the state of an optimizer whose moments mirror the model, or another PyTree
        that holds an [`eqx_embedding.EmbeddingTable`][]. The skeletons of
        `eqx.filter_eval_shape` become those of the new sizes. What else stands for a table's array
        without being one, such as the `None` of `eqx.partition`, stays.
    - `vocab_size`: the number of tokens to have, without padding.
    - `vocabulary_axis`: the vocabulary, by the `vocabulary_axis` of its tables. Tables of others,
        of positions say, are left alone. Defaults to `"vocabulary"`.
    - `key`: a `jax.random.key` for the new rows. Defaults to `None`: they are zero. Not for a tree
        with the state of an optimizer in it: second moments would be drawn below zero, too.
    - `pad_to_multiple_of`: rows of zeros are added until their number is a multiple of this.
        Defaults to 1, which leaves no padding.

    **Returns:**

    The tree with its tables resized. One that has this size already keeps its array. What a mesh
    splits stays split, without being gathered.

    **Raises:**

    A `ValueError` for a size below 1; if no table is of this vocabulary; if its tables differ in
    size, for then they are several vocabularies, and need several names; if an array in the
    place of a table's lacks the table's axes, as the factored moments of Adafactor do; and for a
    number of rows that the mesh axes which split a table do not divide.
    """
    if min(vocab_size, pad_to_multiple_of) < 1:
        raise ValueError(
            f"vocab_size and pad_to_multiple_of must be at least 1, got {vocab_size} and "
            f"{pad_to_multiple_of}."
        )
    size = as_int(vocab_size)
    padding_rows = -size % as_int(pad_to_multiple_of)
    resized: dict[tuple[int, int], Any] = {}  # one array in two fields stays one array

    def resize(array: Any, place: Place) -> Any:
        which = id(array), place.axis
        if which not in resized:
            draw = None if key is None else jax.random.fold_in(key, place.table)
            resized[which] = _resize(array, place, size, padding_rows, draw)
        return resized[which]

    return map_vocabulary(resize, tree, vocabulary_axis, padding_rows)


class Place(NamedTuple):
    """What an array of a vocabulary is in its tree."""

    axis: int  # of the vocabulary, in the array
    stacked: int  # how many axes stand in front of the named ones
    vocab_size: int  # without padding
    table: int  # the number of the table, counted through the tree


def map_vocabulary(
    function: Callable[[Any, Place], Any],
    tree: PyTree,
    vocabulary_axis: str,
    padding_rows: int | None = None,
) -> PyTree:
    """Replaces every array of a vocabulary, and the number of padding rows unless it is `None`."""
    nodes, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_table)
    sizes = _vocabularies(nodes, vocabulary_axis)
    if vocabulary_axis not in sizes:
        found = f"those of {', '.join(map(repr, sizes))}" if sizes else "no table at all"
        raise ValueError(
            f"no table has the vocabulary axis {vocabulary_axis!r}: this tree holds {found}."
        )
    vocab_size = _single_size(vocabulary_axis, sizes[vocabulary_axis])
    numbers: dict[int, int] = {}

    def replace(table: Any) -> Any:
        if not _is_table(table) or table.vocabulary_axis != vocabulary_axis:
            return table
        names, embeddings, bias = table.axis_names, table.embeddings, table.bias
        number = numbers.setdefault(id(embeddings), len(numbers))
        if _is_array(embeddings):
            stacked = len(embeddings.shape) - len(names)
            axis = stacked + names.index(vocabulary_axis)
            embeddings = function(embeddings, Place(axis, stacked, vocab_size, number))
        if _is_array(bias):
            axis = len(bias.shape) - 1
            bias = function(bias, Place(axis, axis, vocab_size, number))
        padding = table.padding_rows if padding_rows is None else padding_rows
        # by way of a table that its checks accept, for what stands for an array may be no array
        shape = [padding + 1 if name == vocabulary_axis else 1 for name in names]
        table = EmbeddingTable(jnp.zeros(shape), names, vocabulary_axis, padding)
        return eqx.tree_at(
            lambda table: (table.embeddings, table.bias),
            table,
            (embeddings, bias),
            is_leaf=lambda leaf: leaf is None,
        )

    return structure.unflatten([replace(node) for _, node in nodes])


def _is_table(node: Any) -> bool:
    return isinstance(node, EmbeddingTable)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def _vocabularies(nodes: list[tuple[Any, Any]], vocabulary_axis: str) -> dict[str, dict[int, str]]:
    """For each vocabulary axis, the sizes that arrays have along it, and where.

    Those of `vocabulary_axis` must have all axes of their tables.
    """
    sizes: dict[str, dict[int, str]] = {}
    for path, table in nodes:
        if not _is_table(table):
            continue
        found = sizes.setdefault(table.vocabulary_axis, {})
        where = f"tree{jax.tree_util.keystr(path)}"
        if _is_array(table.embeddings):
            shape = table.embeddings.shape
            if len(shape) < len(table.axis_names):
                if table.vocabulary_axis != vocabulary_axis:
                    continue
                raise ValueError(
                    f"{where} has an array of shape {shape} in the place of the embeddings with "
                    f"axis_names={table.axis_names}: it cannot be resized. If this is the state of "
                    "an optimizer that does not keep one number for each parameter, such as "
                    "Adafactor, make a new state from the resized model."
                )
            if table.vocab_size < 1 and table.vocabulary_axis == vocabulary_axis:
                raise ValueError(
                    f"{where} has an array of shape {shape}, which is all padding by padding_rows="
                    f"{table.padding_rows}. If these are the rows of partition_rows, or a state "
                    "made from them, use combine_rows first, and make a new state."
                )
            found.setdefault(table.vocab_size, where)
        if _is_array(table.bias):
            found.setdefault(table.bias.shape[-1] - table.padding_rows, f"{where}.bias")
    return sizes


def _single_size(vocabulary_axis: str, sizes: dict[int, str]) -> int:
    if len(sizes) > 1:
        raise ValueError(
            f"the tables of the vocabulary {vocabulary_axis!r} differ in size: "
            + ", ".join(f"{size} tokens at {where}" for size, where in sizes.items())
            + ". Give different vocabularies different names, by the vocabulary_axis of their "
            "tables."
        )
    return next(iter(sizes), 0)


def _resize(
    array: Any, place: Place, vocab_size: int, padding_rows: int, key: PRNGKeyArray | None
) -> Any:
    rows = vocab_size + padding_rows
    if place.vocab_size == vocab_size and array.shape[place.axis] == rows:
        return array
    sharding = _sharding_for(array, place, rows)
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[: place.axis], rows, *array.shape[place.axis + 1 :])
        return array.update(shape=shape, sharding=sharding or array.sharding)
    change = functools.partial(_change_rows, place, vocab_size, padding_rows)
    if sharding is None:
        return change(jnp.asarray(array), key)
    # Each device makes its part, even where the parts of tokens alone would be of different sizes
    typed = Split(sharding.mesh.abstract_mesh).sharding([as_axes(axes) for axes in sharding.spec])
    if typed is not None:
        change = jax.sharding.auto_axes(change, out_sharding=typed)
    # A traced array does not say how automatic axes split it: that is left to the compiler
    placed = None if isinstance(array, Tracer) else sharding
    return jax.jit(change, out_shardings=placed)(array, key)


def _sharding_for(array: Any, place: Place, rows: int) -> NamedSharding | None:
    """How an array of this number of rows is split if it is split as `array` is."""
    traced = isinstance(array, Tracer)
    sharding = jax.typeof(array).sharding if traced else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    spec = [*sharding.spec] + [None] * (len(array.shape) - len(sharding.spec))
    axes = as_axes(spec[place.axis])
    parts = Split(sharding.mesh.abstract_mesh).size(axes)
    if rows % parts != 0:
        raise ValueError(
            f"the vocabulary is split over the mesh axis {', '.join(axes)!r}, whose size "
            f"{parts} does not divide {rows} rows. Give pad_to_multiple_of={parts}."
        )
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _change_rows(
    place: Place, vocab_size: int, padding_rows: int, array: Array, key: PRNGKeyArray | None
) -> Array:
    shape, axis = array.shape, place.axis
    kept = lax.slice_in_dim(array, 0, min(place.vocab_size, vocab_size), axis=axis)
    count = vocab_size - kept.shape[axis]

    def zeros(rows: int) -> Array:
        return jnp.zeros((*shape[:axis], rows, *shape[axis + 1 :]), array.dtype)

    if key is None or count == 0:
        return lax.concatenate([kept, zeros(count + padding_rows)], axis)
    # Stacked tables one after the other, the vocabulary first and the embedding in one axis
    rows = jnp.moveaxis(kept, axis, place.stacked)
    tables = rows.reshape(-1, place.vocab_size, *rows.shape[place.stacked + 1 :])
    keys = jax.random.split(key, len(tables))
    new = jax.vmap(functools.partial(_draw_rows, count))(keys, tables)
    new = jnp.moveaxis(new.reshape(*shape[: place.stacked], *new.shape[1:]), place.stacked, axis)
    return lax.concatenate([kept, new, zeros(padding_rows)], axis)


@functools.partial(jax.jit, static_argnums=0)
def _draw_rows(count: int, key: PRNGKeyArray, rows: Float[Array, "V ..."]) -> Float[Array, "M ..."]:
    """`count` rows with the mean and covariance of `rows`.

    The sum of the centred rows, each times a normal number, has V times their covariance: there is
    no need to compute it, and no matter if there are fewer rows than features.
    """
    V = len(rows)
    wide = at_least_float32(rows.dtype)
    flat = rows.reshape(V, -1).astype(wide)
    mean = jnp.mean(flat, axis=0)
    centred = (flat - mean[None]) / max(V - 1, 1) ** 0.5

    def draw(i: Array) -> Array:
        return mean + jax.random.normal(jax.random.fold_in(key, i), (V,), wide) @ centred

    # some at a time, for each takes as many random numbers as there are rows
    new = lax.map(draw, jnp.arange(count), batch_size=min(count, 256))
    return new.astype(rows.dtype).reshape(count, *rows.shape[1:])
