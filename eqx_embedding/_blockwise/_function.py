"""A loss function of a user, as a value: what it computes, apart from the arrays it closes over."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, Literal
from jax.interpreters import partial_eval
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array

from .._devices import no_mesh, varying_axes
from ._scores import Used
from ._token_scores import Divergence, Scores, TokenScores


class TokenFunction:
    """`function(scores, data, closure)`: the loss of one token. The closure may have wider dtypes.

    Two of them are equal if they compute the same by the same operations. So a function that is
    defined again for each call is compiled once, unless it has a custom derivative.
    """

    def __init__(self, jaxpr: Jaxpr, scores: tuple[str, ...]):
        self.jaxpr = jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, [True])
        self._uses = dict(zip(scores, used, strict=False))
        self._structure = _structure(jaxpr)

    def __call__(
        self, scores: Scores, data: tuple[Array, ...], closure: tuple[Array, ...]
    ) -> Array:
        types: Any = [variable.aval for variable in self.jaxpr.constvars]
        consts = [array.astype(of.dtype) for array, of in zip(closure, types, strict=True)]
        (loss,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(*scores, *data)
        return jnp.asarray(loss)  # a constant is a number of NumPy

    def of_tokens(
        self, scores: Scores, data: tuple[Array, ...], closure: tuple[Array, ...]
    ) -> Array:
        """The losses of tokens, whose scores and data have one more axis in front."""
        return jax.vmap(self, in_axes=(0, 0, None))(scores, data, closure)

    def used(self, return_scores: bool) -> Used:
        """Which scores to compute."""
        return Used(*(return_scores or self._uses.get(name, False) for name in Used._fields))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, TokenFunction) and self._structure == other._structure

    def __hash__(self) -> int:
        return hash(self._structure)


def close_over(
    fn: Callable[..., Any],
    dtype: DTypeLike,
    scores: Any,
    data: tuple[jax.ShapeDtypeStruct, ...],
) -> tuple[TokenFunction, tuple[Array, ...]]:
    """`fn` as a value, and the arrays that it closes over. `scores` and `data` are those of one
    token.

    **Raises:**

    A `TypeError` if `fn` returns something other than a real scalar. A `ValueError` if it names an
    axis of `jax.vmap` or of a mesh, or closes over an array that differs from device to device.
    """
    called = (
        "fn is called with the scores of one token, each of shape (), and data of the shapes "
        f"{[part.shape for part in data]}, and mapped over all tokens."
    )

    def checked(*arguments: Any) -> Array:
        try:
            loss = fn(*arguments)
        except Exception as error:
            error.add_note(called)
            raise
        _check_real_scalar(loss, called)
        return jnp.asarray(loss).astype(dtype)

    differs = ValueError(
        "fn closes over an array that differs from device to device of this `jax.shard_map`: hand "
        "it over as one of the data instead, with the shape of the batch."
    )
    with no_mesh():
        try:
            closed = jax.make_jaxpr(checked)(scores, *data)
        except AssertionError as error:  # JAX meets the type of such an array outside of its mesh
            if "varying=" not in str(error):
                raise
            raise differs from None
        if any(_is_explicit(jax.typeof(array)) for array in closed.consts):
            # Inner functions, such as `jnp.clip`, would keep the mesh in the types of their own.
            with jax.disable_jit():
                closed = jax.make_jaxpr(checked)(scores, *data)
            _check_derivatives(closed.jaxpr)
    if axes := sorted({str(e.name) for e in closed.effects if hasattr(e, "name")}):
        raise ValueError(
            f"fn names the axes {axes}, but it computes the loss of one token, where these axes do "
            "not exist: reduce over them before, in the data, or after, in the loss."
        )
    closure = tuple(map(jnp.asarray, closed.consts))
    if varying_axes(*closure):
        raise differs
    return TokenFunction(closed.jaxpr, scores._fields), closure


def shapes_of_scores(dtype: DTypeLike, targets: tuple[int, ...] | None) -> Any:
    """The scores of a token with targets of that shape, or, for `None`, with a teacher."""
    number: Any = jax.ShapeDtypeStruct((), dtype)
    if targets is None:
        return Divergence(number)
    of_targets: Any = jax.ShapeDtypeStruct(targets, dtype)
    is_top: Any = jax.ShapeDtypeStruct(targets, bool)
    return TokenScores(of_targets, number, number, number, is_top)


def _is_explicit(aval: Any) -> bool:
    return AxisType.Explicit in aval.sharding.mesh.axis_types


def _check_derivatives(jaxpr: Jaxpr) -> None:
    for operation in jaxpr.eqns:
        is_custom = operation.primitive.name.startswith("custom_")
        if is_custom and any(_is_explicit(x.aval) for x in operation.invars):
            called = operation.params.get("call_jaxpr")
            name = operation.primitive if called is None else called.jaxpr.debug_info.func_name
            raise ValueError(
                f"fn closes over an array of an explicit mesh, and passes it to {name}, which has "
                "a custom derivative. Pass the array as one of the data instead, with the shape of "
                "the batch; or write the function without a custom derivative; or use a mesh with "
                "automatic axes: `jax.make_mesh(..., axis_types=(AxisType.Auto, ...))`."
            )


def _check_real_scalar(loss: Any, called: str) -> None:
    try:
        kind = jax.typeof(loss)
    except TypeError:
        kind = type(loss).__name__  # not an array
    else:
        real = (jnp.floating, jnp.integer, jnp.bool_)
        if kind.shape == () and any(jnp.issubdtype(kind.dtype, r) for r in real):
            return
    raise TypeError(
        f"fn must return the loss of one token, a real number of shape (), but returned {kind}. "
        f"{called} For the scores beside the loss, use return_scores=True."
    )


def _structure(jaxpr: Jaxpr) -> Any:
    """The operations of a program without the names of its variables; equal for equal programs.

    What cannot be compared is equal to itself alone.
    """
    numbers: dict[Any, int] = {}

    def atom(variable: Any) -> Any:
        if isinstance(variable, Literal):
            value = np.asarray(variable.val)
            return variable.aval, value.dtype, value.shape, value.tobytes()
        return numbers.setdefault(variable, len(numbers)), variable.aval

    def parameter(value: Any) -> Any:
        if isinstance(value, Jaxpr):
            return _structure(value)
        if isinstance(value, ClosedJaxpr):
            return _structure(value.jaxpr), tuple(map(id, value.consts))
        if isinstance(value, tuple | list):
            return type(value), tuple(map(parameter, value))
        try:
            hash(value)
        except TypeError:
            return id(value)
        return type(value), value

    inputs = tuple(map(atom, (*jaxpr.constvars, *jaxpr.invars)))
    operations = tuple(
        (
            operation.primitive,
            tuple(map(atom, operation.invars)),
            tuple(map(atom, operation.outvars)),
            tuple((name, parameter(operation.params[name])) for name in sorted(operation.params)),
        )
        for operation in jaxpr.eqns
    )
    return inputs, operations, tuple(map(atom, jaxpr.outvars))
