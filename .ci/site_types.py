"""Signatures on the site: the constructors of modules, and types instead of their private names."""

import re
from collections.abc import Iterator
from typing import Any

import griffe


TYPES = {
    "Hidden": 'Float[Array | np.ndarray, "*batch *embedding"]',
    "Pieces": "Mapping[int, Sequence[int]]",
    "FrozenRows": "PyTree",
    "Targets": 'Integer[ArrayLike, "..."]',
    "Temperature": 'Num[ArrayLike, "..."]',
    "Weights": 'Bool[ArrayLike, "..."] | Num[ArrayLike, "..."]',
    "OutOfRange": 'Literal["nan", "raise", "clip"]',
    "Rules": "Mapping[str, str | tuple[str, ...] | None]",
    "Real": "float",
    "Whole": "int",
}


class Signatures(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for item in list(_walk(pkg)):
            if isinstance(item, griffe.Function):
                for parameter in item.parameters:
                    parameter.annotation = _as_type(parameter.annotation)
                    if str(parameter.default).startswith("_"):
                        parameter.default = "..."  # private; the docstring says what it is
                item.returns = _as_type(item.returns)
            elif "eqx.Module" in map(str, item.bases):
                item.set_member("__init__", _constructor(item))


def _walk(parent: griffe.Object) -> Iterator[griffe.Function | griffe.Class]:
    for member in parent.members.values():
        if isinstance(member, griffe.Function | griffe.Class):
            yield member
        if isinstance(member, griffe.Module | griffe.Class):
            yield from _walk(member)


def _constructor(module: griffe.Class) -> griffe.Function:
    """The one that Equinox makes from the annotated fields of a module."""
    parameters = []
    for field in module.attributes.values():
        if field.annotation is not None and "property" not in field.labels:
            default: Any = field.value
            if isinstance(default, griffe.ExprCall):  # eqx.field(default=...)
                named = [a for a in default.arguments if isinstance(a, griffe.ExprKeyword)]
                default = next((a.value for a in named if a.name == "default"), None)
            parameters.append(
                griffe.Parameter(
                    field.name,
                    annotation=_as_type(field.annotation),
                    default=default,
                    kind=griffe.ParameterKind.positional_or_keyword,
                )
            )
    return griffe.Function("__init__", parameters=griffe.Parameters(*parameters))


def _as_type(annotation: Any) -> str | None:
    if annotation is None:
        return None
    # griffe takes the shape "..." for an Ellipsis
    text = re.sub(r"((?:Float|Integer|Shaped)\[[^\[\]]+, )\.\.\.\]", r'\1"..."]', str(annotation))
    # says what a comment in the code says: beartype checks only one item of a tuple
    text = text.replace('"..."] | Any', '"..."] | tuple[Float[Array, "..."], TokenScores]')
    return re.sub(r"\w+", lambda name: TYPES.get(name[0], name[0]), text)
