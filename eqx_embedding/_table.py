"""`EmbeddingTable`: the array, the names of its axes, and how it is made."""

from collections.abc import Callable, Iterable, Mapping
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import variance_scaling
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ._numbers import as_float_dtype, as_int, Whole
from ._tokens import as_array


Rules = Mapping[str, str | tuple[str, ...] | None]


def _fan_out_normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Normal with standard deviation `1 / sqrt(product of embedding sizes)`: penzai's default."""
    embedding_axes = tuple(range(1, len(shape)))
    draw = variance_scaling(
        1.0, "fan_out", "normal", in_axis=(), out_axis=embedding_axes, batch_axis=0
    )
    return draw(key, shape, dtype)


def _named_sizes(names: Iterable[str], sizes: Iterable[object]) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))


@final
class EmbeddingTable(eqx.Module):
    """A table with one embedding for each token of a vocabulary: the parameter of
    [`eqx_embedding.EmbeddingLookup`][] and [`eqx_embedding.EmbeddingDecode`][].

    Make one with [`eqx_embedding.EmbeddingTable.from_config`][], or from an array:

    ```python
    EmbeddingTable(array, ("vocabulary", "embedding"))
    ```

    PyTrees carry no identity: store a table **once** in a model and build the layers where they
    are called, `EmbeddingLookup(self.table)(tokens)` and `EmbeddingDecode(self.table)(hidden)`.
    They are views, cost nothing, and are tied.

    **Fields:**

    - `embeddings`: the parameter, an array of floats. A table that `vmap` or `scan` has stacked
        has further axes in front.
    - `axis_names`: the name of each axis, in order; they describe the *last* `len(axis_names)`
        axes of `embeddings`.
    - `vocabulary_axis`: which of them is indexed by tokens, wherever it stands. All others are
        the embedding, in the order in which they stand. Defaults to `"vocabulary"`.
    - `padding_rows`: how many rows at the end of the vocabulary axis stand for no token. They
        are never looked up, and have no logit. Defaults to 0.

    **Raises:**

    A `ValueError` if names repeat or are no strings, if `vocabulary_axis` is not one of them, if
    `embeddings` has fewer axes than names or an axis of size zero, or unless
    `0 <= padding_rows < rows`.
    """

    embeddings: Float[Array, "..."]
    axis_names: tuple[str, ...] = eqx.field(static=True)
    vocabulary_axis: str = eqx.field(static=True, default="vocabulary")
    padding_rows: int = eqx.field(static=True, converter=as_int, default=0)

    def __check_init__(self):
        names = self.axis_names
        if not all(isinstance(name, str) for name in names):  # the type checks look at one
            raise ValueError(f"axis names must be strings, got axis_names={names}.")
        if len(set(names)) < len(names):
            raise ValueError(f"axis names must be unique, got axis_names={names}.")
        if self.vocabulary_axis not in names:
            raise ValueError(
                f"vocabulary_axis={self.vocabulary_axis!r} is not one of axis_names={names}: "
                "name the axis of `embeddings` that is indexed by tokens."
            )
        self._check_rank()
        sizes = _named_sizes(names, self._sizes)
        if min(self._sizes) < 1:
            raise ValueError(f"every axis needs a size of at least 1, got {sizes}.")
        rows = self._sizes[names.index(self.vocabulary_axis)]
        if not 0 <= self.padding_rows < rows:
            raise ValueError(
                f"padding_rows must be at least 0 and below {rows}, the number of rows on axis "
                f"{self.vocabulary_axis!r}, got {self.padding_rows} for a table of {sizes}."
            )

    @classmethod
    def from_config(
        cls,
        vocab_size: Whole,
        embedding_axes: Mapping[str, Whole],
        vocabulary_axis: str = "vocabulary",
        initializer: Callable[..., Array | np.ndarray] = _fan_out_normal,
        dtype: DTypeLike | None = None,
        *,
        pad_to_multiple_of: Whole = 1,
        key: PRNGKeyArray,
    ) -> "EmbeddingTable":
        """Makes a table with random embeddings.

        **Arguments:**

        - `vocab_size`: the number of tokens.
        - `embedding_axes`: the name and size of each axis of an embedding, in order; usually
            `{"embedding": 768}`, also `{"heads": 12, "features": 64}`.
        - `vocabulary_axis`: the name of the axis that is indexed by tokens, which comes first.
            Defaults to `"vocabulary"`.
        - `initializer`: any initializer of `jax.nn.initializers`, called as
            `initializer(key, shape, dtype)` with `shape = (vocab_size, *embedding sizes)`.
            Defaults to penzai's: normal, with a standard deviation of
            `1 / sqrt(product of embedding sizes)`, which is
            `variance_scaling(1.0, "fan_out", "normal", in_axis=(), out_axis=<embedding axes>,
            batch_axis=<vocabulary axis>)`.
        - `dtype`: the dtype of the embeddings. Defaults to float32, or to float64 if JAX is in
            64-bit mode.
        - `pad_to_multiple_of`: rows of zeros are added until their number is a multiple of this,
            so that a mesh can divide them. What is drawn for the tokens does not depend on it.
            Defaults to 1, which adds none.
        - `key`: a `jax.random.key` for the initializer.

        **Returns:**

        A table whose `embeddings` have the shape `(vocab_size + padding_rows, *embedding sizes)`.

        **Raises:**

        A `ValueError` for a size below 1, for a `vocabulary_axis` that is also an embedding axis,
        for a `dtype` that is not floating, or for an initializer that returns another shape.
        """
        sizes = _named_sizes(
            (vocabulary_axis, *embedding_axes), (vocab_size, *embedding_axes.values())
        )
        if vocabulary_axis in embedding_axes:
            raise ValueError(
                f"the vocabulary axis {vocabulary_axis!r} is also an embedding axis: {sizes}. "
                "Give one of them another name."
            )
        numbers = vocab_size, *embedding_axes.values(), pad_to_multiple_of
        # the type checks look at one size of `embedding_axes` only
        if not all(isinstance(number, Whole) and number >= 1 for number in numbers):
            raise ValueError(
                f"every size must be an integer of at least 1, got {sizes}, pad_to_multiple_of="
                f"{pad_to_multiple_of}."
            )
        *shape, multiple = map(as_int, numbers)
        shape = tuple(shape)
        dtype = as_float_dtype(
            "embeddings", "dtype", jnp.result_type(float) if dtype is None else dtype
        )
        embeddings = jnp.asarray(initializer(key, shape, dtype), dtype)
        if embeddings.shape != shape:
            raise ValueError(
                f"the initializer returned an array of shape {embeddings.shape}, expected {shape} "
                f"({sizes})."
            )
        padding_rows = -shape[0] % multiple
        if padding_rows > 0:
            embeddings = jnp.pad(embeddings, [(0, padding_rows)] + [(0, 0)] * len(embedding_axes))
        return cls(embeddings, (vocabulary_axis, *embedding_axes), vocabulary_axis, padding_rows)

    @property
    def vocab_size(self) -> int:
        """The number of tokens: the size of the vocabulary axis without its padding rows."""
        return self._sizes[self.axis_names.index(self.vocabulary_axis)] - self.padding_rows

    @property
    def embedding_axes(self) -> dict[str, int]:
        """The name and size of each axis of an embedding, in order."""
        sizes = dict(zip(self.axis_names, self._sizes, strict=True))
        del sizes[self.vocabulary_axis]
        return sizes

    def partition_spec(self, rules: Rules) -> PartitionSpec:
        """How `embeddings` are split over the axes of a device mesh.

        **Arguments:**

        - `rules`: a mesh axis (or several, or `None`) for each axis name, such as
            `{"vocabulary": "model"}`. Names that this table lacks are ignored, so that one set of
            rules serves a whole model.

        **Returns:**

        A `jax.sharding.PartitionSpec` with one entry for each axis of `embeddings`. Axes without
        a rule, and those in front of the named ones, are not split.
        """
        stacked = (None,) * (len(self.embeddings.shape) - len(self.axis_names))
        return PartitionSpec(*stacked, *(rules.get(name) for name in self.axis_names))

    @property
    def _sizes(self) -> tuple[int, ...]:
        # not `[-len(names):]`, which would be everything for a table without names
        return self.embeddings.shape[len(self.embeddings.shape) - len(self.axis_names) :]

    def _vocabulary_position(
        self,
        advice: str = "Use it inside `eqx.filter_vmap` or `jax.lax.scan`, which take them away.",
    ) -> int:
        """The index of the vocabulary axis, for a table that is not stacked."""
        if len(self.embeddings.shape) > len(self.axis_names):
            raise ValueError(
                f"this table is stacked: its embeddings have shape {self.embeddings.shape}, and "
                f"axis_names={self.axis_names} describe the last {len(self.axis_names)} axes. "
                f"{advice}"
            )
        return self.axis_names.index(self.vocabulary_axis)

    def _check_rank(self) -> None:
        shape, names = self.embeddings.shape, self.axis_names
        if len(shape) < len(names):
            raise ValueError(
                f"embeddings of shape {shape} have {len(shape)} axes, but {len(names)} are named: "
                f"axis_names={names}."
            )

    def _in_use(self) -> tuple[Array, int]:
        """The embeddings, and the index of their vocabulary axis.

        What a checkpoint, `eqx.tree_at` or `eqx.partition` put in their place was not checked then.
        """
        if not isinstance(self.embeddings, jax.Array | np.ndarray):
            raise ValueError(
                f"a table without embeddings cannot be used: in their place it has "
                f"{type(self.embeddings).__name__}. Put the model together first, as by "
                "`eqx.combine`."
            )
        position = self._vocabulary_position()
        self._check_rank()
        if not jnp.issubdtype(self.embeddings.dtype, jnp.floating):
            raise TypeError(f"embeddings must be floating, got {self.embeddings.dtype.name}.")
        return jnp.asarray(as_array("embeddings", self.embeddings)), position
