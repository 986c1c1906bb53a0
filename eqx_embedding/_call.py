"""One call of a method of `EmbeddingDecode`: its checked arguments, in the form that kernels take.

The kernels in `_blockwise/` compute the logits of a chunk of tokens at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from ._blockwise import (
    close_over,
    Comparison,
    Draws,
    Operands,
    Options,
    sample_tokens,
    score_tokens,
    shapes_of_scores,
    Teacher,
    token_losses,
    TokenScores,
    top_k_tokens,
    Used,
    Wanted,
)
from ._devices import reshard, varying_axes
from ._inputs import (
    as_data,
    as_named_int,
    keys_of_tokens,
    prepare_targets,
    prepare_weights,
    Whole,
)
from ._sharding import Split


class Call(NamedTuple):
    """What is known of a call. Its methods add to that, or run it."""

    options: Options  # known when the program is compiled
    split: Split  # which mesh axes split what
    operands: Operands  # arrays, without weights and data
    weights: Any = None
    target_weights: Any = None

    def with_targets(
        self, targets: ArrayLike, target_weights: ArrayLike | None, ignore_index: Whole | None
    ) -> "Call":
        """With targets, and the mask of tokens that have one."""
        _check_targets(self.operands.batch, targets, target_weights)
        targets, target_weights, mask = prepare_targets(
            targets,
            target_weights,
            ignore_index,
            self.options.vocab_size,
            self.options.wide,
            self._reshard,
        )
        operands = self.operands._replace(targets=targets, mask=mask)
        return self._replace(operands=operands, target_weights=target_weights)

    def with_teacher(
        self, kind: str, temperature: float, options: Options, operands: Operands
    ) -> "Call":
        """With what a teacher computes its logits from."""
        hidden, rows, bias, *_ = operands
        _check_tables(self.split, (self.options, self.operands.rows), (options, rows))
        wide = np.promote_types(self.options.wide, options.wide)
        comparison = Comparison(kind, temperature, options.soft_cap, options.dtype)
        teacher = Teacher(hidden, rows, None if bias is None else bias.astype(wide))
        return self._replace(
            options=self.options._replace(
                padded=self.options.padded or options.padded,
                wide=wide,
                transposed=self.options.transposed or options.transposed,
                comparison=comparison,
            ),
            operands=self.operands._replace(teacher=teacher),
        )

    def with_weights(self, weights: ArrayLike | None, reduction: str) -> "Call":
        """With weights, divided by their sum for a mean, and the mask of those that are not 0.

        After `with_targets`, whose mask it narrows.
        """
        batch, split, operands = self.operands.batch, self.split, self.operands
        if weights is not None and np.shape(weights) != batch:
            raise ValueError(_wrong_shape("weights", weights, batch))
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}.')
        weights, mask = prepare_weights(
            weights,
            operands.mask,
            batch,
            self.options.wide,
            reduction == "mean",
            split.manual_batch,
            self._reshard,
        )
        return self._replace(weights=weights, operands=operands._replace(mask=mask))

    def scores(self, used: Used) -> Any:
        return score_tokens(self.options, self.split, used, self.operands)

    def loss(
        self, fn: Callable[..., Any], data: tuple[Any, ...], reduction: str, return_scores: bool
    ) -> Any:
        options, split, operands, weights, _ = self
        data = tuple(as_data(i, array, weights.shape) for i, array in enumerate(data))
        data_of_token = [jax.ShapeDtypeStruct(x.shape[weights.ndim :], x.dtype) for x in data]
        of_targets = None if operands.targets is None else operands.targets.shape[weights.ndim :]
        scores_of_token = shapes_of_scores(options.wide, of_targets)
        function, closure = close_over(fn, options.wide, scores_of_token, tuple(data_of_token))
        wanted = Wanted(function, reduction != "none", return_scores)
        operands = operands._replace(weights=weights, data=data, closure=closure)
        loss, scores = token_losses(options, split, wanted, operands)
        return (loss, scores) if return_scores else loss

    def sum_targets(self, scores: TokenScores) -> TokenScores:
        """The scores of tokens with k targets each, as those of one target."""
        weights, mask = lax.stop_gradient(self.target_weights), self.operands.mask
        log_prob = jnp.sum(weights * scores.log_prob, axis=-1)
        # A masked token may have weights of NaN
        log_prob = log_prob if mask is None else jnp.where(mask, log_prob, 0)
        k = lax.broadcasted_iota(np.int32, weights.shape, weights.ndim - 1)
        largest = k == jnp.argmax(weights, axis=-1, keepdims=True).astype(np.int32)
        return scores._replace(log_prob=log_prob, is_top=jnp.any(scores.is_top & largest, axis=-1))

    def top_k(self, k: int) -> tuple[Array, Array]:
        return top_k_tokens(self.options, self.split, k, self.operands)

    def sample(self, k: int | None, key: PRNGKeyArray, temperature: Array) -> Array:
        split = self.split
        if differs := set(split.manual_vocabulary) & varying_axes(key, temperature):
            raise ValueError(
                "key and temperature must be the same along the mesh axes that split the "
                f"vocabulary, but differ along {sorted(differs)}."
            )
        keys = keys_of_tokens(key, self.operands.batch, split.manual_batch)
        # Tokens have no gradient, and JAX cannot differentiate the maximum over devices
        draws = Draws(self._reshard(keys), self._reshard(temperature))
        operands = lax.stop_gradient(self.operands._replace(draws=draws))
        return sample_tokens(self.options, split, k, operands)

    def check_k(self, name: str, k: Whole) -> int:
        k = as_named_int(name, k)
        if not 1 <= k <= self.options.vocab_size:
            raise ValueError(
                f"{name} must be at least 1 and at most vocab_size={self.options.vocab_size}, got "
                f"{k}."
            )
        return k

    def _reshard(self, array: Array) -> Array:
        return reshard(self.split.mesh, array, self.split.batch)


def _check_targets(
    batch: tuple[Any, ...], targets: ArrayLike, target_weights: ArrayLike | None
) -> None:
    shape = np.shape(targets)
    if target_weights is None:
        if shape != batch:
            raise ValueError(_wrong_shape("targets", targets, batch))
    elif shape[:-1] != batch or len(shape) != len(batch) + 1 or shape[-1] == 0:
        raise ValueError(
            f"with target_weights, targets must have the shape {batch} of hidden without its "
            "embedding axes, and one more axis, for one or more targets of each token, got "
            f"{shape}."
        )
    elif np.shape(target_weights) != shape:
        raise ValueError(
            f"target_weights must have the shape {shape} of targets, got "
            f"{np.shape(target_weights)}."
        )


def _check_tables(
    split: Split, student: tuple[Options, Array], teacher: tuple[Options, Array]
) -> None:
    """`split` is that of the student."""
    (options, rows), (theirs, their_rows) = student, teacher
    if options.vocab_size != theirs.vocab_size:
        raise ValueError(
            "student and teacher must have the same vocabulary, got a vocab_size of "
            f"{options.vocab_size} and {theirs.vocab_size}."
        )
    if split.manual_table[0] and len(rows) != len(their_rows):
        raise ValueError(
            "inside this `jax.shard_map` each device must have the same number of rows of student "
            f"and teacher, got {len(rows)} and {len(their_rows)}. Make the tables with the same "
            "`pad_to_multiple_of`."
        )


def _wrong_shape(name: str, array: Any, batch: tuple[Any, ...]) -> str:
    return (
        f"{name} must have the shape {batch} of hidden without its embedding axes, got "
        f"{np.shape(array)}."
    )
