"""Second derivatives of every method, in every order of modes that JAX has for it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import (
    assert_close,
    draw,
    make_array,
    make_layer,
    NAMES,
    plain_logits,
    VOCAB_SIZE,
)


N, K, CHUNK_SIZE = 6, 3, 4
TOKENS, TARGETS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, N), np.int32)
SOFT_TARGETS = np.random.default_rng(1).integers(0, VOCAB_SIZE, (N, K), np.int32)
SOFT_WEIGHTS = np.random.default_rng(2).uniform(0.1, 1, (N, K)).astype(np.float32)
TEACHER = make_layer(soft_cap=3.0, seed=5)
THEIRS = make_array((N, 4), seed=6)


def log_p(decode, hidden):
    return jax.nn.log_softmax(plain_logits(decode, hidden))


def curved(values):
    """A scalar with a second derivative also in values that are linear."""
    return jnp.sum(jnp.sin(values) * make_array(values.shape, seed=7))


def plain_score(decode, hidden):
    log_probs = log_p(decode, hidden)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
    return jnp.stack(
        [
            jnp.take_along_axis(log_probs, jnp.asarray(TARGETS)[:, None], 1)[:, 0],
            jnp.mean(log_probs, -1),
            entropy,
            jax.nn.logsumexp(plain_logits(decode, hidden), -1),
        ]
    )


def plain_soft(decode, hidden):
    chosen = jnp.take_along_axis(log_p(decode, hidden), jnp.asarray(SOFT_TARGETS), 1)
    return -jnp.sum(SOFT_WEIGHTS * chosen, 1)


def plain_divergence(kind):
    def divergence(decode, hidden):
        student, teacher = log_p(decode, hidden), log_p(TEACHER, THEIRS)
        mixed = jnp.logaddexp(student, teacher) - jnp.log(2.0)

        def kl(p, q):
            return jnp.sum(jnp.exp(p) * (p - q), -1)

        return {
            "forward": kl(teacher, student),
            "reverse": kl(student, teacher),
            "jensen_shannon": (kl(teacher, mixed) + kl(student, mixed)) / 2,
        }[kind]

    return divergence


def divergence(kind):
    def divergence(decode, hidden):
        options = dict(kind=kind, reduction="none", chunk_size=CHUNK_SIZE)
        return decode.divergence(hidden, TEACHER, THEIRS, **options)

    return divergence


# Each method beside what it computes, from all logits
METHODS = {
    "lookup": (
        lambda decode, hidden: EmbeddingLookup(decode.table)(TOKENS) * hidden,
        lambda decode, hidden: decode.table.embeddings[TOKENS] * hidden,
    ),
    "decode": (lambda decode, hidden: decode(hidden), plain_logits),
    "cross_entropy": (
        lambda decode, hidden: decode.cross_entropy(hidden, TARGETS, chunk_size=CHUNK_SIZE),
        lambda decode, hidden: -jnp.mean(plain_score(decode, hidden)[0]),
    ),
    "cross_entropy of each token": (
        lambda decode, hidden: decode.cross_entropy(hidden, TARGETS, reduction="none"),
        lambda decode, hidden: -plain_score(decode, hidden)[0],
    ),
    "soft targets": (
        lambda decode, hidden: decode.cross_entropy(
            hidden, SOFT_TARGETS, target_weights=SOFT_WEIGHTS, reduction="none"
        ),
        plain_soft,
    ),
    "score": (
        lambda decode, hidden: jnp.stack(decode.score(hidden, TARGETS)[:4]),
        plain_score,
    ),
    "top_k": (
        lambda decode, hidden: decode.top_k(hidden, K)[0],
        lambda decode, hidden: lax.top_k(log_p(decode, hidden), K)[0],
    ),
    **{
        kind: (divergence(kind), plain_divergence(kind))
        for kind in ("forward", "reverse", "jensen_shannon")
    },
}
BOTH_MODES = "lookup", "decode"  # the others have a derivative for reverse mode alone


def slopes(function, arguments, direction, order):
    """The second derivative of a scalar along a direction, or a product with it."""
    x, unravel = ravel_pytree(arguments)

    def scalar(x):
        return curved(function(*unravel(x)))

    def along(x):
        return jax.jvp(scalar, (x,), (direction,))[1]

    return {
        "forward over reverse": lambda: jax.jvp(jax.grad(scalar), (x,), (direction,))[1],
        "reverse over reverse": lambda: jax.grad(lambda x: jax.grad(scalar)(x) @ direction)(x),
        "reverse over forward": lambda: jax.grad(along)(x),
        "forward over forward": lambda: jax.jvp(along, (x,), (direction,))[1],
    }[order]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, order",
    [
        (method, f"{outer} over {inner}")
        for method in METHODS
        for outer in ("forward", "reverse")
        for inner in ("forward", "reverse")
        if inner == "reverse" or method in BOTH_MODES
    ],
)
def test_second_derivatives_are_those_from_logits(method, order):
    layer = make_layer(with_bias=True, soft_cap=2.0)
    layer, static = eqx.partition(layer, eqx.is_array)
    arguments = layer, make_array((N, 4), seed=2)
    direction = jnp.asarray(draw(ravel_pytree(arguments)[0].shape, seed=3))
    ours, plain = (
        lambda layer, hidden, f=f: f(eqx.combine(layer, static), hidden) for f in METHODS[method]
    )
    actual = eqx.filter_jit(slopes)(ours, arguments, direction, order)
    expected = eqx.filter_jit(slopes)(plain, arguments, direction, "reverse over reverse")
    if order == "forward over forward":
        expected = expected @ direction
    assert np.any(expected != 0)
    assert_close(actual, expected, 1e-4, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["score", "top_k"])
def test_hessians_are_those_from_logits(method):
    layer, hidden = make_layer(with_bias=True, soft_cap=2.0), make_array((N, 4), seed=2)
    actual, expected = (
        jax.jit(jax.hessian(lambda hidden, f=f: curved(f(layer, hidden))))(hidden)
        for f in METHODS[method]
    )
    assert np.any(expected != 0)
    assert_close(actual, expected, 1e-4, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_scan", [False, True])
def test_third_derivatives_are_those_from_logits(method, in_scan):
    """Products of a vector and the second derivative of a gradient penalty."""
    layer, hidden = make_layer(with_bias=True, soft_cap=2.0), make_array((N, 4), seed=2)

    def products(function, hidden):
        def gradient(hidden, _):
            return hidden, jax.grad(lambda hidden: curved(function(layer, hidden)))(hidden)

        def penalty(hidden):
            gradients = lax.scan(gradient, hidden, None, 1) if in_scan else gradient(hidden, None)
            return jnp.sum(jnp.sin(gradients[1]))

        return jax.jvp(jax.grad(penalty), (hidden,), (make_array((N, 4), seed=3),))[1]

    actual, expected = (eqx.filter_jit(products)(f, hidden) for f in METHODS[method])
    assert method == "lookup" or np.any(expected != 0)
    assert_close(actual, expected, 1e-4, 1e-4)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in BOTH_MODES])
def test_forward_mode_is_refused_by_jax(method):
    layer, hidden = make_layer(), make_array((N, 4), seed=2)
    ours, _ = METHODS[method]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda hidden: ours(layer, hidden), (hidden,), (hidden,))


def of_scale(function, steps, *arguments):
    """The derivative of a sum over the steps of a `jax.lax.scan`, by a factor of its terms.

    To linearize the scan, JAX forgets rules for derivatives by anything else.
    """

    def total(scale):
        def step(total, x):
            numbers = function(x, *arguments).astype(jnp.result_type(float))
            return total + scale**2 * jnp.sum(numbers), None

        return lax.scan(step, 0.0, steps)[0]

    return jax.grad(total)(1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_second_derivatives_of_lookups_in_a_scan_count_past_256(dtype):
    tokens = jnp.asarray(np.arange(3 * 3000) % 3 == 0, "int32").reshape(3, 3000)

    def look_up(tokens, embeddings):
        return EmbeddingLookup(EmbeddingTable(embeddings, NAMES))(tokens)

    gradient = jax.jit(jax.grad(lambda embeddings: of_scale(look_up, tokens, embeddings)))
    actual = gradient(jnp.ones((2, 4), dtype)).astype("float32")
    np.testing.assert_allclose(actual, [[2 * 6000] * 4, [2 * 3000] * 4], 0.01)


@pytest.mark.parametrize("method", ["cross_entropy", "score", "logits"])
def test_a_norm_of_the_gradient_of_padding_rows_has_no_derivative(method):
    """It is NaN at zero: that of the padding rows must not reach hidden vectors and tokens."""
    embeddings, hidden = make_array((VOCAB_SIZE, 4), seed=1), make_array((N, 4), seed=2)

    def loss(table, hidden):
        decode = EmbeddingDecode(table)
        if method == "cross_entropy":
            return decode.cross_entropy(hidden, TARGETS, chunk_size=CHUNK_SIZE)
        if method == "score":
            return jnp.mean(jnp.square(decode.score(hidden, TARGETS).log_prob))
        return jnp.mean(jnp.square(decode(hidden)))

    def sum_of_norms(padding_rows, embeddings, hidden):
        padded = jnp.pad(embeddings, ((0, padding_rows), (0, 0)))
        table = EmbeddingTable(padded, NAMES, padding_rows=padding_rows)
        gradient = jax.grad(loss)(table, hidden).embeddings
        return jnp.sum(jnp.linalg.norm(gradient, axis=1))

    expected, actual = (
        jax.jit(jax.grad(functools.partial(sum_of_norms, n), (0, 1)))(embeddings, hidden)
        for n in (0, 3)
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nan_in_a_padding_row_reaches_no_second_derivative_of_logits_in_a_scan(dtype):
    embeddings = make_array((5, 4)).astype(dtype)
    hidden = make_array((3, 6, 4), seed=1).astype(dtype)

    def gradients(rows, padding_rows):
        def decode(hidden, rows):
            table = EmbeddingTable(rows, NAMES, padding_rows=padding_rows)
            return EmbeddingDecode(table)(hidden)

        gradient = jax.grad(lambda rows, hidden: of_scale(decode, hidden, rows), (0, 1))
        return jax.jit(gradient)(rows, hidden)

    d_rows, d_hidden = gradients(embeddings.at[4:].set(jnp.nan), 1)
    expected, expected_hidden = gradients(embeddings[:4], 0)
    np.testing.assert_array_equal(d_rows[:4], expected)
    np.testing.assert_array_equal(d_rows[4:], 0)
    np.testing.assert_array_equal(d_hidden, expected_hidden)


@pytest.mark.slow
def test_second_derivatives_of_logits_in_a_scan_are_not_rounded_to_the_dtype_of_factors():
    embeddings, hidden = make_array((5, 4)), make_array((3, 300, 4), seed=1)

    def decode(hidden, embeddings):
        return EmbeddingDecode(EmbeddingTable(embeddings, NAMES), dtype=jnp.bfloat16)(hidden)

    actual = jax.jit(jax.grad(lambda embeddings: of_scale(decode, hidden, embeddings)))(embeddings)
    rounded = np.asarray(hidden.astype("bfloat16"), np.float64).sum((0, 1))
    np.testing.assert_allclose(actual, np.tile(2 * rounded, (5, 1)), 1e-5)
