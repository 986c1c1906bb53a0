"""A table of which each device has a part, whole on all devices, and the gradient of that.

Moved once per call. Its gradient is summed over the devices, of which each keeps its part: this is
a reduce-scatter, in the dtype of the array, which is float32 at least where it was widened before.
"""

import functools
from typing import Any

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from ._mesh import Axes, flat, varying_axes
from ._primitive import call_linear
from ._scatter import reduce_scatter, reduce_scatter_in_rings
from ._types import cast_to_varying, widen


def gather_wide(
    dtype: DTypeLike,
    wide: DTypeLike,
    mesh_axes: tuple[Axes, ...],
    array: Array | None,
    other: Array,
) -> Any:
    """Like `gather`, for a narrow array: it is widened if it has to be gathered.

    The result is used with the `other` array. Along mesh axes where `other` alone differs, a device
    sums only its own part of the gradient, and not that of the whole array.
    """
    if array is None or not flat(mesh_axes):
        return array
    varying: Any = cast_to_varying(varying_axes(other), widen(wide, array))
    return gather(dtype, mesh_axes, varying)


def gather(dtype: DTypeLike, mesh_axes: tuple[Axes, ...], array: Array) -> Array:
    """The whole of an array, each axis of which is split over some manual mesh axes.

    It is sent as `dtype`, and its gradient in the dtype of the array.
    """
    if not flat(mesh_axes):
        return array

    wide = array.dtype

    def whole(array: Array) -> Array:
        sent = array.astype(dtype)
        for position, axes in enumerate(mesh_axes):
            if axes:
                sent = lax.all_gather(sent, axes, axis=position, tiled=True)
        return sent.astype(wide)

    def transpose(cotangent: Array) -> Array:
        for position, axes in enumerate(mesh_axes):
            if axes:
                cotangent = lax.platform_dependent(
                    cotangent,
                    # XLA for TPUs would sum the whole array, and then take a part of it
                    tpu=functools.partial(reduce_scatter_in_rings, axes, position),
                    default=functools.partial(reduce_scatter, axes, position),
                )
        return cotangent

    return call_linear(whole, transpose, array)
