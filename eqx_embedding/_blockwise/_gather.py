"""A table of which each device has a part, whole on all devices, and the gradient of that.

Moved once per call. Its gradient is summed over the devices, of which each keeps its part: this is
a reduce-scatter, in float32 at least.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from .._sharding import Axes, flat
from ._devices import can_scatter, widen


def gather_wide(
    dtype: DTypeLike, wide: DTypeLike, mesh_axes: tuple[Axes, ...], array: Array | None
) -> Any:
    """Like `gather`, of an array that has not been widened yet; it is if it is gathered."""
    if array is None or not flat(mesh_axes):
        return array
    return gather(dtype, mesh_axes, widen(wide, array))


def gather(dtype: DTypeLike, mesh_axes: tuple[Axes, ...], array: Array) -> Array:
    """The whole of an array, each axis of which is split over some manual mesh axes.

    It is sent as `dtype`, and its gradient in the dtype of the array.
    """
    if not flat(mesh_axes):
        return array

    @jax.custom_vjp
    def whole(array: Array) -> Array:
        sent = array.astype(dtype)
        for position, axes in enumerate(mesh_axes):
            if axes:
                sent = lax.all_gather(sent, axes, axis=position, tiled=True)
        return sent.astype(array.dtype)

    def backward(_: None, cotangent: Array) -> tuple[Array]:
        default = _scatter if can_scatter(cotangent) else _scatter_in_rings
        for position, axes in enumerate(mesh_axes):
            if axes:
                cotangent = lax.platform_dependent(
                    cotangent,
                    tpu=functools.partial(_scatter_in_rings, axes, position),
                    default=functools.partial(default, axes, position),
                )
        return (cotangent,)

    whole.defvjp(lambda array: (whole(array), None), backward)
    return whole(array)


def _scatter(axes: Axes, position: int, array: Array) -> Array:
    return lax.psum_scatter(array, axes, scatter_dimension=position, tiled=True)


def _scatter_in_rings(axes: Axes, position: int, array: Array) -> Array:
    """The same. XLA for TPUs would sum the whole array, and then take a part of it."""
    for axis in axes:
        array = _scatter_in_ring(axis, position, array)
    return array


def _scatter_in_ring(axis: str, position: int, array: Array) -> Array:
    """The sum for a device passes all others: half of it each way around a ring of devices.

    The ring algorithm of Patarasuk and Yuan, 2009 (https://doi.org/10.1016/j.jpdc.2008.09.002).
    """
    n, device = lax.axis_size(axis), lax.axis_index(axis)
    size = array.shape[position] // n

    def send(start: int, length: int, step: int) -> Array:
        def part(owner: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, owner % n * size + start, length, position)

        def hop(i: Array, total: Array) -> Array:
            total = lax.ppermute(total, axis, [(j, (j + step) % n) for j in range(n)])
            return total + part(device - (i + 1) * step)

        return lax.fori_loop(1, n, hop, part(device - step))

    half = size // 2
    halves = send(0, half, 1), send(half, size - half, -1)
    return lax.concatenate(halves, position)
