"""The cross-entropy of the logits `hidden @ table.T`, which never all exist at once.

N, D and V are the numbers of tokens, of features of an embedding, and of rows of the table.

Loss and gradients need three products of 2NVD operations: the logits, the gradient of `hidden` and
that of `table`. A scalar loss has a scalar cotangent, so all three are made in the forward pass,
one chunk of tokens after the other, and the backward pass scales what they gave. Losses that stay
apart have a cotangent each: their logits are made again, in the backward pass.

Within a chunk the gradients go through the vocabulary in tiles, so that what is done to a tile
stays in the cache of a CPU. Without gradients the logits do so, too, and the statistics of their
softmax are kept up to date as in https://arxiv.org/abs/1805.02867.

Inside `jax.shard_map` the tokens and the rows may be those of one device. Rows that are split over
devices share, for each chunk, the statistics of the softmax: a few numbers for each token. At the
end each gradient is summed over the devices that share what it is the gradient of.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ._sharding import Split, sum_over, varying_axes
from ._tokens import nan_where


class Plan(NamedTuple):
    """How the work is cut: for speed and memory, without meaning for the result."""

    chunk_size: int  # tokens
    tile_size: int  # rows of the table
    dtype: DTypeLike  # of the factors of the two products for the gradients
    transpose: bool  # whether to transpose a tile before its product with the table


def make_plan(V: int, D: int, dtype: DTypeLike, wide: DTypeLike, tiles: bool) -> Plan:
    """What is fast for this backend, these sizes, and operands of `dtype` summed in `wide`.

    The sizes for CPUs were chosen on two cores of an AMD EPYC, by `benchmarks/cross_entropy.py`.
    """
    if jax.default_backend() != "cpu":
        # Small products starve an accelerator. float16 would lose the small probabilities.
        return Plan(4096, V, wide if dtype == jnp.float16 else dtype, False)
    # Each chunk reads and writes the gradient of the table once, so larger chunks are faster, up to
    # 256; the logits of 13/16 D tokens and the rest take less memory than that gradient. A chunk
    # of 2**20 logits is small in any case: a small problem is one chunk, the plain way. Tiles of
    # 2**18 numbers of the table fit the cache, and are work enough for a few threads. For the
    # gradients, products in float32 are faster than in anything narrower. With a short D, XLA's
    # product with a transposed left factor costs more than to transpose it first.
    chunk_size = max(min(max(D * 13 // 16, 128), 256), 2**20 // V)
    tile_size = min(V, max(min(2**18 // D, 1024), 256)) if tiles else V
    return Plan(chunk_size, tile_size, wide, transpose=D < 256)


class Options(NamedTuple):
    """What is known when the program is compiled."""

    vocab_size: int  # the first so many rows are tokens, the others padding
    padded: bool  # whether there are others
    split: Split  # over which mesh axes the tokens and the rows are split
    label_smoothing: float
    z_loss: float
    soft_cap: float | None
    reduce: bool  # whether to sum the losses
    plan: Plan


def _varying(array, axes):
    """The same array, which from here on may differ along the manual mesh `axes`."""
    axes = tuple(sorted(axes - varying_axes(array)))
    return lax.pcast(array, axes, to="varying") if axes else array


def _loop(count, body, carry):
    # int32 also in 64-bit mode, as the targets are
    zero = np.int32(0)
    return body(zero, carry) if count == 1 else lax.fori_loop(zero, np.int32(count), body, carry)


def _over_tiles(size, tile_size, body, carry):
    """`carry = body(start, length, carry)` for tiles of `size` rows; the last may be shorter."""
    count, rest = divmod(size, tile_size)
    carry = _loop(count, lambda i, carry: body(i * tile_size, tile_size, carry), carry)
    return body(size - rest, rest, carry) if rest > 0 else carry


class _Statistics(NamedTuple):
    """What the loss of a token needs of its logits z; each of shape (C,)."""

    maximum: Array  # of z
    total: Array  # the sum of exp(z - maximum)
    below: Array  # the sum of z - maximum without padding; 0 without label smoothing
    target_z: Array

    @property
    def lse(self):
        return self.maximum + jnp.log(self.total)


def _of_all_devices(options, statistics, num_tokens):
    """The statistics of all rows, of those of the rows of one device, `num_tokens` and padding."""
    axes = options.split.all_vocabulary
    if not axes:
        return statistics
    maximum, total, below, target_z = statistics
    highest = lax.pmax(maximum, axes)
    parts = [total * jnp.exp(maximum - highest), target_z]
    if options.label_smoothing > 0:
        parts.append(_lowered(below, num_tokens, maximum, highest))
    total, target_z, *smoothed = lax.psum(jnp.stack(parts), axes)
    return _Statistics(highest, total, smoothed[0] if smoothed else below, target_z)


def _lowered(below, count, maximum, higher):
    """The sum of z - higher, of the sum of z - maximum over `count` logits."""
    return below + jnp.where(count > 0, count * (maximum - higher), 0.0)


def _losses(options, statistics):
    maximum, total, below, target_z = statistics
    smoothing = options.label_smoothing
    # Differences to the maximum come first, so that large logits keep their precision.
    losses = jnp.log(total) - (1 - smoothing) * (target_z - maximum)
    if options.z_loss > 0:  # else 0 times the square of a large number
        losses = losses + options.z_loss * statistics.lse**2
    if smoothing > 0:
        losses = losses - smoothing * below / options.vocab_size
    return losses


def _chunk(options, x, table, bias, weights, targets, offset, d_table, d_bias):
    """The losses of C tokens and, if there is a `d_table`, the gradients of their weighted sum.

    `x` is (C, D), `weights` and `targets` are (C,). `table` is (V, D) and `bias` (V,) or `None`:
    the rows from `offset` on. Returns the losses, (C,); the gradient of `x`, (C, D); and `d_table`
    and `d_bias`, like `table` and `bias`, with the gradients of these added.
    """
    (C, D), V, wide, T = x.shape, len(table), weights.dtype, options.plan.tile_size
    smoothing, cap, dtype = options.label_smoothing, options.soft_cap, options.plan.dtype
    varying = varying_axes(x, table)
    dot = functools.partial(lax.dot_general, preferred_element_type=wide)
    targets = targets - offset

    def tile(array, start, size):
        return lax.dynamic_slice_in_dim(array, start, size)

    def without_padding(array, start, fill):
        """`fill` for the rows that are padding, whatever they hold."""
        if not options.padded:
            return array
        rows = offset + start + lax.broadcasted_iota(np.int32, array.shape, 0)
        return jnp.where(rows < options.vocab_size, array, jnp.asarray(fill, array.dtype))

    def tokens_before(row):
        return jnp.clip(options.vocab_size - offset, 0, row).astype(wide)

    def logits(start, size):
        # The vocabulary comes first, so that a tile of them is contiguous.
        z = dot(tile(table, start, size), x, (((1,), (1,)), ((), ())))
        z = z if bias is None else z + tile(bias, start, size)[:, None]
        z = z if cap is None else cap * jnp.tanh(z / cap)
        return without_padding(z, start, -jnp.inf)

    def add_statistics(z, start, statistics):
        maximum, total, below, target_z = statistics
        higher = jnp.maximum(maximum, jnp.max(z, axis=0))
        total = total * jnp.exp(maximum - higher) + jnp.sum(jnp.exp(z - higher[None]), axis=0)
        if smoothing > 0:
            below = _lowered(below, tokens_before(start), maximum, higher)
            below = below + jnp.sum(without_padding(z - higher[None], start, 0), axis=0)
        here = (targets >= start) & (targets < start + len(z))
        found = jnp.take_along_axis(z, jnp.where(here, targets - start, 0)[None], axis=0)[0]
        return _Statistics(higher, total, below, jnp.where(here, found, target_z))

    def tile_statistics(start, size, statistics):
        return add_statistics(logits(start, size), start, statistics)

    zeros = _varying(jnp.zeros(C, wide), varying)
    lowest = zeros + jnp.finfo(wide).min  # -inf would give NaN for a tile of -inf
    statistics = _Statistics(lowest, zeros, zeros, zeros)
    if d_table is None:
        statistics = _over_tiles(V, T, tile_statistics, statistics)
        statistics = _of_all_devices(options, statistics, tokens_before(V))
        return _losses(options, statistics), None, None, None

    z = logits(0, V)
    statistics = add_statistics(z, 0, statistics)
    statistics = _of_all_devices(options, statistics, tokens_before(V))
    scale = weights * (1 + 2 * options.z_loss * statistics.lse) / statistics.total

    def tile_gradients(start, size, carry):
        d_x, d_table, d_bias = carry
        z_tile = tile(z, start, size)
        d_z = scale[None] * jnp.exp(z_tile - statistics.maximum[None])
        is_target = (start + jnp.arange(size, dtype=np.int32))[:, None] == targets[None]
        d_z = d_z - jnp.where(is_target, (1 - smoothing) * weights[None], 0.0)
        if smoothing > 0:
            d_z = d_z - smoothing / options.vocab_size * weights[None]
        if cap is not None:
            # where the logit is -inf, the derivative of this would be NaN
            d_z = d_z * (1 - (without_padding(z_tile, start, 0) / cap) ** 2)
        d_z = without_padding(d_z, start, 0)
        if bias is not None:
            d_b = tile(d_bias, start, size) + jnp.sum(d_z, axis=1)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d_b, start, 0)
        d_z = d_z.astype(dtype)
        rows = without_padding(tile(table, start, size).astype(dtype), start, 0)
        if options.plan.transpose:
            d_x = d_x + dot(lax.optimization_barrier(d_z.T), rows, (((1,), (0,)), ((), ())))
        else:
            d_x = d_x + dot(d_z, rows, (((0,), (0,)), ((), ())))
        d_t = tile(d_table, start, size) + dot(d_z, x.astype(dtype), (((1,), (0,)), ((), ())))
        return d_x, lax.dynamic_update_slice_in_dim(d_table, d_t, start, 0), d_bias

    carry = (_varying(jnp.zeros((C, D), wide), varying), d_table, d_bias)
    return _losses(options, statistics), *_over_tiles(V, T, tile_gradients, carry)


def _device_chunks(options, differentiate, hidden, table, bias, weights, targets):
    """The loss of each token and, to `differentiate`, the gradients of their weighted sum, for the
    tokens and the rows that one device has."""
    batch, wide, plan = weights.shape, weights.dtype, options.plan
    axes = options.split.all_vocabulary
    operands = hidden, table, bias, weights, targets
    varying = varying_axes(*operands)
    table = table.reshape(len(table), -1)
    (V, D), N = table.shape, weights.size
    offset = lax.axis_index(axes) * np.int32(V) if axes else np.int32(0)
    hidden, weights, targets = hidden.reshape(N, D), weights.reshape(N), targets.reshape(N)
    count = max(-(-N // plan.chunk_size), 1)
    C = -(-N // count)
    if count > 1:
        C = -(-C // 16) * 16  # whole vectors, whatever N is
        count = -(-N // C)
    # A token without a target must not poison the others, whatever its vector is; a target out of
    # range must, at any weight.
    alive = targets >= 0
    weights = nan_where(targets >= options.vocab_size, weights)
    tokens = hidden, weights, targets, alive
    # Chunk i has every count-th token, so that tokens which are split over devices stay there.
    tokens = [
        jnp.pad(a, [(0, C * count - N)] + [(0, 0)] * (a.ndim - 1)).reshape(C, count, *a.shape[1:])
        for a in tokens
    ]

    def chunk(i, carry):
        losses, d_hidden, d_table, d_bias = carry
        x, w, y, alive = (lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in tokens)
        x = jnp.where(alive[:, None], x, jnp.zeros((), x.dtype))
        loss, d_x, d_table, d_bias = _chunk(options, x, table, bias, w, y, offset, d_table, d_bias)
        loss = jnp.where(alive, jnp.where(jnp.isnan(w), w, loss), 0.0)
        losses = lax.dynamic_update_index_in_dim(losses, loss, i, 1)
        if differentiate:
            d_hidden = lax.dynamic_update_index_in_dim(d_hidden, d_x, i, 1)
        return losses, d_hidden, d_table, d_bias

    losses = _varying(jnp.zeros((C, count), wide), varying - {*axes})
    if not differentiate:
        losses, *_ = _loop(count, chunk, (losses, None, None, None))
        return losses.reshape(-1)[:N].reshape(batch), None
    shapes = (C, count, D), (V, D), None if bias is None else (V,)
    zeros = [None if s is None else _varying(jnp.zeros(s, wide), varying) for s in shapes]
    losses, d_hidden, d_table, d_bias = _loop(count, chunk, (losses, *zeros))
    d_hidden = d_hidden.reshape(-1, D)[:N]

    def whole(operand, gradient):
        axes = (varying - varying_axes(operand)) & {*options.split.mapped}
        return sum_over(axes, gradient.reshape(operand.shape))

    gradients = jax.tree.map(whole, operands[:3], (d_hidden, d_table, d_bias))
    return losses.reshape(-1)[:N].reshape(batch), gradients


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chunks(options, differentiate, *operands):
    split = options.split
    batch, rows = list(split.batch), [split.vocabulary]
    axes = [batch, rows, rows, batch, batch]
    outputs = (
        batch,
        (batch, rows, None if operands[2] is None else rows) if differentiate else None,
    )
    function = functools.partial(_device_chunks, options, differentiate)
    return split.map(function, axes, outputs, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_cross_entropy(
    options: Options,
    hidden: Float[Array, "..."],
    table: Float[Array, "V ..."],
    bias: Float[Array, " V"] | None,
    weights: Float[Array, " *batch"],
    targets: Int[Array, " *batch"],
) -> Float[Array, "..."]:
    """The weight of each token times its loss; summed, if the options say so. `hidden` is `*batch`
    followed by the axes that follow V in `table`. A target of -1 stands for none, one of at least
    the size of the vocabulary is out of range."""
    losses, _ = _chunks(options, False, hidden, table, bias, weights, targets)
    return _weigh(options, losses, weights)


def _weigh(options, losses, weights):
    losses = weights * losses
    return jnp.sum(losses) if options.reduce else losses


@jax.tree_util.register_static
class _Operand(NamedTuple):
    """What its gradient must know of an operand."""

    dtype: DTypeLike
    varying: frozenset[str]

    def as_gradient(self, gradient):
        """The gradient in the operand's dtype, summed over the devices that share the operand."""
        return sum_over(varying_axes(gradient) - self.varying, gradient).astype(self.dtype)


def _forward(options, *operands):
    losses, gradients = _chunks(options, options.reduce, *operands)
    kinds = [None if a is None else _Operand(a.dtype, varying_axes(a)) for a in operands[:4]]
    residuals = losses, gradients if options.reduce else operands, kinds
    return _weigh(options, losses, weights=operands[3]), residuals


def _backward(options, residuals, cotangent):
    losses, saved, kinds = residuals
    if options.reduce:
        gradients = jax.tree.map(lambda d: cotangent * d, saved)
    else:
        hidden, table, bias, weights, targets = saved
        cotangent = jnp.where(targets < 0, 0.0, cotangent)
        weights = weights * cotangent
        # a loss that a caller leaves out must not poison the others either
        targets = jnp.where(weights == 0, -1, targets)
        _, gradients = _chunks(options, True, hidden, table, bias, weights, targets)
    gradients = *gradients, cotangent * losses
    return *(
        None if kind is None else kind.as_gradient(gradient)
        for kind, gradient in zip(kinds, gradients, strict=True)
    ), None


weighted_cross_entropy.defvjp(_forward, _backward)
