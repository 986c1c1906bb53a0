"""The time of a training step of examples/train_lm.py, compared with PyTorch and plain Equinox.

    python -m benchmarks.train_step [--rounds 5] [--steps 10] [--default-memory] [--compile]
                                      [--json]

A step is data, loss, gradient, clipping and AdamW. All train the same model from the same
parameters on the same batches: 4 layers, 4 heads, width 128, 64 tokens, batch 12, bytes, no
dropout, no biases. The example's model and step are imported from examples/. PyTorch's is written
with plain `torch.nn` modules, Equinox's with `eqx.nn` layers and optax's loss. `--compile` also
times PyTorch's with `torch.compile`.

All run in one process in the order A B .. B A, a few steps at a time; the first two steps of each
turn do not count. Times are medians: compare the ratios. The lines below these are parts of
the example's step, each as a separate program.

Where the time went, on two cores of an AMD EPYC with JAX 0.10.2:

- Page faults. glibc returned the memory of each step to the system, which cleared it page by page
  for the next step: some 9,500 faults a step, 8 of 28.8 ms. `--default-memory` shows this. With
  `keep_memory` in the example, they are gone. PyTorch keeps its memory itself, and is faster if
  glibc does not keep it.
- Of the 20.6 ms that remain, the matrix products alone take 15.5, at 270 GFLOP/s. Those of
  attention are the slowest, because they are small: 7% of the operations and 2.5 ms. The gradient
  of a weight is slowest if the wider factor is transposed. So the example stores the second weight
  matrix of its perceptron transposed.
- The update takes 1.7 ms. The other 3 are the operations between products: softmax, normalisation,
  the squared ReLU and the transposes of attention's heads.

These were tried, and were not faster than noise: `einsum` for attention; division after the product
in attention; XLA's options for fast mathematics, wider vectors, oneDNN and XNNPACK. A plain
transformer of `eqx.nn` has the same products, 15.5 of its 26.2 ms: so no version of this model
could take less than 0.59 of its time.
"""

import argparse
import importlib
import json
import resource
import statistics
import sys
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import train_lm
from support.memory import keep_memory
from support.text_data import random_windows, read_text
from toy_transformer import ModelConfig, Transformer
from tqdm import tqdm


SIZES = {
    "vocab_size": 256,
    "sequence_length": 64,
    "num_layers": 4,
    "num_heads": 4,
    "embedding_size": 128,
}
WARM_UP = 2


class Example:
    """The model and the step of the example, as its `main` runs them."""

    def __init__(self, sizes: dict[str, int], config):
        model = make_model(sizes, config)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        # copies, because a step reuses the memory of its arguments
        self.weights = jax.tree.map(np.array, as_matrices(model))
        optimizer = train_lm.make_optimizer(config)
        self.state = params, optimizer.init(params)
        shape = config.data.batch_size, sizes["sequence_length"] + 1
        step = train_lm.make_step(optimizer, static)
        self.step = step.lower(jnp.zeros(shape, int), *self.state).compile()

    def __call__(self, tokens):
        loss, *self.state = self.step(jnp.asarray(tokens, int), *self.state)
        return float(loss)


def make_model(sizes, config):
    of_model = {name: size for name, size in sizes.items() if name != "vocab_size"}
    key = jax.random.key(config.data.seed)
    return Transformer(sizes["vocab_size"], ModelConfig(**of_model), key=key)


def as_matrices(model):
    """The parameters, with matrices of shape (outputs, inputs), as in Equinox and PyTorch."""
    blocks = [
        (b.attention.query_key_value.T, b.attention.output.T, b.expand.T, b.contract)
        for b in model.blocks
    ]
    return model.tokens.embeddings, model.positions.embeddings, blocks


def parts(sizes, config, weights):
    """The parts of a step of the example, each as a separate program.

    They are the matrix products, forward and backward; those of attention alone; the loss; the loss
    and its gradient; and the update, which is clipping and AdamW.
    """
    model = make_model(sizes, config)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = train_lm.make_optimizer(config)
    opt_state = optimizer.init(params)

    def loss(params, tokens):
        return eqx.combine(params, static).loss(tokens[:, :-1], tokens[:, 1:])

    @jax.jit
    def update(gradient, params, opt_state):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state

    @jax.jit
    def products(pairs, heads):
        return (
            # the narrower factor is transposed, as in the example
            [(x @ w.T, g @ w, x.T @ g if x.size < g.size else g.T @ x) for x, g, w in pairs],
            [(q @ k.mT, k @ q.mT, s @ q, s @ k, s.mT @ q, s.mT @ k) for q, k, s in heads],
        )

    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    tokens = config.data.batch_size * sizes["sequence_length"]
    table, _, blocks = weights
    matrices = [table, *(matrix for block in blocks for matrix in block)]
    pairs = [(normal(tokens, w.shape[1]), normal(tokens, w.shape[0]), w) for w in matrices]
    shape = config.data.batch_size, sizes["num_heads"], sizes["sequence_length"]
    size = sizes["embedding_size"] // sizes["num_heads"]
    heads = [(normal(*shape, size), normal(*shape, size), normal(*shape, shape[2])) for _ in blocks]
    forward, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    some = jax.tree.map(jnp.ones_like, params)
    functions = {
        "products": lambda tokens: products(pairs, heads),
        "attention's products": lambda tokens: products([], heads),
        "loss": lambda tokens: forward(params, tokens),
        "loss and gradient": lambda tokens: gradient(params, tokens),
        "update": lambda tokens: update(some, params, opt_state),
    }

    def timed(function):
        def run(tokens):
            jax.block_until_ready(function(jnp.asarray(tokens, int)))

        return run

    return {name: timed(function) for name, function in functions.items()}


def make_runs(sizes, config, compiled=False):
    """The training of each implementation from the same parameters, and why one cannot run."""
    from . import gpt_equinox

    example = Example(sizes, config)
    runs: dict[str, Any] = {"example": example}
    missing = {}
    size = sizes["embedding_size"]
    theirs = {k: v for k, v in sizes.items() if k != "embedding_size"} | {"size": size}
    try:
        gpt_torch = importlib.import_module("benchmarks.gpt_torch")
    except ImportError as error:
        missing["torch"] = str(error)
    else:
        rates = np.asarray(train_lm.learning_rate(config)(jnp.arange(config.run.steps))).tolist()
        rest = rates, config.optimizer.weight_decay, config.optimizer.clip_norm
        runs["torch"] = gpt_torch.Training(gpt_torch.toy(theirs, example.weights), *rest)
        if compiled:
            model = gpt_torch.toy(theirs, example.weights)
            runs["torch.compile"] = gpt_torch.Training(model, *rest, compiled=True)
    runs["equinox"] = gpt_equinox.Training(theirs, train_lm.make_optimizer(config), example.weights)
    return runs, missing


class Batches:
    """The batches of a run of the example."""

    def __init__(self, config):
        self.values = read_text(config.data.text).train
        self.shape = config.data.batch_size, config.model.sequence_length + 1

    def __call__(self, step):
        return random_windows(self.values, *self.shape, seed=(0, step))


def measure(sizes, config, rounds, steps, compiled=False):
    runs, missing = make_runs(sizes, config, compiled)
    runs |= parts(sizes, config, runs["example"].weights)
    batches = Batches(config)
    times, faults, losses = ({name: [] for name in runs} for _ in range(3))
    progress = tqdm(total=2 * rounds * len(runs), leave=False, disable=None)
    for _ in range(rounds):
        for name in [*runs, *reversed(runs)]:
            for i in range(WARM_UP + steps):
                before = page_faults()
                start = time.perf_counter()
                loss = runs[name](batches(len(losses[name])))
                seconds = time.perf_counter() - start
                losses[name].append(loss)
                if i >= WARM_UP:
                    times[name].append(seconds)
                    faults[name].append(page_faults() - before)
            progress.update()
    progress.close()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    results = [
        {
            "name": name,
            "seconds": seconds,
            "ratio": medians["example"] / seconds,
            "page_faults": statistics.mean(faults[name]),
            "losses": losses[name][:3],
        }
        for name, seconds in medians.items()
    ]
    batch_size = config.data.batch_size
    return {"sizes": sizes, "batch_size": batch_size, "results": results, "missing": missing}


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def show(report):
    print(f"\n{'':26}{'ms a step':>10}{'example / it':>14}{'page faults':>13}")
    for row in report["results"]:
        milliseconds = 1e3 * row["seconds"]
        faults = row["page_faults"]
        print(f"{row['name']:26}{milliseconds:10.1f}{row['ratio']:14.2f}{faults:13.0f}")
    for name, reason in report["missing"].items():
        print(f"{name:26}not run: {reason}")


def main(arguments=None, sizes=SIZES):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps in each turn")
    parser.add_argument(
        "--default-memory", action="store_true", help="let glibc return freed memory"
    )
    parser.add_argument("--compile", action="store_true", help="also PyTorch's torch.compile")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    settings = parser.parse_args(arguments)
    length = ModelConfig(sequence_length=sizes["sequence_length"])
    config = train_lm.Config(length, data=train_lm.DataConfig(batch_size=12))
    if not settings.default_memory:
        keep_memory()
    report = measure(sizes, config, settings.rounds, settings.steps, settings.compile)
    if settings.json:
        json.dump({"jax": jax.__version__, "report": report}, sys.stdout)
        print()
    else:
        show(report)


if __name__ == "__main__":
    main()
