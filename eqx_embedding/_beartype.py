"""beartype as a type checker that is imported by the first check, not by `import eqx_embedding`.

To import it and to build the checks of all functions takes longer than the rest of our import.
"""

import functools


def beartype(function):
    @functools.cache
    def checked():
        import beartype

        return beartype.beartype(function)

    # without the name of `function`: jaxtyping checks by it, and shows nothing of it
    return lambda *args, **kwargs: checked()(*args, **kwargs)
