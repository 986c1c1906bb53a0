"""beartype as a type checker that is imported by the first check, not by `import eqx_embedding`.

Importing it and building the checks of all functions take longer than the rest of the import.
"""

import functools


def beartype(function):
    @functools.cache
    def checked():
        import beartype

        return beartype.beartype(function)

    # Without the name of `function`: jaxtyping calls this, and does not show its name
    return lambda *args, **kwargs: checked()(*args, **kwargs)
