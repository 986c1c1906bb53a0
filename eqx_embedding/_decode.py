"""`EmbeddingDecode`: vectors to logits."""

import math
from typing import final

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from ._table import EmbeddingTable


@final
class EmbeddingDecode(eqx.Module):
    """Scores every token of a vocabulary by the product of its embedding and a hidden vector.

    ```python
    logits = EmbeddingDecode(table)(hidden)
    ```

    **Fields:**

    - `table`: the [`eqx_embedding.EmbeddingTable`][].
    - `bias`: added to the logits, of shape `(vocab_size,)`. Defaults to `None`, which is no bias.
    - `soft_cap`: keeps the logits between `-soft_cap` and `soft_cap`, as
        `soft_cap * tanh(logits / soft_cap)`, after the bias, as in
        [Gemma 2](https://arxiv.org/abs/2408.00118). Defaults to `None`, which does not.
    - `logits_dtype`: the dtype of the logits. Defaults to `None`, JAX's promotion of the hidden
        vector, the embeddings and the bias. They are computed in float32 at least.

    **Raises:**

    A `ValueError` for a bias of another shape, a soft cap that is not positive and finite, or a
    `logits_dtype` that is not floating.
    """

    table: EmbeddingTable
    bias: Float[Array, " vocab_size"] | None = None
    soft_cap: float | int | None = eqx.field(static=True, default=None)
    logits_dtype: DTypeLike | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.bias is not None and self.bias.shape != (self.table.vocab_size,):
            raise ValueError(
                f"the bias must have shape ({self.table.vocab_size},), one number for each token "
                f"of the vocabulary {self.table.vocabulary_axis!r} without its padding rows, got "
                f"{self.bias.shape}."
            )
        if self.soft_cap is not None and not 0 < self.soft_cap < math.inf:
            raise ValueError(f"soft_cap must be positive and finite, got {self.soft_cap}.")
        if self.logits_dtype is not None and not jnp.issubdtype(self.logits_dtype, jnp.floating):
            raise ValueError(
                f"logits are floats, got logits_dtype={jnp.dtype(self.logits_dtype).name}."
            )

    def __call__(
        self, hidden: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "... {self.table.vocab_size}"]:
        """**Arguments:**

        - `hidden`: vectors of shape `*batch` followed by the embedding axes.
        - `key`: ignored, for compatibility with `eqx.nn.Sequential`.

        **Returns:**

        The logits, of shape `*batch vocab_size`: padding rows have none.

        **Raises:**

        A `ValueError` that names the embedding axes if `hidden` does not end with them, or for a
        stacked table.
        """
        del key
        table, axis = self.table, self.table._vocabulary_position()
        batch_axes = hidden.ndim - len(table.embedding_axes)
        if batch_axes < 0 or hidden.shape[batch_axes:] != tuple(table.embedding_axes.values()):
            expected = ", ".join(f"{name}={size}" for name, size in table.embedding_axes.items())
            raise ValueError(
                f"hidden must end with the embedding axes ({expected}) of the table, got the "
                f"shape {hidden.shape}."
            )
        operands = [hidden, table.embeddings] + ([] if self.bias is None else [self.bias])
        dtype = jnp.result_type(*operands)
        wide = jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
        product_dtype = jnp.result_type(*operands[:2])
        rows = lax.slice_in_dim(table.embeddings, 0, table.vocab_size, axis=axis)
        embedding_positions = [i for i in range(rows.ndim) if i != axis]
        logits = lax.dot_general(
            hidden.astype(product_dtype),
            rows.astype(product_dtype),
            ((range(batch_axes, hidden.ndim), embedding_positions), ((), ())),
            preferred_element_type=wide,
        )
        if self.bias is not None:
            logits = logits + jnp.expand_dims(self.bias.astype(wide), range(batch_axes))
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        return logits.astype(dtype if self.logits_dtype is None else self.logits_dtype)
