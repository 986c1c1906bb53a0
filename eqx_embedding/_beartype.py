"""beartype as a type checker that is imported by the first check, not by `import eqx_embedding`.

Importing beartype takes about an eighth of the time that importing Equinox takes.
"""

import functools


def beartype(function):
    @functools.cache
    def checked():
        import beartype

        return beartype.beartype(function)

    @functools.wraps(function)
    def check(*args, **kwargs):
        return checked()(*args, **kwargs)

    return check
