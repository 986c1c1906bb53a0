"""Scores and losses of a batch, over the devices of a mesh, and under `jax.vmap`.

`hidden` is `*batch` followed by the axes that follow V in `rows`; `weights`, `targets` and `mask`
are `*batch`, `data` are `*batch ...`. `mask` and `bias` may be `None`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from .._inputs import at_least_float32
from .._sharding import Split, sum_over
from ._device_losses import device_losses
from ._device_scores import device_scores
from ._device_total import device_total
from ._devices import cast_to_varying, device_type
from ._function import TokenFunction
from ._logits import Options
from ._primitive import call_as_one
from ._scores import TokenScores, Used


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score_tokens(
    options: Options,
    split: Split,
    used: Used,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    targets: Array,
    mask: Array | None,
) -> TokenScores:
    """The scores of the targets; zeros for the tokens that the mask leaves out."""

    def on_device(hidden, rows, bias, targets, mask):
        head = _flatten_head(options, hidden, rows, bias)
        head, tokens = _mark_shared(split, head, _flatten(targets.ndim, (targets, mask)))
        scores = device_scores(_for_device(options, split, head), used, *head, *tokens)
        return jax.tree.map(lambda s: s.reshape(targets.shape), scores)

    def on_devices(*operands):
        batch, vocabulary = P(*split.batch), P(split.vocabulary)
        specs = batch, vocabulary, vocabulary, batch, batch
        return split.map(on_device, specs, batch, operands)

    def on_examples(size, mesh_axes, mapped, hidden, rows, bias, targets, mask):
        if any(jax.tree.leaves(mapped[1:3])):
            return None  # each example has a table of its own
        hidden, targets, mask = _repeat(size, (mapped[0], *mapped[3:]), (hidden, targets, mask))
        wider = split.with_examples(mesh_axes)
        return score_tokens(options, wider, used, hidden, rows, bias, targets, mask)

    operands = hidden, rows, bias, targets, mask
    return call_as_one(on_devices, *operands, vmap_rule=on_examples)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def total_loss(
    options: Options,
    split: Split,
    function: TokenFunction,
    return_scores: bool,
    hidden: Array,
    rows: Array,
    bias: Array | None,
    weights: Array,
    data: tuple[Array, ...],
    closure: tuple[Array, ...],
    targets: Array,
    mask: Array | None,
) -> tuple[Array, TokenScores | None]:
    """The weighted sum of the losses, and the scores without gradient."""

    def on_device(hidden, rows, bias, weights, data, closure, targets, mask):
        batch_shape = weights.shape
        head = _flatten_head(options, hidden, rows, bias)
        weights, data, targets, mask = _flatten(weights.ndim, (weights, data, targets, mask))
        tokens = weights, data, _widen(closure), targets, mask
        head, tokens = _mark_shared(split, head, tokens)
        local = _for_device(options, split, head)
        both: Any = device_total(local, function, return_scores, *head, *tokens)
        total, scores = both
        scores = jax.tree.map(lambda s: s.reshape(batch_shape), scores)
        return sum_over(split.all_batch, total), scores

    def on_devices(*operands):
        batch, vocabulary = P(*split.batch), P(split.vocabulary)
        specs = batch, vocabulary, vocabulary, batch, batch, P(), batch, batch
        return split.map(on_device, specs, (P(), batch), operands)

    def on_examples(size, mesh_axes, mapped, *operands):
        if any(jax.tree.leaves(mapped[1:3])):
            return None
        wider = split.with_examples(mesh_axes)
        return _totals_of_examples(options, wider, function, return_scores, size, mapped, operands)

    operands = hidden, rows, bias, weights, data, closure, targets, mask
    total, scores = call_as_one(on_devices, *operands, vmap_rule=on_examples)
    return total, jax.tree.map(lax.stop_gradient, scores)


def _totals_of_examples(
    options: Options,
    split: Split,
    function: TokenFunction,
    return_scores: bool,
    size: int,
    mapped: Any,
    operands: Any,
) -> tuple[Array, TokenScores | None]:
    """`total_loss` of each example. Their cotangents differ, so scores of tokens stay apart.

    `split` is that of the batch with the axis of examples in front.
    """
    hidden, rows, bias, weights, data, closure, targets, mask = operands
    of_all = mapped[0] or mapped[6]  # else the scores are those of all examples alike
    used = function.used(return_scores)
    if of_all:
        each = _repeat(size, (mapped[0], mapped[6], mapped[7]), (hidden, targets, mask))
        scores = score_tokens(options, split, used, each[0], rows, bias, *each[1:])
    else:
        some = mask if mask is None or not mapped[7] else jnp.any(mask, axis=0)
        one = split._replace(batch=split.batch[1:])
        scores = score_tokens(options, one, used, hidden, rows, bias, targets, some)
        scores = TokenScores(*_repeat(size, (False,) * len(scores), tuple(scores)))
    weights, data, mask = _repeat(size, (mapped[3], mapped[4], mapped[7]), (weights, data, mask))
    losses = weighted_losses(split, function, mapped[5], scores, weights, data, closure, mask)
    total = sum_over(split.manual_batch, jnp.sum(losses, axis=range(1, losses.ndim)))
    if not return_scores:
        return total, None
    return total, scores if mask is None else jax.tree.map(
        lambda score: jnp.where(mask, score, jnp.zeros((), score.dtype)), scores
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def weighted_losses(
    split: Split,
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    scores: TokenScores,
    weights: Array,
    data: tuple[Array, ...],
    closure: tuple[Array, ...],
    mask: Array | None,
) -> Array:
    """The weight of each token times its loss, `*batch`; zero where the mask leaves it out.

    `of_example` says which arrays of the closure have the first axis of the batch, too; `None` if
    none has.
    """

    def on_device(scores, weights, data, closure, mask):
        operands = scores, weights, data, _widen(closure), mask
        _, operands = _mark_shared(split, (), operands)
        outer_axes = _outer_axes(split, operands)
        return device_losses(function, of_example, outer_axes, *operands)

    def on_devices(*operands):
        batch = P(*split.batch)
        of_closure = P(split.batch[0]) if split.batch else P()
        flags = of_example or [False] * len(closure)
        closure_specs = tuple(of_closure if mapped else P() for mapped in flags)
        return split.map(on_device, (batch, batch, batch, closure_specs, batch), batch, operands)

    def on_examples(size, mesh_axes, mapped, scores, weights, data, closure, mask):
        if of_example is not None:
            return None
        *of_tokens, of_closure, of_mask = mapped
        each = (*of_tokens, of_mask), (scores, weights, data, mask)
        scores, weights, data, mask = _repeat(size, *each)
        wider, flags = split.with_examples(mesh_axes), of_closure if any(of_closure) else None
        return weighted_losses(wider, function, flags, scores, weights, data, closure, mask)

    operands = scores, weights, data, closure, mask
    return call_as_one(on_devices, *operands, vmap_rule=on_examples)


def _for_device(options: Options, split: Split, head: PyTree) -> Options:
    """Inside of the devices, which have a mesh of their own."""
    mesh = jax.sharding.get_abstract_mesh() if split.all_vocabulary else None
    outer_axes = _outer_axes(split, head)
    return options._replace(mesh=mesh, vocabulary_axes=split.all_vocabulary, outer_axes=outer_axes)


def _outer_axes(split: Split, operands: PyTree) -> frozenset[str]:
    """Of a `jax.shard_map` around that which this call enters."""
    return device_type(operands).varying - {*split.mapped} if split.mapped else frozenset()


def _flatten_head(options: Options, hidden: Array, rows: Array, bias: Array | None) -> Any:
    """Hidden vectors as (N, D), the table as (V, D) and (V,), in a wide dtype."""
    features = math.prod(rows.shape[1:])
    N = math.prod(hidden.shape[: hidden.ndim - rows.ndim + 1])
    hidden, rows = hidden.reshape(N, features), rows.reshape(len(rows), features)
    return jax.tree.map(lambda a: a.astype(options.wide), (hidden, rows, bias))


def _flatten(batch_axes: int, arrays: PyTree) -> PyTree:
    """`*batch ...` as `N ...`."""

    def flatten(array):
        return array.reshape(math.prod(array.shape[:batch_axes]), *array.shape[batch_axes:])

    return jax.tree.map(flatten, arrays)


def _mark_shared(split: Split, head: PyTree, tokens: PyTree) -> tuple[PyTree, PyTree]:
    """Marks arrays that devices share as differing between them.

    So JAX sums their gradients over the devices: once, and in the wide dtype that they have here.
    """
    axes = device_type(head, tokens).varying
    of_tokens = axes - {*split.all_vocabulary}  # where the vocabulary is split, tokens are the same
    return cast_to_varying(axes, head), cast_to_varying(of_tokens, tokens)


def _widen(closure: tuple[Array, ...]) -> tuple[Array, ...]:
    """Floats of half precision as float32, the dtype in which their gradients are summed."""

    def widen(array: Array) -> Array:
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(at_least_float32(array.dtype)) if is_float else array

    return tuple(map(widen, closure))


def _repeat(size: int, mapped: PyTree, arrays: PyTree) -> PyTree:
    """The arrays, with an axis of examples in front of those that are not mapped."""

    def repeat(is_mapped, array):
        return array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))

    return jax.tree.map(repeat, mapped, arrays)
