"""Examples that work on a trained run: nucleus sampling, distillation and a policy gradient."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import distill
import equinox as eqx
import generate
import jax
import jax.numpy as jnp
import numpy as np
import policy_gradient
import pytest
import train_lm
from support import generation
from support.folder import FILES
from support.terminal import from_command_line
from support.text_data import read_text
from toy_transformer import ModelConfig, Transformer

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from ..helpers import float64, make_array, plain_logits, python_environment
from .helpers import EXAMPLES, tiny, written


SCRIPTS = [distill, policy_gradient]


pytestmark = pytest.mark.usefixtures("jax_defaults")


TINY: dict[Any, dict[str, Any]] = {
    distill: {
        "num_layers": 1,
        "embedding_size": 8,
        "top_k": 4,
        "steps": 300,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "report_every": 150,
    },
    policy_gradient: {
        "prompt_length": 4,
        "iterations": 20,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "sample_length": 20,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The settings of a finished run, on a text of words and numbers."""
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "text").write_text("".join(f"{i} times {i} makes {i * i}.\n" for i in range(300)))
    options = {"steps": 150, "report_every": 150, "sample_length": 1}
    config = tiny(folder / "text", folder / "run", **options)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train_lm.main(config)
    return config


def settings(script, run, out, **changes):
    return script.Config(run.run.out, out, run.data.text, **(TINY[script] | changes))


def called(script, run, out, **changes):
    config = settings(script, run, out, **changes)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, script.main(config)


@pytest.fixture(scope="module")
def distilled(run, tmp_path_factory):
    return called(distill, run, tmp_path_factory.mktemp("distill") / "out")


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory):
    return called(policy_gradient, run, tmp_path_factory.mktemp("policy") / "out")


def held_out(run):
    return read_text(run.data.text).held_out


@eqx.filter_jit
def logits_of(model, sequences):
    return eqx.filter_vmap(model.logits)(sequences)


def log_probs_of(model, values):
    """Of what follows each value, in float64, from the logits of sequences."""
    length = model.positions.vocab_size
    padded = np.zeros(-(-len(values) // length) * length, int)
    padded[: len(values)] = values
    logits = logits_of(model, jnp.asarray(padded.reshape(-1, length)))
    logits = np.asarray(logits, np.float64).reshape(len(padded), -1)[: len(values)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Nucleus sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_p, k", [(0.5, 12), (0.9, 12), (1e-6, 12), (1.0, 4), (0.6, 4)])
@pytest.mark.slow
def test_draws_are_those_of_the_nucleus(top_p, k, temperature):
    table = EmbeddingTable(make_array((12, 4)), ("vocabulary", "embedding"))
    hidden = make_array((4,), seed=1)
    logits = float64(plain_logits(EmbeddingDecode(table), hidden)) / temperature
    order = np.argsort(-logits)[:k]
    probs = np.exp(logits[order]) / np.exp(logits[order]).sum()
    size = min(int(np.searchsorted(np.cumsum(probs), top_p)) + 1, k)
    expected = np.zeros(12)
    expected[order[:size]] = probs[:size] / probs[:size].sum()
    many = jnp.broadcast_to(hidden, (20_000, 4))
    heat, key = jnp.asarray(temperature), jax.random.key(0)
    tokens = generation.sample_top_p(EmbeddingDecode(table), many, top_p, heat, k, key)
    counts = np.bincount(tokens, minlength=12)
    np.testing.assert_array_equal(counts[expected == 0], 0)
    deviation = np.sqrt(expected * (1 - expected) / 20_000)
    assert np.all(np.abs(counts / 20_000 - expected) <= 4.5 * deviation + 1e-12)


@pytest.mark.slow
def test_top_p_at_temperature_zero_is_the_likeliest():
    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))

    def sample(temperature, top_p=None):
        options = {"top_p": top_p, "cache": False, "key": jax.random.key(2)}
        return list(generation.sample(model, np.arange(5), 12, temperature, **options))

    likeliest = sample(0.0)
    assert sample(0.0, top_p=0.9) == sample(1e-40, top_p=0.9) == likeliest
    assert sample(1.0, top_p=0.9) != likeliest


# Distillation


@pytest.mark.slow
@pytest.mark.exhaustive
def test_students_of_a_teacher_are_closer_to_it(distilled):
    _, reports = distilled
    last = {line["model"]: line for line in reports}
    text, divergence, stored = (last[f"student, {name}"] for name in distill.LOSSES)
    assert divergence["divergence"] < 0.95 * text["divergence"]
    assert stored["divergence"] < 0.95 * text["divergence"]
    assert last["teacher"]["divergence"] == pytest.approx(0, abs=1e-6)
    steps = [line["step"] for line in reports]
    assert steps == [0, *[150, 300] * 3]


@pytest.mark.exhaustive
def test_reports_are_those_of_the_logits(run, distilled):
    config, reports = distilled
    teacher, student = (generate.load(path).model for path in (run.run.out, config.out))
    values = held_out(run)
    log_p, log_q = (log_probs_of(model, values[:-1]) for model in (student, teacher))
    for line, log_probs in (reports[4], log_p), (reports[0], log_q):
        bits = -log_probs[np.arange(len(values) - 1), values[1:]].mean() / np.log(2)
        assert line["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    divergence = (np.exp(log_q) * (log_q - log_p)).sum(-1).mean()
    assert reports[4]["model"] == "student, divergence"
    assert reports[4]["divergence"] == pytest.approx(divergence, rel=1e-4)


@pytest.mark.exhaustive
def test_the_largest_probabilities_of_the_teacher_are_stored(run):
    teacher, values = generate.load(run.run.out).model, held_out(run)
    data = distill.with_top_k(teacher, values, np.arange(0, len(values) - 16, 16), 3)
    assert data.inputs.shape == ((len(values) - 1) // 16, 16)
    inputs, targets = np.ravel(data.inputs), np.ravel(data.targets)
    np.testing.assert_array_equal(inputs, values[: len(inputs)])
    np.testing.assert_array_equal(targets, values[1 : 1 + len(inputs)])
    expected = log_probs_of(teacher, inputs)
    largest = -np.sort(-expected)[:, :3]
    np.testing.assert_allclose(np.reshape(data.log_probs, (-1, 3)), largest, atol=1e-4)
    tokens = np.reshape(data.likeliest, (-1, 3))
    of_tokens = np.take_along_axis(expected, tokens, -1)
    np.testing.assert_allclose(of_tokens, largest, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [66, 1_000_003])
def test_students_see_all_of_a_text_and_no_more_is_stored_than_they_see(num_tokens):
    config = distill.Config(Path("run"), steps=50, batch_size=4, seed=3)
    starts, batches = distill.draw_batches(config, num_tokens, 16)
    drawn = [
        16 * np.random.default_rng((3, step)).integers(0, (num_tokens - 1) // 16, 4)
        for step in range(50)
    ]
    np.testing.assert_array_equal(starts[batches], drawn)
    np.testing.assert_array_equal(np.unique(batches), np.arange(len(starts)))


@pytest.mark.exhaustive
def test_what_was_not_stored_goes_to_the_token_in_the_text(run):
    teacher = generate.load(run.run.out).model
    student = Transformer(256, ModelConfig(16, 1, 2, 8), key=jax.random.key(0))
    batch = distill.with_top_k(teacher, held_out(run)[:65], np.arange(0, 64, 16), 2)
    log_p, log_q = (log_probs_of(m, np.ravel(batch.inputs)) for m in (student, teacher))
    stored = np.exp(log_q) * (log_q >= -np.sort(-log_q)[:, 1:2])
    rest = (1 - stored.sum(-1)) * log_p[np.arange(64), np.ravel(batch.targets)]
    expected = -((stored * log_p).sum(-1) + rest).mean()
    loss = distill.from_stored(student, teacher, batch)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


# Policy gradient


def test_the_reward_is_the_share_of_words_in_lower_case():
    assert policy_gradient.reward(b"two words") == 1
    assert policy_gradient.reward(b"one THEN 2, x_y") == 4 / 16
    assert policy_gradient.reward(b"a  b") == 4 / 5
    assert policy_gradient.reward(b"") == policy_gradient.reward(b"  ") == 0


def test_a_reward_that_is_no_number_is_named(run, monkeypatch):
    config = settings(policy_gradient, run, Path("out"))
    tokenizer, texts = generate.load(run.run.out).tokenizer, jnp.zeros((2, 16), "int32")
    for bad in None, float("nan"), -float("inf"), np.ones(1):
        returned = iter([np.float64(1.0), bad])
        monkeypatch.setattr(policy_gradient, "reward", lambda text: next(returned))
        with pytest.raises(SystemExit, match=re.escape(f"finite number, got {bad} for b'")):
            policy_gradient.judge(config, tokenizer, texts)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_reward_rises_and_the_divergence_is_held(run, tuned, tmp_path):
    config, metrics = tuned
    rewards, divergences = ([line[name] for line in metrics] for name in ("reward", "divergence"))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    assert divergences[0] == pytest.approx(0, abs=1e-5) and divergences[-1] > 0.01
    _, held = called(policy_gradient, run, tmp_path / "held", divergence_weight=10.0)
    assert held[-1]["divergence"] < 0.5 * divergences[-1]


@pytest.mark.slow
def test_what_is_written_has_the_log_probabilities_of_the_model(run):
    model = generate.load(run.run.out).model
    prompts = jnp.asarray(held_out(run)[:12].reshape(3, 4), "int32")
    texts, log_probs = policy_gradient.write(model, prompts, jax.random.key(0))
    np.testing.assert_array_equal(texts[:, :4], prompts)
    assert texts.shape == (3, 16) and log_probs.shape == (3, 12)
    for text, row in zip(np.asarray(texts), log_probs):
        expected = log_probs_of(model, text)[np.arange(3, 15), text[4:]]
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.exhaustive
def test_the_tuning_loss_is_that_of_the_logits(run, getkey):
    start = generate.load(run.run.out).model
    model = eqx.tree_at(lambda m: m.tokens.embeddings, start, start.tokens.embeddings * 1.1)
    config = settings(policy_gradient, run, Path("out"))
    texts = jnp.asarray(held_out(run)[:32].reshape(2, 16), "int32")
    advantages, old = make_array((2, 12)), make_array((2, 12), seed=1) * 0.1 - 2
    loss, divergence = policy_gradient.tuning_loss(model, start, config, texts, advantages, old)
    expected = np.zeros((2, 12, 2))
    for i, text in enumerate(np.asarray(texts)):
        log_p, log_q = (log_probs_of(m, text)[3:15] for m in (model, start))
        ratio = np.exp(log_p[np.arange(12), text[4:]] - float64(old[i]))
        clipped, advantage = np.clip(ratio, 0.8, 1.2), float64(advantages[i])
        expected[i, :, 0] = -np.minimum(ratio * advantage, clipped * advantage)
        expected[i, :, 1] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    gain, kl = expected.mean((0, 1))
    np.testing.assert_allclose(divergence, kl, rtol=1e-4)
    np.testing.assert_allclose(loss, gain + config.divergence_weight * kl, rtol=1e-4)


# Both


@pytest.mark.parametrize(
    "fixture, picture", [("distilled", "distill"), ("tuned", "policy_gradient")]
)
@pytest.mark.exhaustive
def test_metrics_and_a_picture_are_written(fixture, picture, request):
    config, metrics = request.getfixturevalue(fixture)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == metrics
    assert (config.out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert written(config.out) <= {*FILES, "checkpoints"}
    with pytest.raises(SystemExit, match="out holds a run"):
        sys.modules[type(config).__module__].main(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, train", [(distill, "train"), (policy_gradient, "tune")], ids=["distill", "tune"]
)
def test_a_folder_that_cannot_be_made_is_refused_before_training(
    script, train, run, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, train, lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match="cannot write to .*out: Not a directory"):
        script.main(settings(script, run, tmp_path / "file" / "out"))


@pytest.mark.slow
def test_a_full_disk_promises_a_resume_only_where_there_is_a_checkpoint(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    again = dataclasses.replace(run.run, out=tmp_path / "run", resume=True, steps=151)
    shutil.copytree(run.run.out, again.out)
    for script, config, then in [
        (distill, settings(distill, run, tmp_path / "out", steps=1), "There is none before it."),
        (train_lm, dataclasses.replace(run, run=again), "--resume goes on from step 150."),
    ]:
        with pytest.raises(SystemExit) as error:
            script.main(config)
        assert str(error.value).endswith(f"No space left on device. {then}")


@pytest.mark.exhaustive
def test_training_does_not_go_on_from_a_tuned_model(run, tuned):
    config = dataclasses.replace(run.run, out=tuned[0].out, resume=True)
    message = "cannot resume: .* script is None here and policy_gradient.py there"
    with pytest.raises(SystemExit, match=message):
        train_lm.main(dataclasses.replace(run, run=config))


REFUSED = [
    ({"run": Path("missing")}, "missing holds no checkpoint"),
    ({"text": Path("missing")}, "cannot read the text missing: No such file"),
    (
        {"text": None},
        r"the built-in text of Python 3\.\d+ is not what .* learned from: "
        "give --text the text of that run",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, changes, message",
    [
        *((script, *refused) for script in SCRIPTS for refused in REFUSED),
        (distill, {"top_k": 257}, "--top-k must be at most the 256 tokens of .*run"),
        (policy_gradient, {"prompt_length": 16}, "--prompt-length must be below the 16 positions"),
        (distill, {"learning_rate": 1e30}, "the loss is not finite: try a lower --learning-r"),
        (policy_gradient, {"learning_rate": 1e30}, "the logits are NaN: try a lower --learning-r"),
        (
            policy_gradient,  # in the last update
            {"learning_rate": 1e38, "iterations": 1, "updates": 1},
            "the logits are NaN: try a lower --learning-rate or --divergence-weight",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(script, run, changes, message, tmp_path):
    config = dataclasses.replace(settings(script, run, tmp_path / "out"), **changes)
    with pytest.raises(SystemExit, match=message) as error:
        script.main(config)
    assert "\n" not in str(error.value) and not list(config.out.glob("*"))


@pytest.mark.slow
def test_logits_that_are_nan_stop_a_sample():
    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    broken = eqx.tree_at(lambda m: m.positions.embeddings, model, jnp.full((8, 8), jnp.nan))
    for top_p in None, 0.9:
        with pytest.raises(SystemExit, match="the model's logits are NaN"):
            list(
                generation.sample(broken, np.arange(5), 2, 1.0, top_p=top_p, key=jax.random.key(2))
            )


@pytest.mark.parametrize(
    "script, options, message",
    [
        (generate, ["--top-p=1.1"], "--top-p must be above 0 and at most 1, got 1.1."),
        (generate, ["--top-p=0"], "--top-p must be above 0 and at most 1, got 0.0."),
        (distill, ["--steps=0"], "--steps must be above 0, got 0."),
        (distill, ["--num-heads=3"], "--embedding-size must be a multiple of --num-heads 3"),
        (distill, ["--stepz=5"], "Unrecognized options: --stepz"),
        (policy_gradient, ["--batch-size=1"], "--batch-size must be above 1, got 1."),
        (policy_gradient, ["--clip=nan"], "--clip must be above 0 and finite, got nan."),
        (policy_gradient, ["--stepz=5"], "Unrecognized options: --stepz"),
    ],
)
@pytest.mark.slow
def test_a_setting_out_of_range_is_refused(script, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--run=run", *options])
    with pytest.raises(SystemExit):
        from_command_line(script.Config, script.__doc__)
    out, err = capsys.readouterr()
    assert " ".join(message.split()) in " ".join(err.replace("│", " ").split()) and out == ""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.exhaustive
def test_it_runs_from_any_folder_and_help_explains_each_option(script, tmp_path):
    environment = python_environment(COLUMNS="200", TERM="dumb")

    def call(option):
        command = [sys.executable, str(EXAMPLES / f"{script.__name__}.py"), option]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    shown = call("--help").stdout
    assert f"python examples/{script.__name__}.py --run" in shown
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name.replace('_', '-')} " in shown.replace(",", " ")
    failed = call("--run=missing")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)
