"""Functions that JAX takes as one operation: it differentiates them as they stand, maps them by a
rule of their own, and does not take them apart.

- A loss that is written for one example and mapped over many would have a gradient of the table for
  each. With a rule, the examples become tokens of one call. `jax.custom_batching.custom_vmap` would
  do that, but has no reverse mode.
- To linearize a loop, JAX takes a `jax.custom_jvp` apart, and its rule is lost.
- To linearize a loop, JAX moves what does not depend on the chunk out of it, and keeps that for all
  tiles at once: twice the memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

from ._mesh import as_axes, Axes


# `rule(size, mesh_axes, mapped, argument)` returns the results of `size` calls, with an axis for
# them in front. Those arrays of `argument` that are `mapped` have it, too, split over `mesh_axes`.
# It returns `None` to leave it to JAX.
VmapRule = Callable[..., Any]


def call_as_one(
    function: Callable[..., Any],
    *arguments: Any,
    vmap_rule: VmapRule | None = None,
    recompute: bool = False,
) -> Any:
    """`function(*arguments)`; it closes over no array. With a `vmap_rule` it has one argument.

    With `recompute`, derivatives save the arguments, and nothing that is computed from them.
    """
    if getattr(jax.config, "jax_disable_jit"):  # line by line; pyright does not know the name
        return function(*arguments)
    leaves, structure = jax.tree.flatten(arguments)

    def on_leaves(*leaves: Any) -> Any:
        return function(*structure.unflatten(leaves))

    def map_arguments(size: int, mesh_axes: Axes, mapped: list[bool], leaves: list[Any]) -> Any:
        assert vmap_rule is not None
        (mapped_argument,), (argument,) = map(structure.unflatten, (mapped, leaves))
        return vmap_rule(size, mesh_axes, mapped_argument, argument)

    with jax.auto_pcast(False):  # of the `spmd_axis_name` of a `jax.vmap`
        jaxpr, shapes = jax.make_jaxpr(on_leaves, return_shape=True)(*leaves)
    rule = map_arguments if vmap_rule else None
    results = _call.bind(*leaves, jaxpr=jaxpr, rule=rule, recompute=recompute)
    return jax.tree.structure(shapes).unflatten(results)


_call = Primitive("call_as_one")
_call.multiple_results = True


@_call.def_impl
def _run(*arguments, jaxpr, rule, recompute):
    return jaxpr_as_fun(jaxpr)(*arguments)


@_call.def_effectful_abstract_eval
def _abstract(*_, jaxpr: ClosedJaxpr, rule, recompute):
    return jaxpr.out_avals, jaxpr.effects


def jvp_of_active(
    function: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    recompute: bool = False,
) -> tuple[Any, Any]:
    """`jax.jvp(function, primals, tangents)`, of which no tangent that is known to be zero is made.

    A zero needs no product; and XLA for CPUs of JAX 0.12 reads memory that nobody wrote where it
    sums the product with a constant array.
    """
    zero = ad.Zero, SymbolicZero
    active = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, zero)]

    def of_active(*given: Any) -> Any:
        arguments = list(primals)
        for i, argument in zip(active, given, strict=True):
            arguments[i] = argument
        return function(*arguments)

    if recompute:
        of_active = jax.checkpoint(of_active)
    return jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])


def _differentiate(primals, tangents, *, jaxpr, rule, recompute):
    results, results_tangents = jvp_of_active(jaxpr_as_fun(jaxpr), primals, tangents, recompute)
    # results that are no floats have none
    return results, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if t.dtype == jax.dtypes.float0 else t
        for x, t in zip(results, results_tangents, strict=True)
    ]


def _map(axis, arguments, dims, *, jaxpr, rule, recompute):
    mapped = [dim is not None for dim in dims]
    if not any(mapped):  # as in the derivative of something else, for many directions
        results = _call.bind(*arguments, jaxpr=jaxpr, rule=rule, recompute=recompute)
        return results, [None] * len(results)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arguments, dims)]
    mesh_axes = as_axes(axis.explicit_mesh_axis)
    results = None if rule is None else rule(axis.size, mesh_axes, mapped, moved)
    if results is None:
        function = jax.vmap(
            jaxpr_as_fun(jaxpr),
            in_axes=[0 if m else None for m in mapped],
            axis_size=axis.size,
        )
        with jax.auto_pcast(False):
            results = function(*moved)
    results = jax.tree.leaves(results)
    return results, [0] * len(results)


# `rule(mapped, array, *others)` returns the results of several calls of a linear function, with an
# axis for them in front. So have those of the arguments that are `mapped`.
LinearVmapRule = Callable[..., Any]


def call_linear(
    function: Callable[..., Any],
    transpose: Callable[..., Any],
    array: Any,
    *others: Any,
    vmap_rule: LinearVmapRule | None = None,
) -> Any:
    """`function(array, *others)`, a linear function of the array, whose transpose is the other one.
    The others are integers.

    Unlike `jax.custom_vjp`, it has a forward mode; unlike `jax.custom_derivatives.linear_call`, it
    may be mapped. It is mapped by the rule, if there is one; its transpose is not.
    """
    with jax.auto_pcast(True):
        forward = jax.make_jaxpr(function)(array, *others)
        (result,) = forward.out_avals
        backward = jax.make_jaxpr(transpose)(result, *others)
    return _linear.bind(array, *others, forward=forward, backward=backward, rules=(vmap_rule, None))


_linear = Primitive("call_linear")


def _run_linear(*arrays, forward, backward, rules):
    return jaxpr_as_fun(forward)(*arrays)[0]


def _differentiate_linear(arrays, tangents, **parameters):
    tangent = _linear.bind(tangents[0], *arrays[1:], **parameters)  # integers have no tangents
    return _linear.bind(*arrays, **parameters), tangent


def _transpose_linear(cotangent, _, *others, forward, backward, rules):
    parameters = {"forward": backward, "backward": forward, "rules": rules[::-1]}
    return [_linear.bind(cotangent, *others, **parameters), *(None for _ in others)]


def _map_linear(arrays, dims, *, forward, backward, rules):
    mapped = [dim is not None for dim in dims]
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims)]
    if rules[0] is not None:
        return rules[0](mapped, *moved), 0
    size = next(x.shape[0] for x, is_mapped in zip(moved, mapped) if is_mapped)
    array, *others = moved
    if not mapped[0]:
        array = jnp.broadcast_to(array, (size, *array.shape))
    axes = [0, *(0 if is_mapped else None for is_mapped in mapped[1:])]

    def map_jaxpr(jaxpr):
        def of_all(*arrays):
            with jax.auto_pcast(False):  # of the `spmd_axis_name` of a `jax.vmap`
                return jax.vmap(lambda *each: jaxpr_as_fun(jaxpr)(*each)[0], axes)(*arrays)

        return of_all

    return call_linear(map_jaxpr(forward), map_jaxpr(backward), array, *others), 0


_linear.def_impl(_run_linear)
_linear.def_abstract_eval(lambda *_, forward, backward, rules: forward.out_avals[0])
ad.deflinear2(_linear, _transpose_linear)
ad.primitive_jvps[_linear] = _differentiate_linear
batching.primitive_batchers[_linear] = _map_linear
mlir.register_lowering(_linear, mlir.lower_fun(_run_linear, multiple_results=False))


def _drop_unused(used_results, *others):
    """What nobody uses is not computed, such as the gradient of a table that is frozen."""
    operation = others[-1]  # from JAX 0.11 on, there is one more in front of it
    jaxpr, rule = operation.params["jaxpr"], operation.params["rule"]
    if rule is not None:  # it takes all arguments, and returns all results
        return [True] * len(operation.invars), operation
    if not any(used_results) and not operation.effects:
        return [False] * len(operation.invars), None
    smaller, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, used_results)
    new = operation.replace(
        invars=[x for x, is_used in zip(operation.invars, used, strict=True) if is_used],
        outvars=[x for x, is_used in zip(operation.outvars, used_results, strict=True) if is_used],
        params=operation.params | {"jaxpr": ClosedJaxpr(smaller, jaxpr.consts)},
        effects=smaller.effects,
    )
    return used, new


ad.primitive_jvps[_call] = _differentiate
partial_eval.dce_rules[_call] = _drop_unused
batching.fancy_primitive_batchers[_call] = _map
mlir.register_lowering(
    _call,
    mlir.lower_fun(_run, True),
)
