"""Time, memory and error of losses and their gradients, in this library and in others.

    python -m benchmarks.cross_entropy [--losses cross_entropy focal ..] [--shape N D V]
                                      [--rounds 3] [--dtype float32] [--json]
                                      [--chunk-size 128 256 512]

The losses and their plain versions are in benchmarks/losses.py, other libraries in
benchmarks/peers.py. All run in one process, in the order A B .. B A in each round, so that other
work on the machine slows all of them equally. Times are medians. Compare the ratios, which are a
time divided by that of

- optax: optax's cross-entropy, from logits;
- plain: the same loss in plain JAX, from logits (for cross-entropy, optax's);
- CE: this library's cross-entropy of all tokens, unmasked, in one call.

MB are the temporaries of the compiled program. An error is the largest difference from float64, in
the loss and the gradients, divided by the largest number. On a GPU, two larger models in bfloat16
are added.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .errors import exact, in_float64, largest_error
from .losses import LOSSES
from .peers import PEERS, Torch


SHAPES = [(2048, 256, 50257), (1024, 512, 16384), (4096, 128, 256)]
GPU_SHAPES = [(4096, 4096, 128256), (8192, 2304, 256000)]  # Llama 3, Gemma
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
BASE, OURS, PLAIN, PRODUCTS = "cross_entropy", "eqx_embedding", "plain JAX", "three products"


class Compiled:
    """A function of JAX, compiled, with the size of its temporaries."""

    def __init__(self, function, operands):
        self.operands = operands
        self.call = jax.jit(function).lower(*operands).compile()
        memory = self.call.memory_analysis()
        self.temporaries = None if memory is None else memory.temp_size_in_bytes

    def __call__(self):
        return jax.block_until_ready(self.call(*self.operands))


def compile_gradient(loss, operands):
    return Compiled(jax.value_and_grad(loss, (0, 1)), operands)


def compile_peer(name, loss, operands):
    importlib.import_module(name)
    return compile_gradient(loss, operands)


def in_chunks(chunk_size, hidden, rows, targets):
    decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
    return decode.cross_entropy(hidden, targets, chunk_size=chunk_size)


def products(hidden, rows, targets):
    logits = hidden @ rows.T
    return logits[0, 0], (logits @ rows, logits.T @ hidden)


Programs = dict[str, Callable[[], Any]]


def programs_of_cross_entropy(operands, dtype, chunk_sizes) -> Programs:
    """Functions that build the programs for the cross-entropy, by name."""
    ours = LOSSES[BASE].here
    programs: Programs = {OURS: functools.partial(compile_gradient, ours, operands)}
    for size in chunk_sizes:
        loss = functools.partial(in_chunks, size)
        programs[f"{OURS}, {size}"] = functools.partial(compile_gradient, loss, operands)
    programs[PRODUCTS] = functools.partial(Compiled, products, operands)
    for name, loss in PEERS.items():
        programs[name] = functools.partial(compile_peer, name, loss, operands)
    if jax.default_backend() == "cpu" and dtype == "float32":
        programs["torch"] = functools.partial(Torch, operands)
        programs["torch.compile"] = functools.partial(Torch, operands, compiled=True)
    programs[f"{OURS}, forward"] = functools.partial(Compiled, ours, operands)
    programs["optax, forward"] = functools.partial(Compiled, PEERS["optax"], operands)
    return programs


def programs_of(name, operands) -> Programs:
    """Functions that build the programs for any other loss, by name."""
    loss = LOSSES[name]
    return {
        OURS: functools.partial(compile_gradient, loss.here, operands),
        PLAIN: functools.partial(compile_gradient, loss.plain, operands),
    }


class Run(NamedTuple):
    call: Any
    error: float | None


def try_runs(programs, expected):
    """The programs that run here, with their errors, and the reasons why the others do not."""
    runs, missing = {}, {}
    for name, make in programs.items():
        try:
            call = make()
            result = call()  # also warms up
        except Exception as error:  # a program that fails is reported, and the others run
            reason = next(iter(str(error).splitlines()), "")
            missing[name] = f"{type(error).__name__}: {reason}"
            continue
        error = None
        if expected is not None and name != PRODUCTS:
            loss, _ = expected
            error = largest_error(result, expected if isinstance(result, tuple) else loss)
        runs[name] = Run(call, error)
    return runs, missing


def draw(shape, dtype):
    """Hidden vectors, the rows of a table, and targets."""
    N, D, V = shape
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (N, D)).astype(dtype)
    rows = (jax.random.normal(keys[1], (V, D)) / D**0.5).astype(dtype)
    return hidden, rows, jax.random.randint(keys[2], (N,), 0, V)


def expect(loss, operands):
    """The loss and its gradients in float64, unless that would take minutes."""
    hidden, rows, *_ = operands
    if hidden.size * len(rows) >= 10**11:
        return None
    return exact(*operands) if loss == BASE else in_float64(LOSSES[loss].plain, operands)


def make_runs(shape, dtype, losses, chunk_sizes):
    """The programs that run, and the reasons why others do not, by loss and name."""
    N, _, V = shape
    operands = draw(shape, dtype)
    runs, missing = {}, {}
    others = [loss for loss in losses if loss != BASE]
    for loss in tqdm([BASE, *others], desc=f"{shape} {dtype}", leave=False, disable=None):
        try:
            data = LOSSES[loss].draw_data(jax.random.key(1), N, V)
        except ValueError as error:
            missing[loss, OURS] = str(error)
            continue
        if loss == BASE:
            programs = programs_of_cross_entropy(operands, dtype, chunk_sizes)
            if BASE not in losses:  # only those that other losses are compared with
                programs = {name: programs[name] for name in (OURS, "optax")}
        else:
            programs = programs_of(loss, (*operands, *data))
        found, failed = try_runs(programs, expect(loss, (*operands, *data)))
        runs |= {(loss, name): run for name, run in found.items()}
        missing |= {(loss, name): reason for name, reason in failed.items()}
    return runs, missing


def time_in_turn(runs, rounds):
    times = {key: [] for key in runs}
    order = [*runs, *reversed(runs)] * rounds
    for key in tqdm(order, desc="timing", leave=False, disable=None):
        start = time.perf_counter()
        runs[key].call()
        times[key].append(time.perf_counter() - start)
    return times


def ratios(loss, name, medians):
    """The time, divided by each time that it is compared with."""
    forward = ", forward" if name.endswith(", forward") else ""
    plain = "optax" + forward if loss == BASE else PLAIN
    references = {
        "ratio": (BASE, "optax" + forward),
        "ratio_to_plain": (loss, plain),
        "ratio_to_cross_entropy": (BASE, OURS + forward),
    }
    return {
        key: medians[loss, name] / medians[reference] if reference in medians else None
        for key, reference in references.items()
    }


def measure(shape, dtype, rounds, losses=tuple(LOSSES), chunk_sizes=()):
    runs, missing = make_runs(shape, dtype, losses, chunk_sizes)
    times = time_in_turn(runs, rounds)
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    results = [
        {
            "loss": loss,
            "name": name,
            "seconds": medians[loss, name],
            "times": times[loss, name],
            **ratios(loss, name, medians),
            "temporaries": run.call.temporaries,
            "error": run.error,
            "wrong": run.error is not None and not run.error < TOLERANCE[dtype],
        }
        for (loss, name), run in runs.items()
    ]
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    return {
        "shape": shape,
        "dtype": dtype,
        "titles": {name: loss.title for name, loss in LOSSES.items()},
        "results": results,
        "missing": [
            {"loss": loss, "name": name, "reason": reason}
            for (loss, name), reason in missing.items()
        ],
        "peak_bytes_of_device": statistics_of_device.get("peak_bytes_in_use"),
    }


def installed_versions():
    """The versions of the libraries that are measured here, by name."""
    versions = {}
    for name in ("jax", *PEERS, "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def show(report):
    N, D, V = report["shape"]
    print(f"\n{N} tokens, embedding {D}, vocabulary {V}, {report['dtype']}")
    print(f"{'':26}{'ms':>10}{'/ optax':>9}{'/ plain':>9}{'/ CE':>9}{'MB':>10}{'error':>10}")
    for loss, title in report["titles"].items():
        results = [row for row in report["results"] if row["loss"] == loss]
        missing = [row for row in report["missing"] if row["loss"] == loss]
        if results or missing:
            print(title)
        for row in results:
            print(format_row(row))
        for row in missing:
            print(f"  {row['name']:24}not run: {row['reason']}")
    if report["peak_bytes_of_device"] is not None:
        print(f"peak of the device since the start: {report['peak_bytes_of_device'] / 1e9:.2f} GB")


def format_row(row):
    names = "ratio", "ratio_to_plain", "ratio_to_cross_entropy"
    ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in names]
    memory = "-" if row["temporaries"] is None else f"{row['temporaries'] / 1e6:.1f}"
    error = "-" if row["error"] is None else f"{row['error']:.0e}"
    if row["wrong"]:
        ratios, error = ["WRONG"] * 3, error + " WRONG"
    cells = [f"{1e3 * row['seconds']:10.1f}", *(f"{ratio:>9}" for ratio in ratios)]
    return f"  {row['name']:24}{''.join(cells)}{memory:>10}{error:>10}"


def parse(arguments):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument(
        "--chunk-size", type=int, nargs="*", default=(), help="also try these sizes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments=None):
    settings = parse(arguments)
    work = [(shape, settings.dtype) for shape in SHAPES]
    if jax.default_backend() == "gpu":
        work += [(shape, "bfloat16") for shape in GPU_SHAPES]
    if settings.shape is not None:
        work = [(tuple(settings.shape), settings.dtype)]
    reports = []
    for shape, dtype in work:
        report = measure(shape, dtype, settings.rounds, settings.losses, settings.chunk_size)
        reports.append(report)
        if not settings.json:
            show(report)
    if settings.json:
        about = {"device": jax.devices()[0].device_kind, "versions": installed_versions()}
        json.dump(about | {"reports": reports}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
