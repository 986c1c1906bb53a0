"""beartype, imported by the first check and not by `import eqx_embedding`.

Importing it and building the checks of all functions take longer than the rest of the import.
"""

import functools


def beartype(function):
    @functools.cache
    def checked():
        import beartype

        return beartype.beartype(function)

    # No `functools.wraps`: only jaxtyping calls this, and never shows its name
    return lambda *args, **kwargs: checked()(*args, **kwargs)
