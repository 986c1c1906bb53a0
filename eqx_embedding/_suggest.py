"""Errors that say what to write instead."""

import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np


Function = TypeVar("Function", bound=Callable[..., Any])


def suggest(**suggestions: Callable[[Any], str | None]) -> Callable[[Function], Function]:
    """Adds notes to the errors of a function that are about the types of its arguments.

    **Arguments:**

    - `suggestions`: for each parameter, a function of its argument that returns what to write
        instead, or `None` if the argument is not a common mistake.
    """

    def decorate(function: Any) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (TypeError, AttributeError) as error:
                try:
                    given = signature.bind_partial(*args, **kwargs).arguments
                except TypeError:  # as the error says
                    given = {}
                for name, argument in given.items():
                    suggestion = suggestions[name](argument) if name in suggestions else None
                    if suggestion is not None:
                        wrong = _describe(argument)
                        error.add_note(f"Instead of {name}={wrong}, use {suggestion}.")
                raise

        return checked

    return decorate


def suggest_for_fields(module: Any, **suggestions: Callable[[Any], str | None]) -> None:
    """Adds notes to the type errors of the fields of a module.

    After its definition: the import hook would put the check around a decorator.
    """
    module.__init__ = suggest(**suggestions)(module.__init__)


# What JAX says of a `jax.shard_map` inside a `jax.vmap` with `spmd_axis_name`
SPMD_ERRORS = "vmap spmd_axis_name", "mentioned in `manual_axis_type`", "unbound axis name"


def compiled(static: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` of a function, of which the first so many arguments are static.

    It is compiled under `jax.disable_jit` as well: inside a `jax.shard_map`, JAX cannot run a
    `jax.custom_vjp` line by line. An error about `spmd_axis_name` says what to write instead.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function, static_argnums=tuple(range(static)))

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            try:
                with jax.disable_jit(False):
                    return jitted(*arguments)
            except (ValueError, NameError) as error:
                if not any(part in str(error) for part in SPMD_ERRORS):
                    raise
                raise ValueError(
                    "JAX cannot compute this inside a `jax.vmap` with `spmd_axis_name`, if rules "
                    "split the table or the batch. Leave `spmd_axis_name` out: the examples are "
                    "split as their arrays are."
                ) from None

        return run

    return decorate


def suggest_key(key: Any) -> str | None:
    return f"jax.random.key({key})" if isinstance(key, int) else None


def suggest_array(array: Any) -> str | None:
    return _suggest_array(array, np.number)


def suggest_tokens(tokens: Any) -> str | None:
    is_array = isinstance(tokens, jax.Array | np.ndarray)
    if is_array and jnp.issubdtype(tokens.dtype, np.floating):
        return "integers; for one-hot vectors these are jnp.argmax(..., axis=-1)"
    return _suggest_array(tokens, np.integer)


def _suggest_array(numbers: Any, kind: type[np.number]) -> str | None:
    """An array in the place of a list or tuple of such numbers."""
    if not isinstance(numbers, list | tuple):
        return None
    try:
        dtype = np.asarray(numbers).dtype
    except (TypeError, ValueError):  # some rows are longer than others
        return None
    return f"jnp.asarray({_describe(numbers)})" if np.issubdtype(dtype, kind) else None


def suggest_names(names: Any) -> str | None:
    names = [names] if isinstance(names, str) else names
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return repr(tuple(names)) if is_list else None


def suggest_table(table: Any) -> str | None:
    is_array = isinstance(table, jax.Array | np.ndarray)
    return "EmbeddingTable(array, ('vocabulary', 'embedding'))" if is_array else None


def suggest_layer(name: str) -> Callable[[Any], str | None]:
    """For methods that are called as functions: `EmbeddingDecode.score(table, ...)`."""
    return lambda layer: None if hasattr(layer, "table") else f"{name}(table)"


def suggest_number(number: Any) -> str | None:
    if isinstance(number, jax.Array | np.ndarray):
        return "a Python number, which is known while JAX traces the program"
    return None


def _describe(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype.name}{list(value.shape)}"
    if hasattr(value, "__dataclass_fields__"):
        return f"{type(value).__name__}(...)"
    return reprlib.repr(value)
