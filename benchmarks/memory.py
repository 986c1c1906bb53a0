"""Temporary memory of the cross-entropy and its gradients by size, from compiled programs.

    python -m benchmarks.memory [--tokens 2048 8192] [--embedding 64 128 ..] [--vocab-size 4096 ..]

Prints a table in Markdown for each number of tokens. A cell is the size of this library's
temporaries, divided by the size of one gradient of the table. In brackets: divided by the
temporaries of plain JAX from logits. Nothing is run.
"""

import argparse

import jax

from .cross_entropy import compile_gradient
from .losses import LOSSES


def temporaries(loss, N: int, D: int, V: int) -> int:
    shapes = ((N, D), "float32"), ((V, D), "float32"), ((N,), "int32")
    size = compile_gradient(loss, [jax.ShapeDtypeStruct(*shape) for shape in shapes]).temporaries
    if size is None:
        raise SystemExit(f"{jax.default_backend()} does not report the memory of programs.")
    return size


def cell(N: int, D: int, V: int) -> str:
    loss = LOSSES["cross_entropy"]
    here, plain = (temporaries(way, N, D, V) for way in (loss.here, loss.plain))
    return f"{here / (4 * V * D):.2f} ({here / plain:.2f})"


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--embedding", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[4096, 16384, 50257, 128256])
    given = parser.parse_args(arguments)
    for N in given.tokens:
        print(f"\n{N} tokens, float32, {jax.default_backend()}\n")
        print(line(["embedding", *(f"vocabulary {V:,}" for V in given.vocab_size)]))
        print(line(["---"] * (1 + len(given.vocab_size))))
        for D in given.embedding:
            print(line([str(D), *(cell(N, D, V) for V in given.vocab_size)]), flush=True)


if __name__ == "__main__":
    main()
