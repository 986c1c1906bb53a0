"""`EmbeddingDecode`: vectors to logits, and to the loss."""

import math
from typing import final

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, PRNGKeyArray

from ._cross_entropy import make_plan, Options, weighted_cross_entropy
from ._numbers import as_float_dtype, as_int, as_real, at_least_float32, Real, Whole
from ._sharding import explicit_axes, find_split, remaining, without_padding
from ._table import EmbeddingTable, Rules
from ._tokens import as_whole_array, tokens_in_range


# Beside a soft cap or a z-loss above this, float32 would lose the logits.
LARGEST = 1e30


@final
class EmbeddingDecode(eqx.Module):
    """Scores every token of a vocabulary by the product of its embedding and a hidden vector.

    ```python
    logits = EmbeddingDecode(table)(hidden)
    ```

    **Fields:**

    - `table`: the [`eqx_embedding.EmbeddingTable`][], whose bias, if it has one, is added to the
        logits.
    - `soft_cap`: keeps the logits between `-soft_cap` and `soft_cap`, as
        `soft_cap * tanh(logits / soft_cap)`, after the bias, as in
        [Gemma 2](https://arxiv.org/abs/2408.00118). A number, not traced, of at most 1e30.
        Defaults to `None`, which is no cap.
    - `logits_dtype`: the dtype of the logits. Defaults to `None`, JAX's promotion of the hidden
        vector, the embeddings and the bias. They are computed in float32 at least.

    **Raises:**

    A `ValueError` for a soft cap that is not positive or above 1e30, or a
    `logits_dtype` that is not floating.
    """

    table: EmbeddingTable
    soft_cap: float | int | None = eqx.field(static=True, converter=as_real, default=None)
    logits_dtype: DTypeLike | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.soft_cap is not None and not 0 < self.soft_cap <= LARGEST:
            raise ValueError(
                f"soft_cap must be positive and at most {LARGEST}, got {self.soft_cap}. None is no "
                "cap at all."
            )
        if self.logits_dtype is not None:
            as_float_dtype("logits", "logits_dtype", self.logits_dtype)

    def __call__(
        self,
        hidden: Float[Array, "..."],
        *,
        rules: Rules | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "... vocab_size"]:
        """**Arguments:**

        - `hidden`: vectors of shape `*batch` followed by the embedding axes.
        - `rules`: as in [`eqx_embedding.EmbeddingLookup`][].
        - `key`: ignored, for compatibility with `eqx.nn.Sequential`.

        **Returns:**

        The logits, of shape `*batch vocab_size`: padding rows have none. If a mesh splits the
        vocabulary, it splits the logits alike, unless there are padding rows: no mesh divides
        the rest of them, so that each device has the logits of the whole vocabulary.

        **Raises:**

        A `ValueError` that names the embedding axes if `hidden` does not end with them, for a
        stacked table, or for rules that do not fit the mesh.
        """
        del key
        table, (rows, bias) = self.table, self.table._rows_first()
        batch_axes = self._check_hidden(hidden)
        dtype, wide, product_dtype = self._dtypes(hidden)
        split = find_split(table, rows, hidden, 0, rules)
        vocab_size = split.vocab_size(table)
        part_of_padded = table.padding_rows > 0 and bool(split.all_vocabulary)
        if bias is not None:
            bias = split.place(bias.astype(wide), [explicit_axes(rows)[0]])
        # Before the product, so that not even a NaN in a padding row reaches the gradients.
        if part_of_padded:
            rows = without_padding(rows, split, vocab_size)
            bias = None if bias is None else without_padding(bias, split, vocab_size)
        else:
            rows = rows[: table.vocab_size]
            bias = None if bias is None else bias[: table.vocab_size]
        batch = explicit_axes(hidden)[:batch_axes]
        columns = remaining(explicit_axes(rows)[0], batch)
        logits = lax.dot_general(
            hidden.astype(product_dtype),
            rows.astype(product_dtype),
            ((range(batch_axes, hidden.ndim), range(1, rows.ndim)), ((), ())),
            preferred_element_type=wide,
            out_sharding=split.sharding([*batch, columns]),
        )
        if bias is not None:
            bias = split.place(bias, [columns])
            logits = logits + jnp.expand_dims(bias, range(batch_axes))
        if part_of_padded:
            if split.manual_vocabulary:
                logits = lax.all_gather(
                    logits, split.manual_vocabulary, axis=batch_axes, tiled=True, to="invarying"
                )
            logits = split.place(logits, [*batch, ()])
            logits = lax.slice_in_dim(logits, 0, vocab_size, axis=batch_axes)
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return logits.astype(dtype if self.logits_dtype is None else self.logits_dtype)

    def cross_entropy(
        self,
        hidden: Float[Array, "..."],
        targets: Integer[ArrayLike, "..."],
        *,
        weights: Bool[ArrayLike, "..."]
        | Integer[ArrayLike, "..."]
        | Float[ArrayLike, "..."]
        | None = None,
        label_smoothing: Real = 0.0,
        z_loss: Real = 0.0,
        reduction: str = "mean",
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> Float[Array, "..."]:
        """The cross-entropy of the targets, as if from the logits, which never all exist at once.

        ```python
        loss = EmbeddingDecode(table).cross_entropy(hidden, targets)
        ```

        With the logits `z`, their `lse = logsumexp(z)`, and `e = label_smoothing`, the loss of a
        token is

        `lse - (1 - e) * z[target] - e / vocab_size * sum(z) + z_loss * lse**2`

        with label smoothing as in [Inception v3](https://arxiv.org/abs/1512.00567) and the
        z-loss of [PaLM](https://arxiv.org/abs/2204.02311).

        It has gradients with respect to `hidden`, the table, the bias and `weights`. They are
        computed together with the loss, a chunk of tokens at a time, by a derivative of its own:
        for reverse mode (`jax.grad`), while JAX refuses forward mode (`jax.jvp`).

        **Arguments:**

        - `hidden`: vectors of shape `*batch` followed by the embedding axes.
        - `targets`: integers of shape `*batch`: the token that each vector should score highest.
            As in [`eqx_embedding.EmbeddingLookup`][], host data is checked at 64 bits.
        - `weights`: of shape `*batch`, how much each token counts; booleans are a mask. A token
            of weight zero costs nothing, whatever its vector and target are: -100 may mark
            padding. Nor has its loss a part in the gradient of its weight. Defaults to `None`,
            which counts each token once.
        - `label_smoothing`: the part of the target, below 1, that is spread over all tokens.
            Defaults to 0. A number, not traced: another one compiles anew.
        - `z_loss`: the factor of `lse**2`, which keeps the logits from drifting. 1e-4 in PaLM;
            defaults to 0. A number, not traced.
        - `reduction`: `"mean"`, weighted, and 0 when all weights are zero; `"sum"`; or `"none"`,
            of shape `*batch`: the loss of each token times its weight, whose gradient computes the
            logits again. Defaults to `"mean"`.
        - `chunk_size`: how many tokens have logits at once. Less takes less memory. Defaults to
            `None`, which chooses what is fast. Each device counts its own tokens.
        - `rules`: the axes of the device mesh that split the first axis of the batch and the
            vocabulary, such as `{"batch": "data", "vocabulary": "model"}`. Not needed for
            explicit mesh axes, which are part of the types of the arrays. Automatic axes are
            hidden from this call: without rules the loss is right and the table is not gathered,
            but its gradient is summed over devices once a chunk, rather than once. Inside a
            `jax.shard_map` rules are needed for all axes of it that split either; with
            `check_vma=False` nothing can tell that they are missing.

        **Returns:**

        The loss: a scalar, or of shape `*batch` for `reduction="none"`. It is computed and
        returned in float32, or in float64 for operands in float64, whatever `logits_dtype` is.
        A target out of range at a weight other than zero makes it, and its gradient, NaN.

        **Raises:**

        A `ValueError` for shapes that do not fit, for options out of their range, for a table
        without embeddings or tokens, and for rules that do not fit the mesh, or sizes that it does
        not divide. A `TypeError` for targets that are not integers, weights that are not real, and
        64-bit targets that are traced outside of JAX's 64-bit mode.
        """
        table, (embeddings, bias) = self.table, self.table._rows_first()
        batch = hidden.shape[: self._check_hidden(hidden)]
        for name, array in ("targets", targets), ("weights", weights):
            if array is not None and np.shape(array) != batch:
                raise ValueError(
                    f"{name} must have the shape {batch} of hidden without its embedding axes, "
                    f"got {np.shape(array)}."
                )
        label_smoothing, z_loss = as_real(label_smoothing), as_real(z_loss)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}.')
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
        if not 0 <= z_loss <= LARGEST:
            raise ValueError(f"z_loss must be at least 0 and at most {LARGEST}, got {z_loss}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")

        _, wide, dtype = self._dtypes(hidden)
        split = find_split(table, embeddings, hidden, len(batch), rules)
        rows = embeddings.astype(dtype)
        vocab_size = split.vocab_size(table)
        targets, in_range = tokens_in_range("targets", targets, vocab_size)
        xp = jnp if isinstance(targets, Array) else np
        targets = jnp.asarray(xp.where(in_range, targets, vocab_size).astype(np.int32))
        weights = _real_weights(jnp.ones(batch, wide) if weights is None else weights)
        alive = jnp.asarray(weights != 0)  # before anything narrows or scales them
        if reduction == "mean":
            weights = _shares(weights, alive, wide, split.manual_batch)
        weights = jnp.asarray(weights.astype(wide))  # a large integer is narrowed after that
        targets = jnp.where(alive, targets, -1)
        local_rows = len(rows) // split.size(split.vocabulary)
        plan = make_plan(local_rows, math.prod(rows.shape[1:]), dtype, wide, tiles=split.known)
        options = Options(
            vocab_size=vocab_size,
            padded=table.padding_rows > 0,
            split=split,
            label_smoothing=float(label_smoothing),
            z_loss=float(z_loss),
            soft_cap=None if self.soft_cap is None else float(self.soft_cap),
            reduce=reduction != "none",
            plan=plan if chunk_size is None else plan._replace(chunk_size=as_int(chunk_size)),
        )
        bias = None if bias is None else split.place(bias.astype(wide), [split.vocabulary])
        loss: Array = weighted_cross_entropy(
            options,
            split.place(hidden.astype(dtype), split.batch),
            split.place(rows, [split.vocabulary]),
            bias,
            split.place(weights, split.batch),
            split.place(targets, split.batch),
        )  # pyright: ignore[reportAssignmentType]
        return lax.psum(loss, split.manual_batch) if options.reduce else loss

    def _dtypes(self, hidden: Float[Array, "..."]) -> tuple[DTypeLike, DTypeLike, DTypeLike]:
        """The promotion of all operands; the dtype to compute in; that of the products' factors."""
        table = self.table
        operands = [hidden, table.embeddings] + ([] if table.bias is None else [table.bias])
        dtype = jnp.result_type(*operands)
        return dtype, at_least_float32(dtype), jnp.result_type(*operands[:2])

    def _check_hidden(self, hidden: Float[Array, "..."]) -> int:
        """The number of batch axes of `hidden`."""
        if not jnp.issubdtype(hidden.dtype, jnp.floating):
            raise TypeError(f"hidden must be floating, got {hidden.dtype.name}.")
        sizes = tuple(self.table.embedding_axes.values())
        batch_axes = hidden.ndim - len(sizes)
        if batch_axes < 0 or hidden.shape[batch_axes:] != sizes:
            expected = ", ".join(f"{n}={size}" for n, size in self.table.embedding_axes.items())
            raise ValueError(
                f"hidden must end with the embedding axes ({expected}) of the table, got the "
                f"shape {hidden.shape}."
            )
        return batch_axes


def _real_weights(weights: ArrayLike) -> Array | np.ndarray:
    weights = as_whole_array("weights", weights)
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in kinds):
        raise TypeError(f"weights must be bool, integer or floating, got {weights.dtype.name}.")
    return weights


def _shares(
    weights: Array | np.ndarray, alive: Array, dtype: DTypeLike, mesh_axes: tuple[str, ...]
) -> Array:
    """The weights divided by their sum, or all zero, if none is `alive`."""
    of_host = isinstance(weights, np.ndarray)
    xp = np if of_host else jnp
    weights = weights.astype(np.float64 if of_host else dtype)
    # The largest becomes 1 first, so that no sum overflows.
    largest = xp.max(xp.abs(weights), initial=0)
    if not of_host:
        largest = lax.stop_gradient(largest)
        largest = lax.pmax(largest, mesh_axes) if mesh_axes else largest
    # in two steps, for the reciprocal of the largest may be too small for XLA
    factor = 1 / xp.sqrt(xp.where((largest > 0) & (largest < math.inf), largest, 1.0))
    weights = jnp.asarray((weights * factor * factor).astype(dtype))
    # A sum of zero does not say that none is alive: 1 and -1
    some, total = lax.psum((jnp.sum(alive), jnp.sum(weights)), mesh_axes)
    return weights / jnp.where(some > 0, total, 1.0)
