"""Learns a vector for each word of a text, from the words near it and from its spelling.

    python examples/word_vectors.py
    python examples/word_vectors.py --text FILE --out runs/my_words --words king bread
    python examples/word_vectors.py --dense --steps 500 --out runs/dense

The vector of a word is the mean of the vectors of its character n-grams, so words with similar
spelling share a part of it (Bojanowski et al. 2017, https://arxiv.org/abs/1607.04606). It is
trained to tell the words near it from random ones: skip-gram with negative sampling (Mikolov et al.
2013, https://arxiv.org/abs/1310.4546).

The table of n-grams has 200,000 rows, and a batch needs a few thousand of them. A step takes these
rows, trains them as a small model, and puts them back. With --dense, a step trains the whole table.

Writes metrics.jsonl, words.png and vectors.txt, in the format of word2vec, to --out.
"""

import collections
import dataclasses
import json
import re
import time
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


if __name__ == "__main__":  # before the imports that take seconds
    from support.terminal import start_script

    start_script("stopped. Files that are in the folder already are whole.")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PRNGKeyArray, PyTree
from tqdm import tqdm

from eqx_embedding import EmbeddingLookup, EmbeddingTable, put_rows, take_rows, unique_tokens


with install_import_hook(("support",), "beartype.beartype"):
    from support.folder import new_folder, write_whole
    from support.memory import keep_memory
    from support.meshes import find_all_devices
    from support.pictures import words_picture
    from support.settings import require, require_finite
    from support.terminal import run_script
    from support.text_data import read_text


WORDS = "exception loop tuple iterator integer division debugger coroutine".split()
"""Words of the built-in text whose neighbours are shown."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The text, the vectors and their training."""

    text: Path | None = None
    """A text file in UTF-8 to learn from. None: the help topics that come with Python, 460 kB."""
    out: Path = Path("runs/word_vectors")
    """The folder to write to."""
    words: tuple[str, ...] = ()
    """Words of the text whose neighbours are shown. Without any, some frequent words."""
    min_count: int = 5
    """A word gets a vector if it occurs at least this often."""

    rows: int = 200_000
    """Rows of the table of n-grams, in which a hash gives each n-gram its row."""
    min_length: int = 3
    """Characters in the shortest n-grams."""
    max_length: int = 6
    """Characters in the longest n-grams. The whole word is one more n-gram."""
    embedding_size: int = 64
    """The size of a vector."""

    steps: int = 5000
    """How many batches to train on."""
    batch_size: int = 256
    """Places of the text in a batch. Each place is a word to learn, with the words near it."""
    window: int = 5
    """Words up to this distance are near, on both sides. Closer words count more."""
    negatives: int = 10
    """Random words for each place (negative samples)."""
    threshold: float = 1e-3
    """Words that are a larger share of the text are drawn less often."""
    learning_rate: float = 1e-2
    """The peak learning rate of Adam, which falls to a twentieth."""
    dense: bool = False
    """Train all rows in each step, not only those of the batch."""
    report_every: int = 500
    """Steps between two reports."""
    seed: int = 0
    """The seed of the vectors and of the batches."""

    def __post_init__(self):
        require(self, "min_count", "rows", "min_length", "embedding_size", "steps", above=0)
        require(self, "batch_size", "window", "negatives", "threshold", above=0)
        require(self, "report_every", above=0)
        require(self, "learning_rate", above=0, at_most=1e38)  # what float32 holds
        require(self, "max_length", at_least=self.min_length)
        require(self, "seed", at_least=0, below=2**63)


# Words and their n-grams


class Words(NamedTuple):
    """The words of a text, most frequent first, and the text in numbers of words."""

    names: list[str]
    counts: Integer[np.ndarray, " words"]
    text: Integer[np.ndarray, " tokens"]


def in_lower_case(text: str) -> str:
    """In one of the forms that Unicode has for the same letters, such as é."""
    return unicodedata.normalize("NFC", text.lower())


def read_words(config: Config) -> Words:
    text = read_text(config.text)
    try:
        content = np.concatenate([text.train, text.held_out]).tobytes().decode()
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"{text.name} is not UTF-8 from byte {error.start} on: convert it, as iconv does."
        ) from None
    content = in_lower_case(content)
    # Python's \w leaves out the marks that are part of words in Hindi, Tamil or Hebrew
    marks = sorted(char for char in set(content) if unicodedata.category(char)[0] == "M")
    found = re.findall(rf"[^\W\d][\w{''.join(marks)}]*", content)
    counted = collections.Counter(found).most_common()
    names, counts = [], []
    for name, count in counted:
        if count >= config.min_count:
            names.append(name)
            counts.append(count)
    if len(names) < 2:
        raise SystemExit(
            f"{text.name} has {len(names)} words that occur {config.min_count} times. Give a "
            "longer --text, or a smaller --min-count."
        )
    number = {name: i for i, name in enumerate(names)}
    values = np.array([number[word] for word in found if word in number], np.int32)
    return Words(names, np.array(counts), values)


class Ngrams(NamedTuple):
    """The rows of the n-grams of each word, and how much of its vector each one is.

    Each word is filled up to the same number, with rows of share 0.
    """

    rows: Integer[np.ndarray | Array, "*words ngrams"]
    shares: Float[np.ndarray | Array, "*words ngrams"]


def ngrams_of(word: str, config: Config) -> list[str]:
    """The word itself, and its n-grams. The signs < and > are its ends."""
    marked = f"<{word}>"
    lengths = range(config.min_length, min(config.max_length, len(marked)) + 1)
    parts = [marked[i : i + n] for n in lengths for i in range(len(marked) - n + 1)]
    return [marked, *(part for part in parts if part != marked)]


def find_ngrams(words: list[str], config: Config) -> Ngrams:
    found = [
        [zlib.crc32(part.encode()) % config.rows for part in ngrams_of(word, config)]
        for word in words
    ]
    shape = len(words), max(map(len, found))
    rows, shares = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, parts in enumerate(found):
        rows[i] = parts[0]  # of share 0, where there are no more
        rows[i, : len(parts)] = parts
        shares[i, : len(parts)] = 1 / len(parts)
    return Ngrams(rows, shares)


# The model and its loss


class Model(eqx.Module):
    ngrams: EmbeddingTable
    near: EmbeddingTable
    """A second vector for each word, used when it is near another word."""

    def __init__(self, config: Config, num_words: int, key: PRNGKeyArray):
        axes = {"embedding": config.embedding_size}
        self.ngrams = EmbeddingTable.from_config(config.rows, axes, "ngram", key=key)
        zeros = jnp.zeros((num_words, config.embedding_size))
        self.near = EmbeddingTable(zeros, ("word", "embedding"), "word")

    def vectors(self, ngrams: Ngrams) -> Float[Array, "*words embedding"]:
        rows = EmbeddingLookup(self.ngrams)(ngrams.rows)
        return jnp.einsum("...n,...ne->...e", ngrams.shares, rows)


class Batch(NamedTuple):
    ngrams: Ngrams
    """Of the word at each place."""
    words: Integer[Array, "batch words"]
    """The words near it, and then random words."""
    weights: Float[Array, "batch near"]
    """How much each of the words near it counts."""


def loss_of(model: Model, batch: Batch) -> Float[Array, ""]:
    """The mean over all pairs of words that are near each other, each with all random words."""
    centers = model.vectors(batch.ngrams)
    others = EmbeddingLookup(model.near)(batch.words)
    logits = jnp.einsum("be,bwe->bw", centers, others)
    near, random = jnp.split(logits, [batch.weights.shape[1]], axis=1)
    losses = jax.nn.softplus(-near) + jax.nn.softplus(random).sum(axis=1, keepdims=True)
    return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)


# Training


def batches(config: Config, words: Words, ngrams: Ngrams) -> Iterator[Batch]:
    """Random places of the text, endlessly."""
    shares = words.counts / words.counts.sum()
    # Only ratios matter, and beyond all shares they stay the same: so a tiny threshold makes no
    # weight zero.
    threshold = np.clip(config.threshold, shares.min(), shares.max())
    keep = np.minimum(1, np.sqrt(threshold / shares))
    places = np.cumsum(keep[words.text])
    noise = np.cumsum(words.counts**0.75)
    reach = min(config.window, len(words.text) - 1)
    distances = np.array([d for d in range(-reach, reach + 1) if d != 0])
    closeness = 1 - (np.abs(distances) - 1) / config.window
    random, size = np.random.default_rng(config.seed), config.batch_size
    while True:
        centers = np.searchsorted(places, random.random(size) * places[-1])
        at = centers[:, None] + distances
        inside = (at >= 0) & (at < len(words.text))
        near = words.text[np.where(inside, at, 0)]
        weights = inside * closeness * keep[near]
        others = np.searchsorted(noise, random.random((size, config.negatives)) * noise[-1])
        chosen = words.text[centers]
        yield Batch(
            Ngrams(jnp.asarray(ngrams.rows[chosen]), jnp.asarray(ngrams.shares[chosen])),
            jnp.asarray(np.concatenate([near, others], axis=1), "int32"),
            jnp.asarray(weights, "float32"),
        )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 1 / 20)
    return optax.adam(rate)


def make_step(config: Config):
    """A step that trains the rows of its batch alone, or the whole tables if dense."""
    optimizer = make_optimizer(config)

    def update(model: Model, opt_state: PyTree, batch: Batch):
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return loss, (eqx.apply_updates(model, updates), opt_state)

    @eqx.filter_jit(donate="all-except-first")
    def sparse_step(batch: Batch, model: Model, opt_state: PyTree):
        # The rows that this batch needs. As tokens of the small model, they are 0, 1, 2, ...
        rows, places = unique_tokens(batch.ngrams.rows, batch.ngrams.rows.size)
        words, word_places = unique_tokens(batch.words, batch.words.size)
        batch = Batch(Ngrams(places, batch.ngrams.shares), word_places, batch.weights)
        # Of the model and of the moments of Adam; first of one table, then of the other
        whole = model, opt_state
        half = take_rows(whole, rows, "ngram")
        small_model, small_state = take_rows(half, words, "word")
        loss, small = update(small_model, small_state, batch)
        half = put_rows(half, words, small, "word")
        return loss, *put_rows(whole, rows, half, "ngram")

    @eqx.filter_jit(donate="all-except-first")
    def dense_step(batch: Batch, model: Model, opt_state: PyTree):
        loss, whole = update(model, opt_state, batch)
        return loss, *whole

    return dense_step if config.dense else sparse_step


def train(
    config: Config, model: Model, words: Words, ngrams: Ngrams
) -> tuple[Model, list[dict[str, Any]]]:
    """Trains, and returns the model with the reports. The memory of the model given is reused."""
    train_step = make_step(config)
    opt_state = make_optimizer(config).init(eqx.filter(model, eqx.is_inexact_array))
    metrics, losses, seconds, began = [], [], [], time.perf_counter()
    bar = tqdm(zip(range(config.steps), batches(config, words, ngrams)), total=config.steps)
    for step, batch in bar:
        loss, model, opt_state = train_step(batch, model, opt_state)
        losses.append(float(loss))
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            require_finite(*losses)
            # The median, because the first step includes compilation
            milliseconds = 1e3 * float(np.median(seconds))
            line = {"step": step + 1, "loss": sum(losses) / len(losses), "ms": milliseconds}
            metrics.append(line)
            bar.write("step {step}: loss {loss:.3f}, {ms:.1f} ms a step".format(**line))
            losses, seconds = [], []
    return model, metrics


# What it learned


def words_to_show(config: Config, words: Words) -> list[str]:
    """Stops the program with one line if --words has a word that has no vector."""
    if not config.words:
        if config.text is None:
            return [word for word in WORDS if word in words.names]
        return ([name for name in words.names if len(name) > 4] or words.names)[:8]
    chosen = [in_lower_case(word) for word in config.words]
    missing = [word for word in chosen if word not in words.names]
    if missing:
        raise SystemExit(
            f"the text does not have these --words {config.min_count} times: {' '.join(missing)}. "
            "Choose other words, or a smaller --min-count."
        )
    return list(dict.fromkeys(chosen))


@eqx.filter_jit
def vectors_of(model: Model, ngrams: Ngrams) -> Float[Array, "words embedding"]:
    """Of some words at a time: the rows of all their n-grams would take many times the memory."""
    return jax.lax.map(model.vectors, ngrams, batch_size=256)


def unit(vectors: Float[np.ndarray, "words embedding"]) -> Float[np.ndarray, "words embedding"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


def neighbours(
    vectors: Float[np.ndarray, "words embedding"], names: list[str], shown: list[str]
) -> dict[str, list[str]]:
    """The words whose vectors have the largest cosines with that of each word."""
    chosen = [names.index(word) for word in shown]
    cosines = unit(vectors)[chosen] @ unit(vectors).T
    cosines[range(len(chosen)), chosen] = -np.inf  # not the word itself
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(6, len(names) - 1)]
    return {word: [names[i] for i in row] for word, row in zip(shown, nearest)}


def as_text(vectors: Float[np.ndarray, "words embedding"], names: list[str]) -> str:
    """In the format of word2vec."""
    lines = [f"{len(names)} {vectors.shape[1]}"]
    for name, vector in zip(names, vectors):
        lines.append(" ".join([name, *(f"{value:.6g}" for value in vector)]))
    return "\n".join(lines) + "\n"


def main(config: Config) -> list[dict[str, Any]]:
    """Learns the vectors, and returns what metrics.jsonl says: a dict for each report."""
    keep_memory()
    find_all_devices()
    began = time.perf_counter()
    words = read_words(config)
    shown = words_to_show(config, words)
    with new_folder(config.out):
        ngrams = find_ngrams(words.names, config)
        print(f"{len(words.names):,} words, which occur {len(words.text):,} times")
        used = len(np.unique(ngrams.rows))
        size = config.embedding_size
        print(f"their n-grams have {used:,} of {config.rows:,} rows of {size} numbers")
        model = Model(config, len(words.names), jax.random.key(config.seed))
        before = np.asarray(vectors_of(model, ngrams))
        model, metrics = train(config, model, words, ngrams)
        vectors = np.asarray(vectors_of(model, ngrams))
        with np.errstate(over="ignore"):
            length = float(np.linalg.norm(vectors))
        require_finite(length, what="the length of the vectors")
        old, new = (neighbours(v, words.names, shown) for v in (before, vectors))
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        write_whole(config.out / "vectors.txt", as_text(vectors, words.names).encode())
        write_whole(config.out / "metrics.jsonl", lines.encode())
        losses = [(line["step"], line["loss"]) for line in metrics]
        picture = words_picture(losses, unit(vectors), words.names, new)
        write_whole(config.out / "words.png", picture)
    print("\nthe nearest words, before training and after:")
    for word in shown:
        print(f"{word}\n    before: {', '.join(old[word])}\n    after:  {', '.join(new[word])}")
    print(f"{config.steps} steps, {time.perf_counter() - began:.0f} s; see {config.out}")
    return metrics


if __name__ == "__main__":
    run_script(main, Config, __doc__)
