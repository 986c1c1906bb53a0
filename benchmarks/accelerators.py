"""Memory, traffic and operations of the loss on TPUs and GPUs, compiled on a machine without them.

    pip install "jax[tpu]"          # or, for the H100:
    pip install jax-cuda12-plugin==<jax> jax-cuda12-pjrt==<jax> nvidia-cuda-nvcc-cu12
    JAX_PLATFORMS=cpu python -m benchmarks.accelerators [--target v5e v5p v6e tpu7x h100]
        [--devices 1] [--shape N D V ..] [--chunk-size C] [--alone] [--dtype bfloat16] [--json FILE]

Compiles the mean cross-entropy and its gradients with respect to the hidden vectors and the table:
by this library, by optax from logits, and, if it is installed, by tokamax: its program for XLA, and
its kernel for TPUs. N, D and V are the number of tokens, the size of an embedding and the size of
the vocabulary. With `--devices`, the programs are for meshes of so many devices, and N are the
tokens of each device. Tokens are split over `data`; rows over `model` of size 4, over `data` (fully
sharded), or over both.

- MiB of temporaries and results, and MiB that each device sends: read from the compiled program,
  exact.
- operations (1e12) and the smallest axis of a matrix product: read from the program before it is
  compiled, times the iterations of its loops. Kernels of other libraries count only as far as they
  are made of matrix products.
- an estimate of the time: the longest of three times, for operations, for the memory traffic of the
  products, and for what is sent, at the published speed of the chip. Nothing runs, and real
  programs are slower.

On a GPU or TPU, `--time` runs the same programs, and prints median times. levanter is left out: its
loss takes arrays of haliax, whose stable release does not import with this jax.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from .cross_entropy import compile_gradient, draw, in_chunks, Run, time_in_turn
from .peers import with_optax, with_tokamax
from .programs import compile_and_count


SHAPES = [
    (4096, 4096, 128256),
    (8192, 2304, 256000),
    (32768, 4096, 128256),
    (32768, 2560, 128256),
    (32768, 768, 50304),
]
OURS, OPTAX = "eqx_embedding", "optax from logits"

# An H100 as its driver describes it, for the compiler.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584
  l2_cache_size: 52428800 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Chip(NamedTuple):
    platform: str
    topologies: dict[int, str]  # for so many devices
    operations: float  # 1e12 a second, of products in bfloat16
    memory: float  # GB/s
    links: float  # GB/s to other chips, one way


GRID = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
CUBE = {1: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
CHIPS = {  # https://cloud.google.com/tpu/docs, and NVIDIA's data sheet of the H100 SXM
    "v5e": Chip("tpu", GRID, 197, 819, 100),
    "v5p": Chip("tpu", CUBE, 459, 2765, 300),
    "v6e": Chip("tpu", GRID, 918, 1640, 224),
    "tpu7x": Chip("tpu", CUBE, 2307, 7380, 600),
    "h100": Chip("cuda", {n: f"1x1x{max(n, 2)}" for n in (1, 2, 4, 8)}, 989, 3350, 450),
}


# Without them, libtpu asks the network of a cloud, for minutes.
NO_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
}


class NotInstalled(Exception):
    pass


@functools.cache
def find_devices(target: str, count: int) -> list[Any]:
    chip = CHIPS[target]
    if count not in chip.topologies:
        raise NotInstalled(f"no mesh of {count}: {sorted(chip.topologies)}")
    try:
        if chip.platform == "cuda":
            options: Any = dict(target_config=H100, topology=chip.topologies[count])
            found = topologies.get_topology_desc("h100", "cuda", **options)
        else:
            for name, value in NO_CLOUD.items():
                os.environ.setdefault(name, value)
            found = topologies.get_topology_desc(f"{target}:{chip.topologies[count]}", "tpu")
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotInstalled(f"its compiler is not installed ({lines[0][:90]})") from error
    return list(found.devices)[:count]


# What is compiled


class Operands(NamedTuple):
    hidden: Any
    rows: Any
    targets: Any


def losses_of(chunk_size):
    losses = {OURS: functools.partial(in_chunks, chunk_size), OPTAX: with_optax}
    missing = ["levanter is left out: its loss takes arrays of haliax, which does not import here"]
    if importlib.util.find_spec("tokamax") is None:
        return losses, [*missing, "tokamax is not installed"]
    for implementation in "xla", "mosaic_tpu":
        named = functools.partial(with_tokamax, implementation=implementation)
        losses[f"tokamax, {implementation}"] = named
    return losses, missing


LAYOUTS = {
    "one device": None,
    "vocabulary split": "model",
    "fully sharded": "data",
    "split over both": ("model", "data"),
}


def make_operands(devices, layout, shape, dtype, kind) -> tuple[Operands, Mesh]:
    """Shapes of N tokens for each device, split over a mesh with axes of a kind."""
    n, (N, D, V) = len(devices), shape
    data = max(n // 4, 1) if "model" in (LAYOUTS[layout] or ()) else n
    grid = np.asarray(devices).reshape(data, n // data)
    mesh = Mesh(grid, ("data", "model"), axis_types=(kind, kind))

    def split(sizes, dtype, axis=None):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P(axis)))

    tokens = "data" if n > 1 else None
    return (
        Operands(
            split((N * data, D), dtype, tokens),
            split((V, D), dtype, LAYOUTS[layout]),
            split((N * data,), jnp.int32, tokens),
        ),
        mesh,
    )


def trace(loss, operands: Operands, mesh: Mesh):
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*operands)


def compile_for(target: str, traced):
    return traced.lower(lowering_platforms=(CHIPS[target].platform,)).compile()


# What is counted


def measure(target: str, loss, operands: Operands, mesh: Mesh) -> dict[str, Any]:
    chip = CHIPS[target]
    memory, sent, products = compile_and_count(trace(loss, operands, mesh), chip.platform)
    moved = sent if mesh.size > 1 else 0.0
    if AxisType.Auto in mesh.axis_types:  # one program for all devices
        products.operations /= mesh.size
        products.bytes /= mesh.size
    parts = products.operations / chip.operations / 1e12, products.bytes / chip.memory / 1e9
    return {
        "temporaries": memory.temp_size_in_bytes / 2**20,
        "results": memory.output_size_in_bytes / 2**20,
        "moved": moved / 2**20,
        "operations": products.operations / 1e12,
        "smallest product": None if math.isinf(products.smallest) else products.smallest,
        "estimated ms": 1e3 * max(*parts, moved / chip.links / 1e9),
    }


def run_for_time(shape, losses, dtype, rounds=5):
    """Medians of seconds on the device at hand, interleaved."""
    operands = draw(shape, dtype)
    runs = {name: Run(compile_gradient(loss, operands), None) for name, loss in losses.items()}
    return {name: statistics.median(times) for name, times in time_in_turn(runs, rounds).items()}


HEADINGS = "temporaries", "results", "moved", "operations", "smallest product", "estimated ms"


def print_row(name: str, row: dict[str, Any]) -> None:
    cells = ["" if row[key] is None else f"{row[key]:,.1f}" for key in HEADINGS]
    print(f"  {name:20}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def compare(target, devices, layout, shape, losses, dtype) -> list[dict[str, Any]]:
    """Prints a row for each loss, and returns them for JSON."""
    where = dict(target=target, devices=len(devices), layout=layout, shape=shape)
    print(f"\n{target} x {len(devices)}, {layout}: {shape} tokens of each device, D, V")
    print(f"  {'':20}" + "".join(f"{heading:>18}" for heading in HEADINGS))
    rows = []
    for name, loss in losses.items():
        # JAX places the operands of the plain way by itself, if axes are automatic.
        kind = AxisType.Explicit if name == OURS else AxisType.Auto
        try:
            row = measure(target, loss, *make_operands(devices, layout, shape, dtype, kind))
        except Exception as error:  # a kernel for another machine, or too much memory
            lines = str(error).strip().splitlines() or [""]
            print(f"  {name:20}does not compile: {type(error).__name__} {lines[0][:80]}")
        else:
            print_row(name, row)
            rows.append({**where, "dtype": dtype.name, "name": name, **row})
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--devices", nargs="+", type=int, default=[1])
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("N", "D", "V"))
    parser.add_argument("--chunk-size", type=int, help="of this library's loss")
    parser.add_argument("--alone", action="store_true", help="only this library")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    parser.add_argument("--time", action="store_true", help="time it on this machine")
    given = parser.parse_args(arguments)
    losses, missing = losses_of(given.chunk_size)
    losses = {OURS: losses[OURS]} if given.alone else losses
    shapes = [tuple(shape) for shape in given.shape or SHAPES]
    for line in missing:
        print(line)
    if given.time:
        if jax.default_backend() == "cpu":
            parser.error("--time needs a GPU or TPU, and JAX finds none")
        for shape in shapes:
            print(f"\n{jax.devices()[0].device_kind}: N, D, V = {shape}, median ms")
            for name, seconds in run_for_time(shape, losses, given.dtype).items():
                print(f"  {name:20}{1e3 * seconds:10.1f}")
        return
    rows = []
    for target, count in itertools.product(given.target, given.devices):
        try:
            devices = find_devices(target, count)
        except NotInstalled as error:
            print(f"{target}: {error}")
            continue
        for shape, layout in itertools.product(shapes, LAYOUTS):
            if (layout == "one device") == (count == 1):
                rows += compare(target, devices, layout, shape, losses, jnp.dtype(given.dtype))
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
