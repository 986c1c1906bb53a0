"""Scores and losses of a batch, over the devices of a mesh, and under `jax.vmap`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from .._inputs import at_least_float32
from .._sharding import Axes, flat, Layout, remaining, Split, sum_over
from .._suggest import explain_spmd
from ._device_losses import device_losses
from ._device_scores import device_scores
from ._device_search import device_sample, device_top_k
from ._device_total import device_total
from ._devices import cast_to_varying, device_type, is_alone, widen
from ._function import TokenFunction
from ._gather import gather
from ._logits import Operands, Options
from ._primitive import call_as_one
from ._reference import Scores
from ._scores import Used


@explain_spmd
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score_tokens(options: Options, split: Split, used: Used, operands: Operands) -> Scores:
    """The scores of the targets; zeros for the tokens that the mask leaves out."""

    def scores(options: Options, operands: Operands) -> Scores:
        return device_scores(options, used, operands)

    return _of_each_token(options, split, scores, ("hidden", "targets", "mask"), operands)


@explain_spmd
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def top_k_tokens(options: Options, split: Split, k: int, operands: Operands) -> tuple[Array, Array]:
    """The `k` largest log-probabilities and their tokens, each `*batch k`."""

    def top_k(options: Options, operands: Operands) -> tuple[Array, Array]:
        return device_top_k(options, k, operands)

    return _of_each_token(options, split, top_k, ("hidden", "targets"), operands)


@explain_spmd
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sample_tokens(options: Options, split: Split, k: int | None, operands: Operands) -> Array:
    """A token drawn among the `k` likeliest, or all, with the keys and temperatures in the data."""

    def sample(options: Options, operands: Operands) -> Array:
        return device_sample(options, k, operands)

    return _of_each_token(options, split, sample, ("hidden", "targets", "data"), operands)


def _of_each_token(
    options: Options,
    split: Split,
    of_device: Callable[[Options, Operands], PyTree],
    names: tuple[str, ...],
    operands: Operands,
) -> PyTree:
    """`of_device(options, operands)`, whose arrays are (N, ...), for all tokens of a batch.

    `names` are the operands that have a value for each token.
    """
    layout = split.arrange(math.prod(operands.batch), len(operands.rows))

    def on_one_device(operands: Operands) -> PyTree:
        local, flat = _prepare(options, split, layout, operands)
        return _unflatten(operands.batch, of_device(local, flat))

    def on_devices(operands: Operands) -> PyTree:
        operands = _match_rows(split, layout, operands)
        return split.map(on_one_device, (_specs(split, layout),), P(*split.batch), (operands,))

    def on_examples(size: int, mesh_axes: Any, mapped: Operands, operands: Operands) -> Any:
        if any(jax.tree.leaves((mapped.rows, mapped.bias, mapped.teacher))):
            return None  # each example has a table of its own
        each = _of_examples(size, mapped, operands, *names)
        return _of_each_token(options, split.with_examples(mesh_axes), of_device, names, each)

    return call_as_one(on_devices, operands, vmap_rule=on_examples)


@explain_spmd
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def total_loss(
    options: Options,
    split: Split,
    function: TokenFunction,
    return_scores: bool,
    operands: Operands,
) -> tuple[Array, Scores | None]:
    """The weighted sum of the losses, and the scores without gradient."""
    layout = split.arrange(math.prod(operands.batch), len(operands.rows))

    def on_one_device(operands: Operands) -> tuple[Array, Scores | None]:
        local, flat = _prepare(options, split, layout, operands)
        both: Any = device_total(local, function, return_scores, flat)
        total, scores = both
        return sum_over(split.all_batch, total), _unflatten(operands.batch, scores)

    def on_devices(operands: Operands) -> Any:
        specs, operands = _specs(split, layout), _match_rows(split, layout, operands)
        return split.map(on_one_device, (specs,), (P(), P(*split.batch)), (operands,))

    def on_examples(size: int, mesh_axes: Any, mapped: Operands, operands: Operands) -> Any:
        if any(jax.tree.leaves((mapped.rows, mapped.bias, mapped.teacher))):
            return None
        wider = split.with_examples(mesh_axes)
        return _totals_of_examples(options, wider, function, return_scores, size, mapped, operands)

    total, scores = call_as_one(on_devices, operands, vmap_rule=on_examples)
    return total, jax.tree.map(lax.stop_gradient, scores)


def _totals_of_examples(
    options: Options,
    split: Split,
    function: TokenFunction,
    return_scores: bool,
    size: int,
    mapped: Operands,
    operands: Operands,
) -> tuple[Array, Scores | None]:
    """`total_loss` of each example. Their cotangents differ, so scores of tokens stay apart.

    `split` is that of the batch with the axis of examples in front.
    """
    used, mask = function.used(return_scores), operands.mask
    of_scores = operands._replace(weights=None, data=(), closure=())
    if mapped.hidden or mapped.targets:
        each = _of_examples(size, mapped, of_scores, "hidden", "targets", "mask")
        scores = score_tokens(options, split, used, each)
    else:  # the scores are those of all examples alike
        some = of_scores._replace(mask=jnp.any(mask, axis=0) if mapped.mask else mask)
        scores = score_tokens(options, split._replace(batch=split.batch[1:]), used, some)
        scores = jax.tree.map(functools.partial(_repeat, size, False), scores)
    each = _of_examples(size, mapped, operands, "weights", "data", "mask")
    of_tokens = scores, each.weights, each.data, operands.closure, each.mask
    of_example = mapped.closure if any(mapped.closure) else None
    losses = weighted_losses(split, function, of_example, *of_tokens)
    total = sum_over(split.manual_batch, jnp.sum(losses, axis=range(1, losses.ndim)))
    if not return_scores:
        return total, None
    return total, jax.tree.map(functools.partial(_zero_unless, each.mask), scores)


@explain_spmd
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def weighted_losses(
    split: Split,
    function: TokenFunction,
    of_example: tuple[bool, ...] | None,
    scores: Scores,
    weights: Array,
    data: tuple[Array, ...],
    closure: tuple[Array, ...],
    mask: Array | None,
) -> Array:
    """The weight of each token times its loss, `*batch`; zero where the mask leaves it out.

    `of_example` says which arrays of the closure have the first axis of the batch, too; `None` if
    none has.
    """

    def on_one_device(scores, weights, data, closure, mask):
        operands = scores, weights, data, _widen_closure(closure), mask
        _, operands = _mark_shared(split.manual_vocabulary, (), operands)
        outer_axes = _outer_axes(split, operands)
        return device_losses(function, of_example, outer_axes, *operands)

    def on_devices(operands):
        batch = P(*split.batch)
        of_closure = P(split.batch[0]) if split.batch else P()
        flags = of_example or [False] * len(closure)
        closure_specs = tuple(of_closure if mapped else P() for mapped in flags)
        return split.map(
            on_one_device, (batch, batch, batch, closure_specs, batch), batch, operands
        )

    def on_examples(size, mesh_axes, mapped, operands):
        if of_example is not None:
            return None
        *of_tokens, closure, mask = operands
        *tokens_mapped, closure_mapped, mask_mapped = mapped
        *of_tokens, mask = _repeat(size, (*tokens_mapped, mask_mapped), (*of_tokens, mask))
        flags = closure_mapped if any(closure_mapped) else None
        wider = split.with_examples(mesh_axes)
        return weighted_losses(wider, function, flags, *of_tokens, closure, mask)

    operands = scores, weights, data, closure, mask
    return call_as_one(on_devices, operands, vmap_rule=on_examples)


def _specs(split: Split, layout: Layout) -> Operands:
    """How each operand is split over the devices. The teacher has the rows of the student."""
    batch, rows, row = P(*split.batch), layout.spec, P(*layout.spec[:1])
    return Operands(batch, rows, row, batch, batch, batch, batch, P(), row)


def _match_rows(split: Split, layout: Layout, operands: Operands) -> Operands:
    """Gives a table of a teacher the padding rows of the student, if rows are split."""
    V = len(operands.rows)
    if operands.teacher is None or not (layout.vocabulary or layout.table[0]):
        return operands

    def match(array: Array) -> Array:
        if len(array) == V:
            return array
        array = split.place(array, [()])[:V]
        return jnp.pad(array, [(0, V - len(array))] + [(0, 0)] * (array.ndim - 1))

    return operands._replace(teacher=jax.tree.map(match, operands.teacher))


def _prepare(
    options: Options, split: Split, layout: Layout, operands: Operands
) -> tuple[Options, Operands]:
    """Of one device: what it knows, and its operands, of N tokens, in a wide dtype."""
    head = jax.tree.map(functools.partial(widen, options.wide), operands[:3])
    _, _, _, *of_tokens, closure, teacher = operands
    tokens = *of_tokens, _widen_closure(closure)
    same = remaining(layout.vocabulary, [layout.tokens])
    (hidden, rows, bias), tokens = _mark_shared(same, head, tokens)
    rows = gather(options.dtype, layout.gathered, rows)
    bias = bias if bias is None else gather(options.wide, layout.gathered[:1], bias)
    teacher = jax.tree.map(lambda a: gather(a.dtype, layout.gathered[:1], a), teacher)
    flat_operands = _flatten(Operands(hidden, rows, bias, *tokens, teacher=teacher))
    local = options._replace(
        mesh=jax.sharding.get_abstract_mesh() if layout.vocabulary else None,
        vocabulary_axes=layout.vocabulary,
        token_axes=layout.tokens,
        rows_dtype=operands.rows.dtype if is_alone(rows) else options.wide,
        gathered=bool(flat(layout.gathered)),
        outer_axes=_outer_axes(split, head),
    )
    return local, flat_operands


def _outer_axes(split: Split, operands: PyTree) -> frozenset[str]:
    """Of a `jax.shard_map` around that which this call enters."""
    return device_type(operands).varying - split.mapped if split.mapped else frozenset()


def _flatten(operands: Operands) -> Operands:
    """`*batch` as N, and the axes of an embedding as D."""
    batch = operands.batch
    N, D = math.prod(batch), math.prod(operands.rows.shape[1:])

    def flatten(array: Array) -> Array:
        return array.reshape(N, *array.shape[len(batch) :])

    tokens = operands.targets, operands.mask, operands.weights, operands.data
    targets, mask, weights, data = jax.tree.map(flatten, tokens)
    hidden, rows = operands.hidden.reshape(N, D), operands.rows.reshape(len(operands.rows), D)
    teacher = operands.teacher
    if teacher is not None:
        E = math.prod(teacher[0].shape[1:])
        targets, teacher = targets.reshape(N, E), (teacher[0].reshape(-1, E), teacher[1])
    closure = operands.closure
    return Operands(hidden, rows, operands.bias, targets, mask, weights, data, closure, teacher)


def _unflatten(batch: tuple[Any, ...], tree: PyTree) -> PyTree:
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape[1:]), tree)


def _mark_shared(same: Axes, head: PyTree, tokens: PyTree) -> tuple[PyTree, PyTree]:
    """Marks arrays that devices share as differing between them, but tokens not along some axes.

    So JAX sums their gradients over the devices: once, and in the wide dtype that they have here.
    """
    axes = device_type(head, tokens).varying
    return cast_to_varying(axes, head), cast_to_varying(axes - {*same}, tokens)


def _widen_closure(closure: tuple[Array, ...]) -> tuple[Array, ...]:
    """Floats of half precision as float32, the dtype in which their gradients are summed."""

    def widen_float(array: Array) -> Array:
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        return widen(at_least_float32(array.dtype), array) if is_float else array

    return tuple(map(widen_float, closure))


def _of_examples(size: int, mapped: Operands, operands: Operands, *names: str) -> Operands:
    """The operands, of which those that are named have an axis of examples in front."""
    new = {name: _repeat(size, getattr(mapped, name), getattr(operands, name)) for name in names}
    return operands._replace(**new)


def _zero_unless(mask: Array | None, array: Array) -> Array:
    if mask is None:
        return array
    mask = jnp.expand_dims(mask, range(mask.ndim, array.ndim))
    return jnp.where(mask, array, jnp.zeros((), array.dtype))


def _repeat(size: int, mapped: PyTree, arrays: PyTree) -> PyTree:
    """The arrays, with an axis of examples in front of those that are not mapped."""

    def repeat(is_mapped, array):
        return array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))

    return jax.tree.map(repeat, mapped, arrays)
