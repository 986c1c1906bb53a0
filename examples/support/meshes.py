"""The devices that a run computes on: one, or a mesh of several.

Sequences are split over the mesh axis `data`, the vocabulary over `model`, by the names of the axes
of its table. The mesh's axes are explicit, which is the default of `jax.make_mesh`: JAX carries the
splits through the model as a part of the arrays' types, so that the model knows nothing of them.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree
from toy_transformer import ROWS_MULTIPLE

from eqx_embedding import EmbeddingTable
from support.settings import require


RULES = {"vocabulary": "model"}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices and processes train together, and how they split the work."""

    data: Annotated[int, tyro.conf.arg(name="mesh.data")] = 0
    """How many devices split the sequences of a batch. 0: one device of each process. Without
    accelerators, the CPU acts as all devices."""
    model: Annotated[int, tyro.conf.arg(name="mesh.model")] = 1
    """How many devices split the vocabulary."""
    coordinator: str | None = None
    """HOST:PORT of process 0, with a free port. Only for several processes, which share --out."""
    num_processes: int = 1
    """How many processes train together. Each has an equal part of the mesh."""
    process_id: int = 0
    """The number of this process, from 0."""

    def __post_init__(self):
        require(self, "num_processes", above=0)
        require(self, "process_id", at_least=0, below=self.num_processes)
        if (self.num_processes > 1) != (self.coordinator is not None):
            raise ValueError("--num-processes above 1 and --coordinator must be given together.")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdecimal() and 0 < int(port) < 2**16):
                raise ValueError(f"--coordinator must be HOST:PORT, got {self.coordinator}.")
        if self.data < 0 or self.model < 1 or ROWS_MULTIPLE % self.model != 0:
            raise ValueError(
                f"--mesh.data must be at least 0, and --mesh.model a divisor of {ROWS_MULTIPLE}, "
                f"as the table has a multiple of that many rows; got {self.data} and {self.model}."
            )
        if self.devices % self.num_processes != 0:
            raise ValueError(
                f"--mesh.data {self.data} times --mesh.model {self.model} must be a multiple of "
                f"--num-processes {self.num_processes}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.data or self.num_processes, self.model

    @property
    def devices(self) -> int:
        return math.prod(self.shape)


class Devices:
    """Where the arrays of a run are. Without a mesh, this is JAX's first device."""

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


def find_all_devices() -> list[Any]:
    """The devices of JAX, or one line if it has none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "it was not installed for them"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise SystemExit(
            f"JAX finds no devices, with JAX_PLATFORMS={platforms}: {reason}."
        ) from None


def find_devices(mesh: MeshConfig) -> Devices:
    """The devices of a mesh, or one line if there are too few of them. Without accelerators, the
    CPU stands for as many as it takes."""
    if mesh.devices == 1:
        return Devices()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has looked for devices already
            jax.config.update("jax_num_cpu_devices", mesh.devices // mesh.num_processes)
    devices = find_all_devices()
    # each process needs its part of the mesh
    if len(devices) < mesh.devices or (mesh.num_processes > 1 and len(devices) > mesh.devices):
        data, model = mesh.shape
        raise SystemExit(
            f"--mesh.data {data} times --mesh.model {model} is {mesh.devices} devices, "
            f"but JAX has {len(devices)} of {devices[0].device_kind!r}."
        )
    names = ("data", "model")
    return Devices(jax.make_mesh(mesh.shape, names, devices=devices[: mesh.devices]))
