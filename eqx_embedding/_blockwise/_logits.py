"""What a device computes with, and the logits of some tokens and some rows of a table."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._devices import (
    DeviceType,
    gather_over_devices,
    Group,
    max_over_devices,
    NO_MESH,
    sum_to_owners,
    without_devices,
)
from .._inputs import batch_shape
from ._chunks import Chunks, tile
from ._plan import make_plan, Platform, Work


class Comparison(NamedTuple):
    """With what a divergence compares, as far as it is known when the program is compiled."""

    kind: str  # "forward", "reverse" or "jensen_shannon"
    temperature: float
    soft_cap: float | None  # of the teacher
    dtype: DTypeLike  # of the factors of its logits


class Local(NamedTuple):
    """What is known on a device, of its part of the arrays."""

    rows_dtype: Any = None  # of the table; wide if its gradient is summed over devices
    logits_fit: bool = True  # whether there is a gradient, in whose place logits fit before it
    device_kind: str = ""  # of the devices that the program is most likely for
    parts: int = 1  # that XLA may make of this part, for devices of automatic axes without rules
    vocabulary: Group = Group()  # the devices that have other rows
    tokens: Group = Group()  # those of them that have other tokens as well
    outer_axes: frozenset[str] = frozenset()  # of a `jax.shard_map` around that of this call
    token_type: DeviceType = DeviceType(NO_MESH, frozenset())  # of results for each token


class Options(NamedTuple):
    """What is known when the program is compiled."""

    vocab_size: int  # the first so many rows are tokens, the others padding
    padded: bool  # whether there are others, here or in the table of a teacher
    soft_cap: float | None
    dtype: DTypeLike  # of the factors of the logits
    wide: DTypeLike  # of all else: float32 or float64
    chunk_size: int | None  # `None` leaves it to the plan
    tiles: bool  # whether a device can cut its rows into tiles
    transposed: bool = False  # whether the table is stored with another axis first
    comparison: Comparison | None = None  # `None` for scores of targets
    local: Local = Local()
    plan: Any = None  # a `Plan` for a platform

    def for_platform(self, platform: Platform, operands: "Operands") -> "Options":
        """With a plan for the operands of a device."""
        (N, D), (V, _) = operands.hidden.shape, operands.rows.shape
        work = Work(
            N=-(-N // self.parts) * self.local.tokens.size,
            V=V,
            D=D,
            logits_per_row=1 if self.comparison is None else 2,
            dtype=self.dtype,
            wide=self.wide,
            tiles=self.tiles,
            masked=operands.mask is not None,
            logits_fit=self.local.logits_fit,
            device_kind=self.local.device_kind,
            chunk_size=self.chunk_size,
        )
        plan = make_plan(platform, work)
        return self._replace(plan=plan._replace(chunk_size=plan.chunk_size * self.parts))

    @property
    def parts(self) -> int:
        """How many devices a chunk is planned for. One that was asked for is for all together."""
        return self.local.parts if self.chunk_size is None else 1

    @property
    def without_gradient(self) -> "Options":
        """Where no gradient of the table is computed, whose place logits could use."""
        return self._replace(local=self.local._replace(logits_fit=False))

    @property
    def temperature(self) -> float:
        return 1.0 if self.comparison is None else self.comparison.temperature

    def of_teacher(self) -> "Options":
        """Those of the logits of the teacher."""
        assert self.comparison is not None
        return self._replace(soft_cap=self.comparison.soft_cap, dtype=self.comparison.dtype)


class Teacher(NamedTuple):
    """What the logits of a teacher are computed from, in the dtypes of its product."""

    hidden: Any  # *batch *embedding
    rows: Any  # V *embedding
    bias: Any  # V, or `None`


class Operands(NamedTuple):
    """The arrays that scores and losses are computed from, or something for each of them.

    A batch and an embedding have any number of axes, until `_batch.py` makes N, V and D of them.
    """

    hidden: Any  # *batch *embedding
    rows: Any  # V *embedding
    bias: Any  # V, or `None`
    targets: Any = None  # *batch; *batch k for k targets of a token
    mask: Any = None  # *batch, which tokens count; `None` if all do
    weights: Any = None  # *batch; `None` where only scores are asked for
    data: Any = ()  # arrays *batch ..., of which a function gets one row for each token
    closure: Any = ()  # arrays, which a function gets as they are
    teacher: Any = None  # a `Teacher`, in the place of targets
    draws: Any = None  # what tokens are drawn with: `Draws`

    @property
    def batch(self) -> tuple[Any, ...]:
        return batch_shape(self.hidden, self.rows)

    @property
    def goals(self) -> Any:
        """What each token is compared with: its target, or the hidden vector of a teacher."""
        return self.targets if self.teacher is None else self.teacher.hidden


class Head(NamedTuple):
    """What a device has of the table."""

    rows: Float[Array, "V D"]  # in the dtype of the product
    bias: Float[Array, " V"] | None
    start: Any  # the token of the first row
    teacher: Any = None  # the head of a teacher


def on_device(
    function: Callable[..., Any],
    options: Options,
    types: PyTree,
    operands: Operands,
    *others: PyTree,
) -> Any:
    """`function(options, operands, *others)` of a device, whose results are given the `types`.

    It is planned for the platform that the program is compiled for, which need not be the default
    one of this process, and is not known before.
    """

    def planned(operands: Operands, *others: PyTree) -> Any:
        operands = operands._replace(hidden=operands.hidden.astype(options.dtype))
        plans = {name: options.for_platform(name, operands) for name in ("cpu", "gpu", "tpu")}
        run = {name: functools.partial(function, plan) for name, plan in plans.items()}
        tpu = {} if plans["tpu"] == plans["gpu"] else {"tpu": run["tpu"]}
        return lax.platform_dependent(operands, *others, cpu=run["cpu"], default=run["gpu"], **tpu)

    return without_devices(planned, options.local.outer_axes, types, operands, *others)


def make_head(options: Options, operands: Operands) -> Head:
    rows = operands.rows
    start = options.local.vocabulary.rank * np.int32(len(rows))

    def keep(array: Array) -> Array:
        kept = options.transposed and options.plan.keep_copy and array.dtype == jnp.bfloat16
        return lax.optimization_barrier(array) if kept else array

    teacher = None
    if operands.teacher is not None:
        teacher = Head(keep(operands.teacher.rows), operands.teacher.bias, start)
    return Head(keep(rows.astype(options.dtype)), operands.bias, start, teacher)


def chunks_of(options: Options, operands: Operands) -> Chunks:
    """Chunks of the tokens of this device, which are a part of those that `all_tokens` returns."""
    group = options.local.tokens
    size = max(options.plan.chunk_size // group.size, 1)
    in_step = functools.partial(max_over_devices, group) if group.axes else None
    return Chunks(
        len(operands.hidden),
        size,
        16 * options.parts,  # a vector register of a CPU has up to 16 numbers
        operands.mask,
        in_step,
        parts=options.local.parts,
        rewrite_skipped=options.plan.rewrite_skipped,
    )


def all_tokens(options: Options, tree: PyTree) -> PyTree:
    """Arrays of the tokens of a chunk, joined with those of devices that have other tokens."""
    return jax.tree.map(functools.partial(gather_over_devices, options.local.tokens), tree)


def own_tokens(options: Options, tree: PyTree) -> PyTree:
    """The part of this device of arrays of all these tokens."""
    count, rank = options.local.tokens.size, options.local.tokens.rank

    def own(array: Array) -> Array:
        size = len(array) // count
        return lax.dynamic_slice_in_dim(array, rank * size, size) if count > 1 else array

    return jax.tree.map(own, tree)


def sum_own_tokens(options: Options, array: Array) -> Array:
    """The sum of an array of all these tokens over their devices, of which each gets its part."""
    return sum_to_owners(options.local.tokens, array)


class Logits(NamedTuple):
    """The logits of C tokens for some rows, -inf for padding, and the largest of each token.

    The vocabulary comes first, so that a tile of the logits is contiguous.
    """

    values: Float[Array, "size C"]
    largest: Float[Array, " C"]  # without a gradient: no score depends on what is subtracted

    def tile(self, start: Any, size: int) -> "Logits":
        if size == len(self.values):
            return self
        return with_largest(tile(self.values, start, size))


def with_largest(z: Float[Array, "size C"]) -> Logits:
    return Logits(z, lax.stop_gradient(jnp.max(z, axis=0)))


def tile_logits(
    options: Options, head: Head, x: Float[Array, "C D"], start: Any, size: int
) -> Logits:
    """The logits of `size` rows from `start` on."""
    C = len(x)
    if C == 1 and options.plan.double_one and x.dtype == jnp.bfloat16:
        x = jnp.concatenate([x, x])
    z = lax.dot_general(
        tile(head.rows, start, size),
        x,
        (((1,), (1,)), ((), ())),
        preferred_element_type=options.wide,
    )[:, :C]
    z = z if head.bias is None else z + tile(head.bias, start, size)[:, None]
    if options.soft_cap is not None:
        z = options.soft_cap * jnp.tanh(z / options.soft_cap)
        # Changes no number, but makes XLA round the product before anything is subtracted. A low
        # temperature would enlarge the difference.
        z = jnp.maximum(z, -options.soft_cap)
    # With the largest before the barrier, XLA finds them while it computes the product.
    logits = with_largest(without_padding(options, head, z, start, -jnp.inf))
    return lax.optimization_barrier(logits) if options.plan.hold_logits else logits


def without_padding(options: Options, head: Head, array: Array, start: Any, fill: float) -> Array:
    """`array`, whose first axis is that of the rows from `start` on, with `fill` for padding."""
    if not options.padded:
        return array
    row = head.start + start + lax.broadcasted_iota(np.int32, array.shape, 0)
    return jnp.where(row < options.vocab_size, array, jnp.asarray(fill, array.dtype))


def tokens_before(options: Options, head: Head, row: Any) -> Array:
    """How many of the rows before `row` are tokens."""
    return jnp.clip(options.vocab_size - head.start, 0, row).astype(options.wide)


def is_unknown(options: Options, targets: Array) -> Array:
    """Which targets are out of range. Targets below 0 stand for no target."""
    return targets >= options.vocab_size
