"""What a program costs each device, read from the program before or after it is compiled."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


# What compilers say


# Of a conditional, all branches, as if each ran.
CALLS = r"(?:body|calls|to_apply|\w+_computation|branch_computations)=(%[\w.\-]+|\{[^}]*\})"


def each_instruction(text: str) -> Iterator[tuple[str, str, int]]:
    """The instructions of a compiled program, the computation of each, and how often it runs."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif " = " in line:
            lines.append(line.strip())

    def visit(name: str, trips: int) -> Iterator[tuple[str, str, int]]:
        for line in computations[name]:
            yield name, line, trips
            inner = trips * count_trips(line, computations) if " while(" in line else trips
            for called in re.findall(CALLS, line):
                for callee in re.findall(r"%([\w.\-]+)", called):
                    yield from visit(callee, inner)

    return visit(entry, 1)


def count_trips(line: str, computations: dict[str, list[str]]) -> int:
    """The iterations of a loop. XLA for TPUs does not name them, but compares an index with it."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    if condition is None:
        raise ValueError(f"a loop without a condition: {line}")
    text = "\n".join(computations[condition[1]])
    return max([int(size) for size in re.findall(r" constant\((\d+)\)", text)], default=1)


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def count_bytes(dtype: str, sizes: str) -> int:
    return WIDTHS.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)


def group_size(line: str) -> int:
    """How many devices take part in a collective. XLA writes this in three ways."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if grid := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(grid[1])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if groups is None:
        raise ValueError(f"no replica groups in {line}")
    return len(groups[1].split(","))


def reduced(g: int, size: float) -> float:
    """The bytes that each device of a ring of g sends to sum arrays of `size` bytes over it."""
    return 2 * (g - 1) / g * size


def gathered(g: int, size: float) -> float:
    """The bytes that each sends to gather `size` bytes, or to sum them and keep a part each."""
    return (g - 1) / g * size


def sent(line: str) -> tuple[str, float] | None:
    """The kind of a collective and the bytes that each device sends, or `None` for another line."""
    match = re.match(rf"(?:ROOT )?%\S+ = (.*?) ({COLLECTIVES})(-start)?\(", line)
    if match is None:
        return None
    types, kind, start = match.groups()
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    if start and kind != "all-reduce":
        # operands, results, and for a permutation two numbers
        arrays = arrays[:2] if kind == "collective-permute" else arrays
        arrays = arrays[len(arrays) // 2 :]
    size = sum(count_bytes(*array) for array in arrays)
    if kind == "collective-permute":
        return kind, size
    g = group_size(line)
    if kind == "all-reduce":
        return kind, reduced(g, size)
    return kind, gathered(g, size * g if kind == "reduce-scatter" else size)


def count_sent(text: str) -> float:
    """The bytes that each device sends, by the text of a compiled program, with its loops."""
    found = ((sent(line), trips) for _, line, trips in each_instruction(text))
    return sum(trips * collective[1] for collective, trips in found if collective is not None)


class Program(NamedTuple):
    """A program as it was traced and compiled, of one device."""

    memory: Any
    sent: float  # bytes
    products: "Products"


def compile_and_count(traced, platform: str) -> Program:
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    return Program(memory, count_sent(text), count_products(traced.jaxpr.jaxpr, platform))


# What programs say before


@dataclasses.dataclass
class Products:
    """The matrix products of a program on one device."""

    operations: float = 0
    bytes: float = 0  # read and written
    smallest: float = math.inf  # size of an axis of a product


def count_products(jaxpr, platform: str) -> Products:
    """Of a program, with the trips of its loops, as it is lowered for a platform."""
    found = Products()

    def visit(jaxpr, trips):
        index = None  # of the branch for the platform
        for operation in jaxpr.eqns:
            name, params = operation.primitive.name, operation.params
            if name == "platform_index":
                names = params["platforms"]
                matches = [i for i, of in enumerate(names) if of is None or platform in of]
                index = operation.outvars[0], matches[0]
            elif name == "dot_general":
                add(operation, trips)
            elif name == "cond":
                branches = params["branches"]
                if index is not None and operation.invars[0] is index[0]:
                    visit(branches[index[1]].jaxpr, trips)
                else:  # of a chunk that may be skipped
                    visit(max((b.jaxpr for b in branches), key=lambda b: len(b.eqns)), trips)
            else:
                inner = trips * params["length"] if name == "scan" else trips
                for value in params.values():
                    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                        visit(getattr(value, "jaxpr", value), inner)

    def add(operation, trips):
        left, right, out = (v.aval for v in (*operation.invars, *operation.outvars))
        (contracted, _), _ = operation.params["dimension_numbers"]
        sizes = [left.shape[axis] for axis in contracted]
        found.operations += trips * 2 * out.size * math.prod(sizes)
        found.bytes += trips * sum(a.size * a.dtype.itemsize for a in (left, right, out))
        found.smallest = min(found.smallest, math.prod(sizes), *out.shape)

    visit(jaxpr, 1)
    return found
