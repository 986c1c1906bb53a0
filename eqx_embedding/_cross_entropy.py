"""The cross-entropy of the logits `hidden @ table.T`, which never all exist at once.

N, D and V are the numbers of tokens, of features of an embedding, and of rows of the table.

Loss and gradients need three products of 2NVD operations: the logits, the gradient of `hidden` and
that of `table`. A scalar loss has a scalar cotangent, so all three are made in the forward pass,
one chunk of tokens after the other, and the backward pass scales what they gave. Losses that stay
apart have a cotangent each: their logits are made again, in the backward pass.

Within a chunk the vocabulary goes by in tiles, twice: once for the maximum and the sum of the
exponentials, as in https://arxiv.org/abs/1805.02867, and once, from the logits kept in between, for
the gradients. What is done to a tile stays in the cache of a CPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class Plan(NamedTuple):
    """How the work is cut: for speed and memory, without meaning for the result."""

    chunk_size: int  # tokens
    tile_size: int  # rows of the table, all of them tokens
    dtype: DTypeLike  # of the factors of each product
    transpose: bool  # whether to transpose a tile before its product with the table


def make_plan(D: int, vocab_size: int, dtype: DTypeLike, wide: DTypeLike) -> Plan:
    """What is fast for this backend, these sizes, and operands of `dtype` summed in `wide`."""
    if jax.default_backend() != "cpu":
        # Small products starve an accelerator. float16 would lose the small probabilities.
        return Plan(4096, vocab_size, wide if dtype == jnp.float16 else dtype, False)
    # Each chunk reads and writes the gradient of the table once, so larger chunks are faster, up to
    # 256; the logits of 3/4 D take less memory than that gradient. A small vocabulary has chunks of
    # 2**18 logits, which stay in the cache, and a small problem is one chunk and one tile: the
    # plain way. Tiles of 1024 rows fit the cache, and are work enough for a few threads. Products
    # in float32 are faster than in anything narrower. With a short D, XLA's product with a
    # transposed left factor costs more than to transpose it first.
    chunk_size = max(min(max(D * 3 // 4, 128), 256), 2**18 // vocab_size)
    return Plan(chunk_size, min(vocab_size, 1024), wide, transpose=D < 256)


class Options(NamedTuple):
    """What is known when the program is compiled."""

    vocab_size: int  # the first so many of the V rows are tokens, the others padding
    label_smoothing: float
    z_loss: float
    soft_cap: float | None
    reduce: bool  # whether to sum the losses
    dtype: DTypeLike  # of hidden and table
    plan: Plan


def _loop(count, body, carry):
    # int32 also in 64-bit mode, as the targets are
    zero = np.int32(0)
    return body(zero, carry) if count == 1 else lax.fori_loop(zero, np.int32(count), body, carry)


def _chunk(options, x, table, bias, weights, targets, z_buffer, d_table, d_bias):
    """The losses of C tokens. If there is a `d_table`, also the gradients of their weighted sum:
    that of `x`, and those of the table and the bias, added to `d_table` and `d_bias`."""
    (C, D), wide = x.shape, weights.dtype
    K, T, dtype = options.vocab_size, options.plan.tile_size, options.plan.dtype
    smoothing, cap = options.label_smoothing, options.soft_cap
    count = -(-K // T)
    x = x.astype(dtype)
    dot = functools.partial(lax.dot_general, preferred_element_type=wide)
    column = functools.partial(jnp.expand_dims, axis=1)
    row = functools.partial(jnp.expand_dims, axis=0)

    def rows(i):
        """The first row of tile i, and which of its rows no tile before had: the last overlaps."""
        start = jnp.minimum(i * T, K - T)
        return start, start + jnp.arange(T, dtype=np.int32) >= i * T if K % T > 0 else None

    def tile(array, start):
        return lax.dynamic_slice_in_dim(array, start, T)

    def masked(mask, array, value):
        return array if mask is None else jnp.where(column(mask), array, value)

    def statistics(i, carry):
        z_buffer, maximum, total, sum_z, target_z = carry
        start, mask = rows(i)
        # The vocabulary comes first, so that a tile is contiguous.
        z = dot(tile(table, start).astype(dtype), x, (((1,), (1,)), ((), ())))
        if bias is not None:
            z = z + column(tile(bias, start))
        if cap is not None:
            z = cap * jnp.tanh(z / cap)
        if z_buffer is not None:
            z_buffer = lax.dynamic_update_index_in_dim(z_buffer, z, i, 0)
        if smoothing > 0:
            sum_z = sum_z + jnp.sum(masked(mask, z, 0.0), axis=0)
        z = masked(mask, z, -jnp.inf)
        higher = jnp.maximum(maximum, jnp.max(z, axis=0))
        total = total * jnp.exp(maximum - higher) + jnp.sum(jnp.exp(z - row(higher)), axis=0)
        here = (targets >= i * T) & (targets < start + T)
        found = jnp.take_along_axis(z, row(jnp.where(here, targets - start, 0)), axis=0)[0]
        return z_buffer, higher, total, sum_z, jnp.where(here, found, target_z)

    zeros = jnp.zeros(C, wide)
    lowest = jnp.full(C, jnp.finfo(wide).min)  # -inf would give NaN for a tile of -inf
    carry = (z_buffer, lowest, zeros, zeros, zeros)
    z_buffer, maximum, total, sum_z, target_z = _loop(count, statistics, carry)
    # Differences to the maximum come first, so that large logits keep their precision.
    log_total = jnp.log(total)
    lse = maximum + log_total
    losses = log_total - (1 - smoothing) * (target_z - maximum) + options.z_loss * lse**2
    if smoothing > 0:
        losses = losses - smoothing * (sum_z / K - maximum)
    if d_table is None:
        return losses, None, None, None, None

    scale = weights * (1 + 2 * options.z_loss * lse) / total

    def gradients(i, carry):
        d_x, d_table, d_bias = carry
        start, mask = rows(i)
        z = lax.dynamic_index_in_dim(z_buffer, i, keepdims=False)
        d_z = row(scale) * jnp.exp(z - row(maximum))
        is_target = column(start + jnp.arange(T, dtype=np.int32)) == row(targets)
        d_z = d_z - jnp.where(is_target, row((1 - smoothing) * weights), 0.0)
        if smoothing > 0:
            d_z = d_z - row(smoothing / K * weights)
        if cap is not None:
            d_z = d_z * (1 - (z / cap) ** 2)
        d_z = masked(mask, d_z, 0.0)
        if bias is not None:
            d_b = tile(d_bias, start) + jnp.sum(d_z, axis=1)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d_b, start, 0)
        d_z = d_z.astype(dtype)
        w = tile(table, start).astype(dtype)
        if options.plan.transpose:
            d_x = d_x + dot(lax.optimization_barrier(d_z.T), w, (((1,), (0,)), ((), ())))
        else:
            d_x = d_x + dot(d_z, w, (((0,), (0,)), ((), ())))
        d_t = tile(d_table, start) + dot(d_z, x, (((1,), (0,)), ((), ())))
        return d_x, lax.dynamic_update_slice_in_dim(d_table, d_t, start, 0), d_bias

    carry = (jnp.zeros((C, D), wide), d_table, d_bias)
    return losses, z_buffer, *_loop(count, gradients, carry)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chunks(options, differentiate, hidden, table, bias, weights, targets):
    """The loss of each token and, to `differentiate`, the gradients of their weighted sum."""
    (N, D), wide, plan = hidden.shape, weights.dtype, options.plan
    count = max(-(-N // plan.chunk_size), 1)
    C = -(-N // count)
    if count > 1:
        C = -(-C // 16) * 16  # whole vectors, whatever N is
    # A token of weight zero must not poison the others, whatever its vector and its target are; a
    # target out of range must, at any other weight.
    alive = weights != 0
    in_range = (targets >= 0) & (targets < options.vocab_size)
    weights = jnp.where(alive & ~in_range, jnp.nan, weights)
    tokens = hidden, weights, jnp.where(alive & in_range, targets, 0), alive
    # Chunk i has every count-th token, so that tokens which are split over devices stay there.
    tokens = [
        jnp.pad(a, [(0, C * count - N)] + [(0, 0)] * (a.ndim - 1)).reshape(C, count, *a.shape[1:])
        for a in tokens
    ]

    def chunk(i, carry):
        losses, d_hidden, z_buffer, d_table, d_bias = carry
        x, w, y, alive = (lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in tokens)
        x = jnp.where(alive[:, None], x, jnp.zeros((), x.dtype))
        loss, z_buffer, d_x, d_table, d_bias = _chunk(
            options, x, table, bias, w, y, z_buffer, d_table, d_bias
        )
        loss = jnp.where(alive, jnp.where(jnp.isnan(w), w, loss), 0.0)
        losses = lax.dynamic_update_index_in_dim(losses, loss, i, 1)
        if differentiate:
            d_hidden = lax.dynamic_update_index_in_dim(d_hidden, d_x, i, 1)
        return losses, d_hidden, z_buffer, d_table, d_bias

    losses = jnp.zeros((C, count), wide)
    if not differentiate:
        losses, *_ = _loop(count, chunk, (losses, None, None, None, None))
        return losses.reshape(-1)[:N], None
    tiles = -(-options.vocab_size // plan.tile_size)
    d_hidden, z_buffer = (
        jnp.zeros(shape, wide) for shape in ((C, count, D), (tiles, plan.tile_size, C))
    )
    d_bias = None if bias is None else jnp.zeros_like(bias)
    carry = (losses, d_hidden, z_buffer, jnp.zeros(table.shape, wide), d_bias)
    losses, d_hidden, _, d_table, d_bias = _loop(count, chunk, carry)
    return losses.reshape(-1)[:N], (d_hidden.reshape(-1, D)[:N], d_table, d_bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_cross_entropy(
    options: Options,
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    bias: Float[Array, " vocab_size"] | None,
    weights: Float[Array, " N"],
    targets: Int[Array, " N"],
) -> Float[Array, ""] | Float[Array, " N"]:
    """The weight of each token times its loss; summed, if the options say so."""
    losses, _ = _chunks(options, False, hidden, table, bias, weights, targets)
    return _weigh(options, losses, weights)


def _weigh(options, losses, weights):
    losses = weights * losses
    return jnp.sum(losses) if options.reduce else losses


def _forward(options, *operands):
    losses, gradients = _chunks(options, options.reduce, *operands)
    residuals = losses, (gradients if options.reduce else operands)
    return _weigh(options, losses, weights=operands[3]), residuals


def _backward(options, residuals, cotangent):
    losses, rest = residuals
    if options.reduce:
        gradients = jax.tree.map(lambda d: cotangent * d, rest)
    else:
        hidden, table, bias, weights, targets = rest
        weights = weights * cotangent
        _, gradients = _chunks(options, True, hidden, table, bias, weights, targets)
    d_hidden, d_table, d_bias = gradients
    d_hidden, d_table = (d.astype(options.dtype) for d in (d_hidden, d_table))
    return d_hidden, d_table, d_bias, cotangent * losses, None


weighted_cross_entropy.defvjp(_forward, _backward)
