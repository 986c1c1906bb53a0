"""The cross-entropy of the logits `hidden @ table.T`, which never all exist at once.

N, D and V are the numbers of tokens, of features of an embedding, and of rows of the table.

Loss and gradients need three products of 2NVD operations: the logits, the gradient of `hidden` and
that of `table`. A scalar loss has a scalar cotangent, so all three are made in the forward pass,
one chunk of tokens after the other, and the backward pass scales what they gave. Losses that stay
apart have a cotangent each: their logits are made again, in the backward pass.

Within a chunk the gradients go through the vocabulary in tiles, so that what is done to a tile
stays in the cache of a CPU. Without gradients the logits do so, too, and the statistics of their
softmax are kept up to date as in https://arxiv.org/abs/1805.02867.
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
    dtype: DTypeLike  # of the factors of the two products for the gradients
    transpose: bool  # whether to transpose a tile before its product with the table


def make_plan(D: int, vocab_size: int, dtype: DTypeLike, wide: DTypeLike) -> Plan:
    """What is fast for this backend, these sizes, and operands of `dtype` summed in `wide`."""
    if jax.default_backend() != "cpu":
        # Small products starve an accelerator. float16 would lose the small probabilities.
        return Plan(4096, vocab_size, wide if dtype == jnp.float16 else dtype, False)
    # Each chunk reads and writes the gradient of the table once, so larger chunks are faster, up to
    # 256; the logits of 13/16 D tokens and the rest take less memory than that gradient. A chunk
    # of 2**20 logits is small in any case: a small problem is one chunk, the plain way. Tiles of
    # 2**18 numbers of the table fit the cache, and are work enough for a few threads. For the
    # gradients, products in float32 are faster than in anything narrower. With a short D, XLA's
    # product with a transposed left factor costs more than to transpose it first.
    chunk_size = max(min(max(D * 13 // 16, 128), 256), 2**20 // vocab_size)
    tile_size = min(vocab_size, max(min(2**18 // D, 1024), 256))
    return Plan(chunk_size, tile_size, wide, transpose=D < 256)


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


def _over_tiles(size, tile_size, body, carry):
    """`carry = body(start, length, carry)` for tiles of `size` rows; the last may be shorter."""
    count, rest = divmod(size, tile_size)
    if count > 0:
        carry = _loop(count, lambda i, carry: body(i * tile_size, tile_size, carry), carry)
    return body(size - rest, rest, carry) if rest > 0 else carry


def _chunk(options, x, table, bias, weights, targets, d_table, d_bias):
    """The losses of C tokens. If there is a `d_table`, also the gradients of their weighted sum:
    that of `x`, and those of the table and the bias, added to `d_table` and `d_bias`."""
    (C, D), wide = x.shape, weights.dtype
    K, T, dtype = options.vocab_size, options.plan.tile_size, options.plan.dtype
    smoothing, cap = options.label_smoothing, options.soft_cap
    dot = functools.partial(lax.dot_general, preferred_element_type=wide)
    column = functools.partial(jnp.expand_dims, axis=1)
    row = functools.partial(jnp.expand_dims, axis=0)

    def tile(array, start, size):
        return lax.dynamic_slice_in_dim(array, start, size)

    def logits(rows, bias):
        # The vocabulary comes first, so that a tile of them is contiguous.
        z = dot(rows, x, (((1,), (1,)), ((), ())))[:K]  # without padding rows
        z = z if bias is None else z + column(bias)
        return z if cap is None else cap * jnp.tanh(z / cap)

    def add_statistics(z, start, carry):
        maximum, total, sum_z, target_z = carry
        higher = jnp.maximum(maximum, jnp.max(z, axis=0))
        total = total * jnp.exp(maximum - higher) + jnp.sum(jnp.exp(z - row(higher)), axis=0)
        if smoothing > 0:
            sum_z = sum_z + jnp.sum(z, axis=0)
        here = (targets >= start) & (targets < start + len(z))
        found = jnp.take_along_axis(z, row(jnp.where(here, targets - start, 0)), axis=0)[0]
        return higher, total, sum_z, jnp.where(here, found, target_z)

    def tile_statistics(start, size, carry):
        b = None if bias is None else tile(bias, start, size)
        return add_statistics(logits(tile(table, start, size), b), start, carry)

    zeros = jnp.zeros(C, wide)
    lowest = jnp.full(C, jnp.finfo(wide).min)  # -inf would give NaN for a tile of -inf
    carry = (lowest, zeros, zeros, zeros)
    z = None if d_table is None else logits(table, bias)
    if z is None:
        carry = _over_tiles(K, T, tile_statistics, carry)
    else:
        carry = add_statistics(z, 0, carry)
    maximum, total, sum_z, target_z = carry
    # Differences to the maximum come first, so that large logits keep their precision.
    log_total = jnp.log(total)
    lse = maximum + log_total
    losses = log_total - (1 - smoothing) * (target_z - maximum) + options.z_loss * lse**2
    if smoothing > 0:
        losses = losses - smoothing * (sum_z / K - maximum)
    if d_table is None:
        return losses, None, None, None

    scale = weights * (1 + 2 * options.z_loss * lse) / total

    def tile_gradients(start, size, carry):
        d_x, d_table, d_bias = carry
        z_tile = tile(z, start, size)
        d_z = row(scale) * jnp.exp(z_tile - row(maximum))
        is_target = column(start + jnp.arange(size, dtype=np.int32)) == row(targets)
        d_z = d_z - jnp.where(is_target, row((1 - smoothing) * weights), 0.0)
        if smoothing > 0:
            d_z = d_z - row(smoothing / K * weights)
        if cap is not None:
            d_z = d_z * (1 - (z_tile / cap) ** 2)
        if bias is not None:
            d_b = tile(d_bias, start, size) + jnp.sum(d_z, axis=1)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d_b, start, 0)
        d_z = d_z.astype(dtype)
        rows = tile(table, start, size).astype(dtype)
        if options.plan.transpose:
            d_x = d_x + dot(lax.optimization_barrier(d_z.T), rows, (((1,), (0,)), ((), ())))
        else:
            d_x = d_x + dot(d_z, rows, (((0,), (0,)), ((), ())))
        d_t = tile(d_table, start, size) + dot(d_z, x.astype(dtype), (((1,), (0,)), ((), ())))
        return d_x, lax.dynamic_update_slice_in_dim(d_table, d_t, start, 0), d_bias

    carry = (jnp.zeros((C, D), wide), d_table, d_bias)
    return losses, *_over_tiles(K, T, tile_gradients, carry)


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
        losses, d_hidden, d_table, d_bias = carry
        x, w, y, alive = (lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in tokens)
        x = jnp.where(alive[:, None], x, jnp.zeros((), x.dtype))
        loss, d_x, d_table, d_bias = _chunk(options, x, table, bias, w, y, d_table, d_bias)
        loss = jnp.where(alive, jnp.where(jnp.isnan(w), w, loss), 0.0)
        losses = lax.dynamic_update_index_in_dim(losses, loss, i, 1)
        if differentiate:
            d_hidden = lax.dynamic_update_index_in_dim(d_hidden, d_x, i, 1)
        return losses, d_hidden, d_table, d_bias

    losses = jnp.zeros((C, count), wide)
    if not differentiate:
        losses, *_ = _loop(count, chunk, (losses, None, None, None))
        return losses.reshape(-1)[:N], None
    d_bias = None if bias is None else jnp.zeros_like(bias)
    carry = (losses, jnp.zeros((C, count, D), wide), jnp.zeros(table.shape, wide), d_bias)
    losses, d_hidden, d_table, d_bias = _loop(count, chunk, carry)
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
