"""`EmbeddingDecode.divergence`, against NumPy in float64, optax and autodiff from logits."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingTable
from eqx_embedding._blockwise._reference import reference_divergence

from .helpers import (
    assert_close,
    compile_by_default,
    decode_gradient_reference,
    decode_reference,
    float64,
    log_softmax,
    make_array,
    make_table,
    plain_logits,
    rounding,
    temporaries,
    VOCAB_SIZE,
)


KINDS = "forward", "reverse", "jensen_shannon"
N = 19
CHUNK_SIZE = 16
WEIGHTS = np.where(np.arange(N) % 5 == 1, 0, np.random.default_rng(0).uniform(0.5, 2, N)).astype(
    np.float32
)


def make_teacher(dtype="float32", soft_cap=2.0):
    """With two embedding axes, the vocabulary last, and another number of padding rows."""
    embeddings = make_array((2, 3, VOCAB_SIZE + 1), dtype, seed=7).at[..., VOCAB_SIZE:].set(jnp.nan)
    table = EmbeddingTable(embeddings, ("heads", "features", "vocabulary"), padding_rows=1)
    return EmbeddingDecode(table, soft_cap, logits_dtype="float32")


def make_problem(dtype="float32", soft_cap: float | None = 3.0):
    """A student, hidden vectors, a teacher, and hidden vectors of the teacher."""
    student = EmbeddingDecode(make_table("first", dtype, with_bias=True), soft_cap)
    hidden, theirs = make_array((N, 4), dtype, seed=5), make_array((N, 2, 3), dtype, seed=6)
    return student, hidden, make_teacher(dtype), theirs


def divergences_reference(kind, T, z, y):
    """Of each token, and the derivatives with respect to the logits `z`, in float64."""
    log_p, log_q = log_softmax(z / T), log_softmax(y / T)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(log_p, log_q) - np.log(2)

    def kl(a, log_a, log_b):
        return (a * (log_a - log_b)).sum(-1)

    if kind == "forward":
        return kl(q, log_q, log_p), (p - q) / T
    if kind == "reverse":
        value = kl(p, log_p, log_q)
        return value, p * (log_p - log_q - value[:, None]) / T
    of_student = kl(p, log_p, log_m)
    value = (of_student + kl(q, log_q, log_m)) / 2
    return value, p * (log_p - log_m - of_student[:, None]) / (2 * T)


def mean_reference(kind, T, student, hidden, teacher, theirs, weights):
    """The weighted mean, and its gradients for hidden, embeddings, bias and weights."""
    z = decode_reference(student.table, hidden, student.soft_cap)
    y = decode_reference(teacher.table, theirs, teacher.soft_cap)
    values, d_z = divergences_reference(kind, T, z, y)
    share = float64(weights) / float64(weights).sum()
    mean = (share * values).sum()
    gradients = decode_gradient_reference(
        student.table, hidden, share[:, None] * d_z, student.soft_cap
    )
    for_weights = np.where(weights != 0, values - mean, -mean) / float64(weights).sum()
    return mean, *gradients, for_weights


def value_and_gradients(student, hidden, teacher, theirs, weights=None, **options):
    def loss(student, hidden, weights):
        losses = student.divergence(hidden, teacher, theirs, weights=weights, **options)
        return jnp.sum(losses)

    value, (d_student, *others) = eqx.filter_jit(jax.value_and_grad(loss, (0, 1, 2)))(
        student, hidden, jnp.ones(len(hidden)) if weights is None else jnp.asarray(weights)
    )
    return value, others[0], d_student.table.embeddings, d_student.table.bias, others[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.5, 2.0])
@pytest.mark.slow
def test_values_and_gradients_match_numpy(dtype, kind, temperature):
    problem = make_problem(dtype)
    options: dict[str, Any] = {"kind": kind, "temperature": temperature, "chunk_size": CHUNK_SIZE}
    weights = WEIGHTS.astype("float64" if dtype == "float64" else "float32")
    actual = value_and_gradients(*problem, weights, **options)
    expected = mean_reference(kind, temperature, *problem, WEIGHTS)
    tolerance = max(8 * rounding(dtype), 1e-6 if dtype != "float64" else 1e-12)
    for a, e in zip(actual[:4], expected, strict=False):
        assert_close(a, e, tolerance, tolerance)
    # Tokens of weight zero are not computed, and so not part of the gradient of their weights
    assert_close(actual[4][WEIGHTS != 0], expected[4][WEIGHTS != 0], tolerance, tolerance)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_low_temperatures_lose_no_precision(kind, soft_cap, temperature):
    def make_decode(seed):
        embeddings, bias = make_array((300, 8), seed=seed), make_array((300,), seed=seed + 1)
        table = EmbeddingTable(embeddings, ("vocabulary", "embedding"), bias=bias)
        return EmbeddingDecode(table, soft_cap)

    problem = make_decode(1), make_array((N, 8), seed=5), make_decode(3), make_array((N, 8), seed=6)
    actual = value_and_gradients(*problem, WEIGHTS, kind=kind, temperature=temperature)
    expected = mean_reference(kind, temperature, *problem, WEIGHTS)
    for a, e in zip(actual[:4], expected, strict=False):
        assert_close(float64(a) * temperature, e * temperature, 1e-5, 1e-5)


@pytest.mark.slow
def test_forward_and_reverse_match_optax():
    student, hidden, teacher, theirs = make_problem(soft_cap=None)

    def log_p(student, hidden):
        return jax.nn.log_softmax(plain_logits(student, hidden))

    log_q = jax.nn.log_softmax(plain_logits(teacher, theirs))
    divergence = optax.losses.kl_divergence_with_log_targets
    references = {
        "forward": lambda *student: jnp.mean(divergence(log_p(*student), log_q)),
        "reverse": lambda *student: jnp.mean(divergence(log_q, log_p(*student))),
    }
    for kind, reference in references.items():
        value, d_hidden, d_rows, d_bias, _ = value_and_gradients(
            student, hidden, teacher, theirs, kind=kind
        )
        expected, (d_student, e_hidden) = jax.value_and_grad(reference, (0, 1))(student, hidden)
        table = d_student.table
        expected = expected, e_hidden, table.embeddings, table.bias
        jax.tree.map(assert_close, (value, d_hidden, d_rows, d_bias), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_losses_that_stay_apart_match_logits(kind):
    student, hidden, teacher, theirs = make_problem()

    def ours(student, hidden):
        return student.divergence(hidden, teacher, theirs, kind=kind, reduction="none")

    def plain(student, hidden):
        logits = plain_logits(student, hidden), plain_logits(teacher, theirs)
        return reference_divergence(kind, 1.0, *logits)

    results = []
    for function in ours, plain:
        losses, pullback = jax.vjp(function, student, hidden)
        results.append((losses, *pullback(jnp.asarray(WEIGHTS))))
    jax.tree.map(assert_close, *results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_student_like_its_teacher_has_no_divergence(kind):
    student, hidden, *_ = make_problem()
    value, *gradients, _ = value_and_gradients(student, hidden, student, hidden, kind=kind)
    assert value == 0
    for gradient in gradients:
        assert_close(gradient, np.zeros(gradient.shape), atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_token_of_probability_zero_adds_nothing(kind):
    """Its logit is -inf for both, as with a bias that masks a part of the vocabulary."""
    student, hidden, teacher, theirs = make_problem(soft_cap=None)
    bias = jnp.zeros(VOCAB_SIZE + 2).at[3].set(-jnp.inf)
    masked = dataclasses.replace(student.table, bias=bias)
    theirs_masked = dataclasses.replace(teacher.table, bias=bias[: VOCAB_SIZE + 1])
    value, d_hidden, d_rows, *_ = value_and_gradients(
        EmbeddingDecode(masked), hidden, EmbeddingDecode(theirs_masked), theirs, kind=kind
    )
    others = np.delete(np.arange(VOCAB_SIZE), 3)
    z = decode_reference(dataclasses.replace(student.table, bias=None), hidden)[:, others]
    y = decode_reference(teacher.table, theirs)[:, others]
    values, d_z = divergences_reference(kind, 1.0, z, y)
    assert_close(value, values.mean())
    assert_close(d_hidden, d_z @ float64(student.table.embeddings)[others] / N)
    assert_close(d_rows[others], d_z.T @ float64(hidden) / N)
    assert not np.any(d_rows[3])


@pytest.mark.slow
def test_what_the_teacher_excludes_is_infinitely_far():
    student, hidden, teacher, theirs = make_problem()
    bias = jnp.zeros(VOCAB_SIZE + 1).at[3].set(-jnp.inf)
    teacher = EmbeddingDecode(dataclasses.replace(teacher.table, bias=bias))
    reverse = student.divergence(hidden, teacher, theirs, kind="reverse")
    forward = student.divergence(hidden, teacher, theirs)
    nearest = student.divergence(hidden, teacher, theirs, kind="jensen_shannon")
    assert np.isinf(reverse) and np.isfinite(forward) and 0 < nearest < np.log(2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_nan_at_weight_zero_reaches_nothing(reduction):
    student, hidden, teacher, theirs = make_problem()
    clean = value_and_gradients(student, hidden, teacher, theirs, WEIGHTS, reduction=reduction)
    masked = jnp.asarray(WEIGHTS == 0)
    hidden = jnp.where(masked[:, None], jnp.nan, hidden)
    theirs = jnp.where(masked[:, None, None], jnp.nan, theirs)
    actual = value_and_gradients(student, hidden, teacher, theirs, WEIGHTS, reduction=reduction)
    jax.tree.map(assert_close, actual, clean)
    zero = value_and_gradients(student, hidden, teacher, theirs, 0 * WEIGHTS, reduction=reduction)
    assert not any(np.any(array) for array in zero)


def test_the_teacher_is_constant():
    student, hidden, teacher, theirs = make_problem()
    gradients = jax.grad(
        lambda teacher, theirs: student.divergence(hidden, teacher, theirs), (0, 1)
    )(teacher, theirs)
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_mapped_examples_are_tokens_of_one_call():
    student, _, teacher, _ = make_problem()
    hidden, theirs = make_array((2, N, 4), seed=8), make_array((2, N, 2, 3), seed=9)

    def loss(student, hidden, theirs):
        return student.divergence(hidden, teacher, theirs, weights=WEIGHTS)

    def total(student, hidden):
        return jnp.sum(jax.vmap(loss, (None, 0, 0))(student, hidden, theirs))

    def one_by_one(student, hidden):
        return sum(loss(student, *example) for example in zip(hidden, theirs))

    program = jax.make_jaxpr(jax.grad(total))(student, hidden)
    assert f"f32[{2 * N},{VOCAB_SIZE}" not in str(program)
    gradients = f"f32[2,{VOCAB_SIZE + 2},4]"  # one for each example
    assert gradients not in str(program)
    results = [
        eqx.filter_jit(jax.value_and_grad(function, (0, 1)))(student, hidden)
        for function in (total, one_by_one)
    ]
    jax.tree.map(assert_close, *results)


def test_each_example_may_have_a_teacher_of_its_own():
    student, hidden, teacher, theirs = make_problem()
    teachers = jax.tree.map(lambda array: jnp.stack([array, -array]), teacher)
    mapped = jax.vmap(lambda teacher: student.divergence(hidden, teacher, theirs))(teachers)
    alone = [
        student.divergence(hidden, jax.tree.map(lambda array: sign * array, teacher), theirs)
        for sign in (1, -1)
    ]
    assert_close(mapped, jnp.stack(alone))


def test_steps_of_a_scan_learn_from_the_teacher():
    student, hidden, teacher, theirs = make_problem(soft_cap=None)

    def step(student, _):
        loss, gradient = jax.value_and_grad(student.__class__.divergence)(
            student, hidden, teacher, theirs
        )
        return jax.tree.map(lambda a, g: a - 0.5 * g, student, gradient), loss

    _, losses = jax.jit(lambda student: jax.lax.scan(step, student, length=20))(student)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_second_derivative_is_that_from_logits(kind):
    student, hidden, teacher, theirs = make_problem()
    # NaN of padding rows reaches second derivatives of any loss
    table = dataclasses.replace(teacher.table, embeddings=jnp.nan_to_num(teacher.table.embeddings))
    teacher = dataclasses.replace(teacher, table=table)

    def plain(hidden):
        logits = plain_logits(student, hidden), plain_logits(teacher, theirs)
        return jnp.mean(reference_divergence(kind, 1.0, *logits))

    def ours(hidden):
        return student.divergence(hidden, teacher, theirs, kind=kind)

    def squared(loss):
        return eqx.filter_jit(jax.grad(lambda hidden: jnp.sum(jax.grad(loss)(hidden) ** 2)))(hidden)

    assert_close(squared(ours), squared(plain))


def test_a_teacher_may_be_in_bfloat16():
    """Each computes in its own dtype, and the divergence in float32."""
    student, hidden, teacher, theirs = make_problem(soft_cap=None)
    half = jax.tree.map(lambda array: array.astype("bfloat16"), (teacher, theirs))
    wide = jax.tree.map(lambda array: array.astype("float32"), half)
    actual = value_and_gradients(student, hidden, *half)
    jax.tree.map(assert_close, actual, value_and_gradients(student, hidden, *wide))
    assert actual[0].dtype == "float32"


def test_an_empty_batch_costs_nothing():
    student, hidden, teacher, theirs = make_problem()
    assert student.divergence(hidden[:0], teacher, theirs[:0]) == 0


@pytest.mark.slow
def test_both_logits_of_a_chunk_are_all_that_exist():
    """Twice the logits take half the tokens."""
    shapes = [(2048, 64), (8192, 64), (2048, 32), (8192, 32)]
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]

    def compare(hidden, rows, theirs, their_rows):
        student, teacher = (
            EmbeddingDecode(EmbeddingTable(table, ("vocabulary", "embedding")))
            for table in (rows, their_rows)
        )
        return student.divergence(hidden, teacher, theirs)

    compiled = compile_by_default(jax.jit(jax.grad(compare, (0, 1))).lower(*arrays))
    logits = 2 * 64 * 8192 * 4  # of chunks of 64 tokens
    assert temporaries(compiled) < 1.2 * logits + 3 * 8192 * 64 * 4


def test_wrong_arguments_are_clear_errors():
    student, hidden, teacher, theirs = make_problem()
    call: Any = functools.partial(student.divergence, hidden, teacher)
    with pytest.raises(ValueError, match="'forward', 'reverse', 'jensen_shannon', got 'KL'"):
        call(theirs, kind="KL")
    for temperature in 0, -1.0, np.inf, np.nan:
        with pytest.raises(ValueError, match="temperature must be at least 1e-30 and at most 1e"):
            call(theirs, temperature=temperature)
    with pytest.raises(TypeError, match=r"got EmbeddingTable. .* use EmbeddingDecode\(table\)"):
        student.divergence(hidden, teacher.table, theirs)  # type: ignore
    with pytest.raises(TypeError) as error:
        call(theirs, temperature=jnp.asarray(1.0))
    assert any("a Python number" in note for note in error.value.__notes__)
    with pytest.raises(ValueError, match=r"teacher_hidden must end .*heads=2, features=3"):
        call(hidden)
    with pytest.raises(ValueError, match=r"teacher_hidden must begin with the shape \(19,\)"):
        call(theirs[1:])
    with pytest.raises(ValueError, match=r"weights must have the shape \(19,\)"):
        call(theirs, weights=WEIGHTS[1:])
    table = EmbeddingTable(make_array((9, 4)), ("vocabulary", "embedding"))
    with pytest.raises(ValueError, match="same vocabulary, got a vocab_size of 7 and 9"):
        student.divergence(hidden, EmbeddingDecode(table), hidden)
