"""The folder that a run writes to: whole files, one run at a time, one line for what goes wrong."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


# What the scripts write beside checkpoints. A new run replaces none of them.
FILES = [
    "metrics.jsonl",
    "loss.png",
    "embedding.png",
    "sample.txt",
    "growth.png",
    "distill.png",
    "policy_gradient.png",
    "vectors.txt",
    "words.png",
]
CHECKPOINTS = "checkpoints"  # the folder of those, which `Checkpoints` alone writes to
PARTIAL = ".partial"  # the end of the name of a file that is being written


@contextlib.contextmanager
def one_line(doing: str) -> Iterator[None]:
    """Stops the program with one line where the system refuses what is being done."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"cannot {doing}: {error.strerror or error}.") from None


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file at once, so that nobody sees it half written."""
    partial = path.with_name(path.name + PARTIAL)
    with one_line(f"write {path}"):
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def lock(folder: Path) -> int:
    """Keeps other runs out of the folder until this file descriptor is closed.

    The system does that when the process ends, however it ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SystemExit(f"another run is writing to {folder}: choose another --out.") from None
    except OSError:
        pass  # some network file systems lock no folders
    return descriptor


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes the folder of a run without checkpoints, and keeps other runs out of it until the end.

    Stops the program with one line if it holds a run, or cannot be written to.
    """
    with one_line(f"use the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it can be written to
        descriptor = lock(folder)
    try:
        must_be_new(folder)
        if any((folder / CHECKPOINTS).glob("*")):  # the run may have written nothing else yet
            raise SystemExit(f"{folder} holds a run: choose another --out.")
        yield
    finally:
        os.close(descriptor)


def must_be_new(folder: Path) -> None:
    """Stops the program with one line if the folder holds a file that a run might replace."""
    for name in [*FILES, *(name + PARTIAL for name in FILES)]:
        if os.path.lexists(folder / name):
            what = "a run:" if name == "metrics.jsonl" else f"{name}: move it, or"
            raise SystemExit(f"{folder} holds {what} choose another --out.")
