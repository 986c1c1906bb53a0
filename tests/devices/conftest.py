import jax


# `tests/test_devices.py` runs these in a process with eight devices; or do it by hand, with
# XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/devices
collect_ignore_glob = [] if jax.device_count() == 8 else ["test_*.py"]
