"""Text for a language model: reads and splits it, and measures simple methods on it."""

import hashlib
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from support.folder import one_line
from support.tokenizer import Tokenizer


MOST_HELD_OUT = 2**17  # bytes, for each report measures all of them


class Text(NamedTuple):
    """A text in bytes, cut in two: the last tenth is held out, or the last 128 KiB if less."""

    name: str
    train: Integer[np.ndarray, " train"]
    held_out: Integer[np.ndarray, " held_out"]
    sha256: str


def read_text(path: Path | None) -> Text:
    """Reads `path`, or the help topics that come with every Python.

    Stops the program with one line if there is nothing to read.
    """
    if path is None:
        from pydoc_data.topics import topics

        # Each version of Python has other ones.
        name = "the built-in text of Python {}.{}".format(*sys.version_info)
        data = "\n\n".join(topics.values()).encode()
    else:
        name = str(path)
        with one_line(f"read the text {name}"):
            if path.is_char_device():  # such as /dev/zero
                raise SystemExit(
                    f"the text {name} is a device, which may have no end: give a file."
                )
            data = path.read_bytes()
    return cut_text(name, data)


def cut_text(name: str, data: bytes) -> Text:
    if not data:
        raise SystemExit(f"the text {name} is empty.")
    cut = max(len(data) * 9 // 10, len(data) - MOST_HELD_OUT)
    values = np.frombuffer(data, np.uint8)
    return Text(name, values[:cut], values[cut:], hashlib.sha256(data).hexdigest())


def read_text_of(
    run: Path, identity: dict[str, Any], path: Path | None, option: str = "--text"
) -> Text:
    """Reads a text, and stops the program with one line unless the run learned from it."""
    text = read_text(path)
    if text.sha256 != identity["data"]["text"]:
        raise SystemExit(
            f"{text.name} is not what {run} learned from: give {option} the text of that run."
        )
    return text


class Tokens(NamedTuple):
    """A part of a text in tokens."""

    values: Integer[np.ndarray, " tokens"]
    per_byte: float
    """Tokens for each byte. The first token is left out: it is not predicted."""


def tokenize(text: Text, tokenizer: Tokenizer, sequence_length: int) -> tuple[Tokens, Tokens]:
    """The training text and the held-out text in tokens.

    Stops the program with one line if the tokenizer changes the text, or a part is too short.
    """
    parts = []
    is_tenth = len(text.held_out) < MOST_HELD_OUT
    last = "last tenth" if is_tenth else "held-out part, which is at most 128 KiB,"
    for part, data in ("first nine tenths", text.train), (last, text.held_out):
        data = data.tobytes()
        values = tokenizer.encode(data)
        if tokenizer.decode(values) != data:
            raise SystemExit(
                f"the tokenizer does not reproduce {text.name} byte for byte. Use a byte-level one "
                "that does not change the text, or --tokenizer bpe."
            )
        if len(values) < sequence_length + 1:
            raise SystemExit(
                f"{text.name} is too short: its {part} has {len(values)} tokens, and one sequence "
                f"needs {sequence_length + 1}. Give a longer --text, or shorter sequences."
            )
        predicted = len(data) - len(tokenizer.decode(values[:1]))
        parts.append(Tokens(values, (len(values) - 1) / predicted))
    return parts[0], parts[1]


def random_windows(
    values: Integer[np.ndarray, " values"],
    count: int,
    length: int,
    seed: tuple[int, int],
    part: slice = slice(None),
) -> Integer[np.ndarray, "part {length}"]:
    """`count` random pieces of `values`, or a part of these pieces; the same for the same seed."""
    starts = np.random.default_rng(seed).integers(0, len(values) - length + 1, count)[part]
    return values[starts[:, None] + np.arange(length)]


def windows(
    values: Integer[np.ndarray, " values"], length: int, batch_size: int
) -> tuple[
    Integer[np.ndarray, "batches {batch_size} {length}"],
    Integer[np.ndarray, "batches {batch_size} {length}"],
    Float[np.ndarray, "batches {batch_size} {length}"],
]:
    """Inputs, targets and weights in which each value but the first is a target exactly once.

    The weights are 1, and 0 for the padding of the last batch.
    """
    count = len(values) - 1
    shape = (-1, batch_size, length)
    padded = np.zeros(-(-count // (batch_size * length)) * batch_size * length + 1, np.int32)
    padded[: len(values)] = values
    weights = (np.arange(len(padded) - 1) < count).astype(np.float32)
    return padded[:-1].reshape(shape), padded[1:].reshape(shape), weights.reshape(shape)


def baselines(text: Text) -> dict[str, float]:
    """Bits per byte of three simple methods on the held-out text.

    - unigram: how often each byte occurs in the training text.
    - bigram: how often it follows the byte before it. The unigram has weight 1 / (count + 1).
    - zlib: the held-out text compressed on its own.
    """
    before, after = text.train[:-1], text.train[1:]
    pairs = np.zeros((256, 256))
    np.add.at(pairs, (before, after), 1)
    unigram = (np.bincount(text.train, minlength=256) + 1) / (len(text.train) + 256)
    bigram = (pairs + unigram) / (pairs.sum(axis=1, keepdims=True) + 1)
    return {
        "unigram": float(-np.log2(unigram[text.held_out]).mean()),
        "bigram": float(-np.log2(bigram[text.held_out[:-1], text.held_out[1:]]).mean()),
        "zlib": 8 * len(zlib.compress(text.held_out.tobytes(), 9)) / len(text.held_out),
    }
