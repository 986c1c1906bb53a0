"""Errors about values that are known only at run time, raised on every device."""

import functools
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.internal import unvmap_any
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from ._mesh import sum_over_axes, varying_axes


def raise_unless(valid: Bool[Array | np.ndarray, "..."], message: str) -> Bool[Array, ""]:
    """Raises an error unless all of `valid` is true, and returns False.

    `EQX_ON_ERROR` is followed as in Equinox: with `EQX_ON_ERROR=nan` it returns True instead of an
    error. An error stops only a computation that uses the returned value.
    """
    if isinstance(valid, np.ndarray):
        failed = np.asarray(not valid.all())
    else:
        failed = jnp.any(~valid)
        failed = unvmap_any(sum_over_axes(varying_axes(failed), failed.astype(np.int32)) > 0)
    if jax.device_count() == 1 or os.environ.get("EQX_ON_ERROR", "raise") != "raise":
        return _raise_once(message, failed)
    if not isinstance(failed, Tracer):
        return _raise_once(message, bool(failed))

    # `eqx.error_if` would raise on the first device only, and the others would wait for it. JAX
    # cannot call Python from each device of a TPU.
    check = functools.partial(
        lax.platform_dependent,
        tpu=functools.partial(_raise_once, message),
        default=functools.partial(_raise_on_each_device, message),
    )
    # JAX cannot call Python if a mesh has both manual and other axes either: all become manual.
    mesh = jax.sharding.get_abstract_mesh()
    others = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.manual_axes and others:
        spec = PartitionSpec()
        check = jax.shard_map(check, in_specs=spec, out_specs=spec, axis_names=others)
    return check(failed)


def _raise_once(message: str, failed: Bool[Array | np.ndarray, ""] | bool) -> Bool[Array, ""]:
    return eqx.error_if(jnp.asarray(False), failed, message)


def _raise_on_each_device(message: str, failed: Bool[Array, ""]) -> Bool[Array, ""]:
    def fail(_) -> None:
        raise RuntimeError(message)

    def call_fail() -> Array:
        jax.debug.callback(fail, failed, partitioned=True)
        return jnp.asarray(True)

    return lax.cond(failed, call_fail, lambda: jnp.asarray(False))
