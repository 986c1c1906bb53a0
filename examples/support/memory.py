"""Memory that the C library keeps, so that a step on a CPU need not ask the system for it."""

import ctypes
import sys


def keep_memory() -> None:
    """Asks the C library to keep memory that is freed, if it is glibc.

    A step takes some 40 MB for activations. By default glibc returns them to the system after each
    step, which then clears them page by page: a quarter of the time of a step on a CPU, by
    `python -m benchmarks.train_step --default-memory`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads,
        mallopt(-4, 0)  # M_MMAP_MAX: which has the large pieces, too,
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: and returns no memory below a gigabyte
