"""Flags of XLA for the tests, which JAX reads from the environment when it starts."""

import os

import jaxlib


# Most of a test is compilation, which these make eight times as fast. The programs are slower.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.version.__version_info__ < (0, 11):  # XLA ends the process for a flag that it lacks
    QUICK += " --xla_cpu_use_fusion_emitters=false"
DEVICES = "--xla_force_host_platform_device_count="

given = os.environ.get("XLA_FLAGS", QUICK).split()
COMPILER = " ".join(flag for flag in given if not flag.startswith(DEVICES))


def xla_flags(devices: int) -> str:
    return f"{COMPILER} {DEVICES}{devices}".strip()
