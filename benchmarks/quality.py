"""The held-out loss of examples/train_lm.py and of nanoGPT's small model, on the same text.

    python -m benchmarks.quality [--text FILE] [--steps 2000] [--seeds 0 1 2]

Both train on the same batches of bytes: 12 sequences of 64 tokens a step. Both have 4 layers, 4
heads, width 128 and no dropout. The loss is measured on all of the held-out text, in nats per
byte: the mean over the seeds, with the lowest and the highest. A seed determines the
initial parameters and the batches.

nanoGPT's model is implemented again here (benchmarks/gpt_torch.py, which needs PyTorch), with the
settings of its `train_shakespeare_char` on a CPU: LayerNorm and GELU, no biases; learning rate 1e-3
after 100 steps, then a cosine to 1e-4; betas 0.9 and 0.99, weight decay 0.1, clipping at 1. The
other model is the unchanged example, `train_lm.main`: learning rate 3e-3 after a tenth of the
steps, then a cosine to a twentieth of that.
"""

import argparse
import importlib
import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import train_lm
from support.text_data import random_windows, read_text, windows
from tqdm import tqdm


def nano_gpt(config):
    """The held-out loss of nanoGPT's model and settings, on the batches of the example."""
    torch = importlib.import_module("torch")
    gpt_torch = importlib.import_module("benchmarks.gpt_torch")
    torch.manual_seed(config.data.seed)
    sizes, text, steps = config.model, read_text(config.data.text), config.run.steps
    length = sizes.sequence_length
    model = gpt_torch.nano_gpt(256, length, sizes.num_layers, sizes.num_heads, sizes.embedding_size)
    training = gpt_torch.Training(model, map(rate(steps), range(steps)), 0.1, 1.0)
    for step in tqdm(range(steps), disable=None):
        seed = config.data.seed, step
        training(random_windows(text.train, config.data.batch_size, length + 1, seed))
    nats = 0.0
    with torch.no_grad():
        for inputs, targets, weights in zip(*windows(text.held_out, length, 32)):
            logits = model(torch.from_numpy(inputs).long()).flatten(0, 1)
            targets = torch.from_numpy(targets).long().flatten()
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            nats += float(np.sum(losses.numpy() * weights.reshape(-1), dtype=np.float64))
    return nats / (len(text.held_out) - 1)


def rate(steps, warm_up=100, peak=1e-3, end=1e-4):
    def at(step):
        if step < warm_up:
            return peak * (step + 1) / (warm_up + 1)
        done = (step - warm_up) / max(steps - warm_up, 1)
        return end + 0.5 * (1 + math.cos(math.pi * done)) * (peak - end)

    return at


def losses_of(config):
    """The held-out loss of each model in nats per byte, and why one could not run, or `None`."""
    losses = {"examples/train_lm.py": train_lm.main(config)[-1]["val_loss"]}
    try:
        losses["nanoGPT's, in PyTorch"] = nano_gpt(config)
    except ImportError as error:
        return losses, str(error)
    return losses, None


def main(arguments=None, **sizes):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    settings = parser.parse_args(arguments)
    losses, missing = {}, None
    for seed in settings.seeds:
        with tempfile.TemporaryDirectory() as folder:
            steps = settings.steps
            config = train_lm.Config(
                train_lm.ModelConfig(**sizes),
                data=train_lm.DataConfig(text=settings.text, batch_size=12, seed=seed),
                run=train_lm.RunConfig(Path(folder) / "run", steps=steps, report_every=steps),
            )
            found, missing = losses_of(config)
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss)
    if missing is not None:
        print(f"nanoGPT's not run: {missing}")
    seeds = ", ".join(map(str, settings.seeds))
    print(f"{settings.steps} steps on {read_text(settings.text).name}, seeds {seeds}, held out:")
    for name, values in losses.items():
        mean = statistics.mean(values)
        print(
            f"{name:24}{mean:7.3f} nats a byte ({min(values):.3f} to {max(values):.3f})"
            f"{mean / math.log(2):7.3f} bits a byte"
        )


if __name__ == "__main__":
    main()
