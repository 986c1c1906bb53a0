"""Scores and losses of a batch, over the devices of a mesh, and under `jax.vmap`."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from .._devices import (
    Axes,
    call_as_one,
    cast_to_varying,
    device_kind,
    device_type,
    flat,
    gather,
    Group,
    is_alone,
    remaining,
    reshard,
    sum_over_axes,
    widen,
)
from .._inputs import at_least_float32, NO_TARGET
from .._sharding import Arrangement, Split
from .._suggest import compiled
from ._chunks import only
from ._device_losses import device_losses
from ._device_scores import device_scores
from ._device_search import device_sample, device_top_k
from ._device_total import device_total
from ._function import TokenFunction
from ._logits import Local, Operands, Options, Teacher
from ._scores import Used
from ._token_scores import Scores


@compiled(static=3)
def score_tokens(options: Options, split: Split, used: Used, operands: Operands) -> Scores:
    """The scores of the targets; zeros for the tokens that the mask leaves out."""
    of_shared = functools.partial(_scores_of_shared_vectors, options, split, used)
    return _map_tokens(options, split, device_scores, used, operands, of_shared)


@compiled(static=3)
def top_k_tokens(options: Options, split: Split, k: int, operands: Operands) -> tuple[Array, Array]:
    """The `k` largest log-probabilities and their tokens, each `*batch k`."""
    return _map_tokens(options, split, device_top_k, k, operands)


@compiled(static=3)
def sample_tokens(options: Options, split: Split, k: int | None, operands: Operands) -> Array:
    """A token drawn among the `k` likeliest, or all."""
    return _map_tokens(options, split, device_sample, k, operands)


def _map_tokens(
    options: Options,
    split: Split,
    of_device: Callable[[Options, Any, Operands], PyTree],
    argument: Any,
    operands: Operands,
    of_shared: Callable[[int, Operands, Operands], PyTree] | None = None,
) -> PyTree:
    """`of_device(options, argument, operands)`, arrays (N, ...), for all tokens of a batch.

    `of_shared` is another way, for examples that share their vectors.
    """
    arrangement = split.arrange(math.prod(operands.batch), len(operands.rows))

    def on_one_device(operands: Operands) -> PyTree:
        known, own = _prepare(options, split, arrangement, operands)
        return _unflatten(operands.batch, of_device(known, argument, own))

    def on_devices(operands: Operands) -> PyTree:
        operands = _match_rows(split, arrangement, operands)
        specs = _specs(split, arrangement, operands)
        return split.map(on_one_device, (specs,), P(*split.batch), (operands,))

    def on_examples(size: int, mesh_axes: Any, mapped: Operands, operands: Operands) -> Any:
        if _has_own_table(mapped):
            return None
        # If a mesh splits the examples, each device has its own.
        if of_shared and _share_vectors(size, mapped, operands) and not mesh_axes:
            return of_shared(size, mapped, operands)
        each = _add_example_axis(size, mapped, operands)
        return _map_tokens(options, split.with_examples(mesh_axes), of_device, argument, each)

    return call_as_one(on_devices, operands, vmap_rule=on_examples)


class Wanted(NamedTuple):
    """What to compute from the scores of tokens."""

    function: TokenFunction
    total: bool  # whether to sum the weighted losses
    scores: bool  # whether to return the scores, too

    @property
    def used(self) -> Used:
        return self.function.used(self.scores)


@compiled(static=3)
def token_losses(
    options: Options, split: Split, wanted: Wanted, operands: Operands
) -> tuple[Array, Scores | None]:
    """The weighted losses, `*batch`, or their sum; and the scores without gradient."""
    arrangement = split.arrange(math.prod(operands.batch), len(operands.rows))

    def on_one_device(operands: Operands) -> tuple[Array, Scores | None]:
        known, own = _prepare(options, split, arrangement, operands)
        if wanted.total:
            both: Any = device_total(known, wanted.function, wanted.scores, own)
            total, scores = both
            return sum_over_axes(split.all_batch, total), _unflatten(operands.batch, scores)
        scores = device_scores(known, wanted.used, _score_operands(own))
        of_tokens = scores, own.weights, own.data, own.closure, own.mask
        losses = device_losses(wanted.function, None, known.local.outer_axes, *of_tokens)
        return _unflatten(operands.batch, (losses, scores if wanted.scores else None))

    def on_devices(operands: Operands) -> Any:
        operands = _match_rows(split, arrangement, operands)
        specs = _specs(split, arrangement, operands)
        batch = P(*split.batch)
        of_losses = P() if wanted.total else batch
        return split.map(on_one_device, (specs,), (of_losses, batch), (operands,))

    def on_examples(size: int, mesh_axes: Any, mapped: Operands, operands: Operands) -> Any:
        if _has_own_table(mapped):
            return None
        wider = split.with_examples(mesh_axes)
        return _losses_of_examples(options, wider, wanted, size, mapped, operands)

    losses, scores = call_as_one(on_devices, operands, vmap_rule=on_examples)
    return losses, jax.tree.map(lax.stop_gradient, scores)


def _score_operands(operands: Operands) -> Operands:
    """Without what only losses depend on."""
    return operands._replace(weights=None, data=(), closure=())


def _share_vectors(size: int, mapped: Operands, operands: Operands) -> bool:
    """Whether `size` examples have the same vectors, and differ in their targets or masks."""
    of_teacher = mapped.teacher and mapped.teacher.hidden
    if operands.draws is not None or mapped.hidden or of_teacher:
        return False
    return size > 0 or not mapped.targets  # which become those of each vector: at least one


def _scores_of_shared_vectors(
    options: Options, split: Split, used: Used, size: int, mapped: Operands, operands: Operands
) -> Scores:
    """The scores of examples that share their vectors, whose logits are computed once.

    `split` is that of the batch without examples.
    """
    targets, mask, batch = operands.targets, operands.mask, operands.batch
    if mapped.targets:  # several for each token
        if mapped.mask:
            counts = jnp.expand_dims(mask, range(mask.ndim, targets.ndim))
            targets = jnp.where(counts, targets, NO_TARGET)
        targets = jnp.moveaxis(targets, 0, -1)
        k = math.prod(targets.shape[len(batch) :])
        operands = operands._replace(targets=targets.reshape(*batch, k))
    operands = operands._replace(mask=jnp.any(mask, axis=0) if mapped.mask else mask)
    scores = score_tokens(options, split, used, operands)
    each = jax.tree.map(functools.partial(_repeat, size, False), scores)
    if mapped.targets:
        log_prob, is_top = (
            jnp.moveaxis(array.reshape(targets.shape), -1, 0)
            for array in (scores.log_prob, scores.is_top)
        )
        each = each._replace(log_prob=log_prob, is_top=is_top)
    return jax.tree.map(functools.partial(only, mask), each) if mapped.mask else each


def _losses_of_examples(
    options: Options,
    split: Split,
    wanted: Wanted,
    size: int,
    mapped: Operands,
    operands: Operands,
) -> tuple[Array, Scores | None]:
    """`token_losses` of each example. Their cotangents differ, so scores of tokens stay apart.

    `split` is that of the batch with the axis of examples in front.
    """
    used = wanted.used
    each = _add_example_axis(size, mapped, operands)
    examples, *batch = split.batch
    # If a mesh splits the examples, each device has targets of its own.
    if _share_vectors(size, mapped, operands) and not (mapped.targets and examples):
        one = split._replace(batch=tuple(batch))
        of_scores = _score_operands(mapped), _score_operands(operands)
        scores = _scores_of_shared_vectors(options, one, used, size, *of_scores)
    else:
        scores = score_tokens(options, split, used, _score_operands(each))
    of_tokens = scores, each.weights, each.data, operands.closure, each.mask
    of_example = mapped.closure if any(mapped.closure) else None
    losses = _weighted_losses(split, wanted.function, of_example, *of_tokens)
    if wanted.total:
        losses = sum_over_axes(split.manual_batch, jnp.sum(losses, axis=range(1, losses.ndim)))
    if not wanted.scores:
        return losses, None
    return losses, jax.tree.map(functools.partial(only, each.mask), scores)


@compiled(static=3)
def _weighted_losses(
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
        _, operands = _cast_all_to_varying(split.manual_vocabulary, (), operands)
        outer_axes = _outer_axes(split, operands)
        return device_losses(function, of_example, outer_axes, *operands)

    def on_devices(operands):
        batch = P(*split.batch)
        of_closure = P(split.batch[0]) if split.batch else P()  # nothing splits a single token
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
        return _weighted_losses(wider, function, flags, *of_tokens, closure, mask)

    operands = scores, weights, data, closure, mask
    return call_as_one(on_devices, operands, vmap_rule=on_examples)


def _specs(split: Split, arrangement: Arrangement, operands: Operands) -> Operands:
    """How each operand is split over the devices. The teacher has the rows of the student."""
    batch, rows, row = P(*split.batch), arrangement.spec, P(*arrangement.spec[:1])
    return Operands(
        hidden=batch,
        rows=rows,
        bias=row,
        targets=batch,
        mask=batch,
        weights=batch,
        data=batch,
        closure=P(),
        teacher=None if operands.teacher is None else Teacher(batch, row, row),
        draws=batch,
    )


def _match_rows(split: Split, arrangement: Arrangement, operands: Operands) -> Operands:
    """Gives a table of a teacher the padding rows of the student, if rows are split."""
    V, teacher = len(operands.rows), operands.teacher
    if teacher is None or not (arrangement.vocabulary or arrangement.table[0]):
        return operands
    hidden, *table = teacher

    def match(array: Array) -> Array:
        if len(array) == V:
            return array
        array = reshard(split.mesh, array, [()])[:V]
        return jnp.pad(array, [(0, V - len(array))] + [(0, 0)] * (array.ndim - 1))

    return operands._replace(teacher=Teacher(hidden, *jax.tree.map(match, table)))


def _prepare(
    options: Options, split: Split, arrangement: Arrangement, operands: Operands
) -> tuple[Options, Operands]:
    """Of one device: what it knows, and its operands, of N tokens.

    They are in a wide dtype. The rows are as they were given if no device adds to their gradient:
    XLA would hold a wide table beside a loop, or for a product with a table in float8.
    """

    def wide(array: Array | None) -> Any:
        return None if array is None else widen(options.wide, array)

    rows = operands.rows if is_alone(operands.rows) else wide(operands.rows)
    head = wide(operands.hidden), rows, wide(operands.bias)
    others = operands._replace(hidden=None, rows=None, bias=None)
    others = others._replace(closure=_widen_closure(operands.closure))
    same = remaining(arrangement.vocabulary, [arrangement.tokens])
    (hidden, rows, bias), others = _cast_all_to_varying(same, head, others)
    kind, gathered = device_type(hidden, rows), arrangement.gathered
    rows = gather(options.dtype, gathered, rows)
    bias = bias if bias is None else gather(options.wide, gathered[:1], bias)
    whole = others._replace(hidden=hidden, rows=rows, bias=bias)
    if whole.teacher is not None:
        teacher, *of_rows = whole.teacher
        of_rows = jax.tree.map(lambda array: gather(array.dtype, gathered[:1], array), of_rows)
        whole = whole._replace(teacher=Teacher(teacher, *of_rows))
    mesh = jax.sharding.get_abstract_mesh()
    local = Local(
        rows_dtype=rows.dtype,
        logits_fit=not flat(gathered),
        device_kind=device_kind(split.mesh),
        parts=split.parts,
        vocabulary=Group(mesh, arrangement.vocabulary),
        tokens=Group(mesh, arrangement.tokens),
        outer_axes=_outer_axes(split, hidden),
        token_type=kind._replace(varying=kind.varying - {*same}),
    )
    return options._replace(local=local), _flatten(whole)


def _outer_axes(split: Split, operands: PyTree) -> frozenset[str]:
    """The manual axes of a `jax.shard_map` of the user, around the one that this call enters."""
    return device_type(operands).varying - split.entered if split.entered else frozenset()


def _flatten(operands: Operands) -> Operands:
    """`*batch` as N, and the axes of an embedding as D."""
    batch, N = operands.batch, math.prod(operands.batch)

    def of_tokens(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda array: array.reshape(N, *array.shape[len(batch) :]), tree)

    def of_head(hidden: Array, rows: Array) -> tuple[Array, Array]:
        D = math.prod(rows.shape[1:])
        return hidden.reshape(N, D), rows.reshape(len(rows), D)

    hidden, rows = of_head(operands.hidden, operands.rows)
    teacher = operands.teacher
    return operands._replace(
        hidden=hidden,
        rows=rows,
        targets=of_tokens(operands.targets),
        mask=of_tokens(operands.mask),
        weights=of_tokens(operands.weights),
        data=of_tokens(operands.data),
        teacher=teacher and Teacher(*of_head(teacher.hidden, teacher.rows), teacher.bias),
        draws=of_tokens(operands.draws),
    )


def _unflatten(batch: tuple[Any, ...], tree: PyTree) -> PyTree:
    return jax.tree.map(lambda array: array.reshape(*batch, *array.shape[1:]), tree)


def _cast_all_to_varying(same: Axes, head: PyTree, others: PyTree) -> tuple[PyTree, PyTree]:
    """Tells JAX that all arrays differ from device to device; others not along the axes `same`.

    Where an array is in fact shared, JAX then sums its gradient over the devices: once, and in the
    wide dtype that it has here.
    """
    axes = device_type(head, others).varying
    return cast_to_varying(axes, head), cast_to_varying(axes - {*same}, others)


def _widen_closure(closure: tuple[Array, ...]) -> tuple[Array, ...]:
    """Floats of half precision as float32, the dtype in which their gradients are summed."""

    def widen_float(array: Array) -> Array:
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        return widen(at_least_float32(array.dtype), array) if is_float else array

    return tuple(map(widen_float, closure))


def _has_own_table(mapped: Operands) -> bool:
    """Whether each example has a table of its own."""
    of_teacher = mapped.teacher and mapped.teacher[1:]
    return any(jax.tree.leaves((mapped.rows, mapped.bias, of_teacher)))


def _add_example_axis(size: int, mapped: Operands, operands: Operands) -> Operands:
    """The operands of a batch of examples: all that each token has, with one more axis in front."""
    names = "hidden", "targets", "mask", "weights", "data", "draws"
    new = {name: _repeat(size, getattr(mapped, name), getattr(operands, name)) for name in names}
    teacher = operands.teacher
    if teacher is not None:
        hidden = _repeat(size, mapped.teacher.hidden, teacher.hidden)
        teacher = teacher._replace(hidden=hidden)
    return operands._replace(**new, teacher=teacher)


def _repeat(size: int, mapped: PyTree, arrays: PyTree) -> PyTree:
    """The arrays, with an axis of examples in front of those that are not mapped."""

    def repeat(is_mapped, array):
        return array if is_mapped else jnp.broadcast_to(array, (size, *array.shape))

    return jax.tree.map(repeat, mapped, arrays)
