"""beartype as a type checker that is imported by the first check, not by `import eqx_embedding`.

Importing beartype takes about an eighth of the time that importing Equinox takes.
"""

import functools


def beartype(function):
    @functools.cache
    def checked():
        import beartype

        return beartype.beartype(function)

    # without the name of `function`: jaxtyping checks by it, and shows nothing of it
    return lambda *args, **kwargs: checked()(*args, **kwargs)
