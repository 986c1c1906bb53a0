"""Sums over devices, of which each keeps its part: a reduce-scatter."""

import math
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array

from ._mesh import Axes


def reduce_scatter(axes: Axes, position: int, array: Array) -> Array:
    """The sum of an array over manual mesh axes, which split the axis at `position` of it."""
    if AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types:
        return reduce_scatter_in_rings(axes, position, array)  # JAX cannot compile the other
    return lax.psum_scatter(array, axes, scatter_dimension=position, tiled=True)


def reduce_scatter_in_rings(axes: Axes, position: int, array: Array) -> Array:
    """The same: around one ring of devices after the other.

    The last axis comes first, so that axes before it send only a part of the array: the outer one
    may be a slow network between slices of TPUs.
    """
    *outer, axis = axes
    if not outer:
        return _scatter_in_ring(axis, position, array)
    before, after = array.shape[:position], array.shape[position + 1 :]
    count = math.prod(map(lax.axis_size, outer))
    parts = _scatter_in_ring(axis, position + 1, array.reshape(*before, count, -1, *after))
    return reduce_scatter_in_rings(tuple(outer), position, parts.reshape(*before, -1, *after))


def _scatter_in_ring(axis: str, position: int, array: Array) -> Array:
    """The sum for a device passes all others: half of it each way around a ring of devices.

    The ring algorithm of Patarasuk and Yuan, 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    n, device = lax.axis_size(axis), lax.axis_index(axis)
    size = array.shape[position] // n

    def send(start: int, length: int, step: int) -> Array:
        def part(owner: Any) -> Array:
            return lax.dynamic_slice_in_dim(array, owner % n * size + start, length, position)

        def hop(i: Any, total: Array) -> Array:
            total = lax.ppermute(total, axis, [(j, (j + step) % n) for j in range(n)])
            return total + part(device - (i + 1) * step)

        return lax.fori_loop(1, n, hop, part(device - step))

    half = size // 2
    halves = send(0, half, 1), send(half, size - half, -1)
    return lax.concatenate(halves, position)
