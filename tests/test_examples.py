"""The training example from end to end, on a text and a model so small that a run takes seconds."""

import dataclasses
import errno
import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import equinox as eqx
import generate
import grow_vocabulary
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import train_lm
from support import (
    checkpoints,
    generation,
    pictures,
    terminal,
    text_data,
    tokenizer as tokenizer_module,
)
from support.checkpoints import Checkpoints
from support.folder import lock
from support.generation import sample
from support.terminal import from_command_line
from support.tokenizer import add_tokens, read_tokenizer, Tokenizer, train_bpe
from toy_transformer import ModelConfig, Transformer

from eqx_embedding import EmbeddingDecode

from .helpers import python_environment


EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "train_lm.py"


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


@pytest.fixture(scope="module")
def only_what_scripts_show():
    """As in the scripts, what follows from an error that orbax raises as well is not shown."""
    show = sys.unraisablehook
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "__unraisablehook__", show)
        context.setattr(sys, "unraisablehook", terminal.show_ignored)
        gc.freeze()  # what is there takes seconds to collect
        yield
        gc.collect()  # else what orbax left behind would be shown in another file
        gc.unfreeze()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return path


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


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    config = tiny(text, tmp_path_factory.mktemp("runs") / "finished")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, train_lm.main(config)


@pytest.mark.slow
def test_a_run_learns_and_leaves_metrics_picture_sample_and_checkpoints(finished):
    config, metrics = finished
    assert [line["step"] for line in metrics] == [100, 200, 300]
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] < math.log(256)
    for line in metrics:
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2))
        assert line["tokens_per_second"] > 0
    lines = (config.run.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == metrics
    for picture in "loss.png", "embedding.png":
        assert (config.run.out / picture).read_bytes().startswith(b"\x89PNG")
    held_out = text_data.read_text(config.data.text).held_out.tobytes()
    sample = (config.run.out / "sample.txt").read_bytes()
    assert sample.startswith(held_out[:8] + b"|") and len(sample) == 8 + 1 + 20
    assert sorted(path.name for path in (config.run.out / "checkpoints").iterdir()) == [
        "200",
        "300",
    ]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_losses_of_an_uninterrupted_one(finished, tmp_path):
    config, metrics = finished
    config = changed(config, out=tmp_path / "killed")
    process = subprocess.Popen(
        command(config),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
    )
    wait_for(config.run.out / "checkpoints" / "100", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = sorted(path.name for path in (config.run.out / "checkpoints").iterdir())
    assert "300" not in before, "the run must not have ended before it was killed"
    resumed = train_lm.main(changed(config, resume=True))
    np.testing.assert_allclose(losses(resumed), losses(metrics), rtol=1e-5)


@pytest.mark.slow
def test_resuming_writes_what_a_run_had_no_time_to_write(finished, tmp_path):
    config, metrics = finished
    out = shutil.copytree(config.run.out, tmp_path / "copy")
    picture = (out / "loss.png").read_bytes()
    (out / "loss.png").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    train_lm.main(changed(config, out=out, resume=True))
    assert (out / "metrics.jsonl").read_text() == "".join(lines)
    assert (out / "loss.png").read_bytes() == picture


@pytest.mark.slow
def test_resuming_for_fewer_steps_than_there_are_says_how_many(finished, tmp_path, capsys):
    config, metrics = finished
    out = shutil.copytree(config.run.out, tmp_path / "copy")
    resumed = train_lm.main(changed(config, out=out, steps=100, resume=True))
    assert losses(resumed) == losses(metrics)
    assert "\n300 steps, " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options, line",
    [
        (train_lm, [], "stopped. If the run has a checkpoint, --resume continues from it."),
        (generate, ["--run=a"], "stopped."),
        (grow_vocabulary, ["--run=a"], "stopped. The original run was not changed."),
    ],
)
@pytest.mark.parametrize("seconds", [0.2, 1.0])
@pytest.mark.one_in(3)
def test_ctrl_c_ends_a_script_with_one_line(script, options, line, seconds, tmp_path):
    out = [] if script is generate else [f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-X", "importtime", script.__file__, *options, *out]
    # Else a shell that runs the tests in the background has the script ignore Ctrl-C
    run = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv("
    command = [sys.executable, "-c", f"{run}sys.executable, sys.argv[1:])", *command]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=python_environment()
    ) as process:
        assert process.stderr is not None
        for shown in process.stderr:  # until Ctrl-C is expected, before the slow imports
            if shown.split("|")[-1].strip() == "support.terminal":
                break
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    errors = [e for e in errors.splitlines() if e and not e.startswith("import time:")]
    assert process.returncode == 130 and errors == [line]


@pytest.mark.slow
def test_a_finished_run_resumes_for_longer(finished, tmp_path):
    config, metrics = finished
    config = changed(config, out=tmp_path / "longer", steps=301, resume=True)
    shutil.copytree(finished[0].run.out, config.run.out)
    longer = train_lm.main(config)
    assert losses(longer)[:3] == losses(metrics) and longer[3]["step"] == 301


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embedding_size": 16}, "embedding_size is 16 here and 8 there"),
        ({"num_layers": 2, "seed": 1}, "num_layers is 2 here and 1 there; seed is 1 here and 0"),
        ({"text": None}, "text is .* here and .* there"),
        ({"tokenizer": "bpe"}, "tokenizer is bpe here and bytes there"),
    ],
)
def test_resuming_with_other_settings_names_them_and_changes_nothing(finished, changes, message):
    config, _ = finished
    before = content(config.run.out)
    with pytest.raises(SystemExit, match=message):
        train_lm.main(changed(config, resume=True, **changes))
    assert content(config.run.out) == before


def test_a_run_is_not_overwritten(finished):
    config, _ = finished
    before = content(config.run.out)
    with pytest.raises(SystemExit, match="holds a run: choose another --out. train_lm.py --resume"):
        train_lm.main(config)
    assert content(config.run.out) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_replaces_no_checkpoint(text, tmp_path):
    config = tiny(text, tmp_path / "out", steps=3, report_every=1, learning_rate=1e30)
    with pytest.raises(SystemExit, match="the loss is not finite: try a lower --learning-rate."):
        train_lm.main(changed(config, warmup=0.5))
    model = generate.load(config.run.out).model
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(model))


def test_a_folder_that_is_moved_stops_a_run_in_one_line(text, tmp_path, monkeypatch):
    config = tiny(text, tmp_path / "out", steps=2, report_every=1)

    def move(out, *_):
        while not (out / "checkpoints" / "1").exists():  # it is written in the background
            time.sleep(0.01)
        out.rename(tmp_path / "moved")

    monkeypatch.setattr(train_lm.results, "write_metrics", move)
    with pytest.raises(SystemExit, match="out was moved or removed during the run") as error:
        train_lm.main(config)
    assert "\n" not in str(error.value)
    generate.load(tmp_path / "moved")


def test_what_another_script_wrote_is_not_overwritten(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="holds a run: choose another --out."):
        train_lm.main(tiny(text, tmp_path))
    assert content(tmp_path) == {tmp_path / "metrics.jsonl": b"{}"}


@pytest.mark.parametrize("create", [False, True], ids=["missing", "empty"])
def test_resuming_without_a_checkpoint_is_an_error_and_creates_nothing(text, tmp_path, create):
    out = tmp_path / "nothing"
    if create:
        out.mkdir()
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        train_lm.main(tiny(text, out, resume=True))
    assert out.exists() == create and not list(out.glob("*"))


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
@pytest.mark.one_in(3)
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


# What the file system does


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


def test_a_text_that_cannot_be_used_is_refused_in_one_line(text, tmp_path):
    for name, data, message in [
        ("missing", None, "cannot read the text .*missing: No such file or directory"),
        ("empty", b"", "empty is empty"),
        ("short", b"too short" * 5, "short is too short: its last tenth has 5 tokens"),
    ]:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(SystemExit, match=message) as error:
            train_lm.main(tiny(path, tmp_path / "out"))
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="Is a directory"):
        train_lm.main(tiny(tmp_path, tmp_path / "out"))
    with pytest.raises(SystemExit, match="cannot read the text x*: File name too long"):
        train_lm.main(tiny(Path("x" * 300), tmp_path / "out"))
    with pytest.raises(SystemExit, match="/dev/zero is a device, which may have no end"):
        train_lm.main(tiny(Path("/dev/zero"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps must be above 0, got 0"),
        ({"num_heads": 3}, "--embedding-size must be a multiple of --num-heads 3"),
        ({"learning_rate": math.nan}, "--learning-rate must be above 0 and finite, got nan"),
        ({"num_layers": 2**31 - 1}, "--num-layers must be above 0 and below 65536, got 2147483647"),
        ({"vocab_size": 255}, "--vocab-size must be at least 256, got 255"),
        ({"warmup": 1.0}, "--warmup must be at least 0 and below 1, got 1.0"),
        ({"learning_rate": math.inf}, "--learning-rate must be above 0 and finite, got inf"),
        ({"seed": 2**63}, "--seed must be at least 0 and below 9223372036854775808, got"),
    ],
)
def test_a_setting_out_of_range_is_refused(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(text, tmp_path, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_lm, generate, grow_vocabulary])
@pytest.mark.exhaustive
def test_help_explains_each_option_and_shows_the_command(script):
    env = os.environ | {"COLUMNS": "200", "TERM": "dumb"}
    path = EXAMPLES / f"{script.__name__}.py"
    shown = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, env=env
    )
    assert shown.returncode == 0
    assert f"python examples/{script.__name__}.py" in shown.stdout
    for field in dataclasses.fields(script.Config):
        parts = field.type if dataclasses.is_dataclass(field.type) else script.Config
        for inner in dataclasses.fields(parts):
            if parts is not train_lm.MeshConfig:
                assert f"--{inner.name.replace('_', '-')} " in shown.stdout.replace(",", " ")


@pytest.mark.slow
def test_scripts_run_from_any_folder_and_fail_in_one_line(finished_bpe, tmp_path):
    # what a notebook, from which `!python` is called, sets for its own pictures
    env = python_environment(MPLBACKEND="module://no_such_module")

    def run(command):
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    script, folder = str(EXAMPLES / "generate.py"), str(finished_bpe[0].run.out)
    written = run([sys.executable, script, "--run", folder, "--prompt", "3 times", "--length=5"])
    assert written.stdout.startswith("3 times") and written.stderr == ""
    for failed in (
        run([sys.executable, script, "--run", "missing"]),
        run(command(tiny(tmp_path / "missing", tmp_path / "out"))),
        # in a folder that is gone
        run(["sh", "-c", f"mkdir a; cd a; rmdir ../a; {sys.executable} {script} --run=b"]),
    ):
        assert failed.returncode == 1
        assert failed.stdout == "" and failed.stderr.count("\n") == 1


@pytest.mark.slow
def test_pictures_do_not_depend_on_a_matplotlibrc(tmp_path):
    """That may ask for LaTeX, which need not be there."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    program = "import matplotlib; from support import pictures; print(matplotlib.rcParams[{!r}])"
    written = subprocess.run(
        [sys.executable, "-c", program.format("text.usetex")],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        env=python_environment(MATPLOTLIBRC=str(tmp_path)),
    )
    assert written.stdout == "False\n", written.stderr


@pytest.mark.parametrize(
    "script, options, message",
    [
        (train_lm, ["--stepz", "5"], "Unrecognized options: --stepz"),
        (train_lm, ["--steps", "five"], "--steps: invalid literal for int"),
        (train_lm, ["--steps", "0"], "--steps must be above 0, got 0."),
        (generate, ["--run=a", "--seed=9223372036854775808"], "--seed must be at least 0"),
        (generate, [], "--run PATH"),
        (grow_vocabulary, ["--run=a", "--stepz=5"], "Unrecognized options: --stepz"),
    ],
)
def test_a_mistyped_command_is_refused_by_tyro(script, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options])
    with pytest.raises(SystemExit):
        from_command_line(script.Config, script.__doc__)
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=["ascii", "C"],
)
@pytest.mark.exhaustive
def test_a_terminal_shows_what_it_can_show(finished_bpe, tmp_path, environment):
    def run(*command):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, env=python_environment(**environment)
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.decode("ascii")

    script = EXAMPLES / "generate.py"
    said = run(script, f"--run={finished_bpe[0].run.out}", "--prompt", "é 3 times", "--length=3")
    assert said.startswith("? 3 times")
    if environment.get("LC_ALL"):  # one run is enough
        return
    (tmp_path / "é").write_text("Größe: é, 中. " * 300)
    _, script, *options = command(tiny(tmp_path / "é", tmp_path / "out", steps=2))
    assert "held out: " in run(script, *options)


@pytest.mark.slow
@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("Out of memory\nallocating")])
def test_too_little_memory_is_said_in_one_line(error, monkeypatch):
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["generate.py", "--run=run"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored afterwards
    with pytest.raises(SystemExit, match="not enough memory: try a smaller model"):
        terminal.run_script(main, generate.Config, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams, code, said",
    [
        (">&-", 0, ""),
        ("2>&-", 0, "3 times"),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 1, "cannot print: No space left on device.\n"),
        # a file as large as the shell allows
        (
            "--length=2000 >out 2>err; code=$?; cat err; exit $code",
            1,
            "cannot print: File too large.",
        ),
    ],
)
@pytest.mark.exhaustive
def test_a_terminal_may_be_closed_or_full(finished, tmp_path, streams, code, said):
    script, run = EXAMPLES / "generate.py", finished[0].run.out
    shell = f"{sys.executable} {script} --run={run} --prompt='3 times' --length=1 {streams}"
    if "code" in streams:
        shell = f"ulimit -f 1; {shell}"
    options: Any = {"capture_output": True, "text": True, "env": python_environment()}
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, **options)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr)[: len(said) or None] == said


@pytest.mark.slow
def test_the_model_looks_back_only_and_its_loss_is_that_of_its_logits(getkey):
    model = Transformer(256, ModelConfig(16, 1, 2, 8), key=getkey())
    tokens = jax.random.randint(getkey(), (3, 17), 0, 256)
    changed = tokens[0, :16].at[10:].set(7)
    logits, logits_of_changed = model.logits(tokens[0, :16]), model.logits(changed)
    np.testing.assert_allclose(logits[:10], logits_of_changed[:10], rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits[10:], logits_of_changed[10:])
    rows = eqx.filter_vmap(model.logits)(tokens[:, :-1])
    log_probabilities = jax.nn.log_softmax(rows)
    expected = -np.mean(
        [log_probabilities[b, t, tokens[b, t + 1]] for b in range(3) for t in range(16)]
    )
    np.testing.assert_allclose(model.loss(tokens[:, :-1], tokens[:, 1:]), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("temperature, top_k", [(0.0, None), (0.8, None), (1.5, 3), (1.0, 999)])
@pytest.mark.parametrize("size, prompt", [(8, range(5)), (7, range(20)), (1, [3])])
@pytest.mark.one_in(12)
def test_a_sample_follows_windows_that_keep_their_newer_half(
    size, prompt, temperature, top_k, cache
):
    model = Transformer(32, ModelConfig(size, 1, 2, 8), key=jax.random.key(1))
    key = jax.random.key(2)
    hidden_of, decode = eqx.filter_jit(model.hidden), EmbeddingDecode(model.tokens)
    options = {"temperature": temperature, "top_k": None if top_k is None else min(top_k, 32)}
    window, expected = list(prompt)[-size:], []
    step_key = key
    for _ in range(12):
        step_key, draw = jax.random.split(step_key)
        if len(window) > size:
            window = window[-(size // 2 + 1) :]
        padded = jnp.asarray(window + [0] * (size - len(window)))
        hidden = hidden_of(padded)[len(window) - 1]
        token = int(decode.sample(hidden, key=draw, **options))
        expected.append(token)
        window.append(token)
    options = {"top_k": top_k, "cache": cache, "key": key}
    assert list(sample(model, np.asarray(prompt), 12, temperature, **options)) == expected


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-10])
def test_a_temperature_next_to_zero_is_the_likeliest_token(temperature):
    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    likeliest = list(sample(model, np.arange(5), 12, 0.0, key=jax.random.key(2)))
    assert list(sample(model, np.arange(5), 12, temperature, key=jax.random.key(2))) == likeliest


def test_a_sample_of_three_billion_tokens_begins_at_once():
    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    written = sample(model, np.arange(5), 3 * 10**9, 0.8, key=jax.random.key(2))
    assert len(list(itertools.islice(written, 5))) == 5


def test_windows_ask_for_each_byte_but_the_first_exactly_once():
    values = np.arange(100, 131, dtype=np.uint8)
    inputs, targets, weights = text_data.windows(values, length=4, batch_size=3)
    assert inputs.shape == targets.shape == weights.shape == (3, 3, 4)
    real = weights.reshape(-1) == 1
    np.testing.assert_array_equal(targets.reshape(-1)[real], values[1:])
    np.testing.assert_array_equal(inputs.reshape(-1)[real], values[:-1])


def test_baselines_are_those_of_counting():
    train = np.frombuffer(b"ab" * 500, np.uint8)
    text = text_data.Text("ab", train, np.frombuffer(b"ab" * 50, np.uint8), "")
    reached = text_data.baselines(text)
    assert reached["unigram"] == pytest.approx(-math.log2(501 / 1256))
    a_then_b = (500 + 501 / 1256) / 501
    b_then_a = (499 + 501 / 1256) / 500
    expected = -(50 * math.log2(a_then_b) + 49 * math.log2(b_then_a)) / 99
    assert reached["bigram"] == pytest.approx(expected)
    assert 0 < reached["zlib"] < 8


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_with_the_cache_there_is_one_token_to_encode_unless_the_window_is_full(monkeypatch, cache):
    encoded = []

    def next_token(model, tokens, start, last, caches, *_):
        encoded.append(len(tokens))
        return jnp.asarray(7), caches

    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    monkeypatch.setattr(generation, "next_token", next_token)
    list(sample(model, np.arange(5), 12, 1.0, cache=cache, key=jax.random.key(2)))
    assert encoded == ([8, 1, 1, 1] * 3 if cache else [8] * 12)


TEXTS = [
    b"",
    b"The list of the elements.\n\n\tThe end.\r\n",
    "Größe, 中文, 🙂, e\u0301 and \u00e9 <|endoftext|>".encode(),
    "中".encode()[1:] + b" is cut in two " + "中".encode()[:2],
    bytes(range(256)) * 2,
    np.random.default_rng(0).bytes(500),
]


@pytest.fixture(scope="module")
def bpe(text):
    return train_bpe(text.read_bytes(), 300)


@pytest.mark.parametrize("data", TEXTS)
def test_every_byte_survives_a_tokenizer(bpe, data):
    for tokenizer in Tokenizer(), bpe, Tokenizer(bpe.json):
        assert tokenizer.decode(tokenizer.encode(data)) == data


def test_pieces_are_those_of_hugging_face(text, bpe):
    theirs = tokenizers.Tokenizer.from_str(bpe.json)
    assert 256 < len(bpe.pieces) <= 300 and b" times " not in bpe.pieces
    assert b" times" in bpe.pieces and " is" in map(bytes.decode, bpe.pieces[256:])
    tokens = bpe.encode(text.read_bytes())
    assert list(tokens) == theirs.encode(text.read_text()).ids
    assert bpe.decode(tokens).decode() == theirs.decode(list(tokens))
    assert len(tokens) < 0.6 * len(text.read_bytes())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_decoding_holds_little_more_than_the_text(bpe, kind):
    """Python holds 88 bytes for each piece that it joins."""
    tokenizer, data = Tokenizer() if kind == "bytes" else bpe, b"3 times 3 is 9.\n" * 20_000
    tokens = tokenizer.encode(data)
    tracemalloc.start()
    try:
        assert tokenizer.decode(tokens) == data
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data) + 100 * tokenizer_module.PIECE


def test_a_text_is_cut_where_no_token_reaches(bpe):
    """A long text goes to `tokenizers` in pieces, with the tokens of the whole."""
    words = ["  two ", "\n\n", "it's", " 中文", "\t!", " a\n", "\r\n x", "42 ", "\x1c", "\xa0b "]
    text = "".join(np.random.default_rng(0).choice(words, 40_000))
    pieces = list(tokenizer_module._cut(text))
    assert len(pieces) > 5 and "".join(pieces) == text
    assert max(map(len, pieces)) < 2 * tokenizer_module.PIECE
    whole = tokenizers.Tokenizer.from_str(bpe.json).encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(bpe.encode(text.encode()), whole)


def test_words_of_any_length_are_learned_from_in_short_pieces():
    """The time of `tokenizers` grows with the square of the longest word."""
    word = "".join(np.random.default_rng(0).choice([*"ACGT"], 100_000))
    pieces = list(tokenizer_module._short_pieces(f"a genome: {word} ends"))
    assert "".join(pieces) == f"a genome: {word} ends"
    assert max(len(part) for piece in pieces for part in piece.split()) == 1024
    spaces = " " * 50_000 + "\n" * 50_000
    pieces = list(tokenizer_module._short_pieces(f"a{spaces}b"))
    assert "".join(pieces) == f"a{spaces}b" and max(map(len, pieces)) < 2100
    tokenizer = train_bpe(word.encode(), 300)
    assert tokenizer.decode(tokenizer.encode(word.encode())) == word.encode()
    assert len(tokenizer.pieces) == 300 and len(tokenizer.encode(word.encode())) < len(word) / 2


def test_a_tokenizer_with_dropout_gives_the_same_tokens_each_time(bpe):
    content = json.loads(bpe.json)
    content["model"]["dropout"] = 0.5
    tokenizer, text = Tokenizer(json.dumps(content)), b"the rest of the world " * 20
    np.testing.assert_array_equal(tokenizer.encode(text), bpe.encode(text))


def test_a_tokenizer_of_the_time_of_gpt2_leaves_out_what_has_a_default(bpe, tmp_path):
    content = json.loads(bpe.json)
    del content["model"]["type"], content["pre_tokenizer"]["use_regex"], content["normalizer"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = read_tokenizer(tmp_path / "old.json")
    assert old.pieces == bpe.pieces and old._may_cut


def test_a_text_is_not_cut_for_tokens_that_reach_over_spaces(bpe):
    assert bpe._may_cut
    for added in "of the", "<a> ":
        assert not add_tokens(bpe, [added.encode()])._may_cut
    assert add_tokens(bpe, [b"<|endoftext|>"])._may_cut
    other = tokenizers.Tokenizer.from_str(bpe.json)
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    assert not Tokenizer(other.to_str())._may_cut


def test_a_vocabulary_larger_than_memory_is_as_large_as_the_text_allows():
    assert len(train_bpe(b"one one two two", 10**15).pieces) < 256 + 15


def test_a_tokenizer_of_bytes_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    np.testing.assert_array_equal(Tokenizer().encode(b"\x00a\xff"), [0, 97, 255])
    with pytest.raises(ImportError):
        train_bpe(b"text", 300)


@pytest.fixture(scope="module")
def finished_bpe(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bpe"
    config = tiny(text, out, tokenizer="bpe", vocab_size=300, steps=20, report_every=10)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, train_lm.main(config)


@pytest.mark.slow
def test_accuracy_is_the_share_of_tokens_that_were_the_likeliest(finished):
    config, metrics = finished
    model, _, _ = generate.load(config.run.out)
    values = text_data.read_text(config.data.text).held_out
    hits = 0
    for start in range(0, len(values) - 1, 16):
        piece = np.zeros(17, int)
        piece[: len(values[start : start + 17])] = values[start : start + 17]
        count = min(16, len(values) - 1 - start)
        likeliest = np.argmax(model.logits(jnp.asarray(piece[:-1])), axis=-1)
        hits += int(np.sum((likeliest == piece[1:])[:count]))
    assert metrics[-1]["val_accuracy"] == pytest.approx(hits / (len(values) - 1), abs=2e-3)


def test_bits_per_byte_are_those_of_all_nats_over_all_bytes_predicted(finished_bpe, bpe):
    config, metrics = finished_bpe
    text = text_data.read_text(config.data.text)
    model, tokenizer, _ = generate.load(config.run.out)
    assert train_bpe(text.train.tobytes(), 300).pieces == tokenizer.pieces
    tokens = tokenizer.encode(text.held_out.tobytes())
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        piece = np.zeros(17, int)
        piece[: len(tokens[start : start + 17])] = tokens[start : start + 17]
        log_probabilities = jax.nn.log_softmax(model.logits(jnp.asarray(piece[:-1])))
        for i in range(min(16, len(tokens) - 1 - start)):
            nats -= float(log_probabilities[i, piece[i + 1]])
    bytes_predicted = len(text.held_out) - len(tokenizer.pieces[tokens[0]])
    bits = nats / math.log(2) / bytes_predicted
    assert metrics[-1]["val_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert metrics[-1]["val_loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-4)


@pytest.mark.slow
def test_resuming_takes_the_tokenizer_of_the_checkpoint(finished_bpe, tmp_path, monkeypatch):
    config, metrics = finished_bpe
    config = changed(config, out=tmp_path / "resumed", resume=True)
    shutil.copytree(finished_bpe[0].run.out, config.run.out)
    shutil.rmtree(config.run.out / "checkpoints" / "20")
    monkeypatch.setattr(train_lm, "train_bpe", None)
    np.testing.assert_allclose(losses(train_lm.main(config)), losses(metrics), rtol=1e-5)
    with pytest.raises(SystemExit, match="vocab_size is 301 here and 300 there"):
        train_lm.main(changed(config, vocab_size=301))


def test_a_file_is_the_same_tokenizer_by_its_content(text, bpe, tmp_path):
    path, copy = tmp_path / "tokenizer.json", tmp_path / "copy.json"
    path.write_text(bpe.json)
    copy.write_text(bpe.json)
    config, read = tiny(text, tmp_path), text_data.read_text(text)
    assert config.identity(read, read_tokenizer(path)) == config.identity(
        read, read_tokenizer(copy)
    )
    copy.write_text(train_bpe(text.read_bytes(), 299).json)
    assert config.identity(read, read_tokenizer(path)) != config.identity(
        read, read_tokenizer(copy)
    )


def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(text, bpe, tmp_path):
    lower = tokenizers.Tokenizer.from_str(bpe.json)
    lower.normalizer = tokenizers.normalizers.Replace("times", "x")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"is": 0}, unk_token="?"))
    for name, content, message in [
        ("missing", None, "cannot read the tokenizer .*missing: No such file or directory"),
        ("empty", "", "cannot use .*empty as a tokenizer.json: EOF"),
        ("json", "{}", "cannot use .*json as a tokenizer.json: Model missing"),
        ("words", words.to_str(), r"cannot use .*words as a tokenizer.json: .*\[UNK\]"),
        ("lower", lower.to_str(), "does not reproduce .*text.txt byte for byte"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=message) as error:
            train_lm.main(tiny(text, tmp_path / "out", tokenizer=str(tmp_path / name)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_text_too_short_in_tokens_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"again and " * 50)
    with pytest.raises(SystemExit, match="last tenth has .* tokens, and one sequence needs 31"):
        train_lm.main(
            tiny(tmp_path / "text", tmp_path / "out", tokenizer="bpe", sequence_length=30)
        )
    assert not (tmp_path / "out").exists()


def printed(capsys, run, **settings):
    generate.main(generate.Config(run, **{"length": 40, **settings}))
    return capsys.readouterr().out


@pytest.mark.slow
def test_generation_is_the_same_for_a_seed_with_and_without_the_cache(finished_bpe, capsys):
    run = finished_bpe[0].run.out
    written = printed(capsys, run, prompt="2 times ")
    assert written.startswith("2 times ") and len(written) > 40
    assert written == printed(capsys, run, prompt="2 times ", cache=False)
    assert written != printed(capsys, run, prompt="2 times ", seed=1)
    long = "7 times 7 is 49.\n" * 5
    assert printed(capsys, run, prompt=long, length=0) == long + "\n"
    after_line_break = printed(capsys, run, prompt="\n", temperature=0.0)
    assert "\n" + printed(capsys, run, temperature=0.0) == after_line_break


def test_a_character_is_printed_when_it_is_whole(finished, monkeypatch):
    text = "é中🙂".encode() + b"\xff!" + "中".encode()[:2]
    monkeypatch.setattr(generate, "sample", lambda *args, **options: iter(text))
    shown = []
    monkeypatch.setattr("builtins.print", lambda part, **options: shown.append(part))
    generate.main(generate.Config(finished[0].run.out, prompt=">"))
    assert [part for part in shown if part] == [">", "é", "中", "🙂", "\ufffd", "!", "\ufffd"]


def test_a_prompt_that_the_tokenizer_changes_is_refused(finished_bpe, monkeypatch):
    """It would leave the "é" out, and continue another text."""
    model, tokenizer, identity = generate.load(finished_bpe[0].run.out)
    assert tokenizer.json is not None
    content = json.loads(tokenizer.json)
    content["model"]["vocab"]["unused"] = content["model"]["vocab"].pop("Ã")
    known = generate.Trained(model, Tokenizer(json.dumps(content)), identity)
    monkeypatch.setattr(generate, "load", lambda run: known)
    with pytest.raises(SystemExit, match="the tokenizer of run cannot spell 'é times'"):
        generate.main(generate.Config(Path("run"), prompt="é times"))


def test_a_run_that_cannot_be_used_is_refused_in_one_line(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(finished[0].run.out, broken)
    shutil.rmtree(broken / "checkpoints" / "300" / "model")
    for run, message in [
        (tmp_path / "missing", "missing holds no checkpoint"),
        (tmp_path / "empty", "empty holds no checkpoint"),
        (finished[0].data.text, "text.txt is not a folder"),
        (broken, "checkpoints/300 is broken"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:
            generate.main(generate.Config(run))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "missing").exists() and not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": -0.1}, "--temperature must be at least 0, got -0.1"),
        ({"temperature": math.nan}, "--temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "--top-k must be above 0, got 0"),
        ({"length": -1}, "--length must be at least 0, got -1"),
    ],
)
def test_a_setting_of_generation_out_of_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        generate.Config(Path("run"), **setting)


def test_the_principal_plane_is_that_of_the_covariance():
    rows = np.random.default_rng(0).normal(size=(20, 5)) * [1, 5, 1, 3, 1]
    points, shares = pictures.principal_plane(rows)
    variances = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    np.testing.assert_allclose(np.cov(points.T), np.diag(variances[:2]), atol=1e-12)
    np.testing.assert_allclose(shares, variances[:2] / variances.sum())
    for degenerate in np.ones((1, 4)), np.ones((3, 1)), np.full((3, 4), np.nan):
        np.testing.assert_allclose(pictures.principal_plane(degenerate)[0], 0, atol=1e-12)


@pytest.mark.parametrize(
    "piece, label, kind",
    [
        (b" the", "␣the", "lower case"),
        (b"\n\t", "⏎⇥", "white space"),
        (b"42", "42", "digits"),
        ("Ö".encode(), "Ö", "capitals"),
        (b"$x$", "$x$", "others"),
        (b"=" * 50, "=" * 15 + "…", "others"),
        (b"\x00\xe2", "\\x00\\xe2", "others"),
        ("中".encode(), "\\u4e2d", "others"),
    ],
)
@pytest.mark.slow
def test_labels_can_be_read(piece, label, kind):
    assert pictures.readable(piece) == label and pictures.kind_of(piece) == kind
    assert pictures.embedding_picture(np.ones((1, 2)), np.ones(1, int), [piece])
