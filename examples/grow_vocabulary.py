"""Adds tokens for a new text to a model that train_lm.py has trained, and trains only their rows.

    python examples/train_lm.py --tokenizer bpe --vocab-size 1024 --out runs/bpe
    python examples/grow_vocabulary.py --run runs/bpe
    python examples/grow_vocabulary.py --run runs/bpe --text FILE --out runs/mine

Writes growth.png and a checkpoint for generate.py to --out.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PyTree
from tqdm import tqdm

from eqx_embedding import combine_rows, partition_rows, resize_vocabulary


CHECKED = ("checkpoints", "generate", "pictures", "text_data", "tokenizer", "toy_transformer")
with install_import_hook(CHECKED, "beartype.beartype"):
    from checkpoints import Checkpoints, write_whole
    from command_line import from_command_line, require
    from generate import load
    from pictures import growth_picture
    from text_data import cut_text, random_windows, read_text, Text, tokenize, Tokens, windows
    from tokenizer import add_tokens
    from toy_transformer import ROWS_MULTIPLE, Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """What to grow, for which text, and how."""

    run: Path
    """The folder of a run with a tokenizer: the --out of train_lm.py --tokenizer bpe."""
    out: Path = Path("runs/grown")
    """The folder to write to."""
    text: Path | None = None
    """The new text. None: the source code of three modules of Python, 340 kB."""
    old_text: Path | None = None
    """The text of the run, to measure the cost for it. None: the help topics of Python."""
    new_tokens: int = 256
    """How many tokens to add."""

    steps: int = 1000
    """How many batches to train on, of both texts."""
    batch_size: int = 16
    """Sequences in a batch, each as long as those of the run."""
    learning_rate: float = 1e-2
    """The highest learning rate of AdamW. It falls along a cosine, to a twentieth."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the new rows."""
    report_every: int = 100
    """Steps between two measurements on held-out text."""
    seed: int = 0
    """The seed of the new rows and the batches."""

    def __post_init__(self):
        for name in ("weight_decay", "seed"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("new_tokens", "steps", "batch_size", "learning_rate", "report_every"):
            require(self, name, getattr(self, name) > 0, "above 0")


def read_new_text(path: Path | None) -> Text:
    if path is not None:
        return read_text(path)
    import argparse
    import inspect
    import typing

    sources = [inspect.getsource(module) for module in (argparse, inspect, typing)]
    return cut_text("Python's source code", "\n".join(sources).encode())


def frequent_strings(
    tokens: Integer[np.ndarray, " tokens"], pieces: list[bytes], count: int
) -> list[bytes]:
    """Up to `count` strings that would save many tokens.

    This continues the byte pair encoding, but a pair may cross the ends of words and lines.
    """
    tokens, pieces, known = tokens.astype(np.int64), list(pieces), set(pieces)
    first_new = len(pieces)
    while len(pieces) < first_new + count:
        pairs, counts = np.unique(tokens[:-1] * len(pieces) + tokens[1:], return_counts=True)
        for pair in pairs[np.argsort(-counts, kind="stable")[: np.sum(counts > 1)]].tolist():
            left, right = divmod(pair, len(pieces))
            piece = pieces[left] + pieces[right]
            if piece not in known and piece.decode(errors="ignore").encode() == piece:
                break
        else:
            break  # no pair that occurs twice is left
        at = np.flatnonzero((tokens[:-1] == left) & (tokens[1:] == right))
        # If pairs overlap, as in "aaaa", every other one
        runs = np.maximum.accumulate(np.where(np.diff(at, prepend=-2) > 1, at, 0))
        at = at[(at - runs) % 2 == 0]
        tokens[at] = len(pieces)
        tokens = np.delete(tokens, at + 1)
        pieces.append(piece)
        known.add(piece)
    return pieces[first_new:]


def bits_per_byte(model: Transformer, text: Tokens) -> float:
    """Bits for the whole text, divided by its bytes, so that tokenizers can be compared."""
    batches = windows(text.values, model.positions.vocab_size, batch_size=32)
    loss = model.mean_loss(*map(jnp.asarray, batches))
    return float(loss) / math.log(2) * text.per_byte


def main(config: Config) -> list[tuple[int, float]]:
    """Grows the model and trains the new rows.

    Returns steps and held-out bits per byte: step -1 is the run before it grows, the others are the
    reports.
    """
    about = Checkpoints(config.run, exists=True).about()
    model, tokenizer = load(config.run)
    if tokenizer.json is None:
        raise SystemExit(f"the tokens of {config.run} are bytes. Use a run of --tokenizer bpe.")
    out = Checkpoints(config.out, exists=False)
    text, old_text = read_new_text(config.text), read_text(config.old_text)
    if old_text.sha256 != about["identity"]["text_sha256"]:
        raise SystemExit(f"{config.run} was not trained on {old_text.name}: give --old-text.")

    length, old_size = model.positions.vocab_size, len(tokenizer.pieces)
    train, held_out = tokenize(text, tokenizer, length)
    _, old_held_out = tokenize(old_text, tokenizer, length)
    before, old_before = bits_per_byte(model, held_out), bits_per_byte(model, old_held_out)
    strings = frequent_strings(train.values, tokenizer.pieces, config.new_tokens)
    if not strings:
        raise SystemExit(f"no pair of tokens occurs twice in {text.name}.")
    tokenizer = add_tokens(tokenizer, strings)
    new_size = len(tokenizer.pieces)
    train, held_out = tokenize(text, tokenizer, length)
    old_train, old_held_out = tokenize(old_text, tokenizer, length)
    # Train on both texts, because new tokens also occur in the old one
    values = np.concatenate([train.values, old_train.values])
    print(f"{text.name}: {len(text.train):,} bytes to learn from, {len(text.held_out):,} held out")
    print(f"{old_size:,} tokens, {before:.3f} bits per byte; {new_size - old_size} new ones")

    key = jax.random.key(config.seed)
    model = resize_vocabulary(model, new_size, key=key, pad_to_multiple_of=ROWS_MULTIPLE)
    # The only parameter is an array of the new rows
    trained, frozen = partition_rows(model, range(old_size, new_size))
    size, whole = (sum(x.size for x in jax.tree.leaves(t)) for t in (trained, frozen.model))
    print(f"{size:,} of {whole:,} numbers are trained, as {len(jax.tree.leaves(trained))} array")
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.cosine_decay_schedule(config.learning_rate, config.steps, 1 / 20),
            b2=0.99,
            weight_decay=config.weight_decay,
        ),
    )
    opt_state = optimizer.init(trained)

    @eqx.filter_jit
    def train_step(
        tokens: Integer[Array, "batch length"], trained: PyTree, opt_state: PyTree, frozen: PyTree
    ):
        def loss(trained: PyTree) -> Float[Array, ""]:
            return combine_rows(trained, frozen).loss(tokens[:, :-1], tokens[:, 1:])

        value, grads = eqx.filter_value_and_grad(loss)(trained)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return value, eqx.apply_updates(trained, updates), opt_state

    tokens = jnp.zeros((config.batch_size, length + 1), int)
    train_step = train_step.lower(tokens, trained, opt_state, frozen).compile()
    reports = [(0, bits_per_byte(model, held_out))]
    untrained = np.asarray(model.tokens.embeddings)[old_size:new_size]
    began = time.perf_counter()
    bar = tqdm(range(config.steps), unit="step")
    for step in bar:
        tokens = random_windows(values, *tokens.shape, seed=(config.seed, step))
        tokens = jnp.asarray(tokens, int)
        loss, trained, opt_state = train_step(tokens, trained, opt_state, frozen)
        bar.set_postfix_str(f"loss {float(loss):.3f}")
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            model = combine_rows(trained, frozen)
            reports.append((step + 1, bits_per_byte(model, held_out)))
            bar.write(f"step {step + 1}: held out {reports[-1][1]:.3f} bits per byte")
    seconds = time.perf_counter() - began

    old_after = bits_per_byte(model, old_held_out)
    counts = np.bincount(train.values, minlength=new_size)
    old_rows, trained_rows = np.split(np.asarray(model.tokens.embeddings)[:new_size], [old_size])
    picture = growth_picture(
        reports, before, old_rows, untrained, trained_rows, counts, tokenizer.pieces
    )
    params, _ = eqx.partition(model, eqx.is_inexact_array)
    about["identity"]["tokenizer"] = tokenizer.name  # so that train_lm.py does not --resume here
    about["tokenizer"] = tokenizer.json
    out.save(config.steps, about, model=params)
    out.finish()
    write_whole(config.out / "growth.png", picture)
    print(f"\nheld-out bits per byte of {text.name}:")
    print(f"{before:8.3f} in the run's {old_size:,} tokens")
    print(f"{reports[0][1]:8.3f} with {new_size - old_size} new ones, before they are trained")
    print(f"{reports[-1][1]:8.3f} after {config.steps} steps, {seconds:.0f} s, of their rows alone")
    print(f"of {old_text.name}: {old_before:.3f} before, {old_after:.3f} with the new tokens")
    print(f"see {config.out}")
    return [(-1, before), *reports]


if __name__ == "__main__":
    try:
        main(from_command_line(Config, __doc__))
    except KeyboardInterrupt:
        sys.exit("stopped. Nothing was written.")
