"""Several processes that train together: they start, compare settings, and the first one prints."""

import contextlib
import dataclasses
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from support.checkpoints import differences
from support.folder import one_line
from support.meshes import Devices, find_devices, MeshConfig


TIMEOUT = 30  # seconds, for processes to find each other and to notice that one has died
LONGEST = 2**16  # bytes of settings, as JSON


def start_process(mesh: MeshConfig) -> None:
    """Connects this process with the others."""
    if mesh.process_id == 0:
        _check_port(mesh)
    print(
        f"waiting up to {TIMEOUT} s for {mesh.num_processes} processes at {mesh.coordinator}",
        file=sys.stderr,
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would hold SIGTERM back
    jax.distributed.initialize(
        mesh.coordinator,
        mesh.num_processes,
        mesh.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=TIMEOUT,
        heartbeat_timeout_seconds=TIMEOUT,
        shutdown_timeout_seconds=TIMEOUT,
    )


def _check_port(mesh: MeshConfig) -> None:
    """Stops the program with one line if process 0 cannot have the port, where JAX would crash."""
    assert mesh.coordinator is not None
    _, _, port = mesh.coordinator.rpartition(":")
    with one_line(f"use the port of --coordinator {mesh.coordinator}"):
        socket.create_server(("", int(port))).close()


def check_settings(identity: dict[str, Any], run: Any, mesh: tuple[int, int]) -> None:
    """Stops all processes with one line each, unless all have these settings."""
    run = dataclasses.asdict(run) | {"out": run.out.absolute()}
    settings = identity | {"run": run, "mesh": mesh}
    content = json.dumps(settings, default=str).encode()
    padded = np.frombuffer(content.ljust(LONGEST), np.uint8)
    first, *others = (
        json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)
    )
    for i, other in enumerate(others, 1):
        if differing := differences(first, other):
            raise SystemExit(f"process {i} ('there') differs from process 0 ('here'): {differing}.")


@contextlib.contextmanager
def join(mesh: MeshConfig, identity: dict[str, Any], run: Any) -> Iterator[Devices]:
    """Makes this process one of several, if there are several, and finds their devices.

    Only the first one prints.
    """
    if mesh.coordinator is None:
        yield find_devices(mesh)
        return
    start_process(mesh)
    try:
        devices = find_devices(mesh)
        check_settings(identity, run, mesh.shape)
        with contextlib.ExitStack() as stack:
            if mesh.process_id > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield devices
            # The first one may still write its sample, for longer than a shutdown may take.
            multihost_utils.sync_global_devices("all is written")
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        os._exit(1)  # Python's own exit may wait minutes for threads of JAX
