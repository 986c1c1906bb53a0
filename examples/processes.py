"""Several processes that train together: how they meet, and how all end if one does."""

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
            except TimeoutError:
                answer = f"{1 + len(guests)} of {count} processes came within {TIMEOUT} s."
                break
            try:
                guest.settimeout(min(TIMEOUT, 2))  # ours speak at once
                theirs = json.loads(guest.makefile().readline())
                guest.settimeout(TIMEOUT)
                name = f"process {theirs['process_id']}"
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
