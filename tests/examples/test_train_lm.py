"""The training example from end to end, on a text and a model so small that a run takes seconds."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import generate
import grow_vocabulary
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_lm
from support import text_data
from support.folder import FILES
from support.tokenizer import train_bpe

from ..helpers import python_environment
from .helpers import changed, command, content, losses, tiny, wait_for, written


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


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


@pytest.mark.exhaustive
def test_a_run_may_be_debugged_without_jit(text, tmp_path):
    config = tiny(text, tmp_path / "out", steps=1, sample_length=0)
    environment = python_environment(JAX_DISABLE_JIT="1")
    run = subprocess.run(command(config), capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    first = json.loads((config.run.out / "metrics.jsonl").read_text().splitlines()[0])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (expected,) = train_lm.main(changed(config, out=tmp_path / "jit"))
    assert first["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embedding_size": 16}, "embedding_size is 16 here and 8 there"),
        ({"num_layers": 2, "seed": 1}, "num_layers is 2 here and 1 there; seed is 1 here and 0"),
        ({"text": None}, r"text is .{8}\.{3} here and .{8}\.{3} there\. Give the --text that"),
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
        # as if it was being written
        patch.setattr(ocp.CheckpointManager, "wait_until_finished", out.stat)

    with monkeypatch.context() as patch:
        patch.setattr(train_lm.results, "write_metrics", move)
        with pytest.raises(SystemExit, match="out was moved or removed during the run") as error:
            train_lm.main(config)
    assert "\n" not in str(error.value)
    generate.load(tmp_path / "moved")


@pytest.mark.parametrize(
    "name, what",
    [
        ("metrics.jsonl", "a run:"),
        *(
            (name, f"{name}: move it, or")
            for name in ("sample.txt", "loss.png", "loss.png.partial")
        ),
    ],
)
def test_what_another_script_wrote_is_not_overwritten(name, what, text, tmp_path):
    (tmp_path / name).write_bytes(text.read_bytes())
    with pytest.raises(SystemExit, match=f"holds {what} choose another --out."):
        train_lm.main(tiny(tmp_path / name, tmp_path))
    assert content(tmp_path) == {tmp_path / name: text.read_bytes()}


def test_all_files_that_a_run_writes_are_known(finished):
    assert written(finished[0].run.out) == {*FILES[:4], "checkpoints"}


@pytest.mark.parametrize("create", [False, True], ids=["missing", "empty"])
def test_resuming_without_a_checkpoint_is_an_error_and_creates_nothing(text, tmp_path, create):
    out = tmp_path / "nothing"
    if create:
        out.mkdir()
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        train_lm.main(tiny(text, out, resume=True))
    assert out.exists() == create and not list(out.glob("*"))


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
