"""The devices that a run computes on: one, a mesh of several, or those of several processes.

Sequences are split over the mesh axis `data`, the vocabulary over `model`, by the names of the axes
of its table. The mesh's axes are explicit, which is the default of `jax.make_mesh`: JAX carries the
splits through the model as a part of the arrays' types, so that the model knows nothing of them.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from eqx_embedding import EmbeddingTable


RULES = {"vocabulary": "model"}
TIMEOUT = 30  # seconds, for processes to find each other and to notice that one has died


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
            spec = node.partition_spec(RULES) if table else PartitionSpec()
            return jax.device_put(node, NamedSharding(mesh, spec))

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


def meet(coordinator: str, num_processes: int, process_id: int, settings: dict[str, Any]) -> None:
    """Waits for all processes, and stops each with one line if some do not come or differ.

    JAX would start with processes that do not fit, and end them by a dump of its stack.
    """
    host, _, port = coordinator.rpartition(":")
    hello = {"process_id": process_id, "num_processes": num_processes, **settings}
    hello = json.loads(json.dumps(hello, default=str))
    if process_id > 0:
        answer = _knock(host, int(port), hello)
    else:
        try:
            server = socket.create_server(("", int(port)))
        except OSError as error:
            raise SystemExit(f"cannot listen on port {port}: {error.strerror}.") from None
        with server:
            answer = _welcome(server, hello)
    if answer:
        raise SystemExit(answer)


def _knock(host: str, port: int, hello: dict[str, Any]) -> str:
    until = time.monotonic() + TIMEOUT
    while True:
        try:
            with socket.create_connection((host, port), TIMEOUT) as connection:
                connection.settimeout(2 * TIMEOUT)  # process 0 waits for the others, too
                file = connection.makefile("rw")
                file.write(json.dumps(hello) + "\n")
                file.flush()
                return json.loads(file.readline())
        except (OSError, ValueError) as error:  # it does not listen yet, or ended
            if time.monotonic() > until:
                return f"process 0 did not answer at {host}:{port} within {TIMEOUT} s ({error})."
            time.sleep(0.1)


def _welcome(server: socket.socket, hello: dict[str, Any]) -> str:
    guests: list[socket.socket] = []
    names: set[str] = set()
    count, answer = hello["num_processes"], ""
    until = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:
        while len(guests) < count - 1 and not answer:
            try:
                server.settimeout(max(until - time.monotonic(), 0.01))
                guest = stack.enter_context(server.accept()[0])
                guest.settimeout(TIMEOUT)
                theirs = json.loads(guest.makefile().readline())
                name = f"process {theirs['process_id']}"
            except TimeoutError:
                answer = f"{1 + len(guests)} of {count} processes came within {TIMEOUT} s."
                break
            except (OSError, ValueError, LookupError, TypeError):
                continue  # this was none of the processes, or has ended
            guests.append(guest)
            differences = [
                f"{key} is {theirs.get(key)} there and {hello[key]} here"
                for key in hello
                if key != "process_id" and theirs.get(key) != hello[key]
            ]
            if differences:
                answer = f"{name} differs from process 0: {'; '.join(differences)}."
            elif name in names:
                answer = f"there are two of {name}."
            names.add(name)
        for guest in guests:
            with contextlib.suppress(OSError):  # it has ended
                guest.sendall(f"{json.dumps(answer)}\n".encode())
    return answer


@contextlib.contextmanager
def together(
    coordinator: str | None, num_processes: int, process_id: int, settings: dict[str, Any]
) -> Iterator[None]:
    """Makes this process one of several, of which the first alone prints. All end if one does."""
    if coordinator is None:
        yield
        return
    meet(coordinator, num_processes, process_id, settings)
    jax.config.update("jax_enable_preemption_service", False)  # it would hold SIGTERM back
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=TIMEOUT,
        heartbeat_timeout_seconds=TIMEOUT,
    )
    try:
        with contextlib.ExitStack() as stack:
            if process_id > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except BaseException as error:
        name = f"process {process_id} of {num_processes}"
        if isinstance(error, SystemExit):
            message = f"{name}: {error}"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            cause = str(error).partition("\n")[0]
            message = (
                f"{name} stops. Most likely another one has ended or is out of reach: then start "
                f"all of them again, with --resume. JAX says: {cause}"
            )
        else:
            if not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
            message = f"{name} stops."
        # Python's own way out would wait for the others.
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
