"""Several processes that train together: they start, compare settings, and the first one prints."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from support.checkpoints import differences
from support.meshes import MeshConfig


TIMEOUT = 30  # seconds, for processes to find each other and to notice that one has died
LONGEST = 2**16  # bytes of settings, as JSON


def start_process(mesh: MeshConfig) -> None:
    """Makes this process one of several, if there are several."""
    if mesh.coordinator is None:
        return
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


def check_settings(identity: dict[str, Any], run: Any, mesh: tuple[int, int]) -> None:
    """Stops all processes with one line each, unless all have these settings."""
    if jax.process_count() == 1:
        return
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
def first_prints() -> Iterator[None]:
    """Only the first process prints."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
