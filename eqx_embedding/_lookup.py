"""`EmbeddingLookup`: tokens to vectors, and the gradient of that."""

import functools
import math
from typing import Any, final, get_args, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float, Integer, PRNGKeyArray

from ._devices import (
    Axes,
    call_as_one,
    call_linear,
    cast_to_varying,
    explicit_axes,
    explicit_sharding,
    flat,
    gather_wide,
    is_alone,
    raise_unless,
    remaining,
    reshard,
    sum_over_axes,
    varying_axes,
    widen,
)
from ._inputs import at_least_float32, nan_where, tokens_in_range
from ._sharding import Arrangement, find_split, MappedAxisError, Split
from ._suggest import (
    compiled,
    suggest,
    suggest_for_fields,
    suggest_layer,
    suggest_table,
    suggest_tokens,
)
from ._table import EmbeddingTable, RowAxis, Rules


OutOfRange = Literal["nan", "raise", "clip"]


@final
class EmbeddingLookup(eqx.Module):
    """Looks up the embedding of each token.

    ```python
    vectors = EmbeddingLookup(table)(tokens)
    ```

    A token is in range when `0 <= token < table.vocab_size`. JAX would clamp or wrap the others,
    padding rows included, and train the wrong row in silence. Here `out_of_range` decides:

    - `"nan"`, the default: its vector is NaN, and no gradient reaches the table. This costs next
        to nothing.
    - `"raise"`: an error, by `equinox.error_if`, as the environment variable `EQX_ON_ERROR`
        says. Under `jit` with several devices, every device raises, and the error is one of JAX,
        whose text ends with the message. **Inside a `jax.shard_map` with `check_vma=False` only the
        devices with such a token raise; if others wait for them, XLA ends the process.**
    - `"clip"`: the nearest token stands in, and receives the gradient.

    **Fields:**

    - `table`: the [`eqx_embedding.EmbeddingTable`][].
    - `out_of_range`: `"nan"`, `"raise"` or `"clip"`. Defaults to `"nan"`.

    **Raises:**

    An error of the type checks, or without them a `ValueError`, for another `out_of_range`.
    """

    table: EmbeddingTable
    out_of_range: OutOfRange = eqx.field(static=True, default="nan")

    def __check_init__(self):
        if self.out_of_range not in get_args(OutOfRange):
            raise ValueError(
                f"out_of_range must be one of {get_args(OutOfRange)}, got {self.out_of_range!r}."
            )

    @suggest(self=suggest_layer("EmbeddingLookup"), tokens=suggest_tokens)
    @jax.named_scope("EmbeddingLookup")
    def __call__(
        self,
        tokens: Integer[ArrayLike, "*batch"],
        *,
        rules: Rules | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "..."]:
        """**Arguments:**

        - `tokens`: integers of any shape `*batch`, signed or unsigned: a JAX array, a numpy array
            or a Python int. Host data is checked before JAX narrows it to 32 bits, so a 64-bit id
            out of range stays out of range. (Give it to this call and not to a function under
            `jax.jit`, `jax.vmap` or `jax.lax.scan`: JAX narrows their arguments before any code of
            theirs runs.)
        - `rules`: the axes of the device mesh that split the first axis of the tokens and the axes
            of the table, such as `{"batch": "data", "vocabulary": "model"}`. If several axes of the
            tokens are split, `"batch"` is a `PartitionSpec` of them, such as `P("data", "model")`.
            The types of arrays say this for explicit axes. For automatic axes, vectors are right
            without rules, but XLA chooses what devices send, such as the whole gradient of a split
            table. Inside a `jax.shard_map` along whose axes the table differs, rules are needed:
            those which split its vocabulary, such as `{"vocabulary": "model"}`, or
            `{"vocabulary": None}` if each device has a table of its own. Defaults to `None`. See
            [`eqx_embedding.EmbeddingTable.partition_spec`][].
        - `key`: ignored, for compatibility with `eqx.nn.Sequential`.

        **Returns:**

        The embeddings, of shape `*batch` followed by the embedding axes, in the table's dtype.
        Their gradient with respect to the table is accumulated in float32 at least.

        **Raises:**

        A `RuntimeError` under `out_of_range="raise"`, naming the vocabulary and its size. A
        `TypeError` for tokens that are not integers, or of 64 bits and traced outside of JAX's
        64-bit mode. A `ValueError` for a stacked table, one without embeddings or tokens, rules
        that do not fit the mesh, or under `"nan"` for a table of float4, which has no NaN.
        """
        del key
        table = self.table
        table._check_arrays()
        array, row_axis = jnp.asarray(table.embeddings), table._row_axis
        if self.out_of_range == "nan" and not _has_nan(array.dtype):  # float4 has none
            raise ValueError(
                f"{array.dtype.name} has no NaN for a token out of range: say "
                'out_of_range="raise" or "clip".'
            )
        of_device = tokens if isinstance(tokens, jax.Array) else None
        split = find_split(table, of_device, np.ndim(tokens), rules, must_divide=False)
        vocab_size = split.vocab_size(table)
        past_the_end = vocab_size + table.padding_rows
        index = self._find_rows(tokens, vocab_size, past_the_end)
        has_batch = of_device is not None  # host tokens are the same on all devices
        take = _take_of_mesh if has_batch and split.has_parts else _take_as_split
        missing = None if self.out_of_range == "clip" else past_the_end
        return take(_Lookup(row_axis, missing, split), array, index)

    def _find_rows(
        self, tokens: Integer[ArrayLike, "*batch"], vocab_size: int, past_the_end: int
    ) -> Integer[Array, "*batch"]:
        """The row of each token. A row past the end has no value and no gradient."""
        tokens, in_range = tokens_in_range("tokens", tokens, vocab_size)
        xp = jnp if isinstance(tokens, jax.Array) else np
        if self.out_of_range == "clip":
            nearest = xp.where(tokens < 0, 0, xp.where(in_range, tokens, vocab_size - 1))
            return jnp.asarray(nearest)
        index = jnp.asarray(xp.where(in_range, tokens, past_the_end))
        if self.out_of_range == "raise":
            failed = raise_unless(
                in_range,
                f"a token is out of range: the vocabulary {self.table.vocabulary_axis!r} has "
                f"{vocab_size} tokens, so tokens must be at least 0 and below {vocab_size}.",
            )
            index = jnp.where(failed, jnp.asarray(past_the_end, index.dtype), index)
        return index


suggest_for_fields(EmbeddingLookup, table=suggest_table)


class _Take(NamedTuple):
    """How to take the rows of an index, whose axes come first; zeros past the end."""

    row_axis: RowAxis
    mesh: AbstractMesh | None  # whose explicit axes split the result as they split the operands

    def __call__(self, array: Array, index: Array) -> Array:
        if array.dtype == at_least_float32(array.dtype):
            return self.rows(array, index)
        # As one operation, for else a `jax.lax.scan` would lose the rule below; and compiled, for
        # else JAX would not know the devices of a gradient, if no mesh is set.
        return call_as_one(functools.partial(_compiled_take, self), array, index)

    def rows(self, array: Array, index: Array) -> Array:
        batch = explicit_axes(index)
        others = [remaining(axes, batch) for axes in explicit_axes(array)]
        out_sharding = explicit_sharding(self.mesh, self.row_axis.replace(others, batch))
        with jax.auto_pcast(True):
            taken = self.row_axis.at(array, index).get(
                mode="fill",
                fill_value=0,
                wrap_negative_indices=False,
                out_sharding=out_sharding,
            )
        # To move the axes of the result, and not those of the array, spares a copy of its gradient.
        return self.row_axis.move_first(taken, index.ndim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _take(take: _Take, array: Array, index: Array) -> Array:
    return take.rows(array, index)


@_take.defjvp
def _take_jvp(take, primals, tangents):
    array, index = primals
    tangent = jnp.asarray(tangents[0])  # it may be of NumPy
    return take(array, index), _take_wide(take, tangent, index).astype(array.dtype)


_compiled_take = jax.jit(_take, static_argnums=0)


def _take_wide(take: _Take, array: Array, index: Array) -> Array:
    """The rows of an index, in float32 at least, and so are the sums that are its transpose.

    For bfloat16 stops counting the repeats of a token at 256, and float16 at 2048.
    """
    dtype, num_rows = at_least_float32(array.dtype), take.row_axis.of(array.shape)
    num_tokens = math.prod(index.shape)  # symbolic, perhaps, in `jax.export`
    is_few = isinstance(num_tokens, int) and 4 * num_tokens <= num_rows
    if not is_few or not is_alone(array, index):
        return take.rows(widen(dtype, array), index)  # whose transpose holds a wide table

    # In a `jax.shard_map` over one device, the array may be the same along axes of the index.
    array = cast_to_varying(varying_axes(index), array)
    whole, of_table = functools.partial(reshard, take.mesh, axes=()), explicit_axes(array)

    def of_examples(mapped: list[bool], array: Array, index: Array) -> Array:
        if mapped[0]:
            axes = [0 if is_mapped else None for is_mapped in mapped]
            return jax.vmap(take.rows, axes)(array.astype(dtype), index)
        return _take_wide(take, array, index)  # for their gradients are added

    def transpose(vectors: Array, index: Array) -> Array:
        total = _add_few(take.row_axis, num_rows, array.dtype, whole(vectors), whole(index))
        return reshard(take.mesh, total, of_table)

    return call_linear(
        lambda array, index: take.rows(array, index).astype(dtype),
        transpose,
        array,
        index,
        vmap_rule=of_examples,
    )


def _add_few(
    row_axis: RowAxis, num_rows: int, dtype: np.dtype, vectors: Array, index: Array
) -> Array:
    """The sum of the vectors of each row. It is rounded and written once."""
    tokens = index.reshape(-1).astype(np.int32)
    vectors = vectors.reshape(len(tokens), *vectors.shape[index.ndim :])
    places = np.arange(len(tokens), dtype=np.int32)
    # The last one of the places of a token gets its sum. A token past the end has none.
    last = jnp.zeros(num_rows, np.int32)
    last = last.at[tokens].max(places, mode="drop", wrap_negative_indices=False)
    place = last.at[tokens].get(mode="fill", fill_value=len(tokens), wrap_negative_indices=False)
    sums = jnp.zeros_like(vectors).at[place].add(vectors, mode="drop").astype(dtype)
    other = num_rows + places  # past the end, too
    # Not `where`: on an explicit mesh, `jax.vmap` line by line needs both cases for each example.
    row = other + (place == places).astype(np.int32) * (tokens - other)
    total = jnp.zeros((num_rows, *sums.shape[1:]), dtype)
    # Not `set`: XLA can add to the gradient of a loss in place of zeros.
    return row_axis.move_back(total.at[row].add(sums, mode="drop", unique_indices=True))


class _Lookup(NamedTuple):
    """What is known of a lookup when the program is compiled."""

    row_axis: RowAxis
    past_the_end: int | None  # the row of a token that has none, if there may be one
    split: Split


@compiled(static=1)
def _take_of_mesh(lookup: _Lookup, array: Array, index: Array) -> Array:
    """The rows of an index, on a mesh. Examples of a `jax.vmap` are looked up together."""

    def on_mesh(operands: tuple[Array, Array]) -> Array:
        array, index = operands
        row_axis, _, split = lookup
        arrangement = split.arrange_lookup(index.shape, row_axis.of(array.shape))
        try:
            if arrangement is not None:
                return _take_gathered(lookup, arrangement, array, index)
        except MappedAxisError:
            pass  # This is a `jax.vmap`, for which `of_examples` is called next.
        return _take_as_split(lookup, array, index)

    def of_examples(size: int, mesh_axes: Any, mapped: Any, operands: Any) -> Any:
        if mapped[0]:  # each example has a table of its own
            return None
        return _take_of_mesh(
            lookup._replace(split=lookup.split.with_examples(mesh_axes)), *operands
        )

    return call_as_one(on_mesh, (array, index), vmap_rule=of_examples)


def _take_gathered(lookup: _Lookup, arrangement: Arrangement, array: Array, index: Array) -> Array:
    """The rows of an index in a table that each device gathers.

    XLA would do that as well; but XLA for TPUs sums the gradient of the whole table.
    """
    row_axis, past_the_end, split = lookup
    rows, batch = P(*row_axis.restore(tuple(arrangement.spec))), P(*split.batch)

    def on_device(array: Array, index: Array) -> Array:
        axes = row_axis, past_the_end, arrangement.gathered, arrangement.vocabulary
        with jax.auto_pcast(True):
            return _take_on_device(*axes, None, array, index)

    out_spec = P(*split.batch, *arrangement.columns)
    return split.map(on_device, (rows, batch), out_spec, (array, index))


def _take_as_split(lookup: _Lookup, array: Array, index: Array) -> Array:
    """The rows of an index in a table that only manual axes split, as far as is known here."""
    row_axis, past_the_end, split = lookup
    of_table = explicit_axes(array)
    mesh = split.mesh
    if split.in_shard_map and not flat(explicit_axes(index) + of_table):
        mesh = None  # here, JAX cannot differentiate a lookup with a sharding
    for gathered, explicit in zip(split.manual_shared, row_axis.first(of_table), strict=True):
        if gathered and explicit:
            raise ValueError(
                f"{gathered}, axes of a `jax.shard_map` around this lookup, and {explicit} split "
                "the same axis of the table: let the `jax.shard_map` take all axes of the mesh, or "
                "make the others automatic."
            )
    axes = row_axis, past_the_end, split.manual_shared, split.manual_vocabulary
    return _take_on_device(*axes, mesh, array, index)


def _take_on_device(
    row_axis: RowAxis,
    past_the_end: int | None,
    gathered: tuple[Axes, ...],
    vocabulary: Axes,
    mesh: AbstractMesh | None,
    array: Array,
    index: Array,
) -> Array:
    """The rows of an index, if devices along the axes `vocabulary` have different rows."""
    dtype = array.dtype
    array = gather_wide(dtype, at_least_float32(dtype), row_axis.restore(gathered), array, index)
    row = index
    if vocabulary:  # One device has the row of a token, the others add zeros.
        start = lax.axis_index(vocabulary) * row_axis.of(array.shape)
        row = index - start.astype(index.dtype)
    vectors = _Take(row_axis, mesh)(array, row).astype(dtype)
    vectors = sum_over_axes(vocabulary, vectors)
    if past_the_end is None or not _has_nan(dtype):
        return vectors
    missing = jnp.expand_dims(index == past_the_end, range(index.ndim, vectors.ndim))
    return nan_where(missing, vectors)


def _has_nan(dtype: np.dtype) -> bool:
    return bool(np.isnan(np.asarray(np.nan, dtype)))
