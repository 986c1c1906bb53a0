"""Trains a small language model on text, with one table tied between its input and its output.

    python examples/train_lm.py
    python examples/train_lm.py --text FILE --out runs/mine
    python examples/train_lm.py --text FILE --out runs/mine --resume
    python examples/train_lm.py --tokenizer bpe --out runs/bpe
    python examples/train_lm.py --mesh.data 2 --mesh.model 2
    python examples/train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 0

Writes checkpoints, metrics.jsonl, loss.png, embedding.png and sample.txt to --out.
"""

import ctypes
import dataclasses
import json
import math
import operator
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PyTree
from tqdm import tqdm


CHECKED = ("checkpoints", "devices", "pictures", "processes", "text_data")
CHECKED += ("tokenizer", "toy_transformer")
with install_import_hook(CHECKED, "beartype.beartype"):
    from checkpoints import check_identity, Checkpoints, write_whole
    from command_line import from_command_line, require
    from devices import Devices, find_devices, MeshSize
    from pictures import embedding_picture, loss_picture
    from processes import together
    from text_data import baselines, random_windows, read_text, Text, tokenize, Tokens, windows
    from tokenizer import read_tokenizer, Tokenizer, train_bpe
    from toy_transformer import ROWS_MULTIPLE, Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    text: Path | None = None
    """A file to learn from. None: the help topics that come with Python, 460 kB."""
    out: Path = Path("runs/train_lm")
    """The folder to write to."""
    resume: bool = False
    """Continue from the last checkpoint in --out."""
    tokenizer: str = "bytes"
    """What a token is. bytes: a byte. bpe: what byte pair encoding finds in the training text.
    Or the path of a byte-level tokenizer.json, such as that of GPT-2."""
    vocab_size: int = 4096
    """How many different tokens --tokenizer bpe makes at most, the 256 bytes included."""

    steps: int = 1500
    """How many batches to train on."""
    batch_size: int = 16
    """Sequences in a batch."""
    sequence_length: int = 64
    """Tokens in a sequence: how far the model looks back."""

    num_layers: int = 4
    """Blocks of attention and multilayer perceptron."""
    num_heads: int = 4
    """Heads of each attention."""
    embedding_size: int = 128
    """The size of an embedding, a multiple of --num-heads."""

    learning_rate: float = 3e-3
    """The highest learning rate of AdamW. It falls along a cosine, to a twentieth."""
    warmup: float = 0.1
    """The share of the steps over which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and tables."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to this one."""

    report_every: int = 150
    """Steps between two reports, each with held-out loss, picture and checkpoint."""
    sample_length: int = 600
    """Tokens of text to write at the end."""
    temperature: float = 0.8
    """For that text: 0 for the likeliest token each time, 1 for the model's own probabilities."""
    seed: int = 0
    """The seed of the initial parameters, the batches and the sample."""

    mesh: MeshSize = MeshSize()
    """How many devices train together. Without accelerators, the CPU acts as all of them."""
    coordinator: str | None = None
    """HOST:PORT of process 0, with a free port, to train in several processes that share --out."""
    num_processes: int = 1
    """How many processes there are. Each has the same number of devices of the mesh."""
    process_id: int = 0
    """The number of this process, from 0."""

    def __post_init__(self):
        for name in ("weight_decay", "sample_length", "temperature", "seed"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        positive = ("steps", "batch_size", "sequence_length", "num_layers", "num_heads")
        positive += ("learning_rate", "clip_norm", "report_every", "mesh.model", "num_processes")
        for name in positive:
            require(self, name, operator.attrgetter(name)(self) > 0, "above 0")
        require(self, "vocab_size", self.vocab_size >= 256, "at least 256, the number of bytes")
        require(self, "warmup", 0 <= self.warmup < 1, "at least 0 and below 1")
        require(
            self,
            "embedding_size",
            self.embedding_size > 0 and self.embedding_size % self.num_heads == 0,
            f"a multiple of --num-heads {self.num_heads}",
        )
        require(self, "mesh.data", self.mesh.data >= 0, "at least 0")
        data, model, processes = self.mesh_size.data, self.mesh.model, self.num_processes
        require(
            self, "batch_size", self.batch_size % data == 0, f"a multiple of --mesh.data {data}"
        )
        divisor = f"a divisor of {ROWS_MULTIPLE}, as the table has a multiple of that many rows"
        require(self, "mesh.model", ROWS_MULTIPLE % model == 0, divisor)
        of_several = "above 1 if there is a --coordinator, and 1 if there is none"
        require(
            self, "num_processes", (processes > 1) == (self.coordinator is not None), of_several
        )
        require(
            self, "process_id", 0 <= self.process_id < processes, f"at least 0, below {processes}"
        )
        divided = f"such that --num-processes {processes} divides it times --mesh.model {model}"
        require(self, "mesh.data", self.mesh_size.devices % processes == 0, divided)
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            is_port = port.isdecimal() and 0 < int(port) < 2**16
            require(self, "coordinator", bool(host) and is_port, "HOST:PORT")

    @property
    def mesh_size(self) -> MeshSize:
        return dataclasses.replace(self.mesh, data=self.mesh.data or self.num_processes)

    def given_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that --tokenizer names, or None if it must be trained."""
        if self.tokenizer == "bpe":
            return None
        return Tokenizer() if self.tokenizer == "bytes" else read_tokenizer(Path(self.tokenizer))

    def identity(self, text: Text, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """The settings that must be those of a checkpoint to continue from it."""
        free = ("text", "out", "resume", "steps", "report_every", "sample_length", "temperature")
        free += ("mesh", "coordinator", "num_processes", "process_id")
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in free}
        name = f"bpe of {settings.pop('vocab_size')} tokens"
        settings["tokenizer"] = name if tokenizer is None else tokenizer.name
        return settings | {"text_sha256": text.sha256}


def learning_rate(config: Config) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=int(config.warmup * config.steps),
        decay_steps=config.steps,
        end_value=config.learning_rate / 20,
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    # The decay changes every row of a table at every step, also rows of tokens that are not in the
    # batch
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b2=0.99, weight_decay=config.weight_decay),
    )


def keep_memory() -> None:
    """Asks the C library to keep freed memory, if it is glibc.

    A step needs some 40 MB for activations. By default glibc returns them to the system after each
    step, and the system clears them page by page. That took a fifth of the time of a step on a CPU,
    as measured by `python -m benchmarks.train_step --default-memory`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
        mallopt(-4, 0)  # M_MMAP_MAX: large pieces are in the heap, too
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: memory below a gigabyte is not returned


def make_step(optimizer: optax.GradientTransformation, static: PyTree) -> Callable[..., Any]:
    # The results reuse the memory of donated arguments: parameters exist once, not twice
    @eqx.filter_jit(donate="all-except-first")
    def step(tokens: Integer[Array, "batch length"], params: PyTree, opt_state: PyTree):
        def loss(params: PyTree) -> Float[Array, ""]:
            return eqx.combine(params, static).loss(tokens[:, :-1], tokens[:, 1:])

        value, grads = eqx.filter_value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return value, eqx.apply_updates(params, updates), opt_state

    return step


def as_line(report: dict[str, Any]) -> str:
    return json.dumps(report) + "\n"


def main(config: Config) -> list[dict[str, Any]]:
    """Trains, and returns the lines of metrics.jsonl: one dict of losses for each report."""
    began = time.perf_counter()
    keep_memory()
    text = read_text(config.text)
    given = config.given_tokenizer()
    identity = config.identity(text, given)
    shared = {
        name: getattr(config, name) for name in ("steps", "report_every", "resume", "mesh_size")
    }
    shared["out"] = config.out.absolute()
    processes = config.coordinator, config.num_processes, config.process_id
    with together(*processes, identity | shared):
        devices = find_devices(config.mesh_size, config.num_processes)
        checkpoints = Checkpoints(config.out, config.resume)
        metrics = []
        if config.resume:
            saved = checkpoints.about()
            check_identity(config.out, identity, saved["identity"])
            tokenizer, metrics = Tokenizer(saved["tokenizer"]), saved["metrics"]
        else:
            tokenizer = given or train_bpe(text.train.tobytes(), config.vocab_size)
        about = {"identity": identity, "tokenizer": tokenizer.json, "metrics": metrics}
        parts = tokenize(text, tokenizer, config.sequence_length)
        reference = baselines(text)
        print(
            f"{text.name}: {len(text.train):,} bytes to learn from, {len(text.held_out):,} held out"
        )
        if config.tokenizer != "bytes":
            length = 1 / parts[0].per_byte
            print(f"{len(tokenizer.pieces):,} different tokens, of {length:.2f} bytes on average")
        with devices.use():
            vocab_size = len(tokenizer.pieces)
            model = train(config, devices, checkpoints, about, vocab_size, parts, reference)
        if config.process_id == 0:
            write_results(config, model, tokenizer, *parts)
        others = ", ".join(f"{name} {value:.2f}" for name, value in reference.items())
        print(f"held out: {metrics[-1]['val_bits_per_byte']:.3f} bits per byte ({others})")
        print(f"{config.steps} steps, {time.perf_counter() - began:.0f} s; see {config.out}")
    return metrics


def train(
    config: Config,
    devices: Devices,
    checkpoints: Checkpoints,
    about: dict[str, Any],
    vocab_size: int,
    parts: tuple[Tokens, Tokens],
    reference: dict[str, float],
) -> Transformer:
    """Trains from the last checkpoint on, and adds its reports to the metrics in `about`."""
    (train, held_out), metrics = parts, about["metrics"]
    model = Transformer(
        vocab_size=vocab_size,
        sequence_length=config.sequence_length,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        embedding_size=config.embedding_size,
        key=jax.random.split(jax.random.key(config.seed))[0],
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = make_optimizer(config)
    params, opt_state = devices.place((params, optimizer.init(params)))
    start = checkpoints.last_step
    if config.resume:
        params, opt_state = checkpoints.trees(model=params, optimizer=opt_state)
    else:
        checkpoints.save(start, about, model=params, optimizer=opt_state)

    count = -(-32 // config.mesh_size.data) * config.mesh_size.data
    held_out_batches = jax.tree.map(
        lambda array: devices.batch(lambda part: array[:, part], array.shape, axis=1),
        windows(held_out.values, config.sequence_length, batch_size=count),
    )
    shape = (config.batch_size, config.sequence_length + 1)

    def batch(step: int) -> Integer[Array, "batch length"]:
        def read(part: slice) -> Integer[np.ndarray, "part length"]:
            rows = random_windows(train.values, *shape, seed=(config.seed, step), part=part)
            return rows.astype(np.int32)

        return devices.batch(read, shape)

    tokens_per_step = config.batch_size * config.sequence_length
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, {tokens_per_step:,} tokens a step")
    train_step = make_step(optimizer, static).lower(batch(start), params, opt_state).compile()

    losses, seconds = [], 0.0
    steps = range(start, config.steps)
    first = config.process_id == 0
    bar = tqdm(steps, initial=start, total=config.steps, unit="step", disable=not first)
    for step in bar:
        began = time.perf_counter()
        loss, params, opt_state = train_step(batch(step), params, opt_state)
        losses.append(float(loss))
        seconds += time.perf_counter() - began
        rate = len(losses) * tokens_per_step / seconds
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            train_loss = sum(losses) / len(losses)
            val_loss = float(eqx.combine(params, static).mean_loss(*held_out_batches))
            metrics.append(
                {
                    "step": step + 1,
                    "train_loss": train_loss,
                    "train_bits_per_byte": train_loss / math.log(2) * train.per_byte,
                    "val_loss": val_loss,
                    "val_bits_per_byte": val_loss / math.log(2) * held_out.per_byte,
                    "tokens_per_second": rate,
                }
            )
            checkpoints.save(step + 1, about, model=params, optimizer=opt_state)
            if first:
                write_whole(config.out / "metrics.jsonl", "".join(map(as_line, metrics)).encode())
                write_whole(config.out / "loss.png", loss_picture(metrics, reference))
            bar.write(
                "step {step}: train {train_loss:.3f} nats, held out {val_loss:.3f} nats, "
                "{val_bits_per_byte:.3f} bits per byte".format(**metrics[-1])
            )
            losses, seconds = [], 0.0
    checkpoints.finish()
    return eqx.combine(devices.whole(params), static)


def write_results(
    config: Config, model: Transformer, tokenizer: Tokenizer, train: Tokens, held_out: Tokens
) -> None:
    """Draws the table, and writes and prints a sample of text."""
    size = model.tokens.vocab_size
    counts = np.bincount(train.values, minlength=size)
    picture = embedding_picture(
        np.asarray(model.tokens.embeddings)[:size], counts, tokenizer.pieces
    )
    write_whole(config.out / "embedding.png", picture)
    prompt = held_out.values[: max(1, config.sequence_length // 2)]
    key = jax.random.split(jax.random.key(config.seed))[1]
    sample = model.sample(prompt, config.sample_length, config.temperature, key=key)
    written = tokenizer.decode(prompt) + b"|" + tokenizer.decode(np.fromiter(sample, np.int32))
    write_whole(config.out / "sample.txt", written)
    print(f"\n{written.decode(errors='replace')}\n")
    print("The text before the bar is held-out text. The model wrote the rest.\n")


if __name__ == "__main__":
    try:
        main(from_command_line(Config, __doc__))
    except KeyboardInterrupt:
        print(
            "\nstopped. --resume continues from the last checkpoint.", file=sys.stderr, flush=True
        )
        os._exit(1)  # Python's own exit would report an unfinished checkpoint
