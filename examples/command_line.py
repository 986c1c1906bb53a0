"""Settings from the command line, with errors of one line."""

import contextlib
import io
import math
import operator
from typing import Any, TypeVar

import tyro


Config = TypeVar("Config")


def require(config: Any, name: str, holds: bool, requirement: str) -> None:
    """Stops the program with one line unless the field `name` meets its requirement.

    Infinite values are rejected.
    """
    option, value = name.replace("_", "-"), operator.attrgetter(name)(config)
    if holds and value == math.inf:
        holds, requirement = False, f"{requirement} and finite"
    if not holds:
        raise SystemExit(f"--{option} must be {requirement}, got {value}.")


def from_command_line(config: type[Config], description: str | None) -> Config:
    """Reads the fields of the dataclass `config` as options.

    A wrong option stops the program with one line, where tyro would print a box of several.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config, description=description)
    except SystemExit:
        # The first line of the box is its title. Below it, the message is between two horizontal
        # lines. The characters of the box depend on the encoding of the terminal.
        message: list[str] = []
        for line in box.getvalue().splitlines()[1:]:
            line = line.strip("│╰╯─ ")
            if line.strip("-"):
                message.append(line)
            elif message:
                break
        if not message:  # this was --help, or an error of one line
            raise
        raise SystemExit(f"{' '.join(message).rstrip('.')}. See --help.") from None
