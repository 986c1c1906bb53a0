"""Tunes a model that train_lm.py has trained towards a reward, here for words in lower case.

    python examples/train_lm.py
    python examples/policy_gradient.py --run runs/train_lm
    python examples/generate.py --run runs/policy_gradient

The model writes texts, `reward` scores them, and a clipped policy gradient makes those above the
mean more likely. The divergence from the original model is part of the loss, so that the model does
not forget how to write.

Writes policy_gradient.png, metrics.jsonl and a checkpoint to --out. generate.py can read the
checkpoint.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any


if __name__ == "__main__":  # before the imports that take seconds
    from support.terminal import start_script

    start_script("stopped. The original run was not changed.")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, install_import_hook, Integer, PRNGKeyArray, PyTree
from tqdm import tqdm

from eqx_embedding import EmbeddingDecode, TokenScores


with install_import_hook(("support", "generate", "toy_transformer"), "beartype.beartype"):
    from generate import load
    from support.checkpoints import Checkpoints
    from support.folder import write_whole
    from support.generation import empty_caches, extend, sample
    from support.memory import keep_memory
    from support.pictures import curves_picture
    from support.settings import require
    from support.terminal import run_script
    from support.text_data import random_windows, read_text_of, tokenize
    from support.tokenizer import Tokenizer
    from toy_transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """The model and its tuning."""

    run: Path
    """The folder of a run: the --out of train_lm.py."""
    out: Path = Path("runs/policy_gradient")
    """The folder to write to."""
    text: Path | None = None
    """The text of the run, for the prompts. None: the help topics that come with Python."""
    prompt_length: int = 16
    """Tokens in a prompt. The model continues it until its positions are used up."""

    iterations: int = 100
    """How often the model writes texts and learns from them."""
    batch_size: int = 64
    """Texts that the model writes in each iteration."""
    updates: int = 2
    """Gradient steps on the texts of an iteration."""
    clip: float = 0.2
    """In an iteration, a probability may change by a factor of 1 - clip to 1 + clip."""
    divergence_weight: float = 0.2
    """The weight in the loss of the divergence from the original model, in nats per token."""
    learning_rate: float = 3e-4
    """Of Adam."""
    sample_length: int = 400
    """Tokens of text to show, before and after."""
    seed: int = 0
    """The seed of the prompts and of the sampled tokens."""

    def __post_init__(self):
        require(self, "prompt_length", "iterations", "updates", "clip", "learning_rate", above=0)
        require(self, "batch_size", above=1)
        require(self, "divergence_weight", "sample_length", at_least=0)
        require(self, "seed", at_least=0, below=2**63)


def reward(text: bytes) -> float:
    """The share of a text that is words in lower case, each with one space.

    Replace it with your own reward.
    """
    words = [word for word in text.split() if word.isalpha() and word.islower()]
    return sum(len(word) + 1 for word in words) / (len(text) + 1)


@eqx.filter_jit
def write(
    model: Transformer, prompts: Integer[Array, "batch prompt"], key: PRNGKeyArray
) -> tuple[Integer[Array, "batch sequence"], Float[Array, "batch written"]]:
    """Prompts and what the model writes after them, and the log-probabilities of the latter."""
    decode = EmbeddingDecode(model.tokens)
    encode = eqx.filter_vmap(extend, in_axes=(None, 0, None, 0))
    start, length = prompts.shape[1], model.positions.vocab_size

    def write_token(carry: PyTree, position_and_key: PyTree):
        (hidden, caches), (position, key) = carry, position_and_key
        tokens = decode.sample(hidden, key=key)
        log_probs = decode.score(hidden, tokens).log_prob
        hidden, caches = encode(model, tokens[:, None], position, caches)
        return (hidden[:, -1], caches), (tokens, log_probs)

    caches = [jnp.repeat(cache[None], len(prompts), axis=0) for cache in empty_caches(model)]
    hidden, caches = encode(model, prompts, jnp.asarray(0), caches)
    steps = jnp.arange(start, length), jax.random.split(key, length - start)
    _, (tokens, log_probs) = jax.lax.scan(write_token, (hidden[:, -1], caches), steps)
    return jnp.concatenate([prompts, tokens.T], axis=1), log_probs.T


def tuning_loss(
    model: Transformer,
    start: Transformer,
    config: Config,
    texts: Integer[Array, "batch sequence"],
    advantages: Float[Array, "batch written"],
    old_log_probs: Float[Array, "batch written"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss of what was written, and the divergence from `start` that is part of it."""

    def policy_gradient(scores: TokenScores, advantage: Array, old_log_prob: Array) -> Array:
        ratio = jnp.exp(scores.log_prob - old_log_prob)
        clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
        return -jnp.minimum(ratio * advantage, clipped * advantage)

    prompt = config.prompt_length
    hidden, start_hidden = (
        eqx.filter_vmap(m.hidden)(texts[:, :-1])[:, prompt - 1 :] for m in (model, start)
    )
    decode = EmbeddingDecode(model.tokens)
    loss = decode.token_loss(policy_gradient, hidden, texts[:, prompt:], advantages, old_log_probs)
    divergence = decode.divergence(
        hidden, EmbeddingDecode(start.tokens), start_hidden, kind="reverse"
    )
    return loss + config.divergence_weight * divergence, divergence


def judge(
    config: Config, tokenizer: Tokenizer, texts: Integer[Array, "batch sequence"]
) -> Float[np.ndarray, " batch"]:
    """The reward of what follows each prompt."""
    written = [tokenizer.decode(tokens) for tokens in np.asarray(texts)[:, config.prompt_length :]]
    rewards = [reward(text) for text in written]
    for found, text in zip(rewards, written, strict=True):
        if np.ndim(found) != 0 or not np.isfinite(np.float32(found)):
            raise SystemExit(f"`reward` must return a finite number, got {found} for {text!r}.")
    return np.array(rewards, "float32")


def tune(
    config: Config, start: Transformer, tokenizer: Tokenizer, values: Integer[np.ndarray, " tokens"]
) -> tuple[Transformer, list[dict[str, Any]]]:
    """The tuned model, and the reward and the divergence at each iteration."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    model, opt_state = start, optimizer.init(eqx.filter(start, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(model: Transformer, opt_state: PyTree, start: Transformer, *data: Array):
        loss = eqx.filter_value_and_grad(tuning_loss, has_aux=True)
        (_, divergence), grads = loss(model, start, config, *data)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, divergence

    measure, metrics = eqx.filter_jit(tuning_loss), []
    for iteration in (bar := tqdm(range(config.iterations), unit="iteration")):
        prompts = make_prompts(config, values, iteration)
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)
        texts, log_probs = write(model, prompts, key)
        rewards = judge(config, tokenizer, texts)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        advantages = jnp.broadcast_to(advantages[:, None], log_probs.shape)
        divergences, data = [], (texts, advantages, log_probs)
        for _ in range(config.updates):
            model, opt_state, divergence = update(model, opt_state, start, *data)
            divergences.append(float(divergence))
        if iteration + 1 == config.iterations:  # the last update is measured as well
            divergences.append(float(measure(model, start, config, *data)[1]))
        if not np.isfinite(divergences).all():
            raise SystemExit(
                "the logits are NaN: try a lower --learning-rate or --divergence-weight."
            )
        # The first one is of the model that wrote the texts.
        line = {"reward": float(rewards.mean()), "divergence": divergences[0]}
        metrics.append({"iteration": iteration} | line)
        bar.set_postfix(line)
    return model, metrics


def make_prompts(
    config: Config, values: Integer[np.ndarray, " tokens"], iteration: int
) -> Integer[Array, "batch prompt"]:
    shape, seed = (config.batch_size, config.prompt_length), (config.seed, iteration)
    return jnp.asarray(random_windows(values, *shape, seed=seed), "int32")


def show(
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    held_out: Integer[np.ndarray, " tokens"],
) -> float:
    """Prints what the model writes after a held-out prompt, and returns its mean reward on many."""
    key = jax.random.key(config.seed)
    tokens = sample(model, held_out[: config.prompt_length], config.sample_length, 1.0, key=key)
    print(tokenizer.decode(np.fromiter(tokens, np.int32)).decode(errors="replace"))
    texts, _ = write(model, make_prompts(config, held_out, 0), key)
    return float(judge(config, tokenizer, texts).mean())


def main(config: Config) -> list[dict[str, Any]]:
    """Tunes, and returns what metrics.jsonl says: one dict for each iteration."""
    keep_memory()
    start, tokenizer, identity = load(config.run)
    length = start.positions.vocab_size
    if config.prompt_length >= length:
        raise SystemExit(f"--prompt-length must be below the {length} positions of {config.run}.")
    with Checkpoints(config.out, exists=False) as out:
        text = read_text_of(config.run, identity, config.text)
        train_text, held_out = tokenize(text, tokenizer, length)
        out.claim()
        model, metrics = tune(config, start, tokenizer, train_text.values)
        identity["script"] = "policy_gradient.py"  # so that train_lm.py does not --resume here
        about = {"identity": identity, "tokenizer": tokenizer.json, "metrics": []}
        out.save(config.iterations, about, model=eqx.filter(model, eqx.is_inexact_array))
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        write_whole(config.out / "metrics.jsonl", lines.encode())
        write_whole(config.out / "policy_gradient.png", draw(metrics))
    rewards = []
    for title, shown in ("before", start), ("after", model):
        print(f"\n--- {title} ---")
        rewards.append(show(config, shown, tokenizer, held_out.values))
    print(f"\nreward {rewards[0]:.3f} before, {rewards[1]:.3f} after; see {config.out}")
    return metrics


def draw(metrics: list[dict[str, Any]]) -> bytes:
    labels = {"reward": "reward", "divergence": "divergence from the model before, nats per token"}
    panels = {
        label: {name: [(line["iteration"], line[name]) for line in metrics]}
        for name, label in labels.items()
    }
    return curves_picture("iteration", panels)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
