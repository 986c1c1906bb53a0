"""The files that a run leaves beside its checkpoints: metrics, pictures, a sample of text."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer, PRNGKeyArray
from toy_transformer import Transformer

from support.folder import write_whole
from support.generation import sample
from support.pictures import embedding_picture, loss_picture
from support.tokenizer import Tokenizer


def as_text(line: dict[str, Any]) -> str:
    return (
        "step {step}: train {train_loss:.3f} nats, held out {val_loss:.3f} nats, "
        "{val_bits_per_byte:.3f} bits per byte, {val_accuracy:.1%} of tokens right"
    ).format(**line)


def as_bits(line: dict[str, Any], baselines: dict[str, float]) -> str:
    others = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items())
    return f"{line['val_bits_per_byte']:.3f} bits per byte ({others})"


def write_metrics(out: Path, metrics: list[dict[str, Any]], baselines: dict[str, float]) -> None:
    if jax.process_index() == 0:
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        write_whole(out / "metrics.jsonl", lines.encode())
        write_whole(out / "loss.png", loss_picture(metrics, baselines))


def write_embeddings(
    out: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    tokens: Integer[np.ndarray, " tokens"],
) -> None:
    """Draws the table. `tokens` are the training text."""
    if jax.process_index() == 0:
        size = model.tokens.vocab_size
        counts = np.bincount(tokens, minlength=size)
        rows = np.asarray(model.tokens.embeddings)[:size]
        picture = embedding_picture(rows, counts, tokenizer.pieces)
        write_whole(out / "embedding.png", picture)


def write_sample(
    run: Any,
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Integer[np.ndarray, " prompt"],
    key: PRNGKeyArray,
) -> None:
    """Writes and prints a continuation of `prompt`, by the settings of the run."""
    if jax.process_index() == 0:
        tokens = sample(model, prompt, run.sample_length, run.temperature, key=key)
        written = tokenizer.decode(prompt) + b"|" + tokenizer.decode(np.fromiter(tokens, np.int32))
        write_whole(run.out / "sample.txt", written)
        print(f"\n{written.decode(errors='replace')}\n")
        print("Up to the bar (|), this is held-out text. The rest is from the model.\n")
