"""Settings from the command line, and one line for what is wrong with them."""

import contextlib
import io
from typing import TypeVar

import tyro


Config = TypeVar("Config")


def from_command_line(config: type[Config], description: str | None) -> Config:
    """Reads the fields of the dataclass `config` as options.

    Stops the program with one line where tyro draws a box of several.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, description=description)
    except SystemExit:
        # The first line is the title. What is wrong stands below it, up to an empty line or a rule.
        lines = [line.strip("╭╮╰╯│─ ") for line in box.getvalue().splitlines()[1:]]
        if not lines:  # this was --help, or has its line already
            raise
        end = lines.index("") if "" in lines else len(lines)
        raise SystemExit(f"{' '.join(lines[:end]).rstrip('.')}. See --help.") from None
