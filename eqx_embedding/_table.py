"""`EmbeddingTable`: the parameters of a vocabulary."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import variance_scaling
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ._devices import as_axes
from ._inputs import as_float_dtype, as_int, check_byte_order, Whole
from ._suggest import suggest, suggest_array, suggest_for_fields, suggest_key, suggest_names


Rules = Mapping[str, str | Sequence[str] | PartitionSpec | None]


def find_entries(rules: Rules, names: Sequence[str]) -> list[str | tuple[str, ...] | None]:
    """The entries of a `PartitionSpec` that the rules give to the axes of an array.

    A `ValueError` for a mesh axis that stands there twice, and for a `PartitionSpec`, which is of
    several axes.
    """
    found: dict[str, str] = {}
    for name in names:
        if name != "batch" and isinstance(rules.get(name), PartitionSpec):
            raise ValueError(
                f"rules={dict(rules)} give a PartitionSpec to {name!r}, one axis of a table: give "
                "the names of mesh axes, as a string or a tuple. A PartitionSpec is for 'batch'."
            )
        for axis in as_axes(rules.get(name)):
            if axis in found:
                both = " and ".join(map(repr, dict.fromkeys([found[axis], name])))
                raise ValueError(
                    f"rules={dict(rules)} name the mesh axis {axis!r} twice, for {both}, but it "
                    "can split an array only once: name it once."
                )
            found[axis] = name
    entries = (rules.get(name) for name in names)
    return [axes if axes is None or isinstance(axes, str) else as_axes(axes) for axes in entries]


def _fan_out_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """penzai's default: normal, with standard deviation `1 / sqrt(product of embedding sizes)`."""
    embedding_axes = tuple(range(1, len(shape)))
    draw = variance_scaling(
        1.0, "fan_out", "normal", in_axis=(), out_axis=embedding_axes, batch_axis=0
    )
    return draw(key, shape, dtype)


def _suggest_axes(embedding_axes: object) -> str | None:
    return f"{{'embedding': {embedding_axes}}}" if isinstance(embedding_axes, Whole) else None


def _named_sizes(names: Iterable[str], sizes: Iterable[object]) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))


class RowAxis(NamedTuple):
    """The axis of an array along which its rows lie, and what is done along it."""

    position: int

    def of(self, axes: Sequence[Any]) -> Any:
        """What belongs to this axis, of something for each axis of the array."""
        return axes[self.position]

    def replace(self, axes: Sequence[Any], new: Sequence[Any]) -> tuple[Any, ...]:
        """Something for each axis of the array, with that of this axis replaced."""
        return *axes[: self.position], *new, *axes[self.position + 1 :]

    def first(self, axes: Sequence[Any]) -> tuple[Any, ...]:
        """Something for each axis of the array, in rows-first order."""
        return self.of(axes), *self.replace(axes, ())

    def restore(self, rows_first: Sequence[Any]) -> tuple[Any, ...]:
        """The reverse of `first`."""
        row, *others = rows_first
        return *others[: self.position], row, *others[self.position :]

    def move_first(self, array: Any, count: int = 1) -> Any:
        """The array with this axis first, or the `count` axes that took its place."""
        moved = range(self.position, self.position + count)
        others = [axis for axis in range(array.ndim) if axis not in moved]
        return array.transpose(*moved, *others)

    def move_back(self, rows: Any) -> Any:
        """The reverse of `move_first`."""
        return rows.transpose(self.restore(range(rows.ndim)))

    def at(self, array: Array, rows: Any) -> Any:
        """`array.at[rows]` along this axis."""
        return array.at[(slice(None),) * self.position + (rows,)]


def find_row_axis(names: tuple[str, ...], vocabulary_axis: str, num_stacked: int = 0) -> RowAxis:
    """The row axis of an array with `num_stacked` axes in front of those that have `names`."""
    return RowAxis(num_stacked + names.index(vocabulary_axis))


@final
class EmbeddingTable(eqx.Module):
    """The embeddings of a vocabulary: the parameter of [`eqx_embedding.EmbeddingLookup`][] and
    [`eqx_embedding.EmbeddingDecode`][].

    Make one with [`eqx_embedding.EmbeddingTable.from_config`][], or from an array:

    ```python
    EmbeddingTable(array, ("vocabulary", "embedding"))
    ```

    JAX models are trees, not graphs: one table stored in two fields becomes two parameters, which
    diverge after the first update. For weight tying, store the table **once** and build the layers
    where they are called: `EmbeddingLookup(self.table)(tokens)` and
    `EmbeddingDecode(self.table)(hidden)`. They hold references to the table and cost nothing.

    **Fields:**

    - `embeddings`: the parameter, a floating-point JAX or NumPy array, kept without a copy: later
        changes to a NumPy array are changes to the table. A table stacked by `vmap` or `scan` has
        additional axes in front.
    - `axis_names`: the name of each axis, in order. They describe the *last* `len(axis_names)` axes
        of `embeddings`.
    - `vocabulary_axis`: the name of the axis indexed by tokens, anywhere in `axis_names`. All other
        axes belong to the embedding. Defaults to `"vocabulary"`.
    - `padding_rows`: how many rows at the end of the vocabulary axis are padding. They are never
        looked up and have no logit. Defaults to 0.
    - `bias`: one number for each row, padding rows included, added to the logit of that row by
        [`eqx_embedding.EmbeddingDecode`][]. Its shape is `(rows,)`, or `(*stacked, rows)` for a
        stacked table. Defaults to `None`, no bias.

    **Raises:**

    A `ValueError`:

    - if names repeat or are not strings, or `vocabulary_axis` is not one of them;
    - if `embeddings` has fewer axes than names, or an axis of size 0;
    - unless `0 <= padding_rows < rows`;
    - if the bias does not have one number for each row.

    A `TypeError` for a NumPy array in another byte order than that of this machine, and for a
    subclass: the class is final.
    """

    # No converter, which would turn off the type check of the field
    embeddings: Float[Array | np.ndarray, "..."]
    axis_names: tuple[str, ...] = eqx.field(static=True)
    vocabulary_axis: str = eqx.field(static=True, default="vocabulary")
    padding_rows: int = eqx.field(static=True, converter=as_int, default=0)
    bias: Float[Array | np.ndarray, "..."] | None = None

    def __check_init__(self):
        if type(self) is not EmbeddingTable:  # whose other fields would be lost when it is resized
            raise TypeError(
                f"{type(self).__name__} is a subclass of EmbeddingTable, which is final: store a "
                "table in a field of your module."
            )
        names = self.axis_names
        # beartype checks only one of the names
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"axis_names must be a tuple of strings, got {names!r}.")
        if len(set(names)) < len(names):
            raise ValueError(f"axis names must be unique, got axis_names={names}.")
        if self.vocabulary_axis not in names:
            raise ValueError(
                f"vocabulary_axis={self.vocabulary_axis!r} is not one of axis_names={names}: "
                "name the axis of `embeddings` that is indexed by tokens."
            )
        self._check_byte_orders()
        self._check_shapes()
        sizes = _named_sizes(names, self._sizes)
        if min(self._sizes) < 1:
            raise ValueError(f"every axis needs a size of at least 1, got {sizes}.")
        if not 0 <= self.padding_rows < self._num_rows:
            raise ValueError(
                f"padding_rows must be at least 0 and below {self._num_rows}, the number of rows "
                f"on axis {self.vocabulary_axis!r}, got {self.padding_rows} for a table of {sizes}."
            )

    @classmethod
    @suggest(embedding_axes=_suggest_axes, key=suggest_key)
    def from_config(
        cls,
        vocab_size: Whole,
        embedding_axes: Mapping[str, Whole],
        vocabulary_axis: str = "vocabulary",
        initializer: Callable[..., Array | np.ndarray] = _fan_out_normal,
        dtype: DTypeLike | None = None,
        *,
        use_bias: bool = False,
        pad_to_multiple_of: Whole = 1,
        key: PRNGKeyArray,
    ) -> "EmbeddingTable":
        """Makes a table with random embeddings.

        **Arguments:**

        - `vocab_size`: the number of tokens.
        - `embedding_axes`: the name and size of each axis of an embedding, in order: usually
            `{"embedding": 768}`, or for example `{"heads": 12, "features": 64}`.
        - `vocabulary_axis`: the name of the axis indexed by tokens, which comes first. Defaults to
            `"vocabulary"`.
        - `initializer`: an initializer from `jax.nn.initializers`, called as
            `initializer(key, shape, dtype)` with `shape = (vocab_size, *embedding sizes)`.
            Defaults to penzai's: normal, with a standard deviation of
            `1 / sqrt(product of embedding sizes)`, which is
            `variance_scaling(1.0, "fan_out", "normal", in_axis=(), out_axis=<embedding axes>,
            batch_axis=<vocabulary axis>)`.
        - `dtype`: the dtype of the embeddings and the bias. Defaults to float32, or float64 in
            JAX's 64-bit mode.
        - `use_bias`: whether the table has a bias, which starts at zero. Defaults to `False`.
        - `pad_to_multiple_of`: rows of zeros are added until the number of rows is a multiple of
            this, so that a mesh can divide them. The embeddings of tokens do not depend on it.
            Defaults to 1, no padding.
        - `key`: a `jax.random.key` for the initializer.

        **Returns:**

        A table whose `embeddings` have the shape `(vocab_size + padding_rows, *embedding sizes)`.

        **Raises:**

        A `ValueError` for a size below 1, for a `vocabulary_axis` that is also an embedding axis,
        for a `dtype` that is not floating, and if the initializer returns another shape.
        """
        if not isinstance(embedding_axes, Mapping):
            raise TypeError(
                f"embedding_axes must be a mapping from names to sizes, got {embedding_axes!r}."
            )
        numbers = vocab_size, *embedding_axes.values(), pad_to_multiple_of
        names = vocabulary_axis, *embedding_axes
        sizes = _named_sizes(names, numbers[:-1])
        # beartype checks only one size of `embedding_axes`
        if not all(isinstance(number, Whole) and number >= 1 for number in numbers):
            raise ValueError(
                f"every size must be an integer of at least 1, got {sizes}, pad_to_multiple_of="
                f"{pad_to_multiple_of}."
            )
        *shape, multiple = map(as_int, numbers)
        shape = tuple(shape)
        dtype = jnp.result_type(float) if dtype is None else dtype
        dtype = as_float_dtype("embeddings", "dtype", dtype)
        embeddings = jnp.asarray(initializer(key, shape, dtype), dtype)
        if embeddings.shape != shape:
            raise ValueError(
                f"the initializer returned an array of shape {embeddings.shape}, expected {shape} "
                f"({sizes})."
            )
        padding_rows = -shape[0] % multiple
        if padding_rows > 0:
            embeddings = jnp.pad(embeddings, [(0, padding_rows)] + [(0, 0)] * len(embedding_axes))
        bias = jnp.zeros(len(embeddings), dtype) if use_bias else None
        return cls(embeddings, names, vocabulary_axis, padding_rows, bias)

    @property
    def vocab_size(self) -> int:
        """The number of tokens: the size of the vocabulary axis without its padding rows."""
        return self._num_rows - self.padding_rows

    @property
    def embedding_axes(self) -> dict[str, int]:
        """The name and size of each axis of an embedding, in order."""
        sizes = dict(zip(self.axis_names, self._sizes, strict=True))
        del sizes[self.vocabulary_axis]
        return sizes

    def partition_spec(self, rules: Rules) -> PartitionSpec:
        """Returns how a device mesh splits `embeddings`.

        **Arguments:**

        - `rules`: a mesh axis (or several, or `None`) for each axis name, such as
            `{"vocabulary": "model"}`. Names that this table does not have are ignored, so that one
            set of rules serves a whole model.

        **Returns:**

        A `jax.sharding.PartitionSpec` with one entry for each axis of `embeddings`. Axes without a
        rule are not split, nor are the leading axes of a stacked table.

        **Raises:**

        A `ValueError` if the rules split two axes of the table over one mesh axis, or give one of
        them a `PartitionSpec`.
        """
        stacked = (None,) * len(self._stacked_shape)
        return PartitionSpec(*stacked, *find_entries(rules, self.axis_names))

    def shardings(self, mesh: Mesh | AbstractMesh, rules: Rules) -> "EmbeddingTable":
        """Returns how a device mesh splits each array of the table.

        ```python
        table = jax.device_put(table, table.shardings(mesh, {"vocabulary": "model"}))
        ```

        **Arguments:**

        - `mesh`: the device mesh.
        - `rules`: as in [`eqx_embedding.EmbeddingTable.partition_spec`][].

        **Returns:**

        The table with a `jax.sharding.NamedSharding` in place of each array, for `jax.device_put`
        and for the `out_shardings` of `jax.jit`. The bias is split like the vocabulary axis. This
        also works on a skeleton from `eqx.filter_eval_shape`, and on the state of an optimizer: of
        a table that is not stacked, arrays with fewer axes, such as the factors of Adafactor, are
        not split. Neither is an axis of size 1.
        """

        def sharding(path: Any, array: Any) -> NamedSharding:
            axes = find_entries(rules, self._axes_of_arrays[path[0].name])
            stacked = len(array.shape) - len(axes)
            if stacked < 0:
                return NamedSharding(mesh, PartitionSpec())
            sizes = zip(axes, array.shape[stacked:], strict=True)
            entries = (None if size == 1 else entry for entry, size in sizes)
            return NamedSharding(mesh, PartitionSpec(*[None] * stacked, *entries))

        return jax.tree_util.tree_map_with_path(sharding, self)

    @property
    def _shape(self) -> tuple[int, ...]:
        if not hasattr(self.embeddings, "shape"):
            raise _no_array("embeddings", self.embeddings)
        return self.embeddings.shape

    @property
    def _stacked_shape(self) -> tuple[int, ...]:
        return self._shape[: len(self._shape) - len(self.axis_names)]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self._shape[len(self._stacked_shape) :]

    @property
    def _axes_of_arrays(self) -> dict[str, tuple[str, ...]]:
        """The names of the last axes of each array."""
        return {"embeddings": self.axis_names, "bias": (self.vocabulary_axis,)}

    @property
    def _row_axis(self) -> RowAxis:
        """The row axis of the embeddings of a table that is not stacked."""
        return find_row_axis(self.axis_names, self.vocabulary_axis)

    @property
    def _num_rows(self) -> int:
        return self._row_axis.of(self._sizes)

    def _count_tokens(self, num_rows: int) -> int:
        """The number of tokens if the table has `num_rows` rows, padding included."""
        if num_rows <= self.padding_rows:
            raise ValueError(
                f"this table has {num_rows} rows, {self.padding_rows} of them padding, so no row "
                "is left for a token. If it is the trained part of `partition_rows`, or made from "
                "it, use `combine_rows` first."
            )
        return num_rows - self.padding_rows

    def _rows_first(self) -> tuple[Array, Array | None]:
        """The embeddings, of shape (rows, *embedding), and the bias, of shape (rows,)."""
        self._check_arrays()
        bias = None if self.bias is None else jnp.asarray(self.bias)
        return self._row_axis.move_first(jnp.asarray(self.embeddings)), bias

    def _check_arrays(
        self,
        advice: str = "Use it inside `eqx.filter_vmap` or `jax.lax.scan`, one table at a time.",
    ) -> None:
        """Raises an error unless this table has arrays and is not stacked.

        A checkpoint, `eqx.tree_at` or `eqx.partition` may have changed it since `__check_init__`.
        """
        arrays = {"embeddings": self.embeddings}
        if self.bias is not None:
            arrays["bias"] = self.bias
        for name, array in arrays.items():
            masked = isinstance(array, np.ma.MaskedArray)  # `jnp.asarray` would drop the mask
            if masked or not isinstance(array, jax.Array | np.ndarray):
                raise _no_array(name, array)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise TypeError(f"{name} must be floating, got {array.dtype.name}.")
        self._check_byte_orders()
        self._check_shapes()
        if self._stacked_shape:
            raise ValueError(
                f"this table is stacked: its embeddings have shape {self.embeddings.shape}, and "
                f"axis_names={self.axis_names} describe the last {len(self.axis_names)} axes. "
                f"{advice} If it is one table, name all of its axes."
            )

    def _check_byte_orders(self) -> None:
        check_byte_order("embeddings", self.embeddings)
        check_byte_order("bias", self.bias)

    def _check_shapes(self) -> None:
        shape, names = self.embeddings.shape, self.axis_names
        if len(shape) < len(names):
            raise ValueError(
                f"embeddings of shape {shape} have {len(shape)} axes, but {len(names)} are named: "
                f"axis_names={names}."
            )
        bias_shape = *self._stacked_shape, self._num_rows
        if self.bias is not None and self.bias.shape != bias_shape:
            raise ValueError(
                f"the bias must have shape {bias_shape}, one number for each row of the vocabulary "
                f"{self.vocabulary_axis!r}, padding rows included, got {self.bias.shape} for "
                f"embeddings of shape {shape}."
            )


def _no_array(name: str, found: Any) -> ValueError:
    advice = "Combine the parts of the model first, for example with `eqx.combine`."
    if isinstance(found, np.ma.MaskedArray):
        advice = "Its mask would be lost: fill it by `.filled(...)`, or combine it with another."
    return ValueError(f"this table has {type(found).__name__} in place of its {name}. {advice}")


suggest_for_fields(
    EmbeddingTable, embeddings=suggest_array, axis_names=suggest_names, bias=suggest_array
)
