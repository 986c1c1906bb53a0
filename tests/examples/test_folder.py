"""What the file system does to the folder of a run."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import generate
import numpy as np
import pytest
import train_lm
from support import checkpoints
from support.checkpoints import Checkpoints
from support.folder import lock

from ..helpers import python_environment
from .helpers import changed, command, content, tiny, wait_for


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


def refused(config, message):
    with pytest.raises(SystemExit, match=message) as error:
        train_lm.main(config)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_out_that_cannot_be_a_folder_is_refused_in_one_line(text, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm, "train", None)  # before work that takes long
    (tmp_path / "file").touch()
    refused(tiny(text, tmp_path / "file"), "file is not a folder")
    refused(tiny(text, tmp_path / "file" / "run"), "cannot .*run: Not a directory")
    refused(tiny(text, tmp_path / ("x" * 300)), "cannot .*x: File name too long")
    # orbax would write elsewhere, or fail after compilation
    for name in "a\\b", "[a]", "gs:/a", "\udcff":
        refused(tiny(text, tmp_path / name), "orbax finds no checkpoint by a name with")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "checkpoints").touch()
    refused(tiny(text, tmp_path / "odd"), "odd/checkpoints is not a folder")
    assert checkpoints._path_for_orbax(Path("//a")) == Path("/a/checkpoints")

    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(tiny(text, tmp_path / "run"), "cannot .*run: Read-only file system")


@pytest.mark.exhaustive
def test_two_runs_do_not_write_to_one_folder(finished, text, tmp_path):
    config = tiny(text, tmp_path / "out", steps=10**6)
    process = subprocess.Popen(
        command(config),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
    )
    wait_for(config.run.out / "metrics.jsonl", process)
    try:
        for resume in False, True:
            refused(changed(config, resume=resume), "another run is writing to .*out")
        generate.main(generate.Config(config.run.out, length=1))  # to read needs no lock
    finally:
        process.kill()  # which leaves no lock behind
        process.wait()
    names = [path.name for path in (config.run.out / "checkpoints").iterdir()]
    last = max(int(name) for name in names if name.isdecimal())
    again = changed(config, resume=True, steps=last + 1)
    assert train_lm.main(again)[-1]["step"] == last + 1


@pytest.mark.slow
def test_if_a_checkpoint_and_a_picture_cannot_be_written_both_are_named(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    checkpoints = Checkpoints(out, exists=False)
    with pytest.raises(SystemExit, match="^cannot write loss.png.*\ncannot write a checkpoint to"):
        with checkpoints:
            checkpoints.claim()
            checkpoints.save(0, {}, model={"rows": np.zeros(2)})
            monkeypatch.setattr(checkpoints.manager, "wait_until_finished", full)
            raise SystemExit("cannot write loss.png: No space left on device.")
    monkeypatch.undo()
    checkpoints.manager.close()
    os.close(lock(out))  # no other run has it


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_loses_nothing(finished, tmp_path, monkeypatch):
    config = changed(finished[0], out=tmp_path / "full", resume=True, steps=301)
    shutil.copytree(finished[0].run.out, config.run.out)
    before = content(config.run.out)
    write = Path.write_bytes

    def no_space(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    refused(config, "cannot write .*metrics.jsonl: No space left on device")
    after = content(config.run.out)
    assert all(
        after[path] == before[path] for path in before if "/checkpoints/200/" not in str(path)
    )
    monkeypatch.setattr(Path, "write_bytes", write)
    assert train_lm.main(config)[-1]["step"] == 301
