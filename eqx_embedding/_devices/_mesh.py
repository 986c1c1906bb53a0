"""The axes of a device mesh, and the arrays that they split.

A mesh axis is of one of three types. An explicit one is part of the types of the arrays that it
splits. An automatic one is hidden while JAX traces. Along a manual one, that of a `jax.shard_map`
around us, an array is only the part of one device.
"""

import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


Axes = tuple[str, ...]


def flat(entries: Iterable[Axes]) -> Axes:
    return tuple(axis for axes in entries for axis in axes)


def as_axes(entry: str | Iterable[str] | PartitionSpec | None) -> Axes:
    if isinstance(entry, PartitionSpec):  # of several axes of an array
        return flat(map(as_axes, entry))
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def remaining(axes: Axes, taken: Sequence[Axes]) -> Axes:
    """The mesh axes without those that split another axis of the same array: none splits two."""
    return tuple(axis for axis in axes if all(axis not in others for others in taken))


def common(axes: Axes, others: Axes) -> Axes:
    return tuple(axis for axis in axes if axis in others)


def as_spec(axes: Iterable[Axes]) -> PartitionSpec:
    return PartitionSpec(*(entry or None for entry in axes))


def find_mesh(*arrays: Array | np.ndarray | None) -> AbstractMesh | None:
    """The mesh to compute on: the one that is set, or else that of the type of an array."""
    meshes = [
        jax.sharding.get_abstract_mesh(),
        *(jax.typeof(a).sharding.mesh for a in arrays if a is not None),
    ]
    return next((mesh for mesh in meshes if not mesh.empty), None)


def mesh_is_unset() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def count_devices(mesh: AbstractMesh | Mesh | None, axes: Iterable[str]) -> int:
    """How many devices a mesh has along some of its axes; without a mesh, one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def device_kind(mesh: AbstractMesh | None) -> str:
    """Which devices a mesh has, such as "TPU v6 lite". Without a mesh, those of this process."""
    device = None if mesh is None else mesh.abstract_device
    return (jax.devices()[0] if device is None else device).device_kind


def axis_types(mesh: AbstractMesh | None) -> dict[str, AxisType]:
    return {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def axes_of_type(mesh: AbstractMesh | None, kind: AxisType) -> Axes:
    return tuple(axis for axis, type_ in axis_types(mesh).items() if type_ == kind)


def explicit_axes(array: Array | np.ndarray) -> list[Axes]:
    """The explicit mesh axes that split each axis of an array."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return [as_axes(entry) for entry in spec + (None,) * (array.ndim - len(spec))]


def explicit_sharding(mesh: AbstractMesh | None, axes: Sequence[Axes]) -> NamedSharding | None:
    """The sharding of an array whose axes are split by these mesh axes, as far as these are
    explicit; `None` if the mesh has no explicit axis."""
    explicit = axes_of_type(mesh, AxisType.Explicit)
    if mesh is None or not explicit:
        return None
    return NamedSharding(mesh, as_spec([common(entry, explicit) for entry in axes]))


def reshard(mesh: AbstractMesh | None, array: Array, axes: Sequence[Axes]) -> Array:
    """The same array, with the first of its axes split by these mesh axes, if they are explicit."""
    sharding = explicit_sharding(mesh, axes)
    if sharding is None or (mesh_is_unset() and not isinstance(array, Tracer)):
        return array  # outside of `jax.jit`, JAX cannot tell the devices of such a mesh
    return jax.reshard(array, sharding)


def varying_axes(*arrays: Array | np.ndarray | None) -> frozenset[str]:
    """The manual mesh axes along which any of the arrays differs."""
    types = (jax.typeof(array).manual_axis_type for array in arrays if array is not None)
    return frozenset[str]().union(*(of_array.varying for of_array in types))


def sum_over_axes(axes: Iterable[str], array: Array) -> Array:
    """The sum of an array over manual mesh axes."""
    axes = tuple(sorted(axes))
    return lax.psum(array, axes) if axes else array
