"""The cost of a tied table for each device of a mesh: bytes held, bytes moved, operations.

    python -m benchmarks.mesh_cost [--tokens 4096 --embedding 64 --vocab-size 8192]

Two layouts are compared:

- vocabulary split: the vocabulary is split over `model`, and the tokens over `data`;
- fully sharded (data parallelism): tokens and table are split over all devices, and the table is
  gathered for use.

The first table has the predictions of the formulas below, beside the cost counted in the programs
that XLA compiles for 1, 2, 4 and 8 CPU devices: its collectives and matrix products, times the
iterations of the loops around them, and its memory analysis. The second table has predictions
alone, for a vocabulary of 256,000 on 256 devices.

XLA for CPUs reduces the gradient of the lookup and that of the loss separately, and as whole
arrays. "Summed first" is the cost of a program that adds the two first, and leaves each device its
part of the sum.

The program is the gradient of the mean loss of vectors that are looked up in the same table. N is
the number of tokens, D the size of an embedding, V the size of the vocabulary, C the number of
tokens in a chunk; d and m are the sizes of `data` and `model`, and n = d m. Numbers have 4 bytes.
To reduce S bytes over a ring of g devices, each device sends 2 (g - 1) / g S bytes; to gather them,
half of that.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable


DEVICES = 8
if __name__ == "__main__":  # before JAX looks for devices
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
    )

import jax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec as P  # noqa: E402

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one gradient for one device."""

    held: float  # bytes
    moved: float  # bytes sent
    operations: float  # of the products


@dataclasses.dataclass(frozen=True)
class Sizes:
    N: int
    D: int
    V: int
    C: int


def reduced(g: int, numbers: float) -> float:
    """The bytes that each device of a ring of g sends to sum `numbers` numbers over it."""
    return 2 * (g - 1) / g * 4 * numbers


def gathered(g: int, numbers: float) -> float:
    """The bytes that each sends to gather `numbers` numbers, or to reduce and scatter them."""
    return (g - 1) / g * 4 * numbers


def vocabulary_split(s: Sizes, d: int, m: int, summed_first: bool = False) -> Cost:
    rows, tokens = s.V / m, s.N / d
    chunks = tokens / s.C
    return Cost(
        # the rows and their two gradients; the vectors and their gradient, in chunks and whole; the
        # logits of a chunk
        held=4 * (3 * rows * s.D + 3 * tokens * s.D + min(s.C, tokens) * rows),
        # over `model`: the vectors, three numbers a token, the gradient of the vectors; over
        # `data`: the gradient of the rows, from the lookup and from the loss, or their sum
        moved=reduced(m, 2 * tokens * s.D + 3 * math.ceil(chunks) * min(s.C, tokens))
        + reduced(d, (1 if summed_first else 2) * rows * s.D),
        operations=6 * tokens * rows * s.D,
    )


def fully_sharded(s: Sizes, d: int, m: int, summed_first: bool = False) -> Cost:
    n = d * m
    tokens = s.N / n
    return Cost(
        # a share of the table and of its gradient; the table and its two gradients whole
        held=4 * (2 * s.V / n * s.D + 3 * s.V * s.D + 3 * tokens * s.D + min(s.C, tokens) * s.V),
        # the table once; its gradients, from the lookup and from the loss, each reduced whole, or
        # their sum reduced and scattered
        moved=gathered(n, s.V * s.D)
        + (gathered(n, s.V * s.D) if summed_first else reduced(n, 2 * s.V * s.D)),
        operations=6 * tokens * s.V * s.D,
    )


LAYOUTS: dict[str, Callable[..., Cost]] = {
    "vocabulary split": vocabulary_split,
    "fully sharded": fully_sharded,
}


def compile_gradient(s: Sizes, layout: str, d: int, m: int):
    mesh = jax.make_mesh((d, m), ("data", "model"), devices=jax.devices()[: d * m])
    axes = ("data", "model")
    rows, batch = (P("model"), P("data")) if layout == "vocabulary split" else (P(axes), P(axes))

    def loss(table, tokens, targets):
        if layout == "fully sharded":
            table = jax.reshard(table, P())
        table = EmbeddingTable(table, ("vocabulary", "embedding"))
        vectors = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(vectors, targets, chunk_size=s.C)

    with jax.set_mesh(mesh):
        table = jax.ShapeDtypeStruct((s.V, s.D), "float32", sharding=NamedSharding(mesh, rows))
        tokens = jax.ShapeDtypeStruct((s.N,), "int32", sharding=NamedSharding(mesh, batch))
        return jax.jit(jax.grad(loss)).lower(table, tokens, tokens).compile()


def each_instruction(program: str):
    """The instructions in the text of a compiled program, and how often each runs."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif " = " in line:
            lines.append(line.strip())

    def visit(name: str, trips: int):
        for line in computations[name]:
            yield name, line, trips
            many = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply)=%([\w.\-]+)", line):
                yield from visit(called, trips * (int(many[1]) if many else 1))

    return visit(entry, 1)


def numbers(types: str) -> list[list[int]]:
    """The shapes of the arrays in the type of an instruction."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", types)
    return [[int(size) for size in shape.split(",") if size] for shape in shapes]


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


def count(compiled) -> Cost:
    """The cost of a compiled program, from its text and its memory analysis."""
    moved = operations = 0.0
    sizes: dict[tuple[str, str], list[int]] = {}
    for computation, line, trips in each_instruction(compiled.as_text()):
        match = re.match(r"(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line)
        if match is None:
            continue
        name, types, kind, rest = match.groups()
        shapes = numbers(types)
        sizes[computation, name] = shapes[0] if shapes else []
        total = sum(map(math.prod, shapes))
        if kind == "all-reduce":
            moved += trips * reduced(group_size(line), total)
        elif kind in ("all-gather", "all-to-all"):
            moved += trips * gathered(group_size(line), total)
        elif kind in ("reduce-scatter", "collective-permute"):
            raise NotImplementedError(f"{kind} is not counted: {line}")
        elif kind == "dot":
            left = re.match(r"%([\w.\-]+)", rest)
            axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", rest)
            if left is None or axes is None:
                raise ValueError(f"cannot read this product: {line}")
            shape = sizes[computation, left[1]]
            contracted = math.prod(shape[int(axis)] for axis in axes[1].split(","))
            operations += trips * 2 * total * contracted
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Cost(held, moved, operations)


def row(name: str, d: int, m: int, numbers: list[float]) -> str:
    return f"{name:18}{d:5}{m:6}" + "".join(f"{number:13,.2f}" for number in numbers)


def heading(*columns: str) -> str:
    return f"{'':18}{'d':>5}{'m':>6}" + "".join(f"{column:>13}" for column in columns)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="N")
    parser.add_argument("--embedding", type=int, default=64, help="D")
    parser.add_argument("--vocab-size", type=int, default=8192, help="V")
    parser.add_argument("--chunk-size", type=int, default=256, help="C, on each device")
    given = parser.parse_args(arguments)
    if jax.device_count() < DEVICES:
        parser.error(f"this needs {DEVICES} devices, but JAX has {jax.device_count()}")
    if given.tokens % DEVICES or given.vocab_size % DEVICES or min(vars(given).values()) < 1:
        parser.error(f"all sizes must be above 0, --tokens and --vocab-size multiples of {DEVICES}")
    s = Sizes(given.tokens, given.embedding, given.vocab_size, given.chunk_size)

    print(f"N {s.N:,}, D {s.D:,}, V {s.V:,}, C {s.C}: predicted and counted, for each device")
    print(heading("MiB held", "counted", "MiB moved", "counted", "1e9 ops", "counted"))
    for layout, predict in LAYOUTS.items():
        for d, m in ((1, 1), (1, 2), (2, 2), (2, 4)):
            paper, counted = predict(s, d, m), count(compile_gradient(s, layout, d, m))
            units = ("held", 2**20), ("moved", 2**20), ("operations", 1e9)
            figures = [getattr(c, field) / unit for field, unit in units for c in (paper, counted)]
            print(row(layout, d, m, figures))

    s = Sizes(N=2**20, D=8192, V=256_000, C=4096)
    print(f"\nN {s.N:,}, D {s.D:,}, V {s.V:,}, C {s.C}: predicted, for each of 256 devices")
    print(heading("GiB held", "GiB moved", "summed first", "1e12 ops"))
    for layout, predict in LAYOUTS.items():
        for d, m in ((256, 1), (64, 4), (32, 8), (16, 16), (4, 64))[
            : None if layout == "vocabulary split" else 1
        ]:
            cost, summed = predict(s, d, m), predict(s, d, m, summed_first=True)
            gib = [bytes / 2**30 for bytes in (cost.held, cost.moved, summed.moved)]
            print(row(layout, d, m, [*gib, cost.operations / 1e12]))


if __name__ == "__main__":
    main()
