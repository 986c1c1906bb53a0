"""What is computed in this folder, before how: from all logits at once, in a few lines.

Only tests call this. The other modules give the same numbers from the logits of a chunk of tokens
at a time. They use this, with V tokens in the whole vocabulary:

| score           | meaning                         | its derivative by logit j, with p = softmax |
| --------------- | ------------------------------- | ------------------------------------------- |
| `log_prob`      | log_probs[target]               | (j is the target) - p[j]                    |
| `mean_log_prob` | the mean of log_probs           | 1 / V - p[j]                                |
| `entropy`       | -sum(p * log_probs)             | -p[j] * (log_probs[j] + entropy)            |
| `logsumexp`     | log(sum(exp(logits)))           | p[j]                                        |

So the gradient of any function of the scores is, with z = logits - max(logits),

    d_logits[j] = p[j] * (a + b * z[j]) + c * (j is the target) + d

with four numbers a, b, c, d for each token.

A divergence compares p with the probabilities q of a teacher, at a temperature T. With
m = (p + q) / 2:

| divergence     | meaning                   | its derivative by logit j                 |
| -------------- | ------------------------- | ----------------------------------------- |
| forward        | KL(q, p)                  | (p[j] - q[j]) / T                         |
| reverse        | KL(p, q)                  | p[j] * (log(p[j] / q[j]) - KL(p, q)) / T  |
| jensen_shannon | (KL(p, m) + KL(q, m)) / 2 | p[j] * (log(p[j] / m[j]) - KL(p, m)) / 2T |
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ._token_scores import TokenScores


def reference_loss(
    fn: Callable[..., Array],
    weights: Float[Array, " N"],
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *data: Shaped[Array, "N ..."],
    bias: Float[Array, " V"] | None = None,
    soft_cap: float | None = None,
) -> Float[Array, ""]:
    """The weighted sum of `fn(scores, *data)` of each token."""
    scores = reference_scores(hidden, rows, targets, bias, soft_cap)
    return jnp.sum(weights * jax.vmap(fn)(scores, *data))


def reference_scores(
    hidden: Float[Array, "N D"],
    rows: Float[Array, "V D"],
    targets: Int[Array, " N"],
    bias: Float[Array, " V"] | None = None,
    soft_cap: float | None = None,
) -> TokenScores:
    """The scores of each token."""
    logits = hidden @ rows.T
    logits = logits if bias is None else logits + bias[None]
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    log_probs = jax.nn.log_softmax(logits)
    return TokenScores(
        log_prob=jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0],
        mean_log_prob=jnp.mean(log_probs, axis=1),
        entropy=-jnp.sum(jnp.exp(log_probs) * log_probs, axis=1),
        logsumexp=jax.nn.logsumexp(logits, axis=1),
        is_top=jnp.argmax(logits, axis=1) == targets,
    )


def reference_divergence(
    kind: str, temperature: float, logits: Float[Array, "N V"], teacher_logits: Float[Array, "N V"]
) -> Float[Array, " N"]:
    """The divergence of each token from a teacher."""
    log_p, log_q = (jax.nn.log_softmax(z / temperature) for z in (logits, teacher_logits))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)

    def kl(log_a: Array, log_b: Array) -> Array:
        return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=1)

    if kind == "forward":
        return kl(log_q, log_p)
    if kind == "reverse":
        return kl(log_p, log_q)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2
