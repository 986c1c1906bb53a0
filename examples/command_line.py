"""Settings from the command line, and one line for what is wrong with them."""

import contextlib
import io
import math
import operator
from typing import Any, TypeVar

import tyro


Config = TypeVar("Config")


def require(config: Any, name: str, holds: bool, requirement: str) -> None:
    """Stops the program with one line unless what is required of the field `name` holds.

    Infinity never will do, as in a learning rate.
    """
    option, value = name.replace("_", "-"), operator.attrgetter(name)(config)
    if holds and value == math.inf:
        holds, requirement = False, f"{requirement} and finite"
    if not holds:
        raise SystemExit(f"--{option} must be {requirement}, got {value}.")


def from_command_line(config: type[Config], description: str | None) -> Config:
    """Reads the fields of the dataclass `config` as options.

    Stops the program with one line where tyro draws a box of several.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, description=description)
    except SystemExit:
        # The first line is the title. What is wrong stands below it, between two rules. The box is
        # of signs that depend on the encoding of the terminal.
        message: list[str] = []
        for line in box.getvalue().splitlines()[1:]:
            line = line.strip("│╰╯─ ")
            if line.strip("-"):
                message.append(line)
            elif message:
                break
        if not message:  # this was --help, or has its line already
            raise
        raise SystemExit(f"{' '.join(message).rstrip('.')}. See --help.") from None
