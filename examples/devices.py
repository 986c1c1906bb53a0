"""The devices that a run computes on: one, or a mesh of several.

Sequences are split over the mesh axis `data`. The vocabulary is split over `model`, by the name of
its axis in the table. Mesh axes are explicit, as `jax.make_mesh` makes them: the split is part of
the types of the arrays, so the code of the model does not mention it.
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
    """How many devices split the batch and the vocabulary."""

    data: int = 0
    """Over how many devices the sequences of a batch are split. 0: one for each process."""
    model: int = 1
    """Over how many devices the vocabulary is split."""

    @property
    def devices(self) -> int:
        return self.data * self.model


class Devices:
    """Places the arrays of a run on a mesh, or without one on JAX's first device."""

    def __init__(self, mesh: jax.sharding.Mesh | None = None):
        self.mesh = mesh

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """The context for all computations."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, tree: PyTree) -> PyTree:
        """Places a model or an optimizer state on the mesh, with its tables split."""
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
        """An array whose `axis` is split over `data`. Each device gets `read(its part)`, so that no
        process reads the part of another."""
        if self.mesh is None:
            return jnp.asarray(read(slice(None)))

        def part(index) -> np.ndarray:
            return read(index[axis])

        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data"))
        return jax.make_array_from_callback(shape, sharding, part)

    def whole(self, tree: PyTree) -> PyTree:
        """The tree with whole NumPy arrays, on every process."""
        if self.mesh is not None:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            tree = jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
        return jax.tree.map(np.asarray, tree)


def find_devices(size: MeshSize, num_processes: int) -> Devices:
    """The devices of a mesh. If there are too few, the program stops with one line.

    Without accelerators, JAX makes the CPU act as all of them.
    """
    if size.devices == 1:
        return Devices()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has already looked for devices
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
