"""Checkpoints that are broken, changed, or cannot be read or made."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import generate
import numpy as np
import pytest
import train_lm
from support import checkpoints
from support.checkpoints import Checkpoints

from ..helpers import python_environment
from .helpers import changed, command, content, EXAMPLES, losses


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


def broken_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [broken_in_half, flipped])
@pytest.mark.parametrize("item", ["about", "model", "optimizer"])
def test_resuming_goes_on_from_the_checkpoint_before_a_broken_one(
    finished, tmp_path, item, damage, capsys
):
    config, metrics = changed(finished[0], out=tmp_path / "broken"), finished[1]
    shutil.copytree(finished[0].run.out, config.run.out)
    files = [path for path in (config.run.out / "checkpoints/300" / item).rglob("*")]
    for path in sorted(path for path in files if path.is_file() and path.stat().st_size > 0):
        damage(path)
    resumed = train_lm.main(changed(config, resume=True))
    np.testing.assert_allclose(losses(resumed), losses(metrics), rtol=1e-5)
    said = [line for line in capsys.readouterr().out.splitlines() if "is broken" in line]
    assert len(said) == 1 and "checkpoints/300 is broken: " in said[0]
    assert said[0].endswith("Going on from the one before it, 200.")
    assert [path.name[:11] for path in config.run.out.glob("broken-*")] == ["broken-300-"]
    kept = sorted(path.name for path in (config.run.out / "checkpoints").iterdir())
    assert kept == ["200", "300"]


@pytest.mark.slow
def test_a_flipped_bit_in_an_array_is_found(finished, tmp_path):
    """In the largest file, which holds the arrays: orbax itself may load it with other numbers."""
    run = tmp_path / "flipped"
    shutil.copytree(finished[0].run.out, run)
    files = (run / "checkpoints/300/model").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = largest.read_bytes()
    for position in np.linspace(0, len(content) - 1, 12).astype(int).tolist():
        for bit in 0, 5:
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            largest.write_bytes(damaged)
            try:
                model, _, _ = generate.load(run)
            except SystemExit as error:
                assert "checkpoints/300 is broken" in str(error) and "\n" not in str(error)
            else:  # the bit says nothing of the arrays
                expected = generate.load(finished[0].run.out).model
                assert eqx.tree_equal(model, expected)


def rewrite_about(out, change):
    """Changes what a checkpoint says of itself, as another version of the scripts would do."""
    path = out / "checkpoints/300/about/metadata"
    about = json.loads(path.read_text())
    digest = about.pop("digest")
    assert digest == checkpoints._digest_of_json(about)
    change(about)
    path.write_text(json.dumps(about | {"digest": checkpoints._digest_of_json(about)}))


@pytest.mark.parametrize("key", ["identity", "tokenizer", "metrics", "digests", "step"])
def test_resuming_from_metadata_without_a_key_is_an_error_and_changes_nothing(
    finished, tmp_path, key
):
    config = changed(finished[0], out=tmp_path / "broken", resume=True)
    shutil.copytree(finished[0].run.out, config.run.out)
    shutil.rmtree(config.run.out / "checkpoints" / "200")
    rewrite_about(config.run.out, lambda about: about.pop(key))
    before = content(config.run.out)
    for run in (
        lambda: train_lm.main(config),
        lambda: generate.main(generate.Config(config.run.out)),
    ):
        with pytest.raises(
            SystemExit, match=f"/300 is broken: it does not tell its {key}. .*Nothing was ch"
        ) as error:
            run()
        assert "\n" not in str(error.value)
    assert content(config.run.out) == before


def test_a_checkpoint_of_another_version_is_refused_in_one_line(finished, tmp_path):
    shutil.copytree(finished[0].run.out, tmp_path / "other")
    rewrite_about(tmp_path / "other", lambda about: about["identity"]["model"].update(experts=8))
    with pytest.raises(SystemExit, match="other is of another version .*'experts'") as error:
        generate.load(tmp_path / "other")
    assert "\n" not in str(error.value)
    path = tmp_path / "other/checkpoints/300/about/metadata"
    about = json.loads(path.read_text())
    del about["digest"]
    path.write_text(json.dumps(about))
    with pytest.raises(
        SystemExit, match="/300 is broken: what it says of itself has changed"
    ) as error:
        generate.load(tmp_path / "other")
    assert "\n" not in str(error.value)


def test_a_copy_of_a_checkpoint_is_not_taken_for_a_later_one(finished, tmp_path, capsys):
    run = tmp_path / "copied"
    shutil.copytree(finished[0].run.out, run)
    for name in "400", "0500":  # of the second, Python makes a number as well
        shutil.copytree(run / "checkpoints/300", run / "checkpoints" / name)
    with Checkpoints(run, exists=True) as checkpoints:
        assert checkpoints.steps == [200, 300, 400]
        assert checkpoints.about()["step"] == 300
    assert "checkpoints/400 is broken: it is a copy of that of step 300" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_ENABLE_X64": "1"}, "finished was written with JAX_ENABLE_X64=0: set it to the same"),
        ({"JAX_PLATFORMS": "none"}, "JAX finds no devices, with JAX_PLATFORMS=none: "),
    ],
)
def test_an_environment_that_does_not_fit_breaks_no_checkpoint(finished, environment, message):
    command = [sys.executable, EXAMPLES / "generate.py", f"--run={finished[0].run.out}"]
    failed = subprocess.run(
        command, capture_output=True, text=True, env=python_environment(**environment)
    )
    assert failed.returncode == 1 and failed.stdout == ""
    assert message in failed.stderr and failed.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("item", ["about/metadata", "model", "optimizer/manifest.ocdbt"])
def test_a_checkpoint_that_may_not_be_read_is_not_broken(finished, tmp_path, monkeypatch, item):
    out = shutil.copytree(finished[0].run.out, tmp_path / "out")
    before, forbidden = content(out), out / "checkpoints" / "300" / item

    def not_read(*_, **__):  # tensorstore's errors have types of its own
        raise ValueError(f"Failed to open {forbidden}")

    def check(opened):
        if Path(opened) == forbidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(opened))

    real_open, real_scan = open, os.scandir
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", not_read)
    monkeypatch.setattr("builtins.open", lambda p, *a, **k: (check(p), real_open(p, *a, **k))[1])
    monkeypatch.setattr(os, "scandir", lambda p: (check(p), real_scan(p))[1])
    with Checkpoints(out, exists=True) as checkpoints:
        with pytest.raises(SystemExit, match=f"cannot read {forbidden}: Permission denied"):
            checkpoints.about()
    monkeypatch.undo()
    assert content(out) == before


@pytest.mark.slow
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_broken(finished, tmp_path):
    config = changed(finished[0], out=tmp_path / "out", resume=True, steps=302, report_every=1)
    shutil.copytree(finished[0].run.out, config.run.out)
    with Checkpoints(config.run.out, exists=True, reads_only=True) as checkpoints:
        train_lm.main(config)  # replaces both that there were
        assert checkpoints.about()["metrics"][-1]["step"] == 302


READ_ONLY = """
import errno, os, runpy, sys
mkdir = os.mkdir

def refuse(path, *args, **options):
    if "301.orbax" in str(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
    mkdir(path, *args, **options)

os.mkdir = refuse
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.exhaustive
def test_a_checkpoint_that_cannot_be_made_keeps_no_process_waiting(finished, tmp_path):
    """A thread of orbax would wait ten minutes for the folder of the checkpoint."""
    config = changed(finished[0], out=tmp_path / "out", steps=301)
    shutil.copytree(finished[0].run.out, config.run.out)
    _, *options = command(config)
    failed = subprocess.run(
        [sys.executable, "-c", READ_ONLY, *options, "--resume"],
        capture_output=True,
        text=True,
        env=python_environment(),
        timeout=200,
    )
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.endswith("--resume goes on from step 300.\n"), failed.stderr
    assert "Read-only file system" in failed.stderr
