"""Time, memory and error of `top_k`, `sample` and `divergence`, here and in plain JAX.

    python -m benchmarks.search [--tasks divergence ..] [--shape N D V] [--rounds 3] [--json]
    python -m benchmarks.search --target v6e h100 [--tasks ..] [--shape N D V]

All programs run in one process, in the order A B .. B A in each round, so that other work on the
machine slows all of them equally. Times are medians; compare the ratios. MB are the temporaries of
the compiled program. `time` and `memory` are divided by those of the first program of a task. An
error is the largest difference from its results, divided by the largest number. For tokens, it is
the share that differs. Random tokens have no error. PyTorch is measured on a CPU, if installed.

With `--target`, bfloat16 programs are compiled for accelerators, as by `benchmarks.accelerators`,
and MiB of temporaries are printed. Nothing is run.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .accelerators import CHIPS, compile_for, find_devices
from .cross_entropy import compile_gradient, Compiled, Run, time_in_turn


SHAPE = 4096, 256, 50257
K = 20
PLAIN, OURS, TORCH = "plain JAX", "eqx_embedding", "torch"


class Task(NamedTuple):
    """Something to do, and the programs that do it; the others are compared with the first."""

    title: str
    draw: Callable[..., tuple[Any, ...]]  # (N, D, V) -> the operands
    compile: Callable[..., Any]  # (function, operands) -> a program
    functions: dict[str, Callable[..., Any]]
    compare: Callable[..., float | None]  # (results, those of the first program)


class Torch:
    """A function of PyTorch and tensors, which does not report the size of its temporaries."""

    temporaries = None

    def __init__(self, function, operands):
        self.torch = importlib.import_module("torch")
        self.function = functools.partial(function, self.torch)
        self.operands = [self.torch.from_numpy(np.array(array)) for array in operands]

    def __call__(self):
        with self.torch.inference_mode():
            return jax.tree.map(np.asarray, self.function(*self.operands))


def decode(rows):
    return EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))


def draw_student_and_teacher(N, D, V):
    keys = jax.random.split(jax.random.key(0), 4)
    vectors = [jax.random.normal(key, (N, D)) for key in keys[:2]]
    tables = [jax.random.normal(key, (V, D)) / D**0.5 for key in keys[2:]]
    return vectors[0], tables[0], vectors[1], tables[1]


def divergence(kind, hidden, rows, teacher_hidden, teacher_rows):
    return decode(rows).divergence(hidden, decode(teacher_rows), teacher_hidden, kind=kind)


def divergence_of_logits(kind, hidden, rows, teacher_hidden, teacher_rows):
    log_p = jax.nn.log_softmax(hidden @ rows.T)
    log_q = jax.nn.log_softmax(teacher_hidden @ teacher_rows.T)
    if kind == "forward":
        return jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "reverse":
        return jnp.mean(jnp.sum(p * (log_p - log_q), axis=-1))
    log_m = jnp.log((p + q) / 2)
    return jnp.mean(jnp.sum(p * (log_p - log_m) + q * (log_q - log_m), axis=-1)) / 2


def task_of_divergence(kind):
    functions = {
        PLAIN: functools.partial(divergence_of_logits, kind),
        OURS: functools.partial(divergence, kind),
    }
    title = f"{kind} divergence, with gradients"
    return Task(title, draw_student_and_teacher, compile_gradient, functions, largest_difference)


def draw_hidden(N, D, V):
    hidden, rows = jax.random.split(jax.random.key(0))
    return jax.random.normal(hidden, (N, D)), jax.random.normal(rows, (V, D)) / D**0.5


def draw_hidden_and_key(N, D, V):
    return *draw_hidden(N, D, V), jax.random.key(1)


TOP_K = {
    PLAIN: lambda hidden, rows: jax.lax.top_k(jax.nn.log_softmax(hidden @ rows.T), K),
    OURS: lambda hidden, rows: decode(rows).top_k(hidden, K),
    TORCH: lambda torch, hidden, rows: tuple(
        torch.topk(torch.log_softmax(hidden @ rows.T, dim=-1), K)
    ),
}
LIKELIEST = {
    PLAIN: lambda hidden, rows, key: jnp.argmax(hidden @ rows.T, axis=-1),
    f"{OURS}, top_k(1)": lambda hidden, rows, key: decode(rows).top_k(hidden, 1)[1][:, 0],
    f"{OURS}, sample": lambda hidden, rows, key: decode(rows).sample(
        hidden, temperature=0, key=key
    ),
    "product alone": lambda hidden, rows, key: hidden @ rows.T,
}
SAMPLE = {
    PLAIN: lambda hidden, rows, key: jax.random.categorical(key, hidden @ rows.T),
    OURS: lambda hidden, rows, key: decode(rows).sample(hidden, key=key),
    f"{OURS}, top_k={K}": lambda hidden, rows, key: decode(rows).sample(hidden, top_k=K, key=key),
    "product alone": lambda hidden, rows, key: hidden @ rows.T,
}


def largest_difference(actual, expected):
    """Of any array, divided by its largest number."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(np.subtract(a, e))) / np.max(np.abs(e), initial=1e-30))
        for a, e in pairs
    )


def share_of_others(actual, expected):
    return float(np.mean(np.not_equal(actual, expected))) if actual.ndim == 1 else None


def of_log_probs(actual, expected):
    return largest_difference(actual[0], expected[0])


def none(actual, expected):
    return None


TASKS = {
    "top_k": Task(f"{K} most likely tokens", draw_hidden, Compiled, TOP_K, of_log_probs),
    "likeliest": Task(
        "most likely token", draw_hidden_and_key, Compiled, LIKELIEST, share_of_others
    ),
    "sample": Task("a token drawn", draw_hidden_and_key, Compiled, SAMPLE, none),
    "divergence": task_of_divergence("forward"),
    "reverse_divergence": task_of_divergence("reverse"),
    "jensen_shannon": task_of_divergence("jensen_shannon"),
}


def programs_of(task, operands):
    for name, function in task.functions.items():
        if name != TORCH:
            yield name, task.compile(function, operands)
        elif jax.default_backend() == "cpu" and importlib.util.find_spec("torch"):
            yield name, Torch(function, operands)


def measure(shape, tasks, rounds):
    runs = {}
    for task in tasks:
        operands, expected = TASKS[task].draw(*shape), None
        for name, program in programs_of(TASKS[task], operands):
            result = program()  # also warms up
            expected = result if expected is None else expected
            runs[task, name] = Run(program, TASKS[task].compare(result, expected))
    times = time_in_turn(runs, rounds)
    medians = {key: statistics.median(seconds) for key, seconds in times.items()}
    rows = []
    for (task, name), run in runs.items():
        first = task, next(iter(TASKS[task].functions))
        memory, compared = run.call.temporaries, runs[first].call.temporaries
        rows.append(
            {
                "task": task,
                "name": name,
                "seconds": medians[task, name],
                "times": times[task, name],
                "time": medians[task, name] / medians[first],
                "temporaries": memory,
                "memory": memory / compared if memory and compared else None,
                "error": run.error,
            }
        )
    return {"shape": shape, "results": rows}


def compile_tasks(target, shape, tasks):
    """MiB of temporaries, by task and name, of programs compiled for one device of the target."""
    sharding = jax.sharding.SingleDeviceSharding(find_devices(target, 1)[0])

    def in_bfloat16(array):
        dtype = jnp.bfloat16 if array.dtype == jnp.float32 else array.dtype
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)

    for task in tasks:
        draw = functools.partial(TASKS[task].draw, *shape)
        operands = jax.tree.map(in_bfloat16, jax.eval_shape(draw))
        for name, function in TASKS[task].functions.items():
            if name != TORCH:
                has_gradients = TASKS[task].compile is compile_gradient
                function = jax.value_and_grad(function, (0, 1)) if has_gradients else function
                compiled: Any = compile_for(target, jax.jit(function).trace(*operands))
                yield task, name, compiled.memory_analysis().temp_size_in_bytes / 2**20


def show_compiled(targets, shape, tasks):
    N, D, V = shape
    for target in targets:
        print(f"\n{N} tokens, embedding {D}, vocabulary {V}, bfloat16, {target}")
        for task, name, size in compile_tasks(target, shape, tasks):
            print(f"  {TASKS[task].title:42}{name:26}{size:8.0f} MiB", flush=True)


def show(report):
    N, D, V = report["shape"]
    print(f"\n{N} tokens, embedding {D}, vocabulary {V}, float32")
    print(f"{'':26}{'ms':>10}{'time':>9}{'MB':>10}{'memory':>9}{'error':>10}")
    for task in dict.fromkeys(row["task"] for row in report["results"]):
        print(TASKS[task].title)
        for row in report["results"]:
            if row["task"] == task:
                print(format_row(row))


def format_row(row):
    memory = "-" if row["temporaries"] is None else f"{row['temporaries'] / 1e6:.1f}"
    ratio = "-" if row["memory"] is None else f"{row['memory']:.3f}"
    cells = f"{1e3 * row['seconds']:10.1f}{row['time']:9.2f}{memory:>10}{ratio:>9}"
    error = "-" if row["error"] is None else f"{row['error']:.0e}"
    return f"  {row['name']:24}{cells}{error:>10}"


def parse(arguments):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), default=SHAPE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", nargs="+", choices=list(CHIPS), help="compile only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments=None):
    settings = parse(arguments)
    if settings.target:
        return show_compiled(settings.target, tuple(settings.shape), settings.tasks)
    report = measure(tuple(settings.shape), settings.tasks, settings.rounds)
    if settings.json:
        json.dump({"device": jax.devices()[0].device_kind} | report, sys.stdout)
        print()
    else:
        show(report)


if __name__ == "__main__":
    main()
