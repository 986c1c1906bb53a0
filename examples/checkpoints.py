"""Checkpoints that are complete or absent, whenever the program is killed."""

import copy
import functools
import os
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree


TIMEOUT = 30  # seconds until all processes must see a shared folder


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file atomically, so that nobody sees it half written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


class Checkpoints:
    """The last two checkpoints of the run in the folder `out`, written by orbax."""

    def __init__(self, out: Path, exists: bool):
        """`exists` says whether `out` must hold a run, or must not hold one.

        Otherwise the program stops with one line.
        """
        if out.exists() and not out.is_dir():
            raise SystemExit(f"{out} is not a folder.")
        self.out, self.folder = out, out.absolute() / "checkpoints"
        steps = ocp.utils.checkpoint_steps(self.folder) if self.folder.is_dir() else []
        if exists and not steps:
            raise SystemExit(
                f"{out} holds no checkpoint. Check the name; train_lm.py without --resume starts a "
                "run there."
            )
        if steps and not exists:
            raise SystemExit(f"{out} holds a run: continue with --resume, or choose another --out.")
        self.last_step = max(steps, default=0)

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        # Created when it is first used, because it creates the folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        manager = ocp.CheckpointManager(self.folder, options=options)
        # Process 0 has created the folder. Other processes may see it later, or never.
        until = time.monotonic() + TIMEOUT
        while not self.folder.is_dir():
            if time.monotonic() > until:
                raise SystemExit(f"{self.out} is not the folder of process 0. All must share it.")
            time.sleep(0.1)
        return manager

    def save(self, step: int, about: dict[str, Any], **trees: PyTree) -> None:
        """Writes copies of the trees in the background, and `about` as JSON."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(about=ocp.args.JsonSave(copy.deepcopy(about)), **items)
        self.manager.save(step, args=args)

    def finish(self) -> None:
        """Waits until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()

    def about(self) -> dict[str, Any]:
        """What was saved as `about` with the last checkpoint."""
        return self._restore(about=ocp.args.JsonRestore())["about"]

    def trees(self, **like: PyTree) -> list[PyTree]:
        """Trees of the last checkpoint, with the names and shapes of those given."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
        restored = self._restore(**items)
        return [restored[name] for name in like]

    def _restore(self, **items: Any) -> Any:
        try:
            return self.manager.restore(self.last_step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:  # another process has ended
            raise
        except Exception as error:  # orbax raises whatever its storage layers raise
            raise SystemExit(
                f"the checkpoint {self.out}/checkpoints/{self.last_step} is broken "
                f"({type(error).__name__}). Nothing was changed. Delete that folder to continue "
                "from the checkpoint before it."
            ) from error


def check_identity(out: Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Stops the program with one line that names what differs between two runs."""
    differences = [
        f"{name} is {here.get(name)} here and {there.get(name)} there"
        for name in here | there
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise SystemExit(
            f"cannot resume: the run in {out} has other settings: {'; '.join(differences)}."
        )
