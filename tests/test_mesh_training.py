"""The training example over a mesh of devices and by several processes, on one machine."""

import concurrent.futures
import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import time

import checkpoints
import jax
import numpy as np
import processes as several
import pytest
import train_lm
from devices import MeshSize

from .helpers import python_environment
from .test_examples import command, text as text, tiny


TIMEOUT = 240  # seconds, for a process that takes some fifteen
RUN = {"steps": 8, "report_every": 4}
MESH = ["--mesh.data=2", "--mesh.model=2"]


def start(config, *options):
    return subprocess.Popen(
        [*command(config), *options],
        env=python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def connected(port):
    """A connection to whatever will soon listen at `port`."""
    until = time.monotonic() + TIMEOUT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), TIMEOUT)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)


def start_two(config, *options):
    where = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        start(config, *MESH, where, "--num-processes=2", f"--process-id={i}", *options)
        for i in range(2)
    ]


def losses(config):
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["train_loss"], line["val_loss"]) for line in map(json.loads, lines)]


def copied(config, out):
    shutil.copytree(config.out, out)
    return dataclasses.replace(config, out=out, steps=12)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    config = tiny(text, tmp_path_factory.mktemp("runs") / "alone", **RUN)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train_lm.main(config)
    return config


@pytest.fixture(scope="module")
def on_four(text, tmp_path_factory):
    config = tiny(text, tmp_path_factory.mktemp("runs") / "four", **RUN)
    train_over_a_mesh(config)
    return config


def test_four_devices_reach_the_losses_of_one(alone, on_four):
    np.testing.assert_allclose(losses(on_four), losses(alone), rtol=1e-5)
    names = {path.name for path in alone.out.iterdir()}
    assert {path.name for path in on_four.out.iterdir()} == names


def test_one_device_goes_on_from_the_checkpoint_of_four_and_four_from_that_of_one(
    alone, on_four, tmp_path, jax_defaults
):
    from_four = copied(on_four, tmp_path / "from_four")
    train_lm.main(dataclasses.replace(from_four, resume=True))
    from_one = copied(alone, tmp_path / "from_one")
    train_over_a_mesh(from_one, "--resume")
    assert [step for step, *_ in losses(from_four)] == [4, 8, 12]
    np.testing.assert_allclose(losses(from_four), losses(from_one), rtol=1e-5)


def test_two_processes_reach_the_losses_of_one_and_the_first_alone_prints(alone, text, tmp_path):
    config = tiny(text, tmp_path / "two", **RUN)
    processes = start_two(config)
    printed = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    np.testing.assert_allclose(losses(config), losses(alone), rtol=1e-5)
    assert (config.out / "sample.txt").exists()
    # Not all of what is printed: gloo, which connects the two, prints from several threads at once.
    ours, theirs = (out for out, _ in printed)
    for words in ("bytes to learn from", "held out:", "parameters", "tokens a step", "8 steps,"):
        assert words in ours, printed
        assert words not in theirs, printed


def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(text, tmp_path, jax_defaults):
    config = tiny(text, tmp_path / "killed", steps=10**6, report_every=4)
    processes = start_two(config)
    until = time.monotonic() + TIMEOUT
    while not (config.out / "metrics.jsonl").exists() and time.monotonic() < until:
        assert all(process.poll() is None for process in processes), finish(processes[0])
        time.sleep(0.1)
    processes[1].kill()
    _, errors = finish(processes[0])
    assert processes[0].returncode not in (0, None)
    assert "another one has ended or is out of reach" in errors and "--resume" in errors
    finish(processes[1])

    names = [path.name for path in (config.out / "checkpoints").iterdir()]
    last_step = max(int(name) for name in names if name.isdecimal())
    again = dataclasses.replace(config, steps=last_step + 4, resume=True)
    assert train_lm.main(again)[-1]["step"] == last_step + 4


def test_processes_that_do_not_fit_are_refused_before_jax_starts(monkeypatch):
    def meet(*processes):
        where = f"127.0.0.1:{free_port()}"
        answers = []
        with concurrent.futures.ThreadPoolExecutor() as pool:
            calls = [pool.submit(several.meet, where, *process) for process in processes]
            for call in calls:
                error = call.exception(timeout=TIMEOUT)
                assert error is None or isinstance(error, SystemExit)
                answers.append(str(error))
        return answers

    same = {"learning_rate": 0.1, "text_sha256": "0"}
    assert meet((3, 0, same), (3, 2, same), (3, 1, same)) == ["None"] * 3
    other = same | {"learning_rate": 0.2}
    expected = "process 1 differs from process 0: learning_rate is 0.2 there and 0.1 here."
    assert meet((2, 0, same), (2, 1, other)) == [expected] * 2
    expected = "process 1 differs from process 0: num_processes is 3 there and 2 here."
    assert meet((2, 0, same), (3, 1, same)) == [expected] * 2
    assert (
        meet((3, 0, same), (3, 1, same), (3, 1, same)) == ["two processes have --process-id 1."] * 3
    )
    monkeypatch.setattr(several, "TIMEOUT", 0.5)
    assert meet((3, 0, same), (3, 1, same)) == ["2 of 3 processes came within 0.5 s."] * 2
    assert meet((2, 1, same))[0].startswith("process 0 did not answer at 127.0.0.1:")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen on port {port}: "):
            several.meet(f"127.0.0.1:{port}", 2, 0, same)


def test_a_folder_that_is_not_shared_is_noticed(monkeypatch, tmp_path):
    # what a process other than the first does: it leaves it to the first to make the folder
    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", lambda *_, **__: None)
    monkeypatch.setattr(checkpoints, "TIMEOUT", 0.2)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="is not the folder of process 0. All must share it."):
        checkpoints.Checkpoints(out, exists=False).save(0, {})


def test_whoever_else_knocks_is_not_taken_for_a_process():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(several.meet, f"127.0.0.1:{port}", 2, 0, {})
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n"):
            with connected(port) as stranger:
                stranger.sendall(words)
        with connected(port):  # and says nothing
            several.meet(f"127.0.0.1:{port}", 2, 1, {})
        assert first.result(timeout=TIMEOUT) is None


@pytest.mark.parametrize(
    "error, message",
    [
        (SystemExit("the text is empty."), "process 1 of 2: the text is empty.\n"),
        (KeyboardInterrupt(), "process 1 of 2 stops.\n"),
        (
            jax.errors.JaxRuntimeError("no route\nto it"),
            "process 1 of 2 stops. Most likely another one has ended or is out of reach: then "
            "start all of them again, with --resume. JAX says: no route\n",
        ),
    ],
)
def test_a_process_ends_with_one_line(error, message, monkeypatch, capsys):
    def end(status):
        raise SystemExit(status)

    monkeypatch.setattr(several, "meet", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(several.os, "_exit", end)
    with pytest.raises(SystemExit, match="1"):
        with several.together("127.0.0.1:1", 2, 1, {}):
            raise error
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh": MeshSize(-1, 1)}, "--mesh.data must be at least 0, got -1."),
        ({"mesh": MeshSize(1, 0)}, "--mesh.model must be above 0, got 0."),
        ({"num_processes": 0}, "--num-processes must be above 0, got 0."),
        ({"mesh": MeshSize(3, 1)}, "--batch-size must be a multiple of --mesh.data 3, got 4."),
        ({"mesh": MeshSize(1, 3)}, "--mesh.model must be a divisor of 64, as "),
        ({"num_processes": 2}, "--num-processes must be above 1 if there is a --coordinator"),
        ({"coordinator": "here:1"}, "--num-processes must be above 1 if there is a --coordinator"),
        ({"process_id": 1}, "--process-id must be at least 0, below 1, got 1."),
        (
            {"coordinator": "here", "num_processes": 2, "mesh": MeshSize(2, 1)},
            "--coordinator must be HOST:PORT, got here.",
        ),
        (
            {"coordinator": "here:1", "num_processes": 2, "mesh": MeshSize(1, 1)},
            "--mesh.data must be such that --num-processes 2 divides it times --mesh.model 1, got",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(changes, message, text, tmp_path):
    with pytest.raises(SystemExit) as error:
        tiny(text, tmp_path / "out", **changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_each_process_has_one_device_unless_you_say(text, tmp_path):
    processes = {"coordinator": "here:1", "num_processes": 2}
    assert tiny(text, tmp_path / "out").mesh_size == MeshSize(1, 1)
    assert tiny(text, tmp_path / "out", **processes).mesh_size == MeshSize(2, 1)
    assert tiny(text, tmp_path / "out", **processes, mesh=MeshSize(model=4)).mesh_size == MeshSize(
        2, 4
    )


def test_too_few_devices_are_refused_before_anything_is_written(text, tmp_path, jax_defaults):
    mesh = MeshSize(2, 2 * jax.device_count())
    with pytest.raises(SystemExit, match="is 4 devices, but JAX has 1 of 'cpu'"):
        train_lm.main(tiny(text, tmp_path / "out", mesh=mesh))
    assert not (tmp_path / "out").exists()


def test_options_of_the_mesh_are_those_of_the_command_line():
    help_text = subprocess.run(
        [sys.executable, train_lm.__file__, "--help"], capture_output=True, text=True
    ).stdout
    for option in ("--mesh.data", "--mesh.model", "--coordinator", "--num-processes"):
        assert option in help_text
