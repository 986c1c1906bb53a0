"""Options of the command line, Ctrl-C, and output that a terminal cannot show."""

import builtins
import contextlib
import errno
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def start_script(message: str) -> None:
    """From now on, Ctrl-C ends the program with this line, and the error for a package that is not
    installed says how to install it.

    Ctrl-C makes no exception, which an import or a callback might swallow, and no exit of Python's
    own, which would wait for a checkpoint that is being written. In IPython it ends the script
    alone, as IPython does it.
    """
    if _in_ipython():
        return

    def stop(*_: Any) -> None:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"\n{message}\n".encode())
        os._exit(130)

    _open_streams()
    sys.excepthook = _show_error
    # It may be that of a notebook, which need not be installed for `!python`. No window is opened.
    os.environ.pop("MPLBACKEND", None)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
        signal.signal(signal.SIGINT, stop)


def _show_error(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if isinstance(error, ModuleNotFoundError):
        error.add_note(
            "The examples need packages that the library does not. In the root of the repository: "
            'pip install -e ".[examples]"'
        )
    sys.__excepthook__(kind, error, traceback)


def _in_ipython() -> bool:
    """Whether this is `%run`, which goes on when a script has ended."""
    return hasattr(builtins, "__IPYTHON__")


def _open_streams() -> None:
    """Opens what the shell has closed, as by `>&-`.

    Else the next file would take its number, and with it what libraries print.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


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
    """Calls `main` with the settings of the command line. Errors of users are one line each."""
    if _in_ipython():
        return _run(main, config, description)
    sys.unraisablehook = show_ignored
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What an encoding other than UTF-8 cannot show is a question mark, and no error.
        sys.stdout.reconfigure(errors="replace")
    try:
        _run(main, config, description)
        sys.stdout.flush()
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        with contextlib.suppress(OSError):  # nobody reads it
            sys.stdout.flush()
            print(error.code, file=sys.stderr, flush=True)
        # Python's own exit may wait ten minutes for a checkpoint that cannot be written
        os._exit(1)
    except BrokenPipeError:
        os._exit(1)  # the reader has seen enough; Python's own exit would complain
    except OSError as error:
        full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
        if error.filename is not None or error.errno not in (*full, errno.EIO):
            raise
        # stdout is a file on a full disk, or a terminal that is gone
        with contextlib.suppress(OSError):
            os.write(2, f"cannot print: {error.strerror}.\n".encode())
        os._exit(1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error).lower():
            raise
        reason = "not enough memory: try a smaller model, table or batch."
        raise SystemExit(reason) from None


def _run(main: Callable[[Any], Any], config: type[Any], description: str | None) -> None:
    import jax  # not at the top: it takes seconds, in which Ctrl-C must work already

    from support.folder import one_line  # after the scripts have turned its type checks on

    with one_line("use the current folder"):  # it may have been removed
        os.getcwd()
    # whatever JAX_NUMPY_DTYPE_PROMOTION and JAX_NUMPY_RANK_PROMOTION say: optax mixes both
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        main(from_command_line(config, description))
