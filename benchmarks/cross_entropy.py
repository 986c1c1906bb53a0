"""The loss and its gradients, by this library and by others, side by side in one process.

    python -m benchmarks.cross_entropy [--shape N D V] [--rounds 3] [--dtype float32] [--json]
                                      [--chunk-size 128 256 512]

Times are medians over rounds in the order A B .. B A, so that what else runs on the machine falls
on all alike: compare the ratios. Errors are those of the loss and of the gradients against float64,
relative to their largest number. On a GPU, two larger models in bfloat16 are added.
"""

import argparse
import functools
import importlib
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from eqx_embedding import EmbeddingDecode, EmbeddingTable


SHAPES = [(2048, 256, 50257), (1024, 512, 16384), (4096, 128, 256)]
GPU_SHAPES = [(4096, 4096, 128256), (8192, 2304, 256000)]  # Llama 3, Gemma
REFERENCE = "optax"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def ours(hidden, rows, targets, chunk_size=None):
    table = EmbeddingTable(rows, ("vocabulary", "embedding"))
    return EmbeddingDecode(table).cross_entropy(hidden, targets, chunk_size=chunk_size)


def logits_of(hidden, rows):
    table = EmbeddingTable(rows, ("vocabulary", "embedding"))
    return EmbeddingDecode(table, logits_dtype=jnp.float32)(hidden)


def with_optax(hidden, rows, targets):
    import optax

    logits = logits_of(hidden, rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_flax(hidden, rows, targets):
    import optax

    nnx = importlib.import_module("flax.nnx")
    embed = nnx.Embed(*rows.shape, dtype=rows.dtype, param_dtype=rows.dtype, rngs=nnx.Rngs(0))
    embed.embedding = nnx.Param(rows)
    logits = embed.attend(hidden).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_penzai(hidden, rows, targets):
    import optax
    from penzai import pz

    parameter = pz.Parameter(value=pz.nx.wrap(rows).tag("vocabulary", "embedding"), label="table")
    decode = pz.nn.EmbeddingDecode(pz.nn.EmbeddingTable(parameter, "vocabulary"))
    logits = decode(pz.nx.wrap(hidden).tag("tokens", "embedding"))
    logits = logits.untag("tokens", "vocabulary").unwrap().astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_tokamax(hidden, rows, targets):
    tokamax, flags = importlib.import_module("tokamax"), importlib.import_module("absl.flags")
    flags.FLAGS.mark_as_parsed()  # tokamax would read our command line
    return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, rows.T, reduction="mean")


def products(hidden, rows, targets):
    logits = hidden @ rows.T
    return logits[0, 0], (logits @ rows, logits.T @ hidden)


class Compiled:
    """A function of JAX, compiled, with the size of its temporaries."""

    def __init__(self, function, operands):
        self.operands = operands
        self.call = jax.jit(function).lower(*operands).compile()
        memory = self.call.memory_analysis()
        self.temporaries = None if memory is None else memory.temp_size_in_bytes

    def __call__(self):
        return jax.block_until_ready(self.call(*self.operands))


class Torch:
    """PyTorch on the CPU, which does not tell the size of its temporaries."""

    temporaries = None

    def __init__(self, operands):
        self.torch = torch = importlib.import_module("torch")
        hidden, rows, targets = (torch.from_numpy(np.array(a)) for a in operands)
        self.leaves = hidden.requires_grad_(), rows.requires_grad_()
        self.targets = targets.long()

    def __call__(self):
        hidden, rows = self.leaves
        loss = self.torch.nn.functional.cross_entropy(hidden @ rows.T, self.targets)
        return loss.detach(), self.torch.autograd.grad(loss, self.leaves)


PEERS = {
    "optax": with_optax,
    "flax": with_flax,
    "penzai": with_penzai,
    "tokamax": with_tokamax,
}


def exact(hidden, rows, targets):
    """Loss and gradients in float64, some tokens at a time."""
    hidden, rows = (np.asarray(a, np.float64) for a in (hidden, rows))
    targets, N = np.asarray(targets), len(hidden)
    loss, for_hidden, for_rows = 0.0, np.zeros_like(hidden), np.zeros_like(rows)
    for start in range(0, N, 256):
        x, y = hidden[start : start + 256], targets[start : start + 256]
        z = x @ rows.T
        maximum = z.max(1, keepdims=True)
        e = np.exp(z - maximum)
        total = e.sum(1, keepdims=True)
        here = np.arange(len(y)), y
        loss += (np.log(total) + maximum)[:, 0].sum() - z[here].sum()
        g = e / total
        g[here] -= 1
        for_hidden[start : start + 256] = g @ rows / N
        for_rows += g.T @ x / N
    return loss / N, (for_hidden, for_rows)


def largest_error(result, expected):
    def error(one, other):
        one = np.asarray(one.astype(jnp.float32) if isinstance(one, jax.Array) else one)
        return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))

    # not Python's max, which passes over a NaN
    errors = map(error, jax.tree.leaves(result), jax.tree.leaves(expected))
    return float(np.max(list(errors)))


def make_runs(operands, dtype, chunk_sizes):
    """What can be run here, and why the others cannot."""
    runs, missing = {}, {}
    runs["eqx_embedding"] = Compiled(jax.value_and_grad(ours, (0, 1)), operands)
    for size in chunk_sizes:
        loss = functools.partial(ours, chunk_size=size)
        runs[f"eqx_embedding, {size}"] = Compiled(jax.value_and_grad(loss, (0, 1)), operands)
    runs["three products"] = Compiled(products, operands)
    for name, loss in PEERS.items():
        try:
            importlib.import_module(name)
            runs[name] = Compiled(jax.value_and_grad(loss, (0, 1)), operands)
        except Exception as error:  # a peer that fails is reported, and the others go on
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if jax.default_backend() == "cpu" and dtype == "float32":
        try:
            runs["torch"] = Torch(operands)
        except ImportError as error:
            missing["torch"] = str(error)
    runs["eqx_embedding, forward"] = Compiled(ours, operands)
    if REFERENCE in runs:
        runs["optax, forward"] = Compiled(with_optax, operands)
    return runs, missing


def measure(shape, dtype, rounds, chunk_sizes=()):
    N, D, V = shape
    keys = jax.random.split(jax.random.key(0), 3)
    operands = (
        jax.random.normal(keys[0], (N, D)).astype(dtype),
        (jax.random.normal(keys[1], (V, D)) / D**0.5).astype(dtype),
        jax.random.randint(keys[2], (N,), 0, V),
    )
    # float64 on the host takes minutes for what only a GPU can do fast
    wanted = exact(*operands) if N * D * V < 10**11 else None
    runs, missing = make_runs(operands, dtype, chunk_sizes)
    errors, times = {}, {name: [] for name in runs}
    progress = tqdm(total=len(runs) * (1 + 2 * rounds), desc=f"{shape} {dtype}", leave=False)
    for name, run in runs.items():
        result = run()  # also warms up
        if wanted is not None and name != "three products":
            errors[name] = largest_error(result, wanted if isinstance(result, tuple) else wanted[0])
        progress.update()
        del result
    for _ in range(rounds):
        for name in [*runs, *reversed(runs)]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
            progress.update()
    progress.close()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = []
    for name, seconds in medians.items():
        against = "optax, forward" if "forward" in name else REFERENCE
        rows.append(
            {
                "name": name,
                "seconds": seconds,
                "ratio": seconds / medians[against] if against in medians else None,
                "temporaries": runs[name].temporaries,
                "error": errors.get(name),
                "wrong": name in errors and not errors[name] < TOLERANCE[dtype],
            }
        )
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    return {
        "shape": shape,
        "dtype": dtype,
        "results": rows,
        "missing": missing,
        "peak_bytes_of_device": statistics_of_device.get("peak_bytes_in_use"),
    }


def show(report):
    N, D, V = report["shape"]
    print(f"\n{N} tokens, embedding {D}, vocabulary {V}, {report['dtype']}")
    print(f"{'':24}{'ms':>10}{'/ optax':>9}{'MB':>10}{'error':>10}")
    for row in report["results"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        memory = "-" if row["temporaries"] is None else f"{row['temporaries'] / 1e6:.1f}"
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        if row["wrong"]:
            ratio, error = "WRONG", error + " WRONG"
        milliseconds = 1e3 * row["seconds"]
        print(f"{row['name']:24}{milliseconds:10.1f}{ratio:>9}{memory:>10}{error:>10}")
    for name, reason in report["missing"].items():
        print(f"{name:24}not run: {reason}")
    if report["peak_bytes_of_device"] is not None:
        print(f"peak of the device since the start: {report['peak_bytes_of_device'] / 1e9:.2f} GB")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--chunk-size", type=int, nargs="*", default=(), help="to try as well")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    settings = parser.parse_args(arguments)
    work = [(shape, settings.dtype) for shape in SHAPES]
    if jax.default_backend() == "gpu":
        work += [(shape, "bfloat16") for shape in GPU_SHAPES]
    if settings.shape is not None:
        work = [(tuple(settings.shape), settings.dtype)]
    reports = []
    for shape, dtype in work:
        reports.append(measure(shape, dtype, settings.rounds, settings.chunk_size))
        if not settings.json:
            show(reports[-1])
    if settings.json:
        device = jax.devices()[0].device_kind
        json.dump({"device": device, "jax": jax.__version__, "reports": reports}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
