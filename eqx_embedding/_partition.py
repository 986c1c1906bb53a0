"""Training the same rows of a vocabulary in each step."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int, PyTree

from ._inputs import as_array
from ._rows import check_rows, find_repeated, put_into, take_from
from ._tree import check_structures, find_tables, find_vocab_size, is_table_of, map_arrays, Place


class FrozenRows(eqx.Module):
    """The second result of [`eqx_embedding.partition_rows`][]."""

    model: PyTree  # whole tables, and the other leaves that are not trained
    rows: Int[Array | np.ndarray, " rows"]
    vocabulary_axis: str = eqx.field(static=True)
    vocab_size: int = eqx.field(static=True)


def partition_rows(
    model: PyTree,
    rows: ArrayLike | Sequence[int | np.integer] | slice,
    vocabulary_axis: str = "vocabulary",
    filter_spec: PyTree[bool | Callable[[Any], bool]] = False,
) -> tuple[PyTree, FrozenRows]:
    """Splits a model into the rows of a vocabulary to train, and the frozen rest.

    ```python
    trained, frozen = partition_rows(model, slice(50257, None))   # the tokens from 50257 on
    opt_state = optimizer.init(trained)

    def loss(trained, frozen, tokens, targets):
        return combine_rows(trained, frozen).loss(tokens, targets)
    ```

    This is `eqx.partition` for rows. The parameter is an array of the selected rows only. So an
    optimizer has no moments for other rows, and nothing can change them, not even weight decay.

    **Arguments:**

    - `model`: any PyTree with an [`eqx_embedding.EmbeddingTable`][] of this vocabulary.
    - `rows`: the tokens to train: integers, a slice or range, or a boolean for each token. They
        must not be traced by `jax.jit`.
    - `vocabulary_axis`: which vocabulary, by the `vocabulary_axis` of its tables. All of its tables
        are split, with their biases. Defaults to `"vocabulary"`.
    - `filter_spec`: which other leaves of the model to train, as in `eqx.partition`. With
        `eqx.is_inexact_array`, all of them. The selected rows are always trained. Defaults to
        `False`: nothing else.

    **Returns:**

    `(trained, frozen)`.

    - `trained` has the structure of the model. Each array of the vocabulary has only the selected
        rows, in the order of `rows`, and all other leaves are `None` unless they are trained. Do
        not use its tables by themselves: token 0 would be the first selected row.
    - `frozen` is a PyTree with the rest, the whole old tables included.

    Both can be arguments of a function under `eqx.filter_jit`. For another selection of as many
    rows, it is not compiled again. If a mesh splits the vocabulary, each device has all selected
    rows.

    **Raises:**

    - `ValueError` if rows repeat; if one is out of range, below 0 or not below the number of tokens
        without padding; if there are none; if no table of this vocabulary has arrays; and for a
        skeleton: use `eqx.filter_eval_shape` around this call.
    - `TypeError` for traced rows.
    """
    vocab_size = find_vocab_size(find_tables(model, vocabulary_axis))
    if vocab_size == 0:
        raise ValueError(f"the tables of the vocabulary {vocabulary_axis!r} hold no arrays.")
    index = _as_index(rows, vocab_size)
    is_table = is_table_of(vocabulary_axis)
    others, static = eqx.partition(model, filter_spec)

    def take(place: Place, array: Any) -> Array:
        return take_from(array, place, index)

    def select_trained(node: Any, other: Any) -> Any:
        return map_arrays(take, node) if is_table(node) else other

    def select_frozen(node: Any, other: Any) -> Any:
        return node if is_table(node) else other

    trained = jax.tree.map(select_trained, model, others, is_leaf=is_table)
    frozen = jax.tree.map(select_frozen, model, static, is_leaf=is_table)
    return trained, FrozenRows(frozen, jnp.asarray(index), vocabulary_axis, vocab_size)


def combine_rows(trained: PyTree, frozen: FrozenRows) -> PyTree:
    """Combines the two results of [`eqx_embedding.partition_rows`][] into a model.

    Each call copies the tables of the vocabulary, and so does its gradient. A loss of the combined
    model still never holds the logits.

    **Arguments:**

    - `trained`: the selected rows, and whatever else is trained, with their current values.
    - `frozen`: the rest.

    **Returns:**

    The model, with tables and biases in their original dtypes.

    **Raises:**

    A `ValueError` if `trained` and `frozen` do not fit each other: both must come from one call of
    [`eqx_embedding.partition_rows`][], and must not be resized.

    The results of two calls for the same number of rows do fit each other. Then the new values go
    to the rows that were selected for `frozen`. So store both in a checkpoint.
    """
    check_structures(
        "trained",
        frozen.model,
        trained,
        _is_none,
        "they must be the two results of one call of partition_rows, not resized since then.",
        "frozen",
    )
    vocab_size = find_vocab_size(find_tables(frozen.model, frozen.vocabulary_axis))
    if vocab_size != frozen.vocab_size:
        raise ValueError(
            f"frozen has a vocabulary of {vocab_size} tokens, but had {frozen.vocab_size} when "
            "partition_rows made it: combine the two parts before you resize the model."
        )
    is_table = is_table_of(frozen.vocabulary_axis)

    def put(place: Place, array: Any, new: Any) -> Array:
        check_rows("trained", len(frozen.rows), place, array, new)
        return put_into(array, place, frozen.rows, new)

    def combine(new: Any, old: Any) -> Any:
        if is_table(old):
            return map_arrays(put, old, new)
        return old if new is None else new

    return jax.tree.map(
        combine, trained, frozen.model, is_leaf=lambda node: _is_none(node) or is_table(node)
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _as_index(rows: ArrayLike | Sequence[int | np.integer] | slice, vocab_size: int) -> np.ndarray:
    """The selected tokens as unique int32 numbers."""
    rows = np.arange(vocab_size)[rows] if isinstance(rows, slice) else rows
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
    if repeated := find_repeated(index):
        raise ValueError(f"rows must be unique, got {repeated} more than once.")
    return index.astype(np.int32)
