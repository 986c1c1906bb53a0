"""Training some rows of a vocabulary, and leaving the others bit for bit as they are."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Int, PyTree

from ._inputs import as_array
from ._sharding import Axes, explicit_axes, find_mesh, Split
from ._vocabulary import map_vocabulary, Place


class FrozenRows(eqx.Module):
    """The second result of [`eqx_embedding.partition_rows`][]."""

    model: PyTree  # without the other leaves that are trained
    rows: Int[Array, " rows"]
    # For each leaf of the vocabulary its number of rows, and their axis, which is counted from the
    # end, as `vmap` and `scan` take axes in front away
    places: tuple[tuple[int, int] | None, ...] = eqx.field(static=True)


def partition_rows(
    model: PyTree,
    rows: ArrayLike | Sequence[int | np.integer] | slice,
    vocabulary_axis: str = "vocabulary",
    filter_spec: PyTree[bool | Callable[[Any], bool]] = False,
) -> tuple[PyTree, FrozenRows]:
    """Splits a model into some rows of a vocabulary, to be trained, and the rest, frozen.

    ```python
    trained, frozen = partition_rows(model, slice(50257, None))   # the tokens from 50257 on
    opt_state = optimizer.init(trained)

    def loss(trained, frozen, tokens, targets):
        return combine_rows(trained, frozen).loss(tokens, targets)
    ```

    The parameter is an array of those rows alone. So no optimizer has moments for the others, and
    neither weight decay nor anything else can change them. This is `eqx.partition` for rows.

    **Arguments:**

    - `model`: any PyTree that holds an [`eqx_embedding.EmbeddingTable`][] of this vocabulary.
    - `rows`: the tokens to train: integers, a slice or range, or a mask with a boolean for each
        token. They are known when this is called, so not traced by `jax.jit`.
    - `vocabulary_axis`: the vocabulary, by the `vocabulary_axis` of its tables. All of them are
        split, with their biases. Defaults to `"vocabulary"`.
    - `filter_spec`: what else of the model to train, as in `eqx.partition`: `eqx.is_inexact_array`
        is all of it. Of the vocabulary it is the rows at any rate. Defaults to `False`: nothing.

    **Returns:**

    `(trained, frozen)`. `trained` is like the model, with an array of `rows`, in their order, for
    each array of the vocabulary, and with `None` for what is not trained: no model yet, for its
    tables count from the first of those rows. `frozen` is the rest, a PyTree with the whole old
    table, and knows the rows. Both go through `eqx.filter_jit`; other rows, of the same number,
    compile nothing anew. Where a mesh splits the vocabulary of a table, each device has all of the
    trained rows.

    **Raises:**

    A `ValueError` for rows that repeat, are out of range (below 0, or not below the number of
    tokens without padding) or none at all, and if no table is of this vocabulary, none has an
    array, or the model is a skeleton, which takes `eqx.filter_eval_shape` around this call. A
    `TypeError` for traced rows.
    """
    others, static = eqx.partition(model, filter_spec)
    marked = map_vocabulary(_Mark, model, vocabulary_axis)
    leaves, structure = _flatten(model)
    places = [leaf.place if isinstance(leaf, _Mark) else None for leaf in _flatten(marked)[0]]
    sizes = {place.vocab_size for place in places if place is not None}
    if not sizes:
        raise ValueError(f"the tables of the vocabulary {vocabulary_axis!r} hold no arrays.")
    index = _as_index(rows, sizes.pop())

    trained, frozen = _flatten(others)[0], _flatten(static)[0]
    for i, place in enumerate(places):
        if place is not None:
            trained[i], frozen[i] = _take(leaves[i], index, place.axis), leaves[i]
    sizes_and_axes = tuple(
        None if place is None else (leaf.shape[place.axis], place.axis - len(leaf.shape))
        for leaf, place in zip(leaves, places, strict=True)
    )
    return structure.unflatten(trained), FrozenRows(
        structure.unflatten(frozen), jax.numpy.asarray(index), sizes_and_axes
    )


def combine_rows(trained: PyTree, frozen: FrozenRows) -> PyTree:
    """Puts the two results of [`eqx_embedding.partition_rows`][] together again.

    Each call copies the tables of the vocabulary, as the gradient with respect to `trained` makes
    that of whole tables on its way. The logits of a loss exist no more than otherwise.

    **Arguments:**

    - `trained`: the rows, and what else is trained, as they are now.
    - `frozen`: all else.

    **Returns:**

    The model, with the tables and biases in their own dtypes.

    **Raises:**

    A `ValueError` if the two do not fit each other: they must be the results of one call of
    [`eqx_embedding.partition_rows`][], and neither resized since. (Those of two calls for as many
    rows do fit each other, and the rows of `frozen` hold: store both parts in a checkpoint.)
    """
    (new, structure), (old, expected) = _flatten(trained), _flatten(frozen.model)
    if structure != expected:
        raise ValueError(
            "trained and frozen must be the two results of one call of partition_rows, neither "
            "resized since, but their structures differ."
        )
    leaves = [x if y is None else y for x, y in zip(old, new)]
    for i, place in enumerate(frozen.places):
        if place is not None:
            size, axis = place
            if old[i].shape[axis] != size:
                raise ValueError(
                    f"frozen has a table of {old[i].shape[axis]} rows, which had {size} when "
                    "partition_rows made it: combine the two parts before you resize the model."
                )
            axis += len(old[i].shape)
            _check_shape(np.shape(new[i]), old[i].shape, axis, len(frozen.rows))
            leaves[i] = _put(old[i], frozen.rows, axis, new[i].astype(old[i].dtype))
    return expected.unflatten(leaves)


class _Mark:
    """Stands for an array of the vocabulary, to find its leaf."""

    def __init__(self, array: Any, place: Place):
        self.place = place


def _check_shape(shape: tuple[int, ...], of_table: tuple[int, ...], axis: int, rows: int) -> None:
    expected = (*of_table[:axis], rows, *of_table[axis + 1 :])
    if shape != expected:  # which JAX might broadcast
        raise ValueError(
            f"trained must have an array of shape {expected} for the {rows} rows of a table of "
            f"shape {of_table}, got {shape}."
        )


def _take(array: ArrayLike | jax.ShapeDtypeStruct, rows: np.ndarray, axis: int) -> Array:
    if isinstance(array, jax.ShapeDtypeStruct):
        raise ValueError(
            "a skeleton has no rows to take. Those of both parts are "
            "`eqx.filter_eval_shape(lambda model: partition_rows(model, rows), model)`."
        )
    array = jax.numpy.asarray(array)
    spec = explicit_axes(array)
    spec[axis] = ()  # the rows are few: each device has all of them
    at = array.at[(slice(None),) * axis + (rows,)]
    return at.get(unique_indices=True, out_sharding=_sharding(array, spec))


def _put(array: ArrayLike, rows: Array, axis: int, new: Array) -> Array:
    array = jax.numpy.asarray(array)
    at = array.at[(slice(None),) * axis + (rows,)]
    return at.set(new, unique_indices=True, out_sharding=_sharding(array, explicit_axes(array)))


def _sharding(array: Array, axes: list[Axes]) -> NamedSharding | None:
    """Of an array on the mesh of `array`, split by explicit mesh axes, if that has any."""
    return Split(find_mesh(array)).sharding(axes)


def _flatten(tree: PyTree) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)


def _as_index(rows: ArrayLike | Sequence[int | np.integer] | slice, vocab_size: int) -> np.ndarray:
    if isinstance(rows, slice):
        index = np.arange(vocab_size)[rows]
    else:
        try:
            index = np.asarray(as_array("rows", rows))
        except jax.errors.TracerArrayConversionError:
            raise TypeError(
                "rows must be known when partition_rows is called, not traced: split the model "
                "outside of `jax.jit`, and give it both parts."
            ) from None
    if index.dtype == bool and index.shape == (vocab_size,):
        index = np.flatnonzero(index)
    if index.ndim != 1 or index.size == 0 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            "rows must be at least one integer, a slice, or a boolean for each of the "
            f"{vocab_size} tokens, got {index.dtype.name} of shape {index.shape}."
        )
    outside = index[(index < 0) | (index >= vocab_size)]
    if outside.size > 0:
        raise ValueError(
            f"the vocabulary has {vocab_size} tokens, so rows must be at least 0 and below "
            f"{vocab_size}, got {outside[:5].tolist()}."
        )
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        raise ValueError(f"rows must be different, got {values[counts > 1][:5].tolist()} again.")
    return index.astype(np.int32)
