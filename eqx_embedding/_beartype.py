"""beartype, imported by the first check and not by `import eqx_embedding`.

Importing it and building the checks of all functions take longer than the rest of the import.
"""

import functools
from collections.abc import Callable
from typing import Any


# Checks that are built already. A function inside another is defined again in each call; to build
# its check each time would take half of the time to trace a loss.
checks: dict[Any, Callable[..., Any]] = {}


def beartype(function):
    """Called by jaxtyping, with a function that has a signature and does nothing."""
    annotations = tuple(function.__annotations__.items())
    key = function.__module__, function.__qualname__, function.__code__, annotations

    @functools.cache
    def build():
        import beartype

        return beartype.beartype(function)

    checked = checks.setdefault(key, build)
    # No `functools.wraps`: only jaxtyping calls this, and never shows its name
    return lambda *args, **kwargs: checked()(*args, **kwargs)
