"""How a script meets its terminal: options, Ctrl-C, characters that cannot be shown."""

import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def stop_on_interrupt(message: str) -> None:
    """From now on, Ctrl-C ends the program with this line.

    Without an exception, which an import or a callback might swallow, and without Python's own
    exit, which would wait for a checkpoint that is being written.
    """

    def stop(*_: Any) -> None:
        os.write(2, f"\n{message}\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
        signal.signal(signal.SIGINT, stop)


def from_command_line(config: type[Any], description: str | None) -> Any:
    """Reads the fields of a dataclass as options, and those of dataclasses in it by flat names."""
    import tyro

    return tyro.cli(config, description=description, config=(tyro.conf.OmitArgPrefixes,))


def show_ignored(unraisable: Any) -> None:
    """Prints errors of threads, but not those that follow from one that orbax raises as well."""
    of_orbax = str(unraisable.exc_value) == "Event loop is closed"
    if not of_orbax and not inspect.iscoroutine(unraisable.object):
        sys.__unraisablehook__(unraisable)


def run_script(main: Callable[[Any], Any], config: type[Any], description: str | None) -> None:
    """Calls `main` with the settings of the command line."""
    sys.unraisablehook = show_ignored
    # What an encoding other than UTF-8 cannot show is a question mark, and no error.
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        main(from_command_line(config, description))
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)  # the reader has seen enough; Python's own exit would complain
