"""What a loss of a token is a function of."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float


class TokenScores(NamedTuple):
    """What [`eqx_embedding.EmbeddingDecode.score`][] says of each token.

    - `log_prob`: the logarithm of the probability of the target.
    - `mean_log_prob`: the mean of the logarithms of the probabilities of all tokens of the
        vocabulary.
    - `entropy`: that of the distribution over the vocabulary, in nats.
    - `logsumexp`: the logarithm of the sum of the exponentials of the logits.
    - `is_top`: whether the target has the largest logit; of equal logits that of the lower token.
    """

    # In the kernels, `log_prob` and `is_top` have one more axis if a token has k targets
    log_prob: Float[Array, "*batch"]
    mean_log_prob: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    logsumexp: Float[Array, "*batch"]
    is_top: Bool[Array, "*batch"]


class Divergence(NamedTuple):
    """What a loss of a student and a teacher is a function of."""

    divergence: Float[Array, "*batch"]


Scores = TokenScores | Divergence


def differentiable(scores: Any) -> tuple[Any, ...]:
    """Those of the scores that have a derivative."""
    return tuple(scores[:4])
