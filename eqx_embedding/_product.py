"""All logits at once: the matrix product of hidden vectors and a table."""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from ._devices import call_as_one, call_linear, reshard, widen
from ._sharding import Split
from ._table import RowAxis


class Product(NamedTuple):
    """How hidden vectors are multiplied by the rows of a table."""

    factors: np.dtype  # the dtype of the factors
    sums: np.dtype
    split: Split
    vocab_size: int
    padded: bool  # whether the whole table has padding rows
    row_axis: RowAxis  # of the table as it is stored
    out_sharding: Any


def multiply(product: Product, hidden: Array, rows: Array) -> Array:
    """The matrix product of hidden vectors and all rows, padding included: `*batch rows`."""
    dtypes = {hidden.dtype, rows.dtype, product.factors}
    if dtypes == {product.sums} and not product.padded:  # JAX knows the derivative
        return _contract(product, hidden, rows)
    # As one operation, for else a `jax.lax.scan` would lose the rule below.
    return call_as_one(functools.partial(_multiply, product), hidden, rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _multiply(product: Product, hidden: Array, rows: Array) -> Array:
    factors = product.factors
    is_one = product.split.mesh is None and hidden.size == math.prod(rows.shape[1:])
    contract = _contract_one if is_one and jnp.finfo(factors).bits == 16 else _contract
    return contract(product, hidden.astype(factors), rows.astype(factors))


@functools.partial(_multiply.defjvp, symbolic_zeros=True)
def _multiply_jvp(product, primals, tangents):
    (hidden, rows), (d_hidden, d_rows) = primals, tangents
    factors, sums, *_ = product
    terms = []
    with jax.auto_pcast(True):
        if not isinstance(d_hidden, SymbolicZero):  # as in `jvp_of_active`
            # A NaN in a padding row must not reach the gradient of `hidden`. Padding is removed
            # here, and not before the product: a decode without a gradient copies no table.
            real_rows = _zero_padding_rows(product, rows).astype(factors)
            terms.append(_contract(product, widen(sums, d_hidden), real_rows))
        if not isinstance(d_rows, SymbolicZero):
            # Nothing is derived from the gradient of padding rows: as in `whole_gradient`.
            drop_padding = functools.partial(_zero_padding_rows, product)
            real_rows = call_linear(drop_padding, lambda rows: rows, widen(sums, d_rows))
            terms.append(_contract(product, hidden.astype(factors), real_rows))
    return multiply(product, hidden, rows), functools.reduce(operator.add, terms)


def _contract(product: Product, hidden: Array, rows: Array) -> Array:
    row_axis = product.row_axis
    # As it is stored: XLA for CPUs copies a table in half precision to transpose it.
    table = row_axis.move_back(rows)
    batch_axes = hidden.ndim - (table.ndim - 1)
    axes = range(batch_axes, hidden.ndim), row_axis.replace(range(table.ndim), ())
    with jax.auto_pcast(True):
        return lax.dot_general(
            hidden,
            table,
            (axes, ((), ())),
            preferred_element_type=product.sums,
            out_sharding=product.out_sharding,
        )


def _zero_padding_rows(product: Product, rows: Array) -> Array:
    """The rows that this device has of a table, with zeros for the padding rows."""
    if not product.padded:
        return rows
    mesh_axes = product.split.manual_vocabulary
    start = lax.axis_index(mesh_axes) * len(rows) if mesh_axes else 0
    row = lax.broadcasted_iota(np.int32, rows.shape, 0) + start
    return jnp.where(row < product.vocab_size, rows, jnp.zeros((), rows.dtype))


def _contract_one(product: Product, hidden: Array, rows: Array) -> Array:
    """`_contract` of one hidden vector, and under `jax.vmap` of several.

    For one, XLA for CPUs copies a table in half precision unless it is transposed.
    """

    @jax.custom_batching.custom_vmap
    def contract(hidden: Array, rows: Array) -> Array:
        other_end = rows.ndim - 1 if product.row_axis == RowAxis(0) else 0
        return _contract(product._replace(row_axis=RowAxis(other_end)), hidden, rows)

    @contract.def_vmap
    def contract_several(size: int, mapped: list[bool], hidden: Array, rows: Array) -> Any:
        if size == 1:
            pairs = zip(mapped, (hidden, rows), strict=True)
            return contract(*(x[0] if is_mapped else x for is_mapped, x in pairs))[None], True
        axes = tuple(0 if is_mapped else None for is_mapped in mapped)
        several = functools.partial(_contract, product)
        return jax.vmap(several, axes, axis_size=size)(hidden, rows), True

    return contract(hidden, rows)


def drop_padding(array: Array, split: Split, axes: Any, vocab_size: int) -> Array:
    """Cuts the padding off the last axis, and gathers it: a mesh need not divide `vocab_size`."""
    position, manual = array.ndim - 1, split.manual_vocabulary
    if manual:
        array = lax.all_gather(array, manual, axis=position, tiled=True, to="invarying")
    return lax.slice_in_dim(reshard(split.mesh, array, axes), 0, vocab_size, axis=position)
