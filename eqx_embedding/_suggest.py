"""Type errors that end with what to write instead."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar


Function = TypeVar("Function", bound=Callable[..., Any])


def suggest(**suggestions: Callable[[Any], str | None]) -> Callable[[Function], Function]:
    """Adds a note to the type errors of a function.

    **Arguments:**

    - `suggestions`: for each parameter, a function of its argument that returns what to write
        instead, or `None` if the argument is not a common mistake.
    """

    def decorate(function: Any) -> Any:
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def checked(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                given = dict(zip(parameters, args)) | kwargs
                for name in suggestions.keys() & given.keys():
                    if (suggestion := suggestions[name](given[name])) is not None:
                        error.add_note(f"Instead of {name}={given[name]!r}, use {suggestion}.")
                raise

        return checked

    return decorate


def suggest_key(key: Any) -> str | None:
    return f"jax.random.key({key})" if isinstance(key, int) else None
