"""Training some rows of a vocabulary: those of each batch, or the same in each step."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Int, Integer, PyTree

from ._inputs import (
    as_array,
    as_count,
    check_byte_order,
    is_seen,
    nan_where,
    tokens_in_range,
    Whole,
)
from ._suggest import suggest, suggest_tokens
from ._tree import (
    check_structures,
    find_tables,
    find_vocab_size,
    is_array,
    is_table_of,
    map_arrays,
    Place,
)


OTHER_OPTIMIZER = (
    "it has no rows to take: use an optimizer whose state has the form of the parameters, or train "
    "the whole table."
)
# Fills up the tokens of `unique_tokens`, and stands for no token
NO_TOKEN = np.iinfo(np.int32).max


@suggest(tokens=suggest_tokens)
def unique_tokens(
    tokens: Integer[ArrayLike, "*batch"], size: Whole
) -> tuple[Int[Array, " size"], Int[Array, "*batch"]]:
    """Returns the unique tokens of a batch, and the place of each token among them.

    For [`eqx_embedding.take_rows`][]: the places are the tokens of a model with only those rows.

    **Arguments:**

    - `tokens`: integers of any shape `*batch`. They may be traced.
    - `size`: how many unique tokens to return, at least 1. All fit if it is `tokens.size`, or the
        size of the vocabulary if that is smaller.

    **Returns:**

    `(ids, places)`, of int32.

    - `ids`: the unique tokens in increasing order, of shape `(size,)`. If there are fewer, the rest
        is `jnp.iinfo(jnp.int32).max`, which stands for no token.
    - `places`: of shape `*batch`, with `ids[places] == tokens`. It is -1, which is out of range,
        for a token that does not fit, and for a negative one. So the loss of a batch with too many
        unique tokens is NaN, and not that of other tokens. (Not with `out_of_range="clip"` or
        `ignore_index=-1`, which hide such places: make masks from the tokens.)

    **Raises:**

    A `ValueError` for a size below 1. A `TypeError` for tokens that are not integers, or of 64 bits
    and traced outside of JAX's 64-bit mode.
    """
    size = as_count("size", size)
    tokens, in_range = tokens_in_range("tokens", tokens, NO_TOKEN)
    xp = np if isinstance(tokens, np.ndarray) else jnp
    tokens = jnp.asarray(xp.where(in_range, tokens, NO_TOKEN).astype(np.int32))
    sharding, tokens = _sharding_in_type(tokens), _replicate(tokens)
    # Two sorts are faster than `jnp.unique`, which sorts pairs
    ordered = jnp.sort(tokens.reshape(-1))
    repeats = jnp.pad(ordered[1:] == ordered[:-1], (1, 0))[: len(ordered)]  # of none, there is one
    ids = jnp.sort(jnp.where(repeats, NO_TOKEN, ordered))[:size]
    ids = jnp.pad(ids, (0, size - len(ids)), constant_values=NO_TOKEN)
    places = jnp.minimum(_count_smaller(ids, tokens), size - 1)
    found = (ids.at[places].get() == tokens) & (tokens != NO_TOKEN)
    places = jnp.where(found, places, -1).astype(np.int32)
    return ids, places if sharding is None else jax.reshard(places, sharding)


@suggest(tokens=suggest_tokens)
def take_rows(
    tree: PyTree, tokens: Integer[ArrayLike, " rows"], vocabulary_axis: str = "vocabulary"
) -> PyTree:
    """Returns a tree in which the tables of a vocabulary have only the rows of these tokens.

    With it, a training step touches only the rows of its batch:

    ```python
    @eqx.filter_jit(donate="all-except-first")
    def step(tokens, model, opt_state):
        ids, places = unique_tokens(tokens, tokens.size)
        small, state = take_rows((model, opt_state), ids)
        gradient = eqx.filter_grad(loss)(small, places)    # the places are the tokens of `small`
        updates, state = optimizer.update(gradient, state, eqx.filter(small, eqx.is_array))
        small = eqx.apply_updates(small, updates)
        return put_rows((model, opt_state), ids, (small, state))
    ```

    The moments and the weight decay of all other rows stand still in such a step. With an optimizer
    that has neither, such as plain SGD, the step equals that of the whole model. The loss must not
    use the whole vocabulary, as that of a tied model does: the small model has only these rows.

    **Arguments:**

    - `tree`: a model, the state of an optimizer that keeps one number for each parameter, or any
        other PyTree. One without tables is returned unchanged.
    - `tokens`: integers of shape `(rows,)`, such as those of [`eqx_embedding.unique_tokens`][].
        They may be traced.
    - `vocabulary_axis`: which vocabulary, by the `vocabulary_axis` of its tables. Defaults to
        `"vocabulary"`.

    **Returns:**

    The tree, with the rows of these tokens in each array of the vocabulary, in their order and
    without padding rows. Token 0 of it is `tokens[0]`. If a mesh splits the vocabulary, each device
    has all of these rows.

    The row of token `jnp.iinfo(jnp.int32).max` is zero. That of any other token out of range is
    NaN, or zero in an array of integers.

    **Raises:**

    A `ValueError` if the tree has tables, but none of this vocabulary; if the tables of the
    vocabulary differ in size; for an array that lacks axes of its table; for a skeleton; and inside
    a `jax.shard_map` along which a table differs. A `TypeError` for tokens that are not integers.
    """
    selected = _select(tree, tokens, vocabulary_axis)
    if selected is None:
        return tree
    index, missing = selected
    is_table = is_table_of(vocabulary_axis)

    def take(place: Place, array: Any) -> Array:
        return _invalidate(jnp.asarray(missing), place, _take_from(array, place, index))

    def take_table(node: Any) -> Any:
        return map_arrays(take, node, padding_rows=0) if is_table(node) else node

    return jax.tree.map(take_table, tree, is_leaf=is_table)


@suggest(tokens=suggest_tokens)
def put_rows(
    tree: PyTree,
    tokens: Integer[ArrayLike, " rows"],
    rows: PyTree,
    vocabulary_axis: str = "vocabulary",
) -> PyTree:
    """Puts the rows that [`eqx_embedding.take_rows`][] returned back, after they were changed.

    Under `eqx.filter_jit` with donation, the tables change in place. (XLA for CPUs copies those in
    bfloat16 and float8.)

    **Arguments:**

    - `tree`: the tree that the rows were taken from.
    - `tokens`: the same tokens. Nothing is written for tokens out of range.
    - `rows`: the result of [`eqx_embedding.take_rows`][], changed.
    - `vocabulary_axis`: which vocabulary, by the `vocabulary_axis` of its tables. Defaults to
        `"vocabulary"`.

    **Returns:**

    The tree, with these rows in the tables of the vocabulary, in their original dtypes, and with
    everything else from `rows`.

    **Raises:**

    A `ValueError` if a token repeats, or if `tree` and `rows` do not fit each other, as when rows
    of another vocabulary were not put back before; that cannot be seen if they are as many as its
    table has. Traced tokens cannot be seen: then the row of a token that repeats is NaN, or zero in
    an array of integers.
    """
    if isinstance(tokens, jax.Array) and is_seen(tokens):
        tokens = np.asarray(tokens)
    selected = _select(tree, tokens, vocabulary_axis)
    is_table = is_table_of(vocabulary_axis)
    check_structures("rows", tree, rows, is_table, "they must come from take_rows of this tree.")
    index, _ = selected or (np.zeros(0, np.int32), None)
    repeats = _mark_repeats(index)

    def put(place: Place, array: Any, new: Any) -> Array:
        _check_rows("rows", len(index), place, array, new)
        new = new if repeats is None else _invalidate(repeats, place, new)
        return _put_into(array, place, index, new)

    def put_table(path: Any, node: Any, new: Any) -> Any:
        if not is_table(node):
            if is_array(node) and is_array(new) and node.shape != new.shape:
                raise ValueError(
                    f"rows{jax.tree_util.keystr(path)} has shape {new.shape} in place of "
                    f"{node.shape}, but put_rows changes tables of {vocabulary_axis!r} alone. Put "
                    "the rows of several vocabularies back in reverse order, each into the tree "
                    "that they were taken from."
                )
            return new
        if not is_table(new):
            raise ValueError(
                f"rows must have a table in place of each table, got {type(new).__name__}: "
                "change the result of take_rows, for example with `eqx.tree_at`."
            )
        return map_arrays(put, node, new)

    return jax.tree_util.tree_map_with_path(put_table, tree, rows, is_leaf=is_table)


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
        without padding; if there are none; if no table of this vocabulary has embeddings; inside a
        `jax.shard_map` along which a table differs; and for a skeleton: use `eqx.filter_eval_shape`
        around this call.
    - `TypeError` for traced rows.
    """
    tables = find_tables(model, vocabulary_axis)
    vocab_size = find_vocab_size(tables, OTHER_OPTIMIZER)
    if not any(is_array(table.embeddings) for table in tables.values()):
        raise ValueError(f"the tables of the vocabulary {vocabulary_axis!r} hold no embeddings.")
    index = _as_index(rows, vocab_size)
    is_table = is_table_of(vocabulary_axis)
    others, static = eqx.partition(model, filter_spec)

    def take(place: Place, array: Any) -> Array:
        return _take_from(array, place, index)

    def select_trained(node: Any, other: Any) -> Any:
        # `eqx.nn.Shared` puts an object in place of an array: only arrays are trained.
        return eqx.filter(map_arrays(take, node), is_array) if is_table(node) else other

    def select_frozen(node: Any, other: Any) -> Any:
        return node if is_table(node) else other

    trained = jax.tree.map(select_trained, model, others, is_leaf=is_table)
    frozen = jax.tree.map(select_frozen, model, static, is_leaf=is_table)
    return trained, FrozenRows(frozen, jnp.asarray(index), vocabulary_axis, vocab_size)


def combine_rows(trained: PyTree, frozen: FrozenRows) -> PyTree:
    """Combines the two results of [`eqx_embedding.partition_rows`][] into a model.

    Each call copies the tables of the vocabulary, and so does its gradient. A loss of the combined
    model still need not hold the logits.

    **Arguments:**

    - `trained`: the selected rows, and whatever else is trained, with their current values.
    - `frozen`: the rest.

    **Returns:**

    The model, with tables and biases in their original dtypes.

    **Raises:**

    A `ValueError` if `trained` and `frozen` do not fit each other: both must come from one call of
    [`eqx_embedding.partition_rows`][], and must not be resized; and inside a `jax.shard_map` along
    which a table differs.

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
    vocab_size = find_vocab_size(find_tables(frozen.model, frozen.vocabulary_axis), OTHER_OPTIMIZER)
    if vocab_size != frozen.vocab_size:
        raise ValueError(
            f"frozen has a vocabulary of {vocab_size} tokens, but had {frozen.vocab_size} when "
            "partition_rows made it: combine the two parts before you resize the model."
        )
    is_table = is_table_of(frozen.vocabulary_axis)

    def put(place: Place, array: Any, new: Any) -> Array:
        _check_rows("trained", len(frozen.rows), place, array, new)
        return _put_into(array, place, frozen.rows, new)

    def combine(new: Any, old: Any) -> Any:
        if is_table(old):
            return map_arrays(put, old, new)
        return old if new is None else new

    return jax.tree.map(
        combine, trained, frozen.model, is_leaf=lambda node: _is_none(node) or is_table(node)
    )


def _select(
    tree: PyTree, tokens: Any, vocabulary_axis: str
) -> tuple[Int[Array | np.ndarray, " rows"], Bool[Array | np.ndarray, " rows"]] | None:
    """The rows of these tokens, beyond the table if out of range, and which of these rows are NaN.

    `None` if no table of the vocabulary has arrays.
    """
    tables = find_tables(tree, vocabulary_axis, required=False)
    vocab_size = find_vocab_size(tables, OTHER_OPTIMIZER)
    tokens, in_range = tokens_in_range("tokens", tokens, vocab_size)
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have one axis, got the shape {tokens.shape}.")
    if vocab_size == 0:
        return None
    xp = np if isinstance(tokens, np.ndarray) else jnp
    # Each one beyond the table is another, as JAX demands of unique indices
    beyond = NO_TOKEN - np.arange(len(tokens), dtype=np.int32)
    index = xp.where(in_range, tokens, beyond.astype(tokens.dtype)).astype(np.int32)
    missing = ~in_range & (tokens != NO_TOKEN)
    return (index, missing) if xp is np else (_replicate(jnp.asarray(index)), _replicate(missing))


def _mark_repeats(index: Int[Array | np.ndarray, " rows"]) -> Bool[Array, " rows"] | None:
    """Which rows repeat, or `None` if none does."""
    if isinstance(index, jax.Array):
        ordered = jnp.sort(index)
        next_one = _count_smaller(ordered, index) + 1
        return ordered.at[next_one].get(mode="fill", fill_value=-1) == index
    if repeated := _find_repeated(index):
        raise ValueError(
            f"tokens must be unique, got {repeated} more than once: which of their rows should "
            "stay? `unique_tokens` finds the unique ones."
        )
    return None


def _find_repeated(index: Integer[np.ndarray, " rows"]) -> list[int]:
    """The first few numbers that occur more than once."""
    values, counts = np.unique(index, return_counts=True)
    return values[counts > 1][:5].tolist()


def _invalidate(mask: Bool[Array, " rows"], place: Place, rows: Any) -> Array:
    """The rows, with NaN where the mask is set, or zero in an array of integers."""
    mask = mask.reshape(place.row_axis.replace((1,) * rows.ndim, mask.shape))
    if jnp.issubdtype(rows.dtype, jnp.inexact):
        return nan_where(mask, rows)
    return jnp.where(mask, jnp.zeros((), rows.dtype), rows)


def _replicate(array: Array) -> Array:
    """The array, whole on each device of an explicit mesh."""
    sharding = _sharding_in_type(array)
    return array if sharding is None else jax.reshard(array, sharding.update(spec=PartitionSpec()))


def _take_from(array: Any, place: Place, index: Array | np.ndarray) -> Array:
    """Some rows of an array; zero for those beyond it."""
    if isinstance(array, jax.ShapeDtypeStruct):
        raise ValueError(
            "a skeleton has no rows to take. Call the function in `eqx.filter_eval_shape`, such as "
            "`eqx.filter_eval_shape(lambda model: partition_rows(model, rows), model)`."
        )
    array = jnp.asarray(array)
    sharding = _sharding_in_type(array)
    if sharding is not None:  # each device gets all selected rows, which are few
        spec = place.row_axis.replace(tuple(sharding.spec), [None])
        sharding = sharding.update(spec=PartitionSpec(*spec))
    rows = place.row_axis.at(array, index)
    return rows.get(mode="fill", fill_value=0, out_sharding=sharding)


def _put_into(array: Any, place: Place, index: Array | np.ndarray, new: Any) -> Array:
    """The array with new rows; those beyond it are not written."""
    array = jnp.asarray(array)
    return place.row_axis.at(array, index).set(
        new.astype(array.dtype),
        mode="drop",
        unique_indices=True,
        out_sharding=_sharding_in_type(array),
    )


def _check_rows(name: str, count: int, place: Place, array: Any, new: Any) -> None:
    check_byte_order(name, new)
    expected = place.row_axis.replace(array.shape, [count])
    if np.shape(new) != expected:  # JAX might broadcast it
        raise ValueError(
            f"{name} must have an array of shape {expected} for the {count} rows of a table of "
            f"shape {array.shape}, got {np.shape(new)}."
        )


def _sharding_in_type(array: Array) -> NamedSharding | None:
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _count_smaller(
    ordered: Int[Array, " sorted"], tokens: Int[Array, "*batch"]
) -> Int[Array, "*batch"]:
    """How many of the `ordered` are smaller than each token.

    A binary search, as is `jnp.searchsorted`, which JAX cannot map over axes of a mesh.
    """
    smaller = jnp.zeros_like(tokens)
    for bit in reversed(range(len(ordered).bit_length())):
        more = smaller + np.int32(2**bit)
        last = ordered.at[more - 1].get(mode="fill", fill_value=NO_TOKEN)
        smaller = jnp.where(last < tokens, more, smaller)
    return smaller


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
    if index.shape == (0,):
        raise ValueError(
            f"rows must have at least one of the {vocab_size} tokens, got none. New tokens have no "
            "rows before `resize_vocabulary`."
        )
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(
            "rows must be integers, a slice, or a boolean for each of the "
            f"{vocab_size} tokens, got {index.dtype.name} of shape {index.shape}."
        )
    outside = index[(index < 0) | (index >= vocab_size)]
    if outside.size > 0:
        raise ValueError(
            f"the vocabulary has {vocab_size} tokens, so rows must be at least 0 and below "
            f"{vocab_size}, got {outside[:5].tolist()}."
        )
    if repeated := _find_repeated(index):
        raise ValueError(f"rows must be unique, got {repeated} more than once.")
    return index.astype(np.int32)
