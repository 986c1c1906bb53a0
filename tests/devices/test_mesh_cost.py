"""What a split table costs, as benchmarks/mesh_cost.py predicts it, is what XLA compiles."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import mesh_cost, programs

from .helpers import make_mesh


MANY = mesh_cost.Sizes(N=2048, D=16, V=1024, C=32)
FEW = mesh_cost.Sizes(N=512, D=16, V=1024, C=32)  # fewer tokens than rows


@pytest.mark.slow
@pytest.mark.parametrize("d, m", [(1, 1), (1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize(
    "layout, sizes",
    [("vocabulary split", FEW), ("fully sharded", FEW), ("fully sharded", MANY)],
)
def test_what_is_sent_and_computed_is_as_predicted(layout, sizes, d, m):
    predicted = mesh_cost.LAYOUTS[layout](sizes, d, m)
    counted = mesh_cost.measure(sizes, layout, d, m)
    assert counted.operations == predicted.operations
    assert counted.sent == pytest.approx(predicted.sent, rel=0.01, abs=64)
    assert 0.7 < counted.held / predicted.held < 2


@pytest.mark.parametrize("count", [2, 3])
def test_what_is_sent_in_a_branch_is_counted(count):
    @jax.jit
    @jax.shard_map(mesh=make_mesh("manual"), in_specs=(P(), P("data")), out_specs=P())
    def total(index, x):
        branches = [lambda x: jax.lax.psum(x, "data")] * count
        return jax.lax.switch(index, branches, x)

    text = str(total.lower(0, jnp.zeros((2, 64))).compile().as_text())
    assert "conditional(" in text
    assert programs.count_sent(text) >= programs.reduced(2, 64 * 4)


@pytest.mark.parametrize("options", [["--tokens=4095"], ["--vocab-size=9"], ["--chunk-size=0"]])
def test_sizes_that_eight_devices_cannot_share_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        mesh_cost.main(options)
    assert "--tokens and --vocab-size multiples of 8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_table_of_predictions_is_printed(capsys):
    mesh_cost.main(["--tokens", "512", "--embedding", "16", "--vocab-size", "1024"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("vocabulary split") for line in lines) == 4
    assert sum(line.startswith("fully sharded") for line in lines) == 4
