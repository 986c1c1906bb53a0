"""The benchmark of the loss runs, and tells a wrong answer and a missing peer from a fast one."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import cross_entropy


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
