"""Checkpoints: whole or absent, whatever kills the program, with digests that show changed bits."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from support.folder import CHECKPOINTS, lock, must_be_new, one_line
from support.meshes import find_all_devices


CONTENT = {"identity", "tokenizer", "metrics", "step", "digests"}  # of `about`
TIMEOUT = 30  # seconds, for a folder to be seen by all who share it


class Checkpoints:
    """The last two checkpoints of the run in the folder `out`, written by orbax.

    Each has trees of arrays, by name, and `about`: JSON that says what they are. It holds a digest
    of each tree and of itself.
    """

    def __init__(self, out: Path, exists: bool, reads_only: bool = False):
        """Stops the program with one line unless `out` holds a run, or none, as `exists` says.

        Unless the checkpoints are only read, no other run may write to `out` from now on.
        """
        self.out, self.folder, self.reads_only = out, _path_for_orbax(out), reads_only
        find_all_devices()  # else a wrong JAX_PLATFORMS would look like a broken checkpoint
        self._broken: list[int] = []
        self._lock: int | None = None
        try:
            self.steps = self._open()
            if not exists:
                self._must_be_new()
            elif not self.steps:
                raise SystemExit(
                    f"{out} holds no checkpoint. Check the name: the folder of a run has a folder "
                    f"{CHECKPOINTS}. train_lm.py without --resume starts a run there."
                )
        except SystemExit:
            self._unlock()
            raise

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        try:
            if "manager" in self.__dict__:
                self._close(kind, error)
        finally:
            self._unlock()

    def _close(self, kind: Any, error: Any) -> None:
        if kind is None:
            self._finish()
        elif jax.process_count() > 1:  # it might wait for one that has ended
            return
        elif kind is SystemExit and self.folder.is_dir():  # not moved or removed
            try:
                self._finish()
            except SystemExit as other:
                raise SystemExit(f"{error.code}\n{other.code}") from None
        else:
            with contextlib.suppress(Exception):
                self.manager.close()

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        for name in "absl", "asyncio":  # they log pages about errors that orbax raises as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.claim()
        with one_line(f"write to {self.out}"):
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2, cleanup_tmp_directories=not self.reads_only
            )
            manager = ocp.CheckpointManager(self.folder, options=options)
        # The first of several processes has made the folder. The others might see it later, or not.
        until = time.monotonic() + TIMEOUT
        while not self.folder.is_dir():
            if time.monotonic() > until:
                raise SystemExit(f"{self.out} is not the folder of process 0. All must share it.")
            time.sleep(0.1)
        return manager

    def claim(self) -> None:
        """Makes the folder of a new run, unless this run has done so already.

        Called before long work, it finds a folder that cannot be written to while nothing is lost.
        """
        if self.steps or jax.process_index() > 0:
            return
        with one_line(f"write to {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.steps = self._open()
            self._must_be_new()  # no other run came first

    def save(self, step: int, about: dict[str, Any], **trees: PyTree) -> None:
        """Writes in the background, from copies. What goes into `about` is JSON."""
        about = {
            **about,
            "step": step,
            "x64": _x64(),
            "digests": {name: _digest(tree) for name, tree in trees.items()},
        }
        about["digest"] = _digest_of_json(about)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        manager = self.manager
        if not self.folder.is_dir():
            raise SystemExit(
                f"{self.out} was moved or removed during the run. If it was moved, go on with "
                "--resume, and its new name as --out."
            )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees)) + 2**20
        if shutil.disk_usage(self.out).free < size:
            self._not_written(OSError(os.strerror(errno.ENOSPC)))
        with errors_of_orbax(self._not_written):
            manager.save(step, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **items))

    def about(self) -> dict[str, Any]:
        """What the last checkpoint that can be read says of itself."""
        while True:
            try:
                return self._about(self.steps[-1])
            except ValueError as error:
                self._go_back(error)

    def restore(self, **like: PyTree) -> tuple[int, dict[str, Any], list[PyTree]]:
        """The last checkpoint that is whole: its step, what it says of itself, and its trees, by
        their names, shaped as those given.

        Those that are not whole are put aside.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        while True:
            step = self.steps[-1]
            try:
                about, trees = self._about(step), []
                for name, shape in shapes.items():
                    trees.append(self._read(step, name, ocp.args.StandardRestore(shape)))
                    if _digest(trees[-1]) != about["digests"].get(name):
                        raise ValueError(f"the arrays of its {name} have changed")
            except ValueError as error:
                self._go_back(error)
                continue
            self._put_aside()
            return step, about, trees

    def _find_steps(self) -> list[int]:
        steps = ocp.utils.checkpoint_steps(self.folder) if self.folder.is_dir() else []
        return sorted(step for step in steps if (self.folder / str(step)).is_dir())  # not "0012"

    def _open(self) -> list[int]:
        """Keeps other runs out, and finds the steps of the checkpoints that there are."""
        with one_line(f"use the folder {self.out}"):
            for folder in self.out, self.folder:
                if os.path.lexists(folder) and not folder.is_dir():
                    raise SystemExit(f"{folder} is not a folder.")
            if self.out.is_dir() and not self.reads_only and jax.process_index() == 0:
                tempfile.TemporaryFile(dir=self.out).close()  # it can be written to
                self._lock = lock(self.out) if self._lock is None else self._lock
            return self._find_steps()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _must_be_new(self) -> None:
        if self.steps:
            raise SystemExit(
                f"{self.out} holds a run: choose another --out. train_lm.py --resume goes on with "
                "a run of its own."
            )
        must_be_new(self.out)

    def _about(self, step: int) -> dict[str, Any]:
        about = self._read(step, "about", ocp.args.JsonRestore())
        if not isinstance(about, dict) or about.pop("digest", None) != _digest_of_json(about):
            raise ValueError("what it says of itself has changed, or is of another version")
        if missing := CONTENT - about.keys():
            raise ValueError(f"it does not tell its {', '.join(sorted(missing))}")
        if about["step"] != step:
            raise ValueError(f"it is a copy of that of step {about['step']}")
        there = about.get("x64", False)
        if there != _x64():
            raise SystemExit(
                f"{self.out} was written with JAX_ENABLE_X64={int(there)}: set it to the same."
            )
        return about

    def _read(self, step: int, name: str, args: Any) -> Any:
        def not_read(error: Exception) -> None:
            _check_permissions(self.folder / str(step))
            raise ValueError(f"{type(error).__name__} in its {name}") from error

        manager = self.manager  # not a broken checkpoint, if this fails
        with errors_of_orbax(not_read):
            return manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]

    def _go_back(self, error: ValueError) -> None:
        """Says that the last checkpoint is broken, and takes the one before it for the last.

        If it is only gone, because a run that trains has replaced it by newer ones, takes the
        newest.
        """
        step, there = self.steps.pop(), self._find_steps()
        if self.reads_only and there and there[-1] > step:
            self.steps = there
            return
        message = f"the checkpoint {self.out}/checkpoints/{step} is broken: {error}."
        if self.reads_only and self.steps:
            raise SystemExit(f"{message} train_lm.py --resume tries the one before it.")
        if not self.steps:
            raise SystemExit(f"{message} There is none before it. Nothing was changed.")
        self._broken.append(step)
        print(f"{message} Going on from the one before it, {self.steps[-1]}.")

    def _put_aside(self) -> None:
        """Moves broken checkpoints out of the way of new ones."""
        if not self._broken:
            return
        if jax.process_index() == 0:
            for step in self._broken:
                to = self.out / f"broken-{step}-{time.time_ns()}"
                with one_line(f"move the broken checkpoint {step} to {to}"):
                    os.rename(self.folder / str(step), to)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("broken checkpoints are put aside")
        self.manager.reload()

    def _finish(self) -> None:
        with errors_of_orbax(self._not_written):
            self.manager.wait_until_finished()
            self.manager.close()

    def _not_written(self, error: Exception) -> None:
        reason, full = " ".join(str(error).split()), os.strerror(errno.ENOSPC)
        reason = full if full in reason else reason[:300]
        there = self._find_steps()  # those that are whole; only train_lm.py writes several
        then = f"--resume goes on from step {there[-1]}" if there else "There is none before it"
        raise SystemExit(f"cannot write a checkpoint to {self.out}: {reason}. {then}.") from None


@contextlib.contextmanager
def errors_of_orbax(fail: Callable[[Exception], None]) -> Iterator[None]:
    """Calls `fail` with an error of orbax, which raises whatever its storage layers raise."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # another process has ended
        raise
    except Exception as error:
        fail(error)


def _path_for_orbax(out: Path) -> Path:
    """The folder of the checkpoints. Stops the program with one line if orbax would not find it."""
    path = str(out.absolute()).replace("//", "/")  # at the front, where Python keeps it
    if re.search(r"\\|\[.*\]|/gs:/|[\ud800-\udfff]", path):  # Python's surrogates stand for bytes
        raise SystemExit(
            f"cannot use the folder {path}: orbax finds no checkpoint by a name with a backslash, "
            "[brackets], gs:/ or bytes that are not UTF-8."
        )
    return Path(path) / CHECKPOINTS


def _check_permissions(folder: Path) -> None:
    """Stops the program with one line if a file may not be read: that breaks no checkpoint."""

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise SystemExit(f"cannot read {error.filename}: {error.strerror}.") from None

    for path, _, files in os.walk(folder, onerror=refuse):
        for name in files:
            try:
                open(os.path.join(path, name), "rb").close()
            except OSError as error:
                refuse(error)


def check_identity(out: Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Stops the program with one line that names what differs between two runs."""
    if differing := differences(here, there):
        advice = ""
        if here["data"]["text"] != there["data"]["text"]:
            advice = (
                " Give the --text that it learned from. The built-in one differs between versions "
                "of Python."
            )
        raise SystemExit(f"cannot resume: the run in {out} is another one: {differing}.{advice}")


def differences(here: dict[str, Any], there: dict[str, Any]) -> str:
    """What differs between two nested dicts, by the names of their innermost keys."""
    found = []
    for name in here | there:
        one, other = here.get(name), there.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += filter(None, [differences(one, other)])
        elif one != other:
            one, other = map(_shorten, (one, other))
            found.append(f"{name} is {one} here and {other} there")
    return "; ".join(found)


def _shorten(value: Any) -> Any:
    """The first letters of a digest."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:8]}..." if is_digest else value


def _x64() -> bool:
    """Whether numbers have 64 bits by default: others cannot be read in their place."""
    return jax.dtypes.canonicalize_dtype("float64") == "float64"


def _digest(tree: PyTree) -> str:
    """The SHA-256 of the bytes of all arrays, whichever devices hold them."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _digest_of_json(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
