"""Checkpoints that are whole or absent, whatever kills the program and whenever."""

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the file at once, so that nobody sees it half written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


class Checkpoints:
    """The last two checkpoints of the run in the folder `out`, written by orbax."""

    def __init__(self, out: Path, resume: bool, identity: dict[str, Any]):
        """Stops the program with one line unless `out` holds what `resume` and `identity` need."""
        self.out, self.identity = out, identity
        folder = out.absolute() / "checkpoints"
        steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
        if resume and not steps:
            raise SystemExit(
                f"cannot resume: {out} holds no checkpoint. Check --out, or start without --resume."
            )
        if steps and not resume:
            raise SystemExit(f"{out} holds a run: go on with --resume, or choose another --out.")
        self.last_step = max(steps, default=0)
        self.manager = ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def save(self, step: int, state: PyTree, metrics: list[dict[str, Any]]) -> None:
        """Writes in the background, from a copy of `state`."""
        about = {"identity": self.identity, "metrics": metrics}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
            ),
        )

    def finish(self) -> None:
        """Waits until everything is written."""
        self.manager.wait_until_finished()
        self.manager.close()

    def restore(self, like: PyTree) -> tuple[int, PyTree, list[dict[str, Any]]]:
        """The step, state and metrics of the last checkpoint, the state shaped as `like`."""
        about = self._read(about=ocp.args.JsonRestore())["about"]
        differences = [
            f"{name} is {self.identity.get(name)} here and {about['identity'].get(name)} there"
            for name in self.identity | about["identity"]
            if self.identity.get(name) != about["identity"].get(name)
        ]
        if differences:
            raise SystemExit(
                f"cannot resume: the run in {self.out} is another one: {'; '.join(differences)}."
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state = self._read(state=ocp.args.StandardRestore(shapes))["state"]
        return self.last_step, state, about["metrics"]

    def _read(self, **items: Any) -> Any:
        try:
            return self.manager.restore(self.last_step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax raises whatever its storage layers raise
            raise SystemExit(
                f"cannot resume: the checkpoint {self.out}/checkpoints/{self.last_step} is broken "
                f"({type(error).__name__}). Nothing was changed; delete that folder to go on from "
                "the one before it."
            ) from error
