"""The cost of a tied table for each device of a mesh: bytes held, bytes sent, operations.

    python -m benchmarks.mesh_cost [--tokens 8192 --embedding 64 --vocab-size 4096]
    JAX_PLATFORMS=cpu python -m benchmarks.mesh_cost --target v5p        # needs libtpu, no TPU

Two layouts are compared:

- vocabulary split: the vocabulary is split over `model`, and the tokens over `data`;
- fully sharded: tokens and table are split over all devices. The table is gathered for use. If
  there are fewer tokens than rows, the loss gathers the tokens instead, a chunk at a time.

The predictions of the formulas below are compared with the cost counted in the programs that XLA
compiles: their collectives and matrix products, times the iterations of the loops around them, and
their memory analysis. The programs are for 1, 2, 4 and 8 CPU devices. With `--target`, they are for
256 TPUs, a vocabulary of 256,000 and a million tokens.

The program is the gradient of the mean loss of a tied model: vectors looked up in a table, and
decoded with it. N is the number of tokens, D the size of an embedding, V the size of the
vocabulary, C the number of tokens in a chunk; d and m are the sizes of `data` and `model`, and n =
d m. Numbers have 4 bytes. To sum S bytes over a ring of g devices, each device sends 2 (g - 1) / g
S bytes; to gather them, or to sum them and keep a part each, half of that.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable


DEVICES = 8
if __name__ == "__main__":  # before JAX looks for devices
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
    )

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P  # noqa: E402

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable  # noqa: E402

from .accelerators import CHIPS, find_devices, NotInstalled  # noqa: E402
from .programs import compile_and_count, gathered, reduced  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one gradient for one device."""

    held: float  # bytes
    sent: float  # bytes
    operations: float  # of the products


@dataclasses.dataclass(frozen=True)
class Sizes:
    N: int
    D: int
    V: int
    C: int


def vocabulary_split(s: Sizes, d: int, m: int) -> Cost:
    rows, tokens = s.V / m, s.N / d
    of_chunks = math.ceil(tokens / s.C) * min(s.C, tokens)
    return Cost(
        # the rows and their two gradients; the vectors and their gradient, in chunks and whole; the
        # logits of a chunk
        held=4 * (3 * rows * s.D + 3 * tokens * s.D + min(s.C, tokens) * rows),
        # over `model`: the vectors, three numbers a token, the gradient of the vectors; over
        # `data`: the gradient of the rows, from the lookup and from the loss
        sent=reduced(m, 4 * (2 * tokens * s.D + 3 * of_chunks)) + reduced(d, 8 * rows * s.D),
        operations=6 * tokens * rows * s.D,
    )


def fully_sharded(s: Sizes, d: int, m: int) -> Cost:
    n = d * m
    tokens, rows, table = s.N / n, s.V / n, s.V * s.D
    few = n > 1 and s.N < s.V
    # a share of the table and of its two gradients; the vectors and their gradient; and the logits
    # of a chunk. With more tokens, the table and its gradients are held whole as well.
    held = 3 * rows * s.D + 3 * tokens * s.D + min(s.C, tokens) * (rows if few else s.V)
    if few:
        held += s.N * s.D  # the gradient of all vectors, for the lookup
        # for the lookup, XLA sums the vectors over the devices, and gathers their gradient and the
        # tokens; for the loss, vectors, targets and one cotangent each are gathered, three
        # numbers are summed, and the gradient is summed, of which each device keeps its part
        sent = reduced(n, 4 * s.N * s.D) + gathered(n, 4 * s.N * (s.D + 1))
        sent += gathered(n, 4 * s.N * (2 * s.D + 2)) + reduced(n, 12 * s.N)
    else:
        # the table, once for both, and two gradients of it
        held += 3 * table - rows * s.D
        sent = 3 * gathered(n, 4 * table)
    return Cost(4 * held, sent, 6 * tokens * s.V * s.D)


LAYOUTS: dict[str, Callable[..., Cost]] = {
    "vocabulary split": vocabulary_split,
    "fully sharded": fully_sharded,
}


def measure(s: Sizes, layout: str, d: int, m: int, devices=None, platform="cpu") -> Cost:
    """The cost of a program, from its text and its memory analysis."""
    devices = jax.devices() if devices is None else devices
    grid = np.asarray(devices[: d * m]).reshape(d, m)
    axes = ("data", "model")
    mesh = Mesh(grid, axes, axis_types=(AxisType.Explicit,) * 2)
    rows, batch = (P("model"), P("data")) if layout == "vocabulary split" else (P(axes), P(axes))

    def loss(table, tokens, targets):
        table = EmbeddingTable(table, ("vocabulary", "embedding"))
        vectors = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(vectors, targets, chunk_size=s.C)

    with jax.set_mesh(mesh):
        table = jax.ShapeDtypeStruct((s.V, s.D), "float32", sharding=NamedSharding(mesh, rows))
        tokens = jax.ShapeDtypeStruct((s.N,), "int32", sharding=NamedSharding(mesh, batch))
        traced = jax.jit(jax.grad(loss)).trace(table, tokens, tokens)
        memory, sent, products = compile_and_count(traced, platform)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Cost(held, sent, products.operations)


def heading(*units: str) -> str:
    columns = (column for unit in units for column in (unit, "counted"))
    return f"{'':18}{'d':>5}{'m':>6}" + "".join(f"{column:>13}" for column in columns)


def row(name: str, d: int, m: int, units: tuple[float, ...], costs: tuple[Cost, Cost]) -> str:
    numbers = zip(*(dataclasses.astuple(cost) for cost in costs), strict=True)
    cells = [n / unit for unit, pair in zip(units, numbers, strict=True) for n in pair]
    return f"{name:18}{d:5}{m:6}" + "".join(f"{cell:13,.2f}" for cell in cells)


def compare_on_cpus(s: Sizes) -> None:
    print(f"N {s.N:,}, D {s.D:,}, V {s.V:,}, C {s.C}: predicted and counted, for each device")
    print(heading("MiB held", "MiB sent", "1e9 ops"))
    for layout, predict in LAYOUTS.items():
        for d, m in ((1, 1), (1, 2), (2, 2), (2, 4)):
            costs = predict(s, d, m), measure(s, layout, d, m)
            print(row(layout, d, m, (2**20, 2**20, 1e9), costs), flush=True)


def compare_on_tpus(target: str, s: Sizes) -> None:
    devices = find_devices(target, 256)
    print(
        f"N {s.N:,}, D {s.D:,}, V {s.V:,}, C {s.C}: predicted, and counted in programs for {target}"
    )
    print(heading("GiB held", "GiB sent", "1e12 ops"))
    for layout, predict in LAYOUTS.items():
        for d, m in ((256, 1), (64, 4), (32, 8), (16, 16), (4, 64))[
            : None if layout == "vocabulary split" else 1
        ]:
            costs = predict(s, d, m), measure(s, layout, d, m, devices, CHIPS[target].platform)
            print(row(layout, d, m, (2**30, 2**30, 1e12), costs), flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="N")
    parser.add_argument("--embedding", type=int, default=64, help="D")
    parser.add_argument("--vocab-size", type=int, default=4096, help="V")
    parser.add_argument("--chunk-size", type=int, default=256, help="C, on each device")
    parser.add_argument("--target", choices=[t for t, c in CHIPS.items() if 256 in c.topologies])
    given = parser.parse_args(arguments)
    if given.target is not None:
        try:
            return compare_on_tpus(given.target, Sizes(N=2**20, D=8192, V=256_000, C=4096))
        except NotInstalled as error:
            parser.error(f"{given.target}: {error}")
    if jax.device_count() < DEVICES:
        parser.error(f"this needs {DEVICES} devices, but JAX has {jax.device_count()}")
    sizes = given.tokens, given.embedding, given.vocab_size, given.chunk_size
    if given.tokens % DEVICES or given.vocab_size % DEVICES or min(sizes) < 1:
        parser.error(f"all sizes must be above 0, --tokens and --vocab-size multiples of {DEVICES}")
    compare_on_cpus(Sizes(*sizes))


if __name__ == "__main__":
    main()
