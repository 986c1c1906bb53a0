"""The mean cross-entropy of tokens, as users of other libraries compute it."""

import importlib

import jax.numpy as jnp
import numpy as np

from .losses import plain_logits


def with_optax(hidden, rows, targets):
    import optax

    logits = plain_logits(hidden, rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_flax(hidden, rows, targets):
    import optax

    nnx = importlib.import_module("flax.nnx")
    embed = nnx.Embed(*rows.shape, dtype=rows.dtype, param_dtype=rows.dtype, rngs=nnx.Rngs(0))
    embed.embedding = nnx.Param(rows)
    logits = embed.attend(hidden).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_penzai(hidden, rows, targets):
    import optax
    from penzai import pz

    parameter = pz.Parameter(value=pz.nx.wrap(rows).tag("vocabulary", "embedding"), label="table")
    decode = pz.nn.EmbeddingDecode(pz.nn.EmbeddingTable(parameter, "vocabulary"))
    logits = decode(pz.nx.wrap(hidden).tag("tokens", "embedding"))
    logits = logits.untag("tokens", "vocabulary").unwrap().astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def with_tokamax(hidden, rows, targets, implementation=None):
    tokamax, flags = importlib.import_module("tokamax"), importlib.import_module("absl.flags")
    flags.FLAGS.mark_as_parsed()  # else tokamax would read our command line
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, targets, rows.T, reduction="mean", implementation=implementation
    )


PEERS = {
    "optax": with_optax,
    "flax": with_flax,
    "penzai": with_penzai,
    "tokamax": with_tokamax,
}


class Torch:
    """PyTorch on the CPU, eager or compiled. It does not report the size of its temporaries."""

    temporaries = None

    def __init__(self, operands, compiled=False):
        self.torch = torch = importlib.import_module("torch")
        hidden, rows, targets = (torch.from_numpy(np.array(a)) for a in operands)
        self.leaves = hidden.requires_grad_(), rows.requires_grad_()
        self.targets = targets.long()

        def loss(hidden, rows, targets):
            return torch.nn.functional.cross_entropy(hidden @ rows.T, targets)

        # Compiled at the first call, which fails without a C++ compiler
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss

    def __call__(self):
        loss = self.loss(*self.leaves, self.targets)
        return loss.detach(), self.torch.autograd.grad(loss, self.leaves)
