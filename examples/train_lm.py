"""Trains a small language model on text, with one table tied between its input and its output.

    python examples/train_lm.py
    python examples/train_lm.py --text FILE --out runs/mine
    python examples/train_lm.py --text FILE --out runs/mine --resume
    python examples/train_lm.py --tokenizer bpe --out runs/bpe
    python examples/train_lm.py --mesh.data 2 --mesh.model 2
    python examples/train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 0

Writes checkpoints, metrics.jsonl, loss.png, embedding.png and sample.txt to --out.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


if __name__ == "__main__":  # before the imports that take seconds
    from support.terminal import start_script

    start_script("stopped. If the run has a checkpoint, --resume continues from it.")

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PyTree
from tqdm import tqdm

from eqx_embedding import EmbeddingDecode


with install_import_hook(("support", "toy_transformer"), "beartype.beartype"):
    from support import results, text_data
    from support.checkpoints import check_identity, Checkpoints
    from support.memory import keep_memory
    from support.meshes import Devices, MeshConfig
    from support.processes import join
    from support.settings import require, require_finite
    from support.terminal import run_script
    from support.text_data import Text, Tokens
    from support.tokenizer import named_tokenizer, Tokenizer, train_bpe
    from toy_transformer import ModelConfig, Transformer


# Settings: each is an option of the command line.


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 3e-3
    """The peak learning rate of AdamW. A cosine schedule ends at a twentieth of it."""
    warmup: float = 0.1
    """The share of the steps over which the learning rate rises from zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and tables."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to this norm."""

    def __post_init__(self):
        require(self, "learning_rate", "clip_norm", above=0)
        require(self, "weight_decay", at_least=0)
        require(self, "warmup", at_least=0, below=1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    text: Path | None = None
    """A text file to learn from. None: the help topics that come with Python, 460 kB."""
    tokenizer: str = "bytes"
    """What a token is. bytes: a byte. bpe: byte pair encoding, trained on the training text.
    Or the path of a byte-level tokenizer.json, such as that of GPT-2."""
    vocab_size: int = 4096
    """The largest vocabulary of --tokenizer bpe, with the 256 bytes."""
    batch_size: int = 16
    """Sequences in a batch."""
    seed: int = 0
    """The seed of the initial parameters, the batches and the sample."""

    def __post_init__(self):
        require(self, "batch_size", above=0)
        require(self, "vocab_size", at_least=256)
        require(self, "seed", at_least=0, below=2**63)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    out: Path = Path("runs/train_lm")
    """The folder to write to."""
    resume: bool = False
    """Continue from the last checkpoint in --out."""
    steps: int = 1500
    """How many batches to train on. The learning rate follows them, also after --resume."""
    report_every: int = 150
    """Steps between two reports. Each measures the held-out loss, and writes a checkpoint and the
    pictures."""
    sample_length: int = 600
    """Tokens of text to write at the end."""
    temperature: float = 0.8
    """The temperature of that text: 0 takes the most likely token each time, 1 samples from the
    model's own probabilities."""

    def __post_init__(self):
        require(self, "steps", "report_every", above=0)
        require(self, "sample_length", "temperature", at_least=0)


@dataclasses.dataclass(frozen=True)
class Config:
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        parts, size = self.mesh.shape[0], self.data.batch_size
        if size % parts != 0:
            raise ValueError(f"--batch-size must be a multiple of --mesh.data {parts}, got {size}.")

    def identity(self, text: Text, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What must be the same in a run and in a checkpoint that it continues."""
        # without a name, it is trained on this text
        tokenizer_name = "bpe" if tokenizer is None else tokenizer.name
        parts = {"model": self.model, "optimizer": self.optimizer, "data": self.data}
        parts = {name: dataclasses.asdict(part) for name, part in parts.items()}
        return parts | {"data": parts["data"] | {"text": text.sha256, "tokenizer": tokenizer_name}}


# Data: random pieces of the training text, and the whole held-out text.


class Data(NamedTuple):
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens
    baselines: dict[str, float]

    def batch(self, config: Config, devices: Devices, step: int) -> Integer[Array, "batch length"]:
        """The batch of a step. Each device reads its part."""
        shape, seed = (config.data.batch_size, config.model.sequence_length + 1), config.data.seed

        def read(part: slice) -> Integer[np.ndarray, "part length"]:
            rows = text_data.random_windows(self.train.values, *shape, seed=(seed, step), part=part)
            return rows.astype(np.int32)

        return devices.batch(read, shape)

    def held_out_batches(self, config: Config, devices: Devices) -> tuple[Array, ...]:
        """Inputs, targets and weights that ask for each token of the held-out text once."""
        parts = config.mesh.shape[0]
        size = -(-32 // parts) * parts  # 32, or the next multiple of the parts of a batch
        length = config.model.sequence_length
        return tuple(
            devices.batch(lambda part, array=array: array[:, part], array.shape, axis=1)
            for array in text_data.windows(self.held_out.values, length, size)
        )


def make_data(config: Config, text: Text, tokenizer: Tokenizer) -> Data:
    train, held_out = text_data.tokenize(text, tokenizer, config.model.sequence_length)
    print(f"{text.name}: {len(text.train):,} bytes to learn from, {len(text.held_out):,} held out")
    if tokenizer.json is not None:
        length = 1 / train.per_byte
        print(f"{len(tokenizer.pieces):,} different tokens, of {length:.2f} bytes on average")
    return Data(tokenizer, train, held_out, text_data.baselines(text))


# Model and step


def make_optimizer(config: Config) -> optax.GradientTransformation:
    # In a table the decay reaches every row at every step, those of tokens that are not in the
    # batch included.
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.adamw(learning_rate(config), b2=0.99, weight_decay=config.optimizer.weight_decay),
    )


def learning_rate(config: Config) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.optimizer.learning_rate,
        warmup_steps=int(config.optimizer.warmup * config.run.steps),
        decay_steps=config.run.steps,
        end_value=config.optimizer.learning_rate / 20,
    )


def make_step(optimizer: optax.GradientTransformation, static: PyTree) -> Callable[..., Any]:
    # Donated arguments give their memory to the results: parameters exist once, not twice.
    @eqx.filter_jit(donate="all-except-first")
    def step(tokens: Integer[Array, "batch length"], params: PyTree, opt_state: PyTree):
        def loss(params: PyTree) -> Float[Array, ""]:
            return eqx.combine(params, static).loss(tokens[:, :-1], tokens[:, 1:])

        value, grads = eqx.filter_value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return value, eqx.apply_updates(params, updates), opt_state

    return step


# Loop


class Results(NamedTuple):
    model: Transformer
    metrics: list[dict[str, Any]]


def train(
    config: Config,
    data: Data,
    identity: dict[str, Any],
    devices: Devices,
    checkpoints: Checkpoints,
) -> Results:
    """Trains from the last checkpoint on, or from the start."""
    key = jax.random.split(jax.random.key(config.data.seed))[0]
    model = Transformer(len(data.tokenizer.pieces), config.model, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = make_optimizer(config)
    params, opt_state = devices.place((params, optimizer.init(params)))
    held_out, batch = data.held_out_batches(config, devices), data.batch(config, devices, 0)
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"{size:,} parameters, {batch[:, 1:].size:,} tokens a step")
    # Compiled before the first checkpoint, and not as a part of the first step, which is timed.
    train_step = make_step(optimizer, static)
    if not getattr(jax.config, "jax_disable_jit"):  # as in the debugger
        train_step = train_step.lower(batch, params, opt_state).compile()

    about = {"identity": identity, "tokenizer": data.tokenizer.json, "metrics": []}
    if config.run.resume:
        start, about, (params, opt_state) = checkpoints.restore(model=params, optimizer=opt_state)
        if about["metrics"]:  # perhaps the run ended before it wrote the last
            results.write_metrics(config.run.out, about["metrics"], data.baselines)
    else:
        start = 0
        checkpoints.save(start, about, model=params, optimizer=opt_state)
    losses, began = [], time.perf_counter()
    steps, hide = range(start, config.run.steps), config.mesh.process_id > 0
    bar = tqdm(steps, initial=start, total=config.run.steps, unit="step", disable=hide)
    for step in bar:
        batch = data.batch(config, devices, step)
        loss, params, opt_state = train_step(batch, params, opt_state)
        losses.append(float(loss))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
        if (step + 1) % config.run.report_every == 0 or step + 1 == config.run.steps:
            speed = len(losses) * batch[:, 1:].size / (time.perf_counter() - began)
            measured = evaluate(eqx.combine(params, static), *held_out)
            require_finite(*losses, float(measured[0]))  # before it replaces a good checkpoint
            line = report(data, step + 1, sum(losses) / len(losses), measured, speed)
            about = about | {"metrics": [*about["metrics"], line]}
            checkpoints.save(step + 1, about, model=params, optimizer=opt_state)
            results.write_metrics(config.run.out, about["metrics"], data.baselines)
            bar.write(results.as_text(line))
            losses, began = [], time.perf_counter()
    return Results(eqx.combine(devices.whole(params), static), about["metrics"])


# Report


@eqx.filter_jit
def evaluate(
    model: Transformer,
    inputs: Integer[Array, "batches batch sequence"],
    targets: Integer[Array, "batches batch sequence"],
    weights: Float[Array, "batches batch sequence"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean loss in nats per token, and the share of tokens that the model found most likely."""

    def sums(batch):
        inputs, targets, weights = batch
        loss, scores = EmbeddingDecode(model.tokens).cross_entropy(
            eqx.filter_vmap(model.hidden)(inputs),
            targets,
            weights=weights,
            reduction="sum",
            return_scores=True,
        )
        return loss, scores.is_top.sum()  # of tokens of weight 1: others are no hits

    losses, hits = jax.lax.map(sums, (inputs, targets, weights))  # one batch after the other
    return losses.sum() / weights.sum(), hits.sum() / weights.sum()


def report(
    data: Data, step: int, loss: float, measured: tuple[Array, Array], speed: float
) -> dict[str, Any]:
    """A line of metrics.jsonl. Losses are in nats per token; a bit is log(2) nats."""
    val_loss, val_accuracy = map(float, measured)
    return {
        "step": step,
        "train_loss": loss,
        "train_bits_per_byte": loss / math.log(2) * data.train.per_byte,
        "val_loss": val_loss,
        "val_bits_per_byte": val_loss / math.log(2) * data.held_out.per_byte,
        "val_accuracy": val_accuracy,
        "tokens_per_second": speed,
    }


def main(config: Config) -> list[dict[str, Any]]:
    """Trains, and returns what metrics.jsonl says: one dict for each report."""
    began, run = time.perf_counter(), config.run
    keep_memory()
    text, tokenizer = text_data.read_text(config.data.text), named_tokenizer(config.data.tokenizer)
    identity = config.identity(text, tokenizer)
    with contextlib.ExitStack() as stack:
        devices = stack.enter_context(join(config.mesh, identity, run))
        checkpoints = stack.enter_context(Checkpoints(run.out, exists=run.resume))
        stack.enter_context(devices.use())
        if run.resume:
            saved = checkpoints.about()
            check_identity(run.out, identity, saved["identity"])
            tokenizer = Tokenizer(saved["tokenizer"])
        tokenizer = tokenizer or train_bpe(text.train.tobytes(), config.data.vocab_size)
        data = make_data(config, text, tokenizer)
        checkpoints.claim()
        model, metrics = train(config, data, identity, devices, checkpoints)
        results.write_embeddings(run.out, model, tokenizer, data.train.values)
        prompt = data.held_out.values[: max(1, config.model.sequence_length // 2)]
        key = jax.random.split(jax.random.key(config.data.seed))[1]
        results.write_sample(run, model, tokenizer, prompt, key)
        print(f"held out: {results.as_bits(metrics[-1], data.baselines)}")
        print(f"{metrics[-1]['step']} steps, {time.perf_counter() - began:.0f} s; see {run.out}")
    return metrics


if __name__ == "__main__":
    run_script(main, Config, __doc__)
