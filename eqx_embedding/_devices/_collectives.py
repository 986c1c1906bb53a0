"""Sums and joined arrays of the devices of a group, inside of `without_devices`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import Array

from .._inputs import at_least_float32
from ._mesh import Axes, count_devices
from ._primitive import call_linear
from ._scatter import reduce_scatter
from ._types import cast_to_varying, DeviceType, erase_type, NO_MESH, restore_type


class Group(NamedTuple):
    """A device and those that differ from it in their places along some manual axes of a mesh."""

    mesh: AbstractMesh = NO_MESH
    axes: Axes = ()  # a group without axes is one device, over which nothing is summed

    @property
    def size(self) -> int:
        return count_devices(self.mesh, self.axes)

    @property
    def rank(self) -> Any:
        """The number of a device in its group."""
        if not self.axes:
            return np.int32(0)
        with jax.sharding.use_abstract_mesh(self.mesh), jax.auto_pcast(True):
            return erase_type(lax.axis_index(self.axes))


def sum_over_devices(group: Group, array: Array) -> Array:
    return _collective(lax.psum, group, array)


def max_over_devices(group: Group, array: Array) -> Array:
    return _collective(lax.pmax, group, array)


def min_over_devices(group: Group, array: Array) -> Array:
    return _collective(lax.pmin, group, array)


def gather_over_devices(group: Group, array: Array) -> Array:
    """The arrays of all devices, joined along their first axis."""

    def join(array: Array, axes: Axes) -> Array:
        def gather(array: Array) -> Array:
            return lax.all_gather(array, axes, tiled=True)

        def sum_wide(cotangent: Array) -> Array:
            wide = cotangent.astype(at_least_float32(cotangent.dtype))
            return reduce_scatter(axes, 0, wide).astype(cotangent.dtype)

        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        return call_linear(gather, sum_wide, array) if is_float else gather(array)

    return _collective(join, group, array)


def sum_to_owners(group: Group, array: Array) -> Array:
    """The sum of an array over the devices. Each gets a part of its first axis."""

    def sum_and_scatter(array: Array, axes: Axes) -> Array:
        def gather(cotangent: Array) -> Array:
            return lax.all_gather(cotangent, axes, tiled=True)

        return call_linear(lambda array: reduce_scatter(axes, 0, array), gather, array)

    return _collective(sum_and_scatter, group, array)


def _collective(operation: Callable[[Array, Axes], Array], group: Group, array: Array) -> Array:
    mesh, axes = group
    if not axes:
        return array
    with jax.sharding.use_abstract_mesh(mesh):
        array = restore_type(DeviceType(mesh, frozenset(axes)), array)
        # Each device has its own cotangent of the result, also if that is the same on all of them.
        return erase_type(cast_to_varying(frozenset(axes), operation(array, axes)))
