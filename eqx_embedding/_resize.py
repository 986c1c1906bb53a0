"""Growing and shrinking a vocabulary."""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._inputs import as_int, at_least_float32, Whole
from ._suggest import suggest, suggest_key
from ._table import EmbeddingTable
from ._tree import find_tables, find_vocab_size, is_table_of, map_arrays, Place


@suggest(key=suggest_key)
def resize_vocabulary(
    tree: PyTree,
    vocab_size: Whole,
    vocabulary_axis: str = "vocabulary",
    *,
    key: PRNGKeyArray | None = None,
    pad_to_multiple_of: Whole | None = None,
) -> PyTree:
    """Grows or shrinks every table of a vocabulary, and its bias with it.

    ```python
    model = resize_vocabulary(model, 50300, key=key)
    opt_state = resize_vocabulary(opt_state, 50300)
    ```

    Rows of old tokens are kept bit for bit, and so is everything else in the tree. A table that is
    stored once stays stored once, also inside `eqx.nn.Shared`.

    With a key, new rows are drawn from a normal distribution with the mean and the covariance of
    the old ones, as in [Hewitt, 2021](https://nlp.stanford.edu/~johnhew/vocab-expansion.html). The
    bias of a new token is drawn together with its row. The row of a new token does not depend on
    how many tokens are new. Two tables get different rows, unless they hold the same array.

    Without a key, new rows and their biases are zero, as the state of an optimizer needs.

    Padding rows that become tokens are filled like other new rows. New padding rows are zero.

    **Arguments:**

    - `tree`: a model, the state of an optimizer that keeps one number for each parameter, or any
        other PyTree with an [`eqx_embedding.EmbeddingTable`][]. A skeleton, from
        `eqx.filter_eval_shape`, gets the new shapes. Anything else in place of an array of a table
        does not change, such as the `None` that `eqx.partition` puts there.
    - `vocab_size`: the new number of tokens, without padding.
    - `vocabulary_axis`: which vocabulary, by the `vocabulary_axis` of its tables. Tables of other
        vocabularies, such as positions, do not change. Defaults to `"vocabulary"`.
    - `key`: a `jax.random.key` for the new rows. Do not use one for the state of an optimizer:
        some second moments would be negative. Defaults to `None`: new rows are zero.
    - `pad_to_multiple_of`: rows of zeros are added until the number of rows is a multiple of this.
        Defaults to `None`: no padding. That is an error if a table has padding rows now.

    **Returns:**

    The tree with its tables resized. A table that already has this size keeps its arrays. A table
    that is split over a mesh stays split, and is not gathered.

    **Raises:**

    A `ValueError`:

    - for a size below 1;
    - if `pad_to_multiple_of` is `None` and a table has padding rows;
    - if the tree has no table of this vocabulary, or its tables differ in size: different
        vocabularies need different names;
    - if an array lacks axes of its table, as the factored moments of Adafactor do;
    - if the mesh axes that split a table do not divide its new number of rows.
    """
    tables = find_tables(tree, vocabulary_axis)
    size, padding_rows = _new_size(tables, vocab_size, pad_to_multiple_of)
    sizes = _Sizes(find_vocab_size(tables), size, padding_rows)
    is_table = is_table_of(vocabulary_axis)
    draws: dict[int, int] = {}
    resized: dict[tuple[int, Place], Any] = {}  # so that one array in two tables stays one array

    def resize(node: Any) -> Any:
        if not is_table(node):
            return node
        draw = draws.setdefault(id(node.embeddings), len(draws))
        table_key = None if key is None else jax.random.fold_in(key, draw)

        def resize_array(place: Place, array: Any) -> Any:
            which = id(array), place
            if which not in resized:
                resized[which] = _resize_array(sizes, place, array, table_key)
            return resized[which]

        return map_arrays(resize_array, node, padding_rows=padding_rows)

    return jax.tree.map(resize, tree, is_leaf=is_table)


class _Sizes(NamedTuple):
    old_tokens: int
    tokens: int
    padding_rows: int

    @property
    def rows(self) -> int:
        return self.tokens + self.padding_rows


def _new_size(
    tables: dict[str, EmbeddingTable], vocab_size: Whole, multiple: Whole | None
) -> tuple[int, int]:
    """The new numbers of tokens and of padding rows."""
    for path, table in tables.items():
        if multiple is None and table.padding_rows > 0:
            raise ValueError(
                f"{path} has {table.padding_rows} padding rows, so pad_to_multiple_of must be "
                "given: 1 for no padding, or the multiple that the number of rows should be."
            )
    size, multiple = as_int(vocab_size), 1 if multiple is None else as_int(multiple)
    if min(size, multiple) < 1:
        raise ValueError(
            f"vocab_size and pad_to_multiple_of must be at least 1, got {size} and {multiple}."
        )
    return size, -size % multiple


def _resize_array(sizes: _Sizes, place: Place, array: Any, key: PRNGKeyArray | None) -> Any:
    """The array or skeleton with its new number of rows, split over a mesh as before."""
    if sizes.old_tokens == sizes.tokens and array.shape[place.axis] == sizes.rows:
        return array
    sharding = _mesh_sharding(array)
    if sharding is not None:
        _check_mesh_divides(sharding, place.axis, sizes.rows)
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(
            shape=(*array.shape[: place.axis], sizes.rows, *array.shape[place.axis + 1 :])
        )
    change = functools.partial(_change_rows, sizes, place)
    if sharding is None:
        return change(jnp.asarray(array), key)
    # In one program each device makes only its own rows, and the mesh need not divide those without
    # padding
    explicit = jax.typeof(array).sharding
    if AxisType.Explicit in explicit.mesh.axis_types:
        change = jax.sharding.auto_axes(change, out_sharding=explicit)
    # Automatic axes of a traced array cannot be seen, so the compiler decides
    out_sharding = None if isinstance(array, Tracer) else sharding
    return jax.jit(change, out_shardings=out_sharding)(array, key)


def _mesh_sharding(array: Any) -> NamedSharding | None:
    """How a mesh splits an array or a skeleton, or `None` if it is not on a mesh."""
    traced = isinstance(array, Tracer)
    sharding = jax.typeof(array).sharding if traced else getattr(array, "sharding", None)
    on_mesh = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if on_mesh else None


def _check_mesh_divides(sharding: NamedSharding, axis: int, rows: int) -> None:
    spec = (*sharding.spec, *[None] * (axis + 1))[axis]  # a spec may be shorter than the shape
    mesh_axes = () if spec is None else (spec,) if isinstance(spec, str) else spec
    parts = math.prod(sharding.mesh.shape[name] for name in mesh_axes)
    if rows % parts != 0:
        raise ValueError(
            f"the vocabulary is split over the mesh axis {', '.join(mesh_axes)!r}, whose size "
            f"{parts} does not divide {rows} rows. Give pad_to_multiple_of={parts}."
        )


def _change_rows(sizes: _Sizes, place: Place, array: Array, key: PRNGKeyArray | None) -> Array:
    """The old rows that are kept, then new rows, then padding rows."""
    axis, num_stacked = place
    if num_stacked > 0:
        keys = None if key is None else jax.random.split(key, len(array))
        inner = Place(axis - 1, num_stacked - 1)
        return eqx.filter_vmap(functools.partial(_change_rows, sizes, inner))(array, keys)
    rows = jnp.moveaxis(array, axis, 0)[: min(sizes.old_tokens, sizes.tokens)]
    parts, num_new = [rows], sizes.tokens - len(rows)
    if key is not None and num_new > 0:
        parts.append(_draw_rows(num_new, key, rows))
    num_zeros = sizes.rows - sum(map(len, parts))
    parts.append(jnp.zeros((num_zeros, *rows.shape[1:]), rows.dtype))
    return jnp.moveaxis(jnp.concatenate(parts), 0, axis)


@functools.partial(jax.jit, static_argnums=0)
def _draw_rows(count: int, key: PRNGKeyArray, rows: Float[Array, "V ..."]) -> Float[Array, "M ..."]:
    """`count` rows from a normal distribution with the mean and the covariance of `rows`.

    Each is the mean plus a sum of the centred rows, each multiplied by a standard normal number and
    divided by sqrt(V - 1). That sum has their covariance, so the covariance is never computed, and
    there may be fewer rows than features.
    """
    V = len(rows)
    wide = at_least_float32(rows.dtype)
    flat = rows.reshape(V, -1).astype(wide)
    mean = jnp.mean(flat, axis=0)
    centred = (flat - mean[None]) / max(V - 1, 1) ** 0.5

    def draw(i: Array) -> Array:
        # Always in float32: a row and its bias need the same noise, whatever their dtypes
        noise = jax.random.normal(jax.random.fold_in(key, i), (V,), jnp.float32)
        return mean + noise.astype(wide) @ centred

    # In batches, because each new row needs V random numbers
    new = lax.map(draw, jnp.arange(count), batch_size=min(count, 256))
    return new.astype(rows.dtype).reshape(count, *rows.shape[1:])
