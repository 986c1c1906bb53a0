"""Continues a text with a model that train_lm.py has trained.

    python examples/generate.py --run runs/train_lm --prompt "The "
    python examples/generate.py --run runs/bpe --temperature 0.5 --top-k 10
    python examples/generate.py --run runs/bpe --temperature 1 --top-p 0.9

Prints the text while it is generated.
"""

import codecs
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple


if __name__ == "__main__":  # before the imports that take seconds
    from support.terminal import start_script

    start_script("stopped.")

import equinox as eqx
import jax
from jaxtyping import install_import_hook


with install_import_hook(("support", "toy_transformer"), "beartype.beartype"):
    from support.checkpoints import Checkpoints
    from support.generation import sample
    from support.settings import require
    from support.terminal import run_script
    from support.tokenizer import Tokenizer
    from toy_transformer import ModelConfig, Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """What to continue, and how to sample."""

    run: Path
    """The folder of a run: the --out of train_lm.py."""
    prompt: str = ""
    """The text to continue. If it is empty, the text begins after a line break."""
    length: int = 600
    """How many tokens to write."""
    temperature: float = 0.8
    """0 takes the most likely token each time, 1 samples from the model's own probabilities."""
    top_k: int | None = None
    """Sample from this many most likely tokens. None: from all tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens that together have this probability, among the --top-k most
    likely tokens, or 1024 without --top-k. 1: from all of these. None: no nucleus sampling."""
    cache: bool = True
    """Cache the keys and values of earlier tokens. Without it, the same text takes longer."""
    seed: int = 0
    """The seed of the sampled tokens."""

    def __post_init__(self):
        require(self, "length", "temperature", at_least=0)
        require(self, "seed", at_least=0, below=2**63)
        if self.top_k is not None:
            require(self, "top_k", above=0)
        if self.top_p is not None:
            require(self, "top_p", above=0, at_most=1)


class Trained(NamedTuple):
    model: Transformer
    tokenizer: Tokenizer
    identity: dict[str, Any]
    """The settings of the run, and the digest of its text."""


def load(run: Path) -> Trained:
    """What the last checkpoint in the folder `run` holds."""
    with Checkpoints(run, exists=True, reads_only=True) as checkpoints:
        about = checkpoints.about()
        tokenizer, config = Tokenizer(about["tokenizer"]), about["identity"]["model"]
        key = jax.random.key(0)
        try:
            model = Transformer(len(tokenizer.pieces), ModelConfig(**config), key=key)
        except TypeError as error:
            raise SystemExit(f"{run} is of another version of these scripts: {error}.") from None
        params, static = eqx.partition(model, eqx.is_inexact_array)
        _, _, (params,) = checkpoints.restore(model=params)
    return Trained(eqx.combine(params, static), tokenizer, about["identity"])


def main(config: Config) -> None:
    """Prints the prompt and its continuation."""
    model, tokenizer, _ = load(config.run)
    prompt = config.prompt.encode(errors="surrogateescape")
    beginning = prompt or b"\n"
    tokens = tokenizer.encode(beginning)
    if tokenizer.decode(tokens) != beginning:
        what = repr(config.prompt) if prompt else "a line break"
        raise SystemExit(f"the tokenizer of {config.run} cannot spell {what}.")
    # A character may be split over tokens: it is printed when it is whole.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(decoder.decode(prompt), end="", flush=True)
    for token in sample(
        model,
        tokens,
        config.length,
        config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        cache=config.cache,
        key=jax.random.key(config.seed),
    ):
        print(decoder.decode(tokenizer.pieces[token]), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
