"""Time, memory and error of what is done with the logits beside a loss, here and in plain JAX.

    python -m benchmarks.search [--tasks divergence ..] [--shape N D V] [--rounds 3] [--json]

All programs run in one process, in the order A B .. B A in each round, so that other work on the
machine slows all of them alike. Times are medians; compare the ratios. MB are the temporaries of
the compiled program. `time` and `memory` are divided by those of the first program of a task. An
error is the largest difference from its results, divided by the largest number.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .cross_entropy import compile_gradient, Run, time_in_turn


SHAPE = 4096, 256, 50257
PLAIN = "plain JAX"


class Task(NamedTuple):
    """Something to do, and the programs that do it; the others are compared with the first."""

    title: str
    draw: Callable[..., tuple[Any, ...]]  # (N, D, V) -> the operands
    compile: Callable[..., Any]  # (function, operands) -> a program
    functions: dict[str, Callable[..., Any]]


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
        "divergence": functools.partial(divergence, kind),
    }
    title = f"{kind} divergence, with gradients"
    return Task(title, draw_student_and_teacher, compile_gradient, functions)


TASKS = {
    "divergence": task_of_divergence("forward"),
    "reverse_divergence": task_of_divergence("reverse"),
    "jensen_shannon": task_of_divergence("jensen_shannon"),
}


def largest_difference(actual, expected):
    """Of any array, divided by its largest number."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(np.subtract(a, e))) / np.max(np.abs(e), initial=1e-30))
        for a, e in pairs
    )


def measure(shape, tasks, rounds):
    runs = {}
    for task in tasks:
        operands, expected = TASKS[task].draw(*shape), None
        for name, function in TASKS[task].functions.items():
            program = TASKS[task].compile(function, operands)
            result = program()  # also warms up
            expected = result if expected is None else expected
            runs[task, name] = Run(program, largest_difference(result, expected))
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
    return f"  {row['name']:24}{cells}{row['error']:10.0e}"


def parse(arguments):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), default=SHAPE)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments=None):
    settings = parse(arguments)
    report = measure(tuple(settings.shape), settings.tasks, settings.rounds)
    if settings.json:
        json.dump({"device": jax.devices()[0].device_kind} | report, sys.stdout)
        print()
    else:
        show(report)


if __name__ == "__main__":
    main()
