"""The training example over a mesh of devices and by several processes, on one machine."""

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import train_lm
from support import checkpoints
from support.checkpoints import differences
from support.meshes import MeshConfig
from support.processes import start_process
from support.terminal import from_command_line
from train_lm import Config, DataConfig

from ..helpers import python_environment
from .helpers import changed, command, tiny


TIMEOUT = 240  # seconds, for a process that takes some fifteen
RUN = {"steps": 8, "report_every": 4}
MESH = ["--mesh.data=2", "--mesh.model=2"]


def start(config, *options, program=()):
    python, *arguments = command(config)
    return subprocess.Popen(
        [python, *program, *arguments, *options],
        env=python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# The others wait for the first process longer than JAX does at its end.
WITH_A_SLOW_SAMPLE = """
import os, runpy, sys, time
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
import jax
from support import results

initialize, write_sample = jax.distributed.initialize, results.write_sample
changes = {"shutdown_timeout_seconds": 5}
jax.distributed.initialize = lambda *args, **options: initialize(*args, **options | changes)
if "--process-id=0" in sys.argv:
    results.write_sample = lambda *args: (time.sleep(10), write_sample(*args))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def finish(process):
    try:
        return process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()


def train_over_a_mesh(config, *options):
    process = start(config, *MESH, *options)
    _, errors = finish(process)
    assert process.returncode == 0, errors


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_two(config, of_second=(), program=()):
    mesh = [*MESH, f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    return [
        start(config, *mesh, f"--process-id={i}", *options, program=program)
        for i, options in enumerate(((), of_second))
    ]


def losses(config):
    lines = (config.run.out / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["train_loss"], line["val_loss"]) for line in map(json.loads, lines)]


def copied(config, out):
    shutil.copytree(config.run.out, out)
    return changed(dataclasses.replace(config, mesh=MeshConfig()), out=out, steps=12)


def trained(config):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train_lm.main(config)
    return config


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    return trained(tiny(text, tmp_path_factory.mktemp("runs") / "alone", **RUN))


@pytest.fixture(scope="module")
def on_four(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "four"
    return trained(tiny(text, out, mesh=MeshConfig(data=2, model=2), **RUN))


@pytest.mark.exhaustive
def test_four_devices_reach_the_losses_of_one(alone, on_four):
    np.testing.assert_allclose(losses(on_four), losses(alone), rtol=1e-5)
    names = {path.name for path in alone.run.out.iterdir()}
    assert {path.name for path in on_four.run.out.iterdir()} == names


@pytest.mark.slow
@pytest.mark.exhaustive
def test_one_device_goes_on_from_the_checkpoint_of_four_and_four_from_that_of_one(
    alone, on_four, tmp_path, jax_defaults
):
    from_four = copied(on_four, tmp_path / "from_four")
    train_lm.main(changed(from_four, resume=True))
    from_one = copied(alone, tmp_path / "from_one")
    train_over_a_mesh(from_one, "--resume")
    assert [step for step, *_ in losses(from_four)] == [4, 8, 12]
    np.testing.assert_allclose(losses(from_four), losses(from_one), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_reach_the_losses_of_one_and_the_first_alone_prints(alone, text, tmp_path):
    config = tiny(text, tmp_path / "two", **RUN)
    processes = start_two(config, program=["-c", WITH_A_SLOW_SAMPLE])
    printed = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    np.testing.assert_allclose(losses(config), losses(alone), rtol=1e-5)
    assert (config.run.out / "sample.txt").exists()
    # Not all of what is printed: gloo, which connects the two, prints from several threads at once.
    ours, theirs = (out for out, _ in printed)
    for words in ("bytes to learn from", "held out:", "parameters", "tokens a step", "8 steps,"):
        assert words in ours, printed
        assert words not in theirs, printed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(text, tmp_path, jax_defaults):
    config = tiny(text, tmp_path / "killed", steps=10**6, report_every=4)
    processes = start_two(config)
    until = time.monotonic() + TIMEOUT
    while not (config.run.out / "metrics.jsonl").exists() and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), finish(processes[0])
        time.sleep(0.1)
    processes[1].kill()
    finish(processes[0])
    assert processes[0].returncode not in (0, None)
    finish(processes[1])

    names = [path.name for path in (config.run.out / "checkpoints").iterdir()]
    last_step = max(int(name) for name in names if name.isdecimal())
    again = changed(config, steps=last_step + 4, resume=True)
    assert train_lm.main(again)[-1]["step"] == last_step + 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "of_second, message",
    [
        (
            ["--learning-rate=0.5", "--steps=9"],
            "process 1 ('there') differs from process 0 ('here'): learning_rate is 0.01 here and "
            "0.5 there; steps is 8 here and 9 there.",
        ),
        (["--mesh.data=4"], "devices, but JAX has 6 of 'cpu'."),
    ],
)
@pytest.mark.exhaustive
def test_processes_with_other_settings_stop_with_one_line(of_second, message, text, tmp_path):
    processes = start_two(tiny(text, tmp_path / "out", **RUN), of_second=of_second)
    for process in processes:
        _, errors = finish(process)
        assert process.returncode == 1
        # gloo and the coordinator of JAX write lines of their own
        assert message in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_what_differs_is_said_by_the_innermost_names():
    one = {"model": {"size": 1, "same": 2}, "data": {"text": "a"}, "mesh": [2, 1]}
    other = {"model": {"size": 3, "same": 2}, "data": {"text": "b"}, "mesh": [1, 2]}
    expected = "size is 1 here and 3 there; text is a here and b there; mesh is [2, 1] here and "
    assert differences(one, other) == expected + "[1, 2] there"
    assert differences(one, one) == ""
    assert differences({"data": {}}, {"data": {"seed": 0}}) == "seed is None here and 0 there"


def test_a_folder_that_is_not_shared_is_noticed(monkeypatch, tmp_path):
    # what a process other than the first does: it leaves it to the first to make the folder
    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "TIMEOUT", 0.2)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="is not the folder of process 0. All must share it."):
        checkpoints.Checkpoints(out, exists=False).save(0, {})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": -1}, "--mesh.data must be at least 0, and --mesh.model a divisor of 64, "),
        ({"data": 1, "model": 3}, "--mesh.data must be at least 0, and --mesh.model a divisor of "),
        ({"num_processes": 0}, "--num-processes must be above 0, got 0."),
        ({"num_processes": 2}, "--num-processes above 1 and --coordinator must be given together."),
        ({"coordinator": "a:1"}, "--num-processes above 1 and --coordinator must be given"),
        ({"coordinator": "here", "num_processes": 2}, "--coordinator must be HOST:PORT, got here."),
        ({"coordinator": "a:70000", "num_processes": 2}, "--coordinator must be HOST:PORT, got a:"),
        ({"process_id": 1}, "--process-id must be at least 0 and below 1, got 1."),
        (
            {"coordinator": "a:1", "num_processes": 2, "data": 1},
            "--mesh.data 1 times --mesh.model 1 must be a multiple of --num-processes 2.",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        MeshConfig(**changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_port_that_is_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        mesh = MeshConfig(coordinator=f"here:{server.getsockname()[1]}", num_processes=2)
        with pytest.raises(SystemExit, match="cannot use the port .*: Address already in use"):
            start_process(mesh)


@pytest.mark.slow
@pytest.mark.parametrize("data", [3, 10**30])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(data):
    message = f"--batch-size must be a multiple of --mesh.data {data}, got 4."
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(data=DataConfig(batch_size=4), mesh=MeshConfig(data))


def test_each_process_has_one_device_unless_you_say():
    processes = {"coordinator": "here:1", "num_processes": 2}
    assert MeshConfig().shape == (1, 1)
    assert MeshConfig(**processes).shape == (2, 1)
    assert MeshConfig(model=4, **processes).shape == (2, 4)


def test_too_few_devices_are_refused_before_anything_is_written(text, tmp_path, jax_defaults):
    mesh = MeshConfig(2, 2 * len(jax.devices()))
    message = f"is {mesh.devices} devices, but JAX has {len(jax.devices())} of 'cpu'"
    with pytest.raises(SystemExit, match=message):
        train_lm.main(tiny(text, tmp_path / "out", mesh=mesh))
    assert not (tmp_path / "out").exists()


def test_options_of_the_mesh_are_those_of_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_lm.py", "--help"])
    with pytest.raises(SystemExit):
        from_command_line(Config, train_lm.__doc__)
    help_text = capsys.readouterr().out
    for option in ("--mesh.data", "--mesh.model", "--coordinator", "--num-processes"):
        assert option in help_text
