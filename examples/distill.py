"""Trains small students from a model that train_lm.py has trained, and from its text alone.

    python examples/train_lm.py
    python examples/distill.py --run runs/train_lm

The model is the teacher. Three students start with the same parameters and see the same batches.
One learns from the text, one from the teacher's probabilities of all tokens, and one from the few
largest of these, which are computed once and stored.

Writes distill.png, metrics.jsonl and a checkpoint of the second student to --out. generate.py can
read the checkpoint.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


if __name__ == "__main__":  # before the imports that take seconds
    from support.terminal import start_script

    start_script("stopped. The teacher's run was not changed.")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PyTree
from tqdm import tqdm

from eqx_embedding import EmbeddingDecode


with install_import_hook(("support", "generate", "toy_transformer"), "beartype.beartype"):
    from generate import load
    from support.checkpoints import Checkpoints
    from support.folder import write_whole
    from support.memory import keep_memory
    from support.pictures import Curves, curves_picture
    from support.settings import require, require_finite
    from support.terminal import run_script
    from support.text_data import read_text_of, tokenize, Tokens, windows
    from toy_transformer import ModelConfig, Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """The teacher, the students and their training."""

    run: Path
    """The folder of the teacher's run: the --out of train_lm.py."""
    out: Path = Path("runs/distill")
    """The folder to write to."""
    text: Path | None = None
    """The text of the run. None: the help topics that come with Python."""
    num_layers: int = 2
    """Blocks of attention and multilayer perceptron in a student."""
    num_heads: int = 2
    """Attention heads in each block."""
    embedding_size: int = 64
    """The size of an embedding, a multiple of --num-heads."""
    top_k: int = 8
    """How many of the teacher's largest probabilities are stored for each token of the batches."""

    steps: int = 2000
    """How many batches each student is trained on."""
    batch_size: int = 16
    """Sequences in a batch, each as long as those of the run."""
    learning_rate: float = 3e-3
    """The peak learning rate of AdamW. A cosine schedule ends at a twentieth of it."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and tables."""
    report_every: int = 250
    """Steps between two measurements on held-out text."""
    seed: int = 0
    """The seed of the students' parameters and of the batches."""

    def __post_init__(self):
        require(self, "top_k", "steps", "batch_size", "learning_rate", "report_every", above=0)
        require(self, "weight_decay", at_least=0)
        require(self, "seed", at_least=0, below=2**63)
        self.student(1)

    def student(self, sequence_length: int) -> ModelConfig:
        return ModelConfig(sequence_length, self.num_layers, self.num_heads, self.embedding_size)


class Batch(NamedTuple):
    inputs: Integer[Array, "batch sequence"]
    targets: Integer[Array, "batch sequence"]
    log_probs: Float[Array, "batch sequence k"]
    """The largest log-probabilities of the teacher for what follows each input."""
    likeliest: Integer[Array, "batch sequence k"]
    """The tokens that have them."""


def draw_batches(
    config: Config, num_tokens: int, length: int
) -> tuple[Integer[np.ndarray, " sequences"], Integer[np.ndarray, "steps batch"]]:
    """Where the sequences begin that students see, and which of these are in each batch."""
    starts = np.arange(0, num_tokens - length, length)
    steps = (np.random.default_rng((config.seed, step)) for step in range(config.steps))
    rows = np.stack([random.integers(0, len(starts), config.batch_size) for random in steps])
    seen, places = np.unique(rows, return_inverse=True)
    return starts[seen], places.reshape(rows.shape)


def with_top_k(
    teacher: Transformer,
    values: Integer[np.ndarray, " tokens"],
    starts: Integer[np.ndarray, " sequences"],
    k: int,
) -> Batch:
    """Sequences of the text, with the largest log-probabilities of the teacher for each token."""
    places = starts[:, None] + np.arange(teacher.positions.vocab_size)
    inputs, targets = (jnp.asarray(values[places + shift], "int32") for shift in (0, 1))

    @jax.jit
    def store(teacher: Transformer, inputs: Integer[Array, "count sequence"]):
        def top_k(tokens: Integer[Array, " sequence"]):
            return EmbeddingDecode(teacher.tokens).top_k(teacher.hidden(tokens), k)

        return jax.lax.map(top_k, inputs, batch_size=64)

    return Batch(inputs, targets, *store(teacher, inputs))


# What a student may learn from. The teacher stays as it is.


def from_text(student: Transformer, teacher: Transformer, batch: Batch) -> Float[Array, ""]:
    return student.loss(batch.inputs, batch.targets)


def from_teacher(student: Transformer, teacher: Transformer, batch: Batch) -> Float[Array, ""]:
    hidden, teacher_hidden = (eqx.filter_vmap(m.hidden)(batch.inputs) for m in (student, teacher))
    decode = EmbeddingDecode(student.tokens)
    return decode.divergence(hidden, EmbeddingDecode(teacher.tokens), teacher_hidden)


def from_stored(student: Transformer, teacher: Transformer, batch: Batch) -> Float[Array, ""]:
    """Soft targets. The probability that was not stored goes to the token in the text."""
    probs = jnp.exp(batch.log_probs)
    rest = 1 - jnp.sum(probs, axis=-1, keepdims=True)
    return EmbeddingDecode(student.tokens).cross_entropy(
        eqx.filter_vmap(student.hidden)(batch.inputs),
        jnp.concatenate([batch.likeliest, batch.targets[..., None]], axis=-1),
        target_weights=jnp.concatenate([probs, rest], axis=-1),
    )


Loss = Callable[[Transformer, Transformer, Batch], Float[Array, ""]]
LOSSES: dict[str, Loss] = {
    "text": from_text,
    "divergence": from_teacher,
    "stored top-k": from_stored,
}


@eqx.filter_jit
def measure(
    student: Transformer,
    teacher: Transformer,
    inputs: Integer[Array, "batches batch sequence"],
    targets: Integer[Array, "batches batch sequence"],
    weights: Float[Array, "batches batch sequence"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean loss of a student, and its divergence from the teacher, in nats per token."""

    def sums(batch):
        inputs, targets, weights = batch
        decode, of_teacher = EmbeddingDecode(student.tokens), EmbeddingDecode(teacher.tokens)
        hidden, teacher_hidden = (eqx.filter_vmap(m.hidden)(inputs) for m in (student, teacher))
        options = {"weights": weights, "reduction": "sum"}
        loss = decode.cross_entropy(hidden, targets, **options)
        return loss, decode.divergence(hidden, of_teacher, teacher_hidden, **options)

    losses, divergences = jax.lax.map(sums, (inputs, targets, weights))
    return losses.sum() / weights.sum(), divergences.sum() / weights.sum()


def report(
    name: str, step: int, model: Transformer, teacher: Transformer, held_out: Tokens
) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    batches = windows(held_out.values, teacher.positions.vocab_size, batch_size=32)
    loss, divergence = map(float, measure(model, teacher, *map(jnp.asarray, batches)))
    bits = loss / math.log(2) * held_out.per_byte
    return {"model": name, "step": step, "bits_per_byte": bits, "divergence": divergence}


def make_optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps, config.learning_rate / 20
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay),
    )


def train(
    config: Config,
    name: str,
    student: Transformer,
    teacher: Transformer,
    text: Batch,
    batches: Integer[np.ndarray, "steps batch"],
    held_out: Tokens,
) -> tuple[Transformer, list[dict[str, Any]]]:
    """Trains a student by the loss of this name, and returns it with its reports."""
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(eqx.filter(student, eqx.is_inexact_array))

    @eqx.filter_jit
    def train_step(student: Transformer, opt_state: PyTree, teacher: Transformer, batch: Batch):
        value, grads = eqx.filter_value_and_grad(LOSSES[name])(student, teacher, batch)
        params = eqx.filter(student, eqx.is_inexact_array)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return value, eqx.apply_updates(student, updates), opt_state

    reports = []
    bar = tqdm(batches, unit="step", desc=name)
    for step, rows in enumerate(bar):
        batch = Batch(*(array[rows] for array in text))
        loss, student, opt_state = train_step(student, opt_state, teacher, batch)
        bar.set_postfix_str(f"loss {float(loss):.3f}")
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            reports.append(report(f"student, {name}", step + 1, student, teacher, held_out))
            require_finite(float(loss), reports[-1]["bits_per_byte"], reports[-1]["divergence"])
            line = "{model}: step {step}, held out {bits_per_byte:.3f} bits per byte"
            bar.write(line.format(**reports[-1]))
    return student, reports


def draw(config: Config, teacher: dict[str, Any], reports: list[dict[str, Any]]) -> bytes:
    labels = {
        "bits_per_byte": "bits per byte of held-out text",
        "divergence": "divergence from the teacher, nats per token",
    }
    curves: dict[str, Curves] = {label: {} for label in labels.values()}
    for line in [teacher, teacher | {"step": config.steps}, *reports]:
        for key, label in labels.items():
            curves[label].setdefault(line["model"], []).append((line["step"], line[key]))
    return curves_picture("step", curves)


def main(config: Config) -> list[dict[str, Any]]:
    """Trains the students, and returns what metrics.jsonl says: the teacher, then each report."""
    keep_memory()
    teacher, tokenizer, identity = load(config.run)
    vocab_size, length = len(tokenizer.pieces), teacher.positions.vocab_size
    if config.top_k > vocab_size:
        raise SystemExit(f"--top-k must be at most the {vocab_size} tokens of {config.run}.")
    with Checkpoints(config.out, exists=False) as out:
        text = read_text_of(config.run, identity, config.text)
        train_text, held_out = tokenize(text, tokenizer, length)
        out.claim()
        print("the teacher reads the batches, and its largest probabilities are stored")
        starts, batches = draw_batches(config, len(train_text.values), length)
        data = with_top_k(teacher, train_text.values, starts, config.top_k)
        share = float(jnp.exp(data.log_probs).sum(axis=-1).mean())
        print(f"{config.top_k} for each token, which add up to {share:.3f} on average")
        student_config = config.student(length)
        untrained = Transformer(vocab_size, student_config, key=jax.random.key(config.seed))
        students, reports = {}, [report("teacher", 0, teacher, teacher, held_out)]
        for name in LOSSES:
            students[name], lines = train(config, name, untrained, teacher, data, batches, held_out)
            reports += lines

        identity["model"] = dataclasses.asdict(student_config)
        identity["script"] = "distill.py"  # so that train_lm.py does not --resume here
        about = {"identity": identity, "tokenizer": tokenizer.json, "metrics": []}
        out.save(
            config.steps, about, model=eqx.filter(students["divergence"], eqx.is_inexact_array)
        )
        lines = "".join(json.dumps(line) + "\n" for line in reports)
        write_whole(config.out / "metrics.jsonl", lines.encode())
        write_whole(config.out / "distill.png", draw(config, reports[0], reports[1:]))
    print("\nheld-out bits per byte, and divergence from the teacher in nats per token:")
    for line in reports:
        if line["model"] == "teacher" or line["step"] == config.steps:
            print("{bits_per_byte:8.3f} {divergence:8.3f}   {model}".format(**line))
    print(f"see {config.out}")
    return reports


if __name__ == "__main__":
    run_script(main, Config, __doc__)
