"""Runs the tests in `tests/devices`, which need eight devices, in a process that has them."""

import re
import subprocess
import sys

from .helpers import python_environment


def test_on_eight_devices():
    command = [sys.executable, "-m", "pytest", "-q", "tests/devices"]
    environment = python_environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ passed in", run.stdout, re.MULTILINE), run.stdout  # and none skipped
