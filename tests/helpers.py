"""What several tests need: keys, and references in numpy that share no code with the library."""

import json
import os
import random
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqx_embedding import EmbeddingDecode, EmbeddingTable, TokenScores

from .flags import COMPILER, QUICK


class Keys:
    """Makes a new `jax.random.key` at each call, and shows its seed when a test fails."""

    def __init__(self, seed: int | None = None):
        self.seed = random.randrange(2**31) if seed is None else seed
        self.count = 0

    def __call__(self):
        self.count += 1
        return jax.random.fold_in(jax.random.key(self.seed), self.count)

    def __repr__(self):
        return f"Keys(seed={self.seed})"


VOCAB_SIZE = 7
PADDING_ROWS = 2

NAMES = ("vocabulary", "embedding")

# A batch of four tokens, one of which is masked.
FOUR_TOKENS = np.asarray([0, 6, 3, 3], np.int32)
FOUR_TARGETS = np.asarray([1, 2, 6, 0], np.int32)
FOUR_WEIGHTS = np.asarray([1, 0, 2, 1], np.float32)

# The axis names and sizes of a table of 7 tokens and 2 padding rows, with the vocabulary anywhere.
LAYOUTS = {
    "first": {"vocabulary": 9, "embedding": 4},
    "middle": {"heads": 2, "vocabulary": 9, "features": 3},
    "last": {"heads": 2, "features": 3, "vocabulary": 9},
    "alone": {"vocabulary": 9},
}


def draw(shape: tuple[int, ...], dtype="float32", seed: int = 0) -> np.ndarray:
    """Normal numbers, drawn by numpy, which has nothing to compile."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def make_array(shape: tuple[int, ...], dtype="float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(draw(shape, dtype, seed))


def make_table(
    layout: str, dtype="float32", seed: int = 0, with_bias=False, padding: float | None = None
) -> EmbeddingTable:
    """A table of one of the `LAYOUTS`. Its padding rows are random numbers or `padding`, so that a
    leak shows."""
    axes = LAYOUTS[layout]
    embeddings = draw(tuple(axes.values()), dtype, seed)
    bias = draw((VOCAB_SIZE + PADDING_ROWS,), dtype, seed + 1)
    if padding is not None:
        np.moveaxis(embeddings, list(axes).index("vocabulary"), 0)[VOCAB_SIZE:] = padding
        bias[VOCAB_SIZE:] = padding
    return EmbeddingTable(
        jnp.asarray(embeddings),
        tuple(axes),
        padding_rows=PADDING_ROWS,
        bias=jnp.asarray(bias) if with_bias else None,
    )


def make_layer(
    layout="first", dtype="float32", with_bias=False, soft_cap=None, padding=None, seed=0
) -> EmbeddingDecode:
    return EmbeddingDecode(make_table(layout, dtype, seed, with_bias, padding), soft_cap)


def make_hidden(layer: EmbeddingDecode, batch: tuple[int, ...], dtype="float32") -> jax.Array:
    return make_array((*batch, *layer.table.embedding_axes.values()), dtype, seed=2)


# As XLA compiles by default, whatever flags the tests have.
DEFAULT_COMPILER: dict[str, Any] = {"xla_backend_optimization_level": 3}
if "xla_cpu_use_fusion_emitters" in QUICK:
    DEFAULT_COMPILER["xla_cpu_use_fusion_emitters"] = True


def compile_by_default(lowered):
    """For tests of memory and communication: the program that users get."""
    lowered = getattr(lowered, "lowered", lowered)  # which Equinox wraps
    return lowered.compile(compiler_options=DEFAULT_COMPILER)


def float64(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def rows_first(table: EmbeddingTable) -> np.ndarray:
    """The embeddings of the tokens, one row each, in float64."""
    axis = table.axis_names.index(table.vocabulary_axis)
    return np.moveaxis(float64(table.embeddings), axis, 0)[: table.vocab_size]


def as_embeddings(table: EmbeddingTable, rows: np.ndarray) -> np.ndarray:
    """The reverse of `rows_first`, with zeros for the padding."""
    padded = np.concatenate([rows, np.zeros((table.padding_rows, *rows.shape[1:]))])
    return np.moveaxis(padded, 0, table.axis_names.index(table.vocabulary_axis))


def lookup_reference(table: EmbeddingTable, tokens, clip: bool = False) -> np.ndarray:
    rows = rows_first(table)
    vectors = np.full(np.shape(tokens) + rows.shape[1:], np.nan)
    for position, token in np.ndenumerate(np.asarray(tokens, object)):
        if clip:
            token = min(max(token, 0), len(rows) - 1)
        if 0 <= token < len(rows):
            vectors[position] = rows[token]
    return vectors


def lookup_gradient_reference(table: EmbeddingTable, tokens, cotangent, clip: bool = False):
    """The gradient of `sum(cotangent * lookup(table, tokens))` with respect to the embeddings."""
    gradient = np.zeros_like(rows_first(table))
    for position, token in np.ndenumerate(np.asarray(tokens, object)):
        if clip:
            token = min(max(token, 0), len(gradient) - 1)
        if 0 <= token < len(gradient):
            gradient[token] += float64(cotangent)[position]
    return as_embeddings(table, gradient)


def decode_reference(table: EmbeddingTable, hidden, soft_cap=None) -> np.ndarray:
    rows = rows_first(table)
    logits = np.tensordot(float64(hidden), np.moveaxis(rows, 0, -1), rows.ndim - 1)
    if table.bias is not None:
        logits = logits + float64(table.bias)[: table.vocab_size]
    return logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)


def decode_gradient_reference(table: EmbeddingTable, hidden, cotangent, soft_cap=None):
    """The gradients of `sum(cotangent * logits)` with respect to hidden, embeddings and bias."""
    rows, hidden, cotangent = rows_first(table), float64(hidden), float64(cotangent)
    if soft_cap is not None:
        logits = decode_reference(table, hidden)
        cotangent = cotangent * (1 - np.tanh(logits / soft_cap) ** 2)
    batch_axes = tuple(range(cotangent.ndim - 1))
    return (
        np.tensordot(cotangent, rows, 1),
        as_embeddings(table, np.tensordot(cotangent, hidden, (batch_axes, batch_axes))),
        np.pad(cotangent.sum(batch_axes), (0, table.padding_rows)),
    )


def token_losses_reference(layer, hidden, targets, label_smoothing=0.0, z_loss=0.0):
    """The loss of each token, and their derivatives with respect to its logits."""
    z = decode_reference(layer.table, hidden, layer.soft_cap)
    targets, e, K = np.asarray(targets), label_smoothing, z.shape[-1]
    maximum = z.max(-1, keepdims=True)
    lse = maximum + np.log(np.exp(z - maximum).sum(-1, keepdims=True))
    wanted = (1 - e) * (targets[..., None] == np.arange(K)) + e / K
    chosen = np.multiply(wanted, z, out=np.zeros(z.shape), where=wanted != 0)  # a logit may be -inf
    losses = lse[..., 0] - chosen.sum(-1) + z_loss * lse[..., 0] ** 2
    return losses, (1 + 2 * z_loss * lse) * np.exp(z - lse) - wanted


def scores_reference(layer, hidden, targets) -> TokenScores:
    """The scores in float64, for targets in range. 0 log 0 is 0."""
    z = decode_reference(layer.table, hidden, layer.soft_cap)
    targets, maximum = np.asarray(targets), z.max(-1, keepdims=True)
    lse = maximum + np.log(np.exp(z - maximum).sum(-1, keepdims=True))
    log_p = z - lse
    terms = np.multiply(np.exp(log_p), log_p, where=z > -np.inf, out=np.zeros(z.shape))
    scores: dict[str, Any] = dict(
        log_prob=np.take_along_axis(log_p, targets[..., None], -1)[..., 0],
        mean_log_prob=log_p.mean(-1),
        entropy=-terms.sum(-1),
        logsumexp=lse[..., 0],
        is_top=z.argmax(-1) == targets,
    )
    return TokenScores(**scores)


def plain_logits(layer, hidden) -> jax.Array:
    """The logits, for JAX to differentiate."""
    table = layer.table
    axis = table.axis_names.index(table.vocabulary_axis)
    rows = jnp.moveaxis(table.embeddings, axis, -1)[..., : table.vocab_size]
    logits = jnp.tensordot(hidden, rows, rows.ndim - 1)
    if table.bias is not None:
        logits += jnp.expand_dims(table.bias[: table.vocab_size], range(logits.ndim - 1))
    return logits if layer.soft_cap is None else layer.soft_cap * jnp.tanh(logits / layer.soft_cap)


def plain_scores(layer, hidden, targets) -> TokenScores:
    """The scores from all logits, for JAX to differentiate, for targets in range."""
    logits = plain_logits(layer, hidden)
    log_p = jax.nn.log_softmax(logits)
    return TokenScores(
        log_prob=jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0],
        mean_log_prob=jnp.mean(log_p, -1),
        entropy=-jnp.sum(jnp.exp(log_p) * log_p, -1),
        logsumexp=jax.nn.logsumexp(logits, -1),
        is_top=jnp.argmax(logits, -1).astype(targets.dtype) == targets,
    )


def plain_loss(fn, layer, hidden, targets, *data, weights=None, reduction="mean") -> jax.Array:
    """`EmbeddingDecode.token_loss` from all logits, for JAX to differentiate."""
    scores = plain_scores(layer, hidden, targets)
    for _ in targets.shape:
        fn = jax.vmap(fn)
    losses = fn(scores, *data).astype(hidden.dtype)
    if weights is None:
        weights = jnp.ones(targets.shape, hidden.dtype)
    losses = weights * jnp.where(weights != 0, losses, 0)
    if reduction == "none":
        return losses
    total = jnp.where(jnp.any(weights != 0), jnp.sum(weights), 1)
    return jnp.sum(losses) / (total if reduction == "mean" else 1)


def cross_entropy_reference(
    layer,
    hidden,
    targets,
    weights=None,
    cotangent: np.ndarray | float = 1.0,
    *,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
):
    """The loss, and the gradients of `sum(cotangent * loss)` with respect to hidden, embeddings,
    bias and weights."""
    w = np.ones(np.shape(targets)) if weights is None else float64(weights)
    hidden = float64(hidden)
    alive = w.reshape(w.shape + (1,) * (hidden.ndim - w.ndim)) != 0
    hidden = np.where(alive, hidden, 0)
    losses, d_logits = token_losses_reference(layer, hidden, targets, label_smoothing, z_loss)
    losses = np.where(w != 0, losses, 0)
    value, for_weights, scale = w * losses, losses, w
    if reduction != "none":
        value = value.sum()
    if reduction == "mean":
        total = w.sum() if np.any(w != 0) else 1.0
        value, scale = value / total, scale / total
        for_weights = (losses - value) / total * np.any(w != 0)
    gradients = decode_gradient_reference(
        layer.table, hidden, (scale * cotangent)[..., None] * d_logits, layer.soft_cap
    )
    return value, *gradients, for_weights * cotangent


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def assert_close(actual, expected, rtol: float = 1e-5, atol: float = 1e-6):
    np.testing.assert_allclose(float64(actual), float64(expected), rtol, atol)


def assert_trees_close(actual, expected, rtol: float = 1e-5, atol: float = 1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert_close(a, e, rtol, atol)


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def compiled_memory(compiled):
    """The sizes in bytes of what a compiled program holds on each device."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis


def temporaries(compiled) -> int:
    return compiled_memory(compiled).temp_size_in_bytes


def rounding(dtype) -> float:
    """The distance between 1 and the next number of this dtype."""
    return float(jnp.finfo(dtype).eps)


def python_environment(**environment: str) -> dict[str, str]:
    """The environment of a fresh process, without the settings and devices of this one."""
    settings = ("EQX_ON_ERROR", "JAXTYPING_DISABLE")
    kept = {k: v for k, v in os.environ.items() if k not in settings}
    return kept | {"XLA_FLAGS": COMPILER} | environment


def run_python(code: str, **environment: str):
    """Runs `code` in a fresh process and returns what it printed last, which is JSON."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=python_environment(**environment),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])
