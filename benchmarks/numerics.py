"""Errors of this library and of plain JAX, against float64.

    python -m benchmarks.numerics [--shape N D V] [--dtype float32 bfloat16 float16] [--json]

An error is the largest difference from the result of NumPy in float64 for the same operands,
divided by the largest number in that result. The k-th token is drawn with a probability in
proportion to 1 / k, as words are distributed. Plain JAX is `table[tokens]` for the lookup, `einsum`
for the logits, and optax's loss. Its logits have the dtype of the operands; "float32 logits" is the
same with logits in float32.

The last lines are for the sum of a gradient over 256 devices, with numbers from a normal
distribution: rounded to the dtype of the table after each addition, as a ring of devices does that
sums in that dtype, and summed in float32 and rounded once.
"""

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .errors import exact, largest_error


SHAPE = (2048, 256, 50257)
DTYPES = ("float32", "bfloat16", "float16")
NAMES = ("vocabulary", "embedding")


class Here:
    """This library, with its default options."""

    def lookup(self, rows, tokens):
        return EmbeddingLookup(EmbeddingTable(rows, NAMES))(tokens)

    def decode(self, rows, hidden):
        return EmbeddingDecode(EmbeddingTable(rows, NAMES))(hidden)

    def loss(self, hidden, rows, targets) -> Any:
        return EmbeddingDecode(EmbeddingTable(rows, NAMES)).cross_entropy(hidden, targets)


class Plain:
    """The same in plain JAX and optax."""

    logits_dtype = None

    def lookup(self, rows, tokens):
        return rows[tokens]

    def decode(self, rows, hidden):
        dtype = self.logits_dtype
        return jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=dtype)

    def loss(self, hidden, rows, targets):
        logits = self.decode(rows, hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class Float32Logits(Plain):
    """Plain JAX with logits in float32."""

    logits_dtype = jnp.float32


WAYS = {"here": Here(), "plain": Plain(), "float32 logits": Float32Logits()}


def draw(shape, dtype):
    """Hidden vectors, the rows of a table, tokens, and the cotangents of their vectors."""
    N, D, V = shape
    generator = np.random.default_rng(0)
    hidden, rows, cotangents = (
        jnp.asarray(generator.normal(size=size).astype(np.float32)).astype(dtype)
        for size in ((N, D), (V, D), (N, D))
    )
    weights = 1 / np.arange(1, V + 1)
    tokens = generator.choice(V, N, p=weights / weights.sum())
    return hidden, (rows / D**0.5).astype(dtype), jnp.asarray(tokens, jnp.int32), cotangents


def measure(shape, dtype):
    hidden, rows, tokens, cotangents = draw(shape, dtype)
    hidden64, rows64, cotangents64 = (np.asarray(a, np.float64) for a in (hidden, rows, cotangents))
    scattered = np.zeros_like(rows64)
    np.add.at(scattered, np.asarray(tokens), cotangents64)
    loss64, gradients64 = exact(hidden, rows, tokens)
    some = slice(None, 256)  # all logits would take a gigabyte in float64
    logits64 = hidden64[some] @ rows64.T
    errors = {}
    for name, way in WAYS.items():
        gradient = jax.jit(jax.value_and_grad(way.loss, (0, 1)))
        loss, (for_hidden, for_rows) = gradient(hidden, rows, tokens)
        pull_back = jax.jit(lambda *a, way=way: jax.vjp(way.lookup, *a[:2])[1](a[2])[0])
        logits = jax.jit(way.decode)(rows, hidden[some])
        errors[name] = {
            "lookup, gradient": largest_error(pull_back(rows, tokens, cotangents), scattered),
            "decode": largest_error(logits, logits64),
            "loss": largest_error(loss, np.asarray(loss64)),
            "loss, gradient of hidden": largest_error(for_hidden, gradients64[0]),
            "loss, gradient of the table": largest_error(for_rows, gradients64[1]),
        }
    names = "sum over devices, rounded each time", "sum over devices, rounded once"
    sums = dict(zip(names, sum_over_devices(jnp.dtype(dtype)), strict=True))
    return {"shape": shape, "dtype": dtype, "errors": errors, "sums": sums}


def sum_over_devices(dtype, devices=256, size=2**16):
    """The errors of a sum whose terms are rounded on their way, and of one rounded at the end."""
    terms = np.random.default_rng(0).normal(size=(devices, size)).astype(dtype)
    exact_sum = terms.astype(np.float64).sum(axis=0)
    rounded, wide = terms[0], terms[0].astype(np.float32)
    for term in terms[1:]:
        rounded = (rounded.astype(np.float32) + term.astype(np.float32)).astype(dtype)
        wide = wide + term.astype(np.float32)
    return largest_error(rounded, exact_sum), largest_error(wide.astype(dtype), exact_sum)


def show(report):
    N, D, V = report["shape"]
    print(f"\n{N} tokens, embedding {D}, vocabulary {V}, {report['dtype']}")
    print(f"{'':28}" + "".join(f"{name:>16}" for name in report["errors"]))
    for row in next(iter(report["errors"].values())):
        figures = (errors[row] for errors in report["errors"].values())
        print(f"{row:28}" + "".join(f"{figure:16.1e}" for figure in figures))
    for name, figure in report["sums"].items():
        print(f"{name:28}{figure:16.1e}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), default=SHAPE)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    settings = parser.parse_args(arguments)
    reports = []
    for dtype in settings.dtype:
        reports.append(measure(tuple(settings.shape), dtype))
        if not settings.json:
            show(reports[-1])
    if settings.json:
        json.dump({"jax": jax.__version__, "reports": reports}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
