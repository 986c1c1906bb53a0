"""Several processes that train together: they connect, and all end if one ends."""

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax


TIMEOUT = 30  # seconds, for processes to find each other and to notice that one has died


def meet(coordinator: str, num_processes: int, process_id: int, settings: dict[str, Any]) -> None:
    """Waits for all processes. Stops each with one line if some are missing or have other settings.

    JAX would start such processes, and end them later with a dump of its stack.
    """
    host, _, port = coordinator.rpartition(":")
    own = {"process_id": process_id, "num_processes": num_processes, **settings}
    own = json.loads(json.dumps(own, default=str))
    if process_id > 0:
        answer = _ask_first_process(host, int(port), own)
    else:
        try:
            server = socket.create_server(("", int(port)))
        except OSError as error:
            raise SystemExit(f"cannot listen on port {port}: {error.strerror}.") from None
        with server:
            answer = _check_all_processes(server, own)
    if answer:
        raise SystemExit(answer)


def _ask_first_process(host: str, port: int, own: dict[str, Any]) -> str:
    """Sends the settings to process 0, and returns its answer: an error, or nothing."""
    until = time.monotonic() + TIMEOUT
    while True:
        try:
            with socket.create_connection((host, port), TIMEOUT) as connection:
                connection.settimeout(2 * TIMEOUT)  # process 0 also waits for the others
                file = connection.makefile("rw")
                file.write(json.dumps(own) + "\n")
                file.flush()
                return json.loads(file.readline())
        except (OSError, ValueError) as error:  # it does not listen yet, or has ended
            if time.monotonic() > until:
                return f"process 0 did not answer at {host}:{port} within {TIMEOUT} s ({error})."
            time.sleep(0.1)


def _check_all_processes(server: socket.socket, own: dict[str, Any]) -> str:
    """Compares the settings of all processes, and answers each with an error, or nothing."""
    connections: list[socket.socket] = []
    names: set[str] = set()
    count, answer = own["num_processes"], ""
    until = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:
        while len(connections) < count - 1 and not answer:
            try:
                server.settimeout(max(until - time.monotonic(), 0.01))
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                answer = f"{1 + len(connections)} of {count} processes came within {TIMEOUT} s."
                break
            try:
                connection.settimeout(min(TIMEOUT, 2))  # our processes send at once
                theirs = json.loads(connection.makefile().readline())
                connection.settimeout(TIMEOUT)
                name = f"process {theirs['process_id']}"
            except (OSError, ValueError, LookupError, TypeError):
                continue  # not one of our processes, or it has ended
            connections.append(connection)
            differences = [
                f"{key} is {theirs.get(key)} there and {own[key]} here"
                for key in own
                if key != "process_id" and theirs.get(key) != own[key]
            ]
            if differences:
                answer = f"{name} differs from process 0: {'; '.join(differences)}."
            elif name in names:
                answer = f"two processes have --process-id {theirs['process_id']}."
            names.add(name)
        for connection in connections:
            with contextlib.suppress(OSError):  # it has ended
                connection.sendall(f"{json.dumps(answer)}\n".encode())
    return answer


@contextlib.contextmanager
def together(
    coordinator: str | None, num_processes: int, process_id: int, settings: dict[str, Any]
) -> Iterator[None]:
    """Makes this process one of several. Only process 0 prints. All end if one ends."""
    if coordinator is None:
        yield
        return
    meet(coordinator, num_processes, process_id, settings)
    jax.config.update("jax_enable_preemption_service", False)  # it would delay SIGTERM
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
        # Python's own exit would wait for the other processes
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
