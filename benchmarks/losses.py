"""Losses, each written twice: for this library, and in plain JAX.

The first function of a pair computes the loss of one token from its scores: it is the `fn` of
`EmbeddingDecode.token_loss`. The second, `..._of_logits`, computes the same loss of all tokens from
their logits, in plain JAX. The first functions with an argument `decode` call
`EmbeddingDecode.cross_entropy` instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eqx_embedding import EmbeddingDecode, EmbeddingTable


def at(values, targets):
    """The value of each target: `N V`, `N` -> `N`."""
    return jnp.take_along_axis(values, targets[:, None], axis=-1)[:, 0]


def log_prob_of_logits(logits, targets):
    return at(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def cross_entropy_of_logits(logits, targets):
    return -log_prob_of_logits(logits, targets)


def smoothed(scores):
    """Label smoothing of 0.1 (arXiv:1512.00567) and a z-loss of 1e-4 (arXiv:2204.02311)."""
    return -0.9 * scores.log_prob - 0.1 * scores.mean_log_prob + 1e-4 * scores.logsumexp**2


def smoothed_of_logits(logits, targets):
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    log_prob = at(logits, targets) - logsumexp
    mean_log_prob = jnp.mean(logits, axis=-1) - logsumexp
    return -0.9 * log_prob - 0.1 * mean_log_prob + 1e-4 * logsumexp**2


def policy_gradient(scores, advantage, old_log_prob):
    """The clipped policy gradient of PPO (arXiv:1707.06347), with its entropy bonus."""
    ratio = jnp.exp(scores.log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    return -jnp.minimum(ratio * advantage, clipped * advantage) - 0.01 * scores.entropy


def policy_gradient_of_logits(logits, targets, advantages, old_log_probs):
    log_probs = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    ratio = jnp.exp(at(log_probs, targets) - old_log_probs)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    return -jnp.minimum(ratio * advantages, clipped * advantages) - 0.01 * entropy


def focal(scores):
    """Focal loss (arXiv:1708.02002): targets that are already likely count less."""
    return -((1 - jnp.exp(scores.log_prob)) ** 2) * scores.log_prob


def focal_of_logits(logits, targets):
    log_prob = log_prob_of_logits(logits, targets)
    return -((1 - jnp.exp(log_prob)) ** 2) * log_prob


def unlikelihood(scores, unwanted):
    """Makes unwanted targets less likely (arXiv:1908.04319), and the others more likely."""
    others = jnp.maximum(1 - jnp.exp(scores.log_prob), 1e-5)
    return -jnp.where(unwanted, jnp.log(others), scores.log_prob)


def unlikelihood_of_logits(logits, targets, unwanted):
    log_prob = log_prob_of_logits(logits, targets)
    others = jnp.maximum(1 - jnp.exp(log_prob), 1e-5)
    return -jnp.where(unwanted, jnp.log(others), log_prob)


def distillation(scores, teacher_log_prob):
    """The target's term of KL(teacher || student). Only that of the teacher was stored."""
    return jnp.exp(teacher_log_prob) * (teacher_log_prob - scores.log_prob)


def distillation_of_logits(logits, targets, teacher_log_probs):
    log_prob = log_prob_of_logits(logits, targets)
    return jnp.exp(teacher_log_probs) * (teacher_log_probs - log_prob)


def masked(decode, hidden, targets, mask):
    """The mean cross-entropy of some of the tokens."""
    return decode.cross_entropy(hidden, targets, weights=mask)


def masked_of_logits(logits, targets, mask):
    losses = cross_entropy_of_logits(logits, targets)
    return jnp.sum(jnp.where(mask, losses, 0)) / jnp.sum(mask)


def vmapped(decode, hidden, targets):
    """The mean cross-entropy of examples, with one call for each under `vmap`."""
    losses = jax.vmap(decode.cross_entropy)(as_examples(hidden), as_examples(targets))
    return jnp.mean(losses)


def vmapped_of_logits(logits, targets):
    losses = jax.vmap(cross_entropy_of_logits)(as_examples(logits), as_examples(targets))
    return jnp.mean(losses)


def unreduced(decode, hidden, targets, factors):
    """The cross-entropy of each token, weighted after the call."""
    losses = decode.cross_entropy(hidden, targets, reduction="none")
    return jnp.mean(losses * factors)


def unreduced_of_logits(logits, targets, factors):
    losses = cross_entropy_of_logits(logits, targets)
    return jnp.mean(losses * factors)


EXAMPLES = 16


def as_examples(array):
    """Splits the tokens into examples of equal length."""
    return array.reshape(EXAMPLES, -1, *array.shape[1:])


# The data of each loss, for N tokens and a vocabulary of V


def no_data(key, N, V):
    return ()


def policy_data(key, N, V):
    keys = jax.random.split(key)
    return jax.random.normal(keys[0], (N,)), jax.random.normal(keys[1], (N,)) - jnp.log(V)


def unwanted_data(key, N, V):
    return (jax.random.bernoulli(key, 0.5, (N,)),)


def teacher_data(key, N, V):
    return (-jnp.abs(jax.random.normal(key, (N,))),)


def no_data_of_examples(key, N, V):
    if N % EXAMPLES != 0:
        raise ValueError(f"{N} tokens cannot be split into {EXAMPLES} examples of equal length")
    return ()


def whole_mask(key, N, V):
    return (jnp.ones(N, bool),)


def quarter_mask(key, N, V):
    return (jax.random.permutation(key, jnp.arange(N) % 4 == 0),)


def factor_data(key, N, V):
    return (jax.random.uniform(key, (N,)),)


class Loss(NamedTuple):
    """A loss of `hidden` (N D), `rows` (V D), `targets` (N) and data (N each)."""

    title: str
    of_decode: Callable[..., Any]  # (decode, hidden, targets, *data) -> the mean
    of_logits: Callable[..., Array]  # (logits, targets, *data) -> the losses, or their mean
    draw_data: Callable[..., tuple[Array, ...]] = no_data

    def here(self, hidden, rows, targets, *data):
        decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
        return self.of_decode(decode, hidden, targets, *data)

    def plain(self, hidden, rows, targets, *data):
        return jnp.mean(self.of_logits(plain_logits(hidden, rows), targets, *data))


def plain_logits(hidden, rows):
    dtype = jnp.promote_types(jnp.result_type(hidden, rows), jnp.float32)
    return jnp.einsum("nd,vd->nv", hidden, rows, preferred_element_type=dtype)


def mean_of(fn):
    return lambda decode, *operands: decode.token_loss(fn, *operands)


LOSSES = {
    "cross_entropy": Loss("cross-entropy", EmbeddingDecode.cross_entropy, cross_entropy_of_logits),
    "smoothed": Loss(
        "cross-entropy, label smoothing and z-loss", mean_of(smoothed), smoothed_of_logits
    ),
    "policy_gradient": Loss(
        "clipped policy gradient, entropy bonus",
        mean_of(policy_gradient),
        policy_gradient_of_logits,
        policy_data,
    ),
    "focal": Loss("focal loss", mean_of(focal), focal_of_logits),
    "unlikelihood": Loss(
        "unlikelihood", mean_of(unlikelihood), unlikelihood_of_logits, unwanted_data
    ),
    "distillation": Loss(
        "distillation, stored log-probabilities",
        mean_of(distillation),
        distillation_of_logits,
        teacher_data,
    ),
    "vmapped": Loss(
        f"cross-entropy, vmap of {EXAMPLES} examples",
        vmapped,
        vmapped_of_logits,
        no_data_of_examples,
    ),
    "none_masked": Loss("cross-entropy, none masked", masked, masked_of_logits, whole_mask),
    "masked": Loss("cross-entropy, three quarters masked", masked, masked_of_logits, quarter_mask),
    "unreduced": Loss(
        'cross-entropy, reduction="none"', unreduced, unreduced_of_logits, factor_data
    ),
}
