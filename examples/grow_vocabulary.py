"""Adds tokens for a new text to a model that train_lm.py has trained, and trains only their rows.

    python examples/train_lm.py --tokenizer bpe --vocab-size 1024 --out runs/bpe
    python examples/grow_vocabulary.py --run runs/bpe
    python examples/grow_vocabulary.py --run runs/bpe --text FILE --out runs/mine

Writes growth.png and a checkpoint to --out. generate.py can read the checkpoint.
"""

import codecs
import dataclasses
import math
import time
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple


if __name__ == "__main__":  # before the imports that take seconds
    from support.terminal import start_script

    start_script("stopped. The original run was not changed.")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PyTree
from tqdm import tqdm

from eqx_embedding import combine_rows, partition_rows, resize_vocabulary


with install_import_hook(("support", "generate", "toy_transformer"), "beartype.beartype"):
    from generate import load
    from support.checkpoints import Checkpoints
    from support.folder import write_whole
    from support.pictures import growth_picture
    from support.settings import require, require_finite
    from support.terminal import run_script
    from support.text_data import (
        cut_text,
        random_windows,
        read_text,
        read_text_of,
        Text,
        tokenize,
        Tokens,
        windows,
    )
    from support.tokenizer import add_tokens, Tokenizer
    from toy_transformer import ROWS_MULTIPLE, Transformer
    from train_lm import evaluate


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, the new text, and the training of the new rows."""

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
    """The peak learning rate of AdamW. A cosine schedule ends at a twentieth of it."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the new rows."""
    report_every: int = 100
    """Steps between two measurements on held-out text."""
    seed: int = 0
    """The seed of the new rows and of the batches."""

    def __post_init__(self):
        require(self, "weight_decay", at_least=0)
        require(self, "seed", at_least=0, below=2**63)
        require(self, "new_tokens", "steps", "batch_size", "learning_rate", above=0)
        require(self, "report_every", above=0)


def read_new_text(path: Path | None) -> Text:
    if path is not None:
        return read_text(path)
    import argparse
    import inspect
    import typing

    sources = [inspect.getsource(module) for module in (argparse, inspect, typing)]
    return cut_text("Python's source code", "\n".join(sources).encode())


def occurs_in_utf8(piece: bytes) -> bool:
    """Whether a text could have these bytes, which may start or end within a character."""
    chars = piece.lstrip(bytes(range(0x80, 0xC0)))  # which continue a character
    try:
        codecs.getincrementaldecoder("utf-8")().decode(chars)  # the last one may be incomplete
    except UnicodeDecodeError:
        return False
    return len(piece) - len(chars) <= 3


def frequent_strings(
    tokens: Integer[np.ndarray, " tokens"],
    pieces: list[bytes],
    count: int,
    reserved: Set[str] = frozenset(),
) -> list[bytes]:
    """Up to `count` strings that would save many tokens: byte pair encoding continued, except
    that a pair may cross the ends of words and lines.

    Strings in `reserved` and parts of characters are only used as parts of longer strings, and
    bytes that are not UTF-8 not at all."""
    tokens, pieces, known = tokens.astype(np.int64), list(pieces), set(pieces)
    strings: list[bytes] = []
    with tqdm(total=count, unit="token", desc="new tokens") as bar:
        while len(strings) < count:
            pairs, counts = np.unique(tokens[:-1] * len(pieces) + tokens[1:], return_counts=True)
            for pair in pairs[np.argsort(-counts, kind="stable")[: np.sum(counts > 1)]].tolist():
                left, right = divmod(pair, len(pieces))
                piece = pieces[left] + pieces[right]
                if piece not in known and occurs_in_utf8(piece):
                    break
            else:
                break  # no pair that occurs twice is left
            at = np.flatnonzero((tokens[:-1] == left) & (tokens[1:] == right))
            # Of pairs that overlap, as in "aaaa", every other one
            runs = np.maximum.accumulate(np.where(np.diff(at, prepend=-2) > 1, at, 0))
            at = at[(at - runs) % 2 == 0]
            tokens[at] = len(pieces)
            tokens = np.delete(tokens, at + 1)
            pieces.append(piece)
            known.add(piece)
            text = piece.decode(errors="ignore")
            if text.encode() == piece and text not in reserved:
                strings.append(piece)
                bar.update()
    return strings


def bits_per_byte(model: Transformer, text: Tokens) -> float:
    """Comparable between tokenizers: bits for the whole text, divided by its bytes."""
    batches = windows(text.values, model.positions.vocab_size, batch_size=32)
    loss, _ = evaluate(model, *map(jnp.asarray, batches))
    return float(loss) / math.log(2) * text.per_byte


class Parts(NamedTuple):
    """A text in tokens, in the part to learn from and the part that is held out."""

    train: Tokens
    held_out: Tokens


def make_optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 1 / 20)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay),
    )


def train_rows(
    config: Config, model: Transformer, new: range, text: Parts, old_text: Parts
) -> tuple[Transformer, list[tuple[int, float]]]:
    """Trains the rows of new tokens, and returns the step and the bits per byte of each report."""
    # Only the array of the new rows is trained, and the optimizer sees nothing else.
    trained, frozen = partition_rows(model, new)
    size, whole = (sum(x.size for x in jax.tree.leaves(t)) for t in (trained, frozen.model))
    print(f"{size:,} of {whole:,} numbers are trained, as {len(jax.tree.leaves(trained))} array")
    optimizer = make_optimizer(config)
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

    # The old text contains new tokens as well, and the model must not forget it.
    values = np.concatenate([text.train.values, old_text.train.values])
    shape = config.batch_size, model.positions.vocab_size + 1
    reports = [(0, bits_per_byte(model, text.held_out))]
    bar = tqdm(range(config.steps), unit="step")
    for step in bar:
        tokens = jnp.asarray(random_windows(values, *shape, seed=(config.seed, step)), int)
        loss, trained, opt_state = train_step(tokens, trained, opt_state, frozen)
        bar.set_postfix_str(f"loss {float(loss):.3f}")
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            reports.append((step + 1, bits_per_byte(combine_rows(trained, frozen), text.held_out)))
            require_finite(float(loss), reports[-1][1])
            bar.write(f"step {step + 1}: held out {reports[-1][1]:.3f} bits per byte")
    return combine_rows(trained, frozen), reports


def more_tokens(config: Config, tokenizer: Tokenizer, text: Text, train: Tokens) -> Tokenizer:
    strings = frequent_strings(
        train.values, tokenizer.pieces, config.new_tokens, reserved=tokenizer.names
    )
    if not strings:
        raise SystemExit(
            f"in {text.name}, no string that could be a new token occurs twice. Is it UTF-8?"
        )
    grown = add_tokens(tokenizer, strings)
    size = len(tokenizer.pieces)
    if len(grown.pieces) != size + len(strings):
        raise SystemExit(
            f"cannot add tokens to this tokenizer: some of its numbers below {size} stand for "
            "nothing, and would be used first."
        )
    return grown


def draw(
    model: Transformer,
    untrained: Transformer,
    tokenizer: Tokenizer,
    new: range,
    train: Tokens,
    reports: list[tuple[int, float]],
    before: float,
) -> bytes:
    counts = np.bincount(train.values, minlength=new.stop)
    began = np.asarray(untrained.tokens.embeddings)[new.start : new.stop]
    old_rows, rows = np.split(np.asarray(model.tokens.embeddings)[: new.stop], [new.start])
    return growth_picture(reports, before, old_rows, began, rows, counts, tokenizer.pieces)


def main(config: Config) -> list[tuple[int, float]]:
    """Grows and trains, and returns held-out bits per byte: of the run's own tokens, as step -1,
    then at each report."""
    model, tokenizer, identity = load(config.run)
    if tokenizer.json is None:
        raise SystemExit(f"the tokens of {config.run} are bytes. Take a run of --tokenizer bpe.")
    with Checkpoints(config.out, exists=False) as out:
        text = read_new_text(config.text)
        old_text = read_text_of(config.run, identity, config.old_text, "--old-text")
        length = model.positions.vocab_size
        parts, old_parts = (Parts(*tokenize(t, tokenizer, length)) for t in (text, old_text))
        out.claim()
        before, old_before = (bits_per_byte(model, t.held_out) for t in (parts, old_parts))
        grown = more_tokens(config, tokenizer, text, parts.train)
        new = range(len(tokenizer.pieces), len(grown.pieces))
        parts, old_parts = (Parts(*tokenize(t, grown, length)) for t in (text, old_text))
        print(f"{text.name}: {new.start:,} tokens, {before:.3f} bits per byte; {len(new)} new ones")

        pieces = {token: tokenizer.encode(grown.pieces[token]).tolist() for token in new}
        options = {"key": jax.random.key(config.seed), "pad_to_multiple_of": ROWS_MULTIPLE}
        mean_rows = resize_vocabulary(model, new.stop, **options)
        at_mean = bits_per_byte(mean_rows, parts.held_out)
        untrained = resize_vocabulary(model, new.stop, pieces=pieces, **options)
        began = time.perf_counter()
        model, reports = train_rows(config, untrained, new, parts, old_parts)
        seconds = time.perf_counter() - began
        identity["data"]["tokenizer"] = grown.name  # so that train_lm.py does not --resume here
        about = {"identity": identity, "tokenizer": grown.json, "metrics": []}
        out.save(config.steps, about, model=eqx.filter(model, eqx.is_inexact_array))
        picture = draw(model, untrained, grown, new, parts.train, reports, before)
        write_whole(config.out / "growth.png", picture)
    print(f"\nheld-out bits per byte of {text.name}:")
    print(f"{before:8.3f} in the run's {new.start:,} tokens")
    print(f"{at_mean:8.3f} with {len(new)} new ones, untrained, each the mean of all tokens")
    print(f"{reports[0][1]:8.3f} with each the mean of the tokens that it replaces")
    print(f"{reports[-1][1]:8.3f} after {config.steps} steps, {seconds:.0f} s, of their rows alone")
    old_after = bits_per_byte(model, old_parts.held_out)
    print(f"of {old_text.name}: {old_before:.3f} before, {old_after:.3f} in the new tokens")
    print(f"see {config.out}")
    return [(-1, before), *reports]


if __name__ == "__main__":
    run_script(main, Config, __doc__)
