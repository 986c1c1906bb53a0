"""Settings so small that a run takes seconds, and what tests of the examples share."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import train_lm


EXAMPLES = Path(__file__).parent.parent.parent / "examples"


SCRIPT = EXAMPLES / "train_lm.py"


def changed(config, **changes):
    """The settings with other values, by the names of their fields in any part."""
    parts = {}
    for part in dataclasses.fields(config):
        old = getattr(config, part.name)
        names = {field.name for field in dataclasses.fields(old)} & set(changes)
        parts[part.name] = dataclasses.replace(old, **{name: changes.pop(name) for name in names})
    assert not changes
    return dataclasses.replace(config, **parts)


def tiny(text, out, mesh: Any = train_lm.MeshConfig(), **changes):
    small = {"num_layers": 1, "num_heads": 2, "embedding_size": 8, "sequence_length": 16}
    small |= {"batch_size": 4, "learning_rate": 1e-2}
    run = {"text": text, "out": out, "steps": 300, "report_every": 100, "sample_length": 20}
    return changed(train_lm.Config(mesh=mesh), **(small | run | changes))


def losses(metrics):
    return [(line["step"], line["train_loss"], line["val_loss"]) for line in metrics]


def command(config):
    options = [
        f"--{name.replace('_', '-')}={value}"
        for part in (config.model, config.optimizer, config.data, config.run)
        for name, value in dataclasses.asdict(part).items()
        if name != "resume"
    ]
    return [sys.executable, str(SCRIPT), *options]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def written(folder):
    """The names of what a run has left in its folder."""
    return {path.name for path in folder.iterdir()}
