"""Code that knows no devices, run on the parts of arrays that one device has.

JAX types an array with its mesh, and inside a `jax.shard_map` with the mesh axes along which it
differs from device to device; an operation of two arrays wants equal types. Code that was written
without devices in mind, such as the loss function of a user, does not see to that: a loop that
starts with zeros is an error. `without_devices` takes mesh and axes out of the types, and puts them
back into those of the results. That is right for code which treats the part of each device by
itself; what crosses devices is in `_collectives.py`.

Without types, each device treats every array as its own. So the gradient of an array that was the
same along an axis is summed over that axis, and the cotangent of a result that is said to be the
same along an axis is divided by its number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ._mesh import count_devices, sum_over_axes, varying_axes
from ._primitive import call_as_one


NO_MESH = AbstractMesh((), ())
no_mesh = functools.partial(jax.sharding.use_abstract_mesh, NO_MESH)


class DeviceType(NamedTuple):
    """What the type of an array says of devices."""

    mesh: AbstractMesh
    varying: frozenset[str]  # the manual mesh axes along which it differs


def device_type(*trees: PyTree) -> DeviceType:
    """Of arrays of one mesh, some of which may have none."""
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(trees)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), NO_MESH)
    return DeviceType(mesh, varying_axes(*jax.tree.leaves(trees)))


def is_alone(*arrays: Array) -> bool:
    """Whether a gradient of the arrays cannot be summed over devices, for lack of others."""
    mesh = device_type(arrays).mesh
    return mesh.empty or mesh.size == 1


def cast_to_varying(axes: frozenset[str], tree: PyTree) -> PyTree:
    """The same arrays, which from here on may differ along the axes. The transpose is a sum."""

    def cast(array: Array) -> Array:
        new = tuple(sorted(axes - varying_axes(array)))
        return lax.pcast(array, new, to="varying") if new else array

    return jax.tree.map(cast, tree)


def widen(dtype: DTypeLike, array: Array) -> Array:
    """The array in a wider dtype. Its gradient is rounded after it is summed over devices."""
    if array.dtype == dtype or is_alone(array):
        return array.astype(dtype)
    return _widen.bind(array, dtype=jnp.dtype(dtype))


def without_devices(
    function: Callable[..., Any], outer_axes: frozenset[str], types: PyTree, *arguments: PyTree
) -> Any:
    """`function(*arguments)`, whose results are given the `types`, a prefix of their tree.

    Derivatives of it save the arguments, and not what is computed from them: that has no types, so
    that JAX would take it for the same on all devices. With `outer_axes` it is saved all the same,
    because JAX cannot save arguments of such types.
    """
    axes = varying_axes(*jax.tree.leaves(arguments))

    def erased(*arguments: PyTree) -> Any:
        arguments = jax.tree.map(functools.partial(erase_type, axes=axes), arguments)
        with no_mesh():
            results = call_as_one(function, *arguments)  # which `jax.vmap` maps without types
        restore = functools.partial(restore_type, axes=axes)
        return jax.tree.map(
            restore, types, results, is_leaf=lambda node: isinstance(node, DeviceType)
        )

    if outer_axes or not axes:
        return erased(*arguments)
    return call_as_one(erased, *arguments, recompute=True)


@jax.tree_util.register_static
class Types(tuple[DeviceType, ...]):
    """The type of each of some operands, which JAX keeps beside their arrays."""


Saved = tuple[Types, list[PyTree]]


def save(outer_axes: frozenset[str], operands: Sequence[PyTree]) -> Saved:
    """The operands, in a form that JAX can save from the forward pass for the backward pass.

    JAX cannot save what differs along the axes of two `jax.shard_map`, one inside the other. So the
    types of what is saved do not name the outer axes.
    """
    types = Types(map(device_type, operands))
    saved = (kind._replace(varying=kind.varying - outer_axes) for kind in types)
    return types, list(map(_retype, saved, operands))


def load(saved: Saved) -> tuple[Types, list[PyTree]]:
    """The types of the operands that were saved, and the operands, which have them again."""
    types, operands = saved
    return types, list(map(_retype, types, operands))


def _retype(kind: DeviceType, tree: PyTree) -> PyTree:
    return restore_type(kind, jax.tree.map(erase_type, tree))


def erase_type(array: Array, axes: frozenset[str] = frozenset()) -> Array:
    """Takes the mesh and the varying axes out of the type of an array, and says that it may differ
    along the given axes as well."""
    kind = device_type(array)
    if kind.mesh.empty:
        return array
    return _erase.bind(array, kind=kind, same=tuple(sorted(axes - kind.varying)))


def restore_type(kind: DeviceType, tree: PyTree, axes: frozenset[str] = frozenset()) -> PyTree:
    """Gives arrays a type. Along those of the axes that it lacks, they are said to be the same."""
    if kind.mesh.empty:
        return tree
    same = tuple(sorted(axes - kind.varying))
    return jax.tree.map(lambda array: _restore.bind(array, kind=kind, same=same), tree)


def _with_type(new_type, aval, *, kind, same):
    mesh, varying = new_type(kind)
    return aval.update(
        sharding=NamedSharding(mesh, PartitionSpec(*[None] * aval.ndim)),
        manual_axis_type=aval.manual_axis_type.update(varying=varying),
    )


def _transpose_erase(cotangent, _, *, kind, same):
    wider = kind._replace(varying=kind.varying.union(same))
    with jax.sharding.use_abstract_mesh(kind.mesh):
        return [sum_over_axes(same, _restore.bind(cotangent, kind=wider, same=()))]


def _transpose_restore(cotangent, _, *, kind, same):
    count = count_devices(kind.mesh, same)
    return [_erase.bind(cotangent, kind=kind, same=same) / count]


def _map(primitive, axis, arrays, dims, *, kind, same):
    result, (dim,) = primitive.bind(*arrays, kind=kind, same=same), dims
    if primitive is _restore and axis.explicit_mesh_axis and dim is not None:
        spec = [None] * result.ndim
        spec[dim] = axis.explicit_mesh_axis
        result = jax.reshard(result, NamedSharding(kind.mesh, PartitionSpec(*spec)))
    return result, dim


_erase, _restore = Primitive("erase_device_type"), Primitive("restore_device_type")


# No function of this package is called here: its first call imports the type checker.
for primitive, transpose, new_type in (
    (_erase, _transpose_erase, lambda kind: DeviceType(NO_MESH, frozenset())),
    (_restore, _transpose_restore, lambda kind: kind),
):
    primitive.def_impl(lambda array, *, kind, same: array)
    primitive.def_abstract_eval(functools.partial(_with_type, new_type))
    mlir.register_lowering(primitive, lambda context, array, *, kind, same: [array])
    ad.deflinear2(primitive, transpose)
    batching.fancy_primitive_batchers[primitive] = functools.partial(_map, primitive)

_widen = Primitive("widen")


def _round(cotangent: Array, array: Any, *, dtype: DTypeLike) -> list[Array]:
    narrow = array.aval.dtype
    if narrow == jnp.bfloat16:  # XLA for TPUs would move a conversion alone before the sum
        info = jnp.finfo(narrow)
        cotangent = lax.reduce_precision(cotangent, info.nexp, info.nmant)
    return [cotangent.astype(narrow)]


def _as_wide(array: Array, *, dtype: DTypeLike) -> Array:
    return lax.convert_element_type(array, dtype)


_widen.def_impl(_as_wide)
_widen.def_abstract_eval(lambda aval, *, dtype: aval.update(dtype=dtype, weak_type=False))
mlir.register_lowering(_widen, mlir.lower_fun(_as_wide, multiple_results=False))
ad.deflinear2(_widen, _round)
batching.defvectorized(_widen)
