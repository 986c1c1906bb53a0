"""What new tokens cost a trained model, for different amounts of noise in their rows.

    python examples/train_lm.py --tokenizer bpe --vocab-size 1024 --out runs/help
    python -m benchmarks.growth --run runs/help [--text FILE] [--new-tokens 256] [--seeds 24]

`resize_vocabulary` makes new rows the mean of the old ones, plus noise with a part of their
covariance. The table has a line for each such part:

- `right after`: how much the loss on held-out old text rises, in nats per token, while the text
  is in old tokens only. The mean and the highest rise, over `--seeds` seeds.
- `trained`: bits per byte of a new text, after the rows of the new tokens were trained for some
  steps. The mean and the highest, over the first `--trained-seeds` seeds.

In the line `pieces`, each new row is the mean of the tokens that the new token replaces, without
noise.
The first line is the run without new tokens.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from generate import load
from grow_vocabulary import bits_per_byte, Config, more_tokens, Parts, read_new_text, train_rows
from support.text_data import read_text_of, tokenize, windows
from toy_transformer import ROWS_MULTIPLE
from train_lm import evaluate

import eqx_embedding._resize._new_rows
from eqx_embedding import resize_vocabulary


PARTS = 0.0, 1e-9, 1e-5, 1e-3, 1e-2, 0.1, 1.0


def nats_per_token(model, text):
    batches = windows(text.values, model.positions.vocab_size, batch_size=32)
    return float(evaluate(model, *map(jnp.asarray, batches))[0])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--old-text", type=Path)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--trained-seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    if not 1 <= options.trained_seeds <= options.seeds:
        parser.error("--trained-seeds must be at least 1 and at most --seeds")
    config = Config(
        run=options.run,
        text=options.text,
        new_tokens=options.new_tokens,
        steps=options.steps,
        report_every=options.steps,
    )
    model, tokenizer, identity = load(options.run)
    old_text = read_text_of(options.run, identity, options.old_text, "--old-text")
    length = model.positions.vocab_size
    old, text = tokenize(old_text, tokenizer, length), read_new_text(options.text)
    parts = Parts(*tokenize(text, tokenizer, length))
    grown = more_tokens(config, tokenizer, text, parts.train)
    new = range(len(tokenizer.pieces), len(grown.pieces))
    new_parts, old_parts = (Parts(*tokenize(t, grown, length)) for t in (text, old_text))
    before = nats_per_token(model, old[1])
    print(f"{len(new)} new tokens beside {new.start}, {options.seeds} seeds, {options.steps} steps")
    print(f"{'part of the covariance':24}{'right after (nats)':>24}{'trained (bits per byte)':>28}")
    print(f"{'no new tokens':24}{before:16.4f}{bits_per_byte(model, parts.held_out):20.3f}")

    def measure(seed, pieces=None):
        new_model = resize_vocabulary(
            model,
            new.stop,
            key=jax.random.key(seed),
            pieces=pieces,
            pad_to_multiple_of=ROWS_MULTIPLE,
        )
        rise = nats_per_token(new_model, old[1]) - before
        if seed >= options.trained_seeds:
            return rise, None
        seeded = dataclasses.replace(config, seed=seed)
        with contextlib.redirect_stdout(io.StringIO()):
            _, reports = train_rows(seeded, new_model, new, new_parts, old_parts)
        return rise, reports[-1][1]

    rows = {}
    for part in PARTS:
        with mock.patch.object(eqx_embedding._resize._new_rows, "COVARIANCE", part):
            jax.clear_caches()  # the part is a constant of compiled programs
            rows[f"{part:g}"] = [measure(seed) for seed in range(options.seeds if part else 1)]
        show(f"{part:g}", rows[f"{part:g}"])
    pieces = {token: tokenizer.encode(grown.pieces[token]).tolist() for token in new}
    rows["pieces"] = [measure(0, pieces)]
    show("pieces", rows["pieces"])
    return rows


def show(name, results):
    rises = [rise for rise, _ in results]
    trained = [bits for _, bits in results if bits is not None]
    print(
        f"{name:24}{statistics.mean(rises):+16.4f}{max(rises):+12.4f}"
        f"{statistics.mean(trained):16.3f}{max(trained):8.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
