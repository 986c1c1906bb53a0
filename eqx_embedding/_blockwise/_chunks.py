"""Loops over chunks of tokens, and over tiles of the vocabulary within a chunk."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, PyTree


def loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = body(i, carry)` for each `i` below `count`."""
    # int32 also in 64-bit mode, as the targets are
    zero = np.int32(0)
    return body(zero, carry) if count == 1 else lax.fori_loop(zero, np.int32(count), body, carry)


def over_tiles(size: int, tile_size: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """`carry = body(start, length, carry)` for each tile of some rows; the last may be shorter."""
    tile_size = min(tile_size, size)
    count, rest = divmod(size, tile_size)
    carry = loop(count, lambda i, carry: body(i * tile_size, tile_size, carry), carry)
    return body(size - rest, rest, carry) if rest > 0 else carry


def tile(array: Array, start: Any, length: int) -> Array:
    return lax.dynamic_slice_in_dim(array, start, length)


class Chunks:
    """How N tokens are arranged in chunks of C, a multiple of `multiple` if there are several.

    Chunk `i` has every `count`-th token, so that tokens which are split over devices stay where
    they are. With a `mask`, tokens that it leaves out cost no time: the others fill the first
    chunks, and the rest are skipped. A single chunk never is: XLA holds more for a branch.

    With several `parts`, XLA may have split the tokens over as many devices in a way that cannot be
    seen here. Then tokens that the mask leaves out are computed, too: to bring those that count
    together, each device would compute all of them. A chunk has equally many places in each part:
    if the last part alone were filled up, XLA would send all tokens.

    Places without a token repeat one that counts; what is computed there is thrown away.

    `in_step(number)` is the largest of a number over the devices that compute a chunk together.
    With `rewrite_skipped`, a skipped chunk writes a row of each sum again.
    """

    def __init__(
        self,
        num_tokens: Any,
        chunk_size: int,
        multiple: int,
        mask: Bool[Array, " N"] | None,
        in_step: Callable[[Array], Array] | None = None,
        *,
        parts: int = 1,
        rewrite_skipped: bool = False,
    ):
        N = num_tokens
        self.parts = math.gcd(N, parts)
        self.part_tokens = N // self.parts
        count = max(-(-N // chunk_size), 1)
        c = -(-self.part_tokens // count)  # of C, in each part
        if count > 1:
            multiple = max(multiple // self.parts, 1)
            c = -(-c // multiple) * multiple
            count = -(-self.part_tokens // c)
            c = self.part_tokens if count == 1 else c
        self.num_tokens, self.count, self.size = N, count, c * self.parts
        self.part_size = c
        self.rewrite_skipped = rewrite_skipped
        self.mask = mask if N > 0 else None
        self.moves = self.mask is not None and parts == 1
        self.all_masked = None  # whether no token counts, in chunks that are computed in any case
        if self.mask is None:
            return
        if not self.moves:
            self.valid = self._in_place(self.mask, "constant")
            self.first = self.mask & (jnp.arange(N) == jnp.argmax(self.mask))  # if any counts
            return
        self._gather(self.mask)
        if in_step is not None or count == 1:
            self.all_masked = self.num_used == 0
        if in_step is not None:
            self.num_used = in_step(self.num_used)

    def _gather(self, mask: Bool[Array, " N"]) -> None:
        """Puts the tokens of the mask first, chunk after chunk."""
        count, C = self.count, self.size
        mask = lax.optimization_barrier(mask)  # XLA for CPUs ends the process for some constants
        counted = jnp.sum(mask, dtype="int32")
        first = jnp.argsort(~mask, stable=True).astype("int32")
        place = jnp.arange(C * count, dtype="int32").reshape(count, C).T
        self.valid = place < counted
        self.token = first[jnp.where(self.valid, place, 0)]  # in each place, (C, count)
        # The inverse of `first`: XLA for GPUs can fuse a cumulative sum of the mask into what reads
        # it, and then needs minutes to compile that.
        rank = jnp.argsort(first).astype("int32")
        self.place = jnp.where(mask, rank % C * count + rank // C, 0)  # of each token, (N,)
        self.num_used = -(-counted // C)  # the number of chunks with tokens

    def _in_place(self, array: Array, mode: str) -> Array:
        """`(N, ...)` to `(C, count, ...)`, parts filled up with zeros or their last token."""
        shape = array.shape[1:]
        rest = self.part_size * self.count - self.part_tokens
        if rest > 0:
            array = array.reshape(self.parts, self.part_tokens, *shape)
            array = jnp.pad(array, [(0, 0), (0, rest)] + [(0, 0)] * len(shape), mode=mode)
        return array.reshape(self.size, self.count, *shape)

    def split(self, array: Array) -> Array:
        """`(N, ...)` to `(C, count, ...)`."""
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.extended)  # which cannot be zeros
        if self.moves:
            chunks = array[self.token]
            if self.all_masked is None or is_key:
                return chunks
            return jnp.where(self.all_masked, jnp.zeros((), array.dtype), chunks)
        if self.mask is not None and not is_key:
            # A sum, because XLA would gather the array to index it.
            one = jnp.sum(only(self.first, array), axis=0, dtype=array.dtype)
            array = jnp.where(expand(self.mask, array), array, one)
        return self._in_place(array, "edge")

    def join(self, array: Array) -> Array:
        """`(C, count, ...)` to `(N, ...)`, with zeros for tokens that the mask leaves out."""
        shape = array.shape[2:]
        array = array.reshape(self.parts, self.part_size * self.count, *shape)
        if self.moves:
            array = array[0][self.place]
        else:
            array = array[:, : self.part_tokens].reshape(self.num_tokens, *shape)
        return only(self.mask, array)

    def is_token(self, i: Any) -> Array | None:
        """Which places of chunk `i` have a token, or `None` if all have."""
        if self.mask is not None:
            return lax.dynamic_index_in_dim(self.valid, i, 1, keepdims=False)
        if self.size * self.count == self.num_tokens:
            return None
        place = jnp.arange(self.size, dtype="int32") % self.part_size * self.count + i
        return place < self.part_tokens

    def run(self, body: Callable[..., Any], tokens: PyTree, sums: PyTree) -> tuple[PyTree, PyTree]:
        """`sums, results = body(sums, is_token, *tokens of a chunk)`, chunk after chunk.

        `tokens` and `results` have arrays `(N, ...)`. Returns the last `sums`, and all `results`.
        """
        chunks = jax.tree.map(self.split, tokens)

        # Second derivatives compute the logits of a chunk again: else they would save those of all.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        @functools.partial(jax.jit, inline=True)  # traced once for its shapes and for the loop
        def chunk(sums: PyTree, i: Any) -> tuple[PyTree, PyTree]:
            of_chunk = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, 1, False), chunks)
            return body(sums, self.is_token(i), *of_chunk)

        def step(i: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            sums, results = chunk(carry[0], i)
            update = functools.partial(lax.dynamic_update_index_in_dim, index=i, axis=1)
            return sums, jax.tree.map(update, carry[1], results)

        def step_if_used(i: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            return lax.cond(i < self.num_used, step, skip, i, carry)

        def skip(i: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            return _rewrite(carry) if self.rewrite_skipped else carry

        shapes = jax.eval_shape(lambda sums: chunk(sums, np.int32(0))[1], sums)
        results = jax.tree.map(
            lambda a: jnp.zeros((a.shape[0], self.count, *a.shape[1:]), a.dtype), shapes
        )
        carry = sums, results
        may_skip = self.moves and self.count > 1
        sums, results = loop(self.count, step_if_used if may_skip else step, carry)
        return sums, jax.tree.map(self.join, results)


def _rewrite(tree: PyTree) -> PyTree:
    """The same arrays, of which the first row is written to its place again."""

    def rewrite(array: Array) -> Array:
        return array if array.ndim == 0 else lax.dynamic_update_slice_in_dim(array, array[:1], 0, 0)

    return jax.tree.map(rewrite, tree)


def only(mask: Array | None, array: Array) -> Array:
    """The array, with zeros for the tokens that the mask leaves out."""
    if mask is None:
        return array
    return jnp.where(expand(mask, array), array, jnp.zeros((), array.dtype))


def expand(mask: Array, array: Array) -> Array:
    """The mask with axes of size 1 at its end, as many as the array has more."""
    return jnp.expand_dims(mask, range(mask.ndim, array.ndim))
