"""Time and memory of steps of Adam that touch only the rows of their batch, here and elsewhere.

    python -m benchmarks.sparse_rows [--shape V D --shape V D ..] [--tokens 4096] [--steps 16]
                                     [--rounds 3] [--json]

Four programs train the same V x D table in float32 on the same batches of random tokens, for the
same loss, a sum of squares:

- hand-written: lazy Adam in plain JAX, for one table and this optimizer alone;
- eqx_embedding: `unique_tokens`, `take_rows`, any optimizer of optax, `put_rows`;
- torch: `torch.nn.Embedding(sparse=True)` with `torch.optim.SparseAdam`, which is lazy as well: on
  a CPU, if PyTorch is installed;
- optax, dense: a lookup, and optax's Adam on the whole table.

All run in one process, some steps at a time, in the order A B .. B A in each round, so that other
work on the machine slows all of them equally. Times are medians; compare the ratios. MB are what
the compiled step needs besides its arguments: temporaries, and results that do not reuse the memory
of an argument. An error is the largest difference from the hand-written program's table after the
first steps, divided by its largest number. Dense Adam gives other results: its moments move rows
that are not in the batch.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_embedding import EmbeddingLookup, EmbeddingTable, put_rows, take_rows, unique_tokens

from .cross_entropy import Run, time_in_turn


SHAPES = [(200_000, 256), (200_000, 64), (2_000_000, 64)]
LEARNING_RATE = 1e-3
OURS, HAND, TORCH, DENSE = "eqx_embedding", "hand-written", "torch", "optax, dense"
TO_HAND, GROWTH = 1.15, 1.8  # the targets


def loss(vectors):
    return ((vectors - 1) ** 2).sum() / 2


class Steps:
    """A step of JAX, compiled, that updates its state in place."""

    def __init__(self, step, state, batches):
        self.step, self.state, self.batches = step, state, [jnp.asarray(b) for b in batches]
        compiled = step.lower(self.batches[0], *state).compile()
        memory = getattr(compiled, "compiled", compiled).memory_analysis()
        self.memory = None
        if memory is not None:
            results = memory.output_size_in_bytes - memory.alias_size_in_bytes
            self.memory = memory.temp_size_in_bytes + results

    def __call__(self):
        for batch in self.batches:
            self.state = self.step(batch, *self.state)
        jax.block_until_ready(self.state)

    def rows(self):
        first, *_ = self.state
        return np.asarray(getattr(first, "embeddings", first))


def ours(rows, batches):
    optimizer = optax.adam(LEARNING_RATE)

    def loss_of(model, tokens):
        return loss(EmbeddingLookup(model)(tokens))

    @eqx.filter_jit(donate="all-except-first")
    def step(tokens, model, opt_state):
        ids, places = unique_tokens(tokens, tokens.size)
        small, state = take_rows((model, opt_state), ids)
        gradient = eqx.filter_grad(loss_of)(small, places)
        updates, state = optimizer.update(gradient, state, small)
        return put_rows((model, opt_state), ids, (eqx.apply_updates(small, updates), state))

    table: Any = EmbeddingTable(jnp.array(rows), ("vocabulary", "embedding"))
    return Steps(step, (table, optimizer.init(table)), batches)


def hand_written(rows, batches, b1=0.9, b2=0.999, eps=1e-8):
    @functools.partial(jax.jit, donate_argnums=(1, 2, 3, 4))
    def step(tokens, rows, means, squares, count):
        ids, places = jnp.unique(
            tokens, size=tokens.size, fill_value=len(rows), return_inverse=True
        )

        def take(array):
            return array.at[ids].get(mode="fill", fill_value=0)

        def put(array, new):
            return array.at[ids].set(new, mode="drop", unique_indices=True)

        row, mean, square = take(rows), take(means), take(squares)
        gradient = jax.grad(lambda row: loss(row[places]))(row)
        count = count + 1
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        size = jnp.sqrt(square / (1 - b2**count)) + eps
        row = row - LEARNING_RATE * mean / (1 - b1**count) / size
        return put(rows, row), put(means, mean), put(squares, square), count

    state = jnp.array(rows), jnp.zeros(rows.shape), jnp.zeros(rows.shape), jnp.zeros((), int)
    return Steps(step, state, batches)


def dense(rows, batches):
    optimizer = optax.adam(LEARNING_RATE)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(tokens, rows, opt_state):
        gradient = jax.grad(lambda rows: loss(rows[tokens]))(rows)
        updates, opt_state = optimizer.update(gradient, opt_state, rows)
        return optax.apply_updates(rows, updates), opt_state

    rows = jnp.array(rows)
    return Steps(step, (rows, optimizer.init(rows)), batches)


class Torch:
    """Lazy Adam in PyTorch, which does not report what a step needs."""

    memory = None

    def __init__(self, rows, batches):
        torch = importlib.import_module("torch")
        self.batches = [torch.from_numpy(batch.astype(np.int64)) for batch in batches]
        weight = torch.from_numpy(rows.copy())
        self.table = torch.nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
        self.optimizer = torch.optim.SparseAdam(self.table.parameters(), lr=LEARNING_RATE)

    def __call__(self):
        for batch in self.batches:
            self.optimizer.zero_grad()
            loss(self.table(batch)).backward()
            self.optimizer.step()

    def rows(self):
        return self.table.weight.detach().numpy()


PROGRAMS = {HAND: hand_written, OURS: ours, TORCH: Torch, DENSE: dense}


def why_not_torch():
    if jax.default_backend() != "cpu":
        return "it is measured on CPUs"
    # A module that is None in sys.modules is not there
    found = sys.modules.get(TORCH, 0) is not None and importlib.util.find_spec(TORCH)
    return None if found else "not installed"


def make_runs(shapes, tokens, steps):
    """The programs after their first steps, with the errors of these, by shape and name."""
    runs = {}
    for shape in shapes:
        random = np.random.default_rng(0)
        rows = random.standard_normal(shape, np.float32)
        batches = random.integers(0, shape[0], (steps, tokens), np.int32)
        expected = None
        for name, make in PROGRAMS.items():
            if name == TORCH and why_not_torch():
                continue
            program = make(rows, batches)
            program()  # also warms up
            result = program.rows()
            expected = np.array(result) if expected is None else expected
            difference = np.max(np.abs(result - expected)) / np.max(np.abs(expected))
            runs[shape, name] = Run(program, float(difference))
    return runs


def measure(shapes, tokens, steps, rounds):
    runs = make_runs(shapes, tokens, steps)
    times = time_in_turn(runs, rounds)
    medians = {key: statistics.median(seconds) / steps for key, seconds in times.items()}
    results = [
        {
            "shape": shape,
            "name": name,
            "seconds": medians[shape, name],
            "times": [seconds / steps for seconds in times[shape, name]],
            "ratio": medians[shape, name] / medians[shape, HAND],
            "memory": run.call.memory,
            "error": run.error,
        }
        for (shape, name), run in runs.items()
    ]
    missing = {TORCH: why_not_torch()} if why_not_torch() else {}
    report = {"tokens": tokens, "results": results, "missing": missing}
    return report | {"targets": targets(shapes, medians)}


def targets(shapes, medians):
    """What was to be reached, the most that it may be, and what it is."""
    found = []
    for V, D in shapes:
        compared = [(HAND, TO_HAND), (TORCH, 1.0), (DENSE, 1.0)]
        for name, most in compared:
            if ((V, D), name) in medians:
                ratio = medians[(V, D), OURS] / medians[(V, D), name]
                found.append((f"{V:,} x {D}: time / {name}", most, ratio))
    for D in dict.fromkeys(D for _, D in shapes):
        sizes = sorted(V for V, size in shapes if size == D)
        if len(sizes) > 1:
            few, many = sizes[0], sizes[-1]
            ratio = medians[(many, D), OURS] / medians[(few, D), OURS]
            found.append((f"{D} features: time of {many:,} rows / {few:,}", GROWTH, ratio))
    return [{"what": what, "at_most": most, "reached": ratio} for what, most, ratio in found]


def about():
    """The hardware, and the versions of what is measured."""
    device, cores = jax.devices()[0].device_kind, len(os.sched_getaffinity(0))
    versions, threads = {}, None
    for name in "jax", "equinox", "optax", TORCH:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if why_not_torch() is None:
        threads = importlib.import_module(TORCH).get_num_threads()
    return {"device": device, "cores": cores, "torch_threads": threads, "versions": versions}


def show(hardware, report):
    versions = ", ".join(f"{name} {version}" for name, version in hardware["versions"].items())
    threads = hardware["torch_threads"]
    print(f"{hardware['device']}, {hardware['cores']} cores, {versions}", end="")
    print("" if threads is None else f" with {threads} threads")
    print(f"{report['tokens']} tokens a step, Adam, float32")
    print(f"{'':26}{'ms':>10}{'/ hand':>9}{'MB':>10}{'error':>10}")
    for V, D in dict.fromkeys(tuple(row["shape"]) for row in report["results"]):
        print(f"{V:,} x {D}")
        for row in report["results"]:
            if tuple(row["shape"]) == (V, D):
                print(format_row(row))
        for name, reason in report["missing"].items():
            print(f"  {name:24}not run: {reason}")
    print("targets of eqx_embedding")
    for target in report["targets"]:
        most, reached = target["at_most"], target["reached"]
        verdict = "reached" if reached <= most else "MISSED"
        print(f"  {target['what']:48}{reached:7.2f}, at most {most:.2f}: {verdict}")


def format_row(row):
    memory = "-" if row["memory"] is None else f"{row['memory'] / 1e6:.1f}"
    cells = f"{1e3 * row['seconds']:10.2f}{row['ratio']:9.2f}{memory:>10}"
    return f"  {row['name']:24}{cells}{row['error']:10.0e}"


def parse(arguments):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--shape", type=int, nargs=2, action="append", metavar=("V", "D"), help="may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--steps", type=int, default=16, help="steps of a program in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments=None):
    settings = parse(arguments)
    shapes = [(V, D) for V, D in settings.shape or SHAPES]
    report = measure(shapes, settings.tokens, settings.steps, settings.rounds)
    if settings.json:
        json.dump(about() | report, sys.stdout)
        print()
    else:
        show(about(), report)


if __name__ == "__main__":
    main()
