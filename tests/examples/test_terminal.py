"""Command lines, and what a terminal shows."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from typing import Any

import generate
import grow_vocabulary
import pytest
import train_lm
from support import terminal
from support.terminal import from_command_line

from ..helpers import python_environment
from .helpers import command, EXAMPLES, tiny


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


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


@pytest.mark.parametrize("script", [train_lm, generate])
def test_a_script_says_how_to_install_what_it_needs(script, tmp_path):
    # the first package that a script imports
    missing = 'raise ModuleNotFoundError("No module named \'equinox\'", name="equinox")'
    (tmp_path / "equinox.py").write_text(missing)
    failed = subprocess.run(
        [sys.executable, script.__file__],
        capture_output=True,
        text=True,
        env=python_environment(PYTHONPATH=str(tmp_path)),
    )
    assert failed.returncode == 1
    error, advice = failed.stderr.splitlines()[-2:]
    assert error == "ModuleNotFoundError: No module named 'equinox'"
    assert advice.endswith('pip install -e ".[examples]"')


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


IN_IPYTHON = """
import builtins, io, runpy, signal, sys
import support.generation
sys.argv = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have made it ignored
builtins.__IPYTHON__ = True
shown, sys.stdout = sys.stdout, io.StringIO()  # which cannot be told how to show errors
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except (SystemExit, KeyboardInterrupt) as error:
    print("ended:", type(error).__name__, error, file=shown)
print(sys.stdout.getvalue(), "and on it goes", file=shown)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ipython_outlives_a_script(finished_bpe, tmp_path):
    def run(*options, code=IN_IPYTHON):  # as `%run` does
        command = [sys.executable, "-c", code, str(EXAMPLES / "generate.py"), *options]
        env = python_environment(PYTHONPATH=str(EXAMPLES))
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = str(finished_bpe[0].run.out)
    assert run("--run", folder, "--prompt=3 times", "--length=5").startswith("3 times")
    refused = run("--run=missing")
    assert refused.startswith("ended: SystemExit missing holds no checkpoint")
    assert refused.endswith("and on it goes\n")
    press = "support.generation.sample = lambda *_, **__: signal.raise_signal(signal.SIGINT)\ntry:"
    interrupted = run("--run", folder, code=IN_IPYTHON.replace("try:", press))
    assert interrupted.startswith("ended: KeyboardInterrupt")


def test_output_may_go_elsewhere(monkeypatch):
    """As in IDLE, whose standard output is neither a terminal nor a file."""
    monkeypatch.setattr(sys, "argv", ["generate.py", "--run=run"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored afterwards
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        terminal.run_script(lambda config: print(config.run), generate.Config, None)
    assert shown.getvalue() == "run\n"


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
