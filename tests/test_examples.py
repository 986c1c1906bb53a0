"""The training example from end to end, on a text and a model so small that a run takes seconds."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_data
import train_lm
from toy_transformer import Transformer


SCRIPT = Path(__file__).parent.parent / "examples" / "train_lm.py"


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    # optax and the example rely on JAX's defaults
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return path


def tiny(text, out, **changes):
    config = train_lm.Config(
        text=text,
        out=out,
        steps=300,
        batch_size=4,
        sequence_length=16,
        num_layers=1,
        num_heads=2,
        embedding_size=8,
        learning_rate=1e-2,
        report_every=100,
        sample_length=20,
    )
    return dataclasses.replace(config, **changes)


def losses(metrics):
    return [(line["step"], line["train_loss"], line["val_loss"]) for line in metrics]


def command(config):
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(config).items()
        if name != "resume"
    ]
    return [sys.executable, str(SCRIPT), *options]


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    config = tiny(text, tmp_path_factory.mktemp("runs") / "finished")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, train_lm.main(config)


def test_a_run_learns_and_leaves_metrics_picture_sample_and_checkpoints(finished):
    config, metrics = finished
    assert [line["step"] for line in metrics] == [100, 200, 300]
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] < math.log(256)
    for line in metrics:
        assert line["val_bits_per_byte"] == pytest.approx(line["val_loss"] / math.log(2))
        assert line["tokens_per_second"] > 0
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == metrics
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    held_out = text_data.read_text(config.text).held_out.tobytes()
    sample = (config.out / "sample.txt").read_bytes()
    assert sample.startswith(held_out[:8] + b"|") and len(sample) == 8 + 1 + 20
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["200", "300"]


def test_a_killed_run_resumes_to_the_losses_of_an_uninterrupted_one(finished, tmp_path):
    config, metrics = finished
    config = dataclasses.replace(config, out=tmp_path / "killed")
    process = subprocess.Popen(
        command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (config.out / "checkpoints" / "100").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert "300" not in before, "the run must not have ended before it was killed"
    resumed = train_lm.main(dataclasses.replace(config, resume=True))
    np.testing.assert_allclose(losses(resumed), losses(metrics), rtol=1e-5)


def test_a_finished_run_resumes_for_longer(finished, tmp_path):
    config, metrics = finished
    config = dataclasses.replace(config, out=tmp_path / "longer", steps=301, resume=True)
    shutil.copytree(finished[0].out, config.out)
    longer = train_lm.main(config)
    assert losses(longer)[:3] == losses(metrics) and longer[3]["step"] == 301


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embedding_size": 16}, "embedding_size is 16 here and 8 there"),
        ({"num_layers": 2, "seed": 1}, "num_layers is 2 here and 1 there; seed is 1 here and 0"),
        ({"text": None}, "text_sha256 is .* here and .* there"),
    ],
)
def test_resuming_with_other_settings_names_them_and_changes_nothing(finished, changes, message):
    config, _ = finished
    before = content(config.out)
    with pytest.raises(SystemExit, match=message):
        train_lm.main(dataclasses.replace(config, resume=True, **changes))
    assert content(config.out) == before


def test_a_run_is_not_overwritten(finished):
    config, _ = finished
    before = content(config.out)
    with pytest.raises(SystemExit, match="holds a run: go on with --resume, or choose another"):
        train_lm.main(config)
    assert content(config.out) == before


@pytest.mark.parametrize("create", [False, True], ids=["missing", "empty"])
def test_resuming_without_a_checkpoint_is_an_error_and_creates_nothing(text, tmp_path, create):
    out = tmp_path / "nothing"
    if create:
        out.mkdir()
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        train_lm.main(tiny(text, out, resume=True))
    assert out.exists() == create and not list(out.glob("*"))


@pytest.mark.parametrize("item", ["about", "model", "optimizer"])
def test_resuming_from_a_broken_checkpoint_is_an_error_and_changes_nothing(
    finished, tmp_path, item
):
    config = dataclasses.replace(finished[0], out=tmp_path / "broken")
    shutil.copytree(finished[0].out, config.out)
    for path in (config.out / "checkpoints" / "300" / item).rglob("*"):
        if path.is_file() and path.stat().st_size > 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = content(config.out)
    with pytest.raises(SystemExit, match="checkpoints/300 is broken"):
        train_lm.main(dataclasses.replace(config, resume=True))
    assert content(config.out) == before


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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps must be above 0, got 0"),
        ({"num_heads": 3}, "--embedding-size must be a multiple of --num-heads 3, got 8"),
        ({"learning_rate": math.nan}, "--learning-rate must be above 0, got nan"),
        ({"warmup": 1.0}, "--warmup must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_line(text, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        tiny(text, tmp_path, **changes)


def test_the_command_line_explains_each_option_and_fails_in_one_line(text, tmp_path):
    env = os.environ | {"COLUMNS": "200", "TERM": "dumb"}
    shown = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, env=env
    )
    assert shown.returncode == 0
    for field in dataclasses.fields(train_lm.Config):
        assert f"--{field.name.replace('_', '-')}" in shown.stdout
    failed = subprocess.run(
        command(tiny(tmp_path / "missing", tmp_path / "out")),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert failed.returncode == 1
    assert failed.stdout == "" and failed.stderr.count("\n") == 1


def test_the_model_looks_back_only_and_its_loss_is_that_of_its_logits(getkey):
    model = Transformer(256, 16, 1, 2, 8, key=getkey())
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
