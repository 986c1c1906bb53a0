"""The devices that a run computes on: one, or a mesh of several.

Sequences are split over the mesh axis `data`, the vocabulary over `model`, by the names of the axes
of its table. The mesh's axes are explicit, which is the default of `jax.make_mesh`: JAX carries the
splits through the model as a part of the arrays' types, so that the model knows nothing of them.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from eqx_embedding import EmbeddingTable


RULES = {"vocabulary": "model"}


@dataclasses.dataclass(frozen=True)
class MeshSize:
    """How many devices split what."""

    data: int = 0
    """The sequences of a batch are split over so many devices. 0: one of each process."""
    model: int = 1
    """The vocabulary is split over so many devices."""

    @property
    def devices(self) -> int:
        return self.data * self.model


class Devices:
    """Where the arrays of a run are. Without a mesh that is JAX's first device."""

    def __init__(self, mesh: jax.sharding.Mesh | None = None):
        self.mesh = mesh

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """The context to compute in."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, tree: PyTree) -> PyTree:
        """A model or the state of an optimizer, its tables split over the mesh."""
        mesh = self.mesh
        if mesh is None:
            return tree

        def put(node: PyTree) -> PyTree:
            table = isinstance(node, EmbeddingTable)
            whole = NamedSharding(mesh, PartitionSpec())
            return jax.device_put(node, node.shardings(mesh, RULES) if table else whole)

        return jax.tree.map(put, tree, is_leaf=lambda node: isinstance(node, EmbeddingTable))

    def batch(
        self, read: Callable[[slice], np.ndarray], shape: tuple[int, ...], axis: int = 0
    ) -> Array:
        """An array whose `axis` is split over `data`: each device gets `read(its part)`, so that no
        process reads the part of another."""
        if self.mesh is None:
            return jnp.asarray(read(slice(None)))

        def part(index) -> np.ndarray:
            return read(index[axis])

        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data"))
        return jax.make_array_from_callback(shape, sharding, part)

    def whole(self, tree: PyTree) -> PyTree:
        """The same in numpy, whole on every process."""
        if self.mesh is not None:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        return jax.tree.map(np.asarray, tree)


def find_devices(size: MeshSize, num_processes: int) -> Devices:
    """The devices of a mesh, or one line if there are too few of them. Without accelerators, the
    CPU stands for as many as it takes."""
    if size.devices == 1:
        return Devices()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has looked for devices already
            jax.config.update("jax_num_cpu_devices", size.devices // num_processes)
    devices = jax.devices()
    # each process needs its part of the mesh
    if len(devices) < size.devices or (num_processes > 1 and len(devices) > size.devices):
        raise SystemExit(
            f"--mesh.data {size.data} times --mesh.model {size.model} is {size.devices} devices, "
            f"but JAX has {len(devices)} of {devices[0].device_kind!r}."
        )
    shape, names = dataclasses.astuple(size), ("data", "model")
    return Devices(jax.make_mesh(shape, names, devices=devices[: size.devices]))
