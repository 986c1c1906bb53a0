"""Continues a text with a model that train_lm.py has trained.

    python examples/generate.py --run runs/train_lm --prompt "The "
    python examples/generate.py --run runs/bpe --temperature 0.5 --top-k 10

Prints the text while it is generated.
"""

import codecs
import dataclasses
import os
from pathlib import Path

import equinox as eqx
import jax
from jaxtyping import install_import_hook


with install_import_hook(("checkpoints", "tokenizer", "toy_transformer"), "beartype.beartype"):
    from checkpoints import Checkpoints
    from command_line import from_command_line, require
    from tokenizer import Tokenizer
    from toy_transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Config:
    """What to continue, and how."""

    run: Path
    """The folder of a run: the --out of train_lm.py."""
    prompt: str = ""
    """The text to continue. An empty one begins after a line break."""
    length: int = 600
    """Tokens of text to write."""
    temperature: float = 0.8
    """0 for the likeliest token each time, 1 for the model's own probabilities."""
    top_k: int | None = None
    """Choose among this many of the likeliest tokens. None: among all."""
    cache: bool = True
    """Keep the keys and values of earlier tokens. Without, the same text takes longer."""
    seed: int = 0
    """The seed of the random choices."""

    def __post_init__(self):
        for name in ("length", "temperature", "seed"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        require(self, "top_k", self.top_k is None or self.top_k > 0, "at least 1")


def load(run: Path) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of the last checkpoint in the folder `run`."""
    checkpoints = Checkpoints(run, exists=True)
    about = checkpoints.about()
    tokenizer = Tokenizer(about["tokenizer"])
    sizes = ("sequence_length", "num_layers", "num_heads", "embedding_size")
    model = Transformer(
        len(tokenizer.pieces), **{k: about["identity"][k] for k in sizes}, key=jax.random.key(0)
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    (params,) = checkpoints.trees(model=params)
    checkpoints.finish()
    return eqx.combine(params, static), tokenizer


def main(config: Config) -> None:
    """Prints the prompt and its continuation."""
    model, tokenizer = load(config.run)
    prompt = config.prompt.encode(errors="surrogateescape")
    tokens = tokenizer.encode(prompt or b"\n")
    if len(tokens) == 0:
        raise SystemExit("the run's tokenizer has no tokens for this --prompt.")
    # A character may be split over tokens. It is printed when it is complete.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(decoder.decode(prompt), end="", flush=True)
    for token in model.sample(
        tokens,
        config.length,
        config.temperature,
        top_k=config.top_k,
        cache=config.cache,
        key=jax.random.key(config.seed),
    ):
        print(decoder.decode(tokenizer.pieces[token]), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    try:
        main(from_command_line(Config, __doc__))
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # Python's own exit would print an error
