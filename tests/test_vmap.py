"""Losses that are written for one example and mapped over many by `jax.vmap`."""

import dataclasses
import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .helpers import (
    assert_close,
    assert_trees_close,
    compile_by_default,
    make_array,
    make_layer as make_any_layer,
    NAMES,
    plain_loss,
    temporaries,
    VOCAB_SIZE,
)


EXAMPLES, TOKENS = 4, 10
BATCH = (EXAMPLES, TOKENS)
TARGETS = (np.arange(40).reshape(BATCH) % VOCAB_SIZE).astype(np.int32)
MASK = np.arange(40).reshape(BATCH) % 5 != 1
CHUNK_SIZE = 16  # more than one example, less than two


def make_layer(padding=np.nan, seed=0):
    """The padding rows are NaN, and so are their biases, so that a leak shows."""
    return make_any_layer("last", with_bias=True, soft_cap=4.0, padding=padding, seed=seed)


def make_examples(mapped: str, axis=0):
    """Hidden, targets, weights, data, and an array to close over; those whose letter is among
    `mapped` have an axis of examples."""
    draw = np.random.default_rng(0)
    weights = np.where(MASK, draw.uniform(0.5, 2, BATCH), 0)
    # an example without any token that counts
    weights[1] = 0
    arrays = {
        "h": draw.normal(size=(*BATCH, 2, 3)),
        "t": TARGETS,
        "w": weights,
        "d": draw.normal(size=BATCH),
        "c": draw.uniform(0.5, 1.5, size=(EXAMPLES, 3)),
    }
    return tuple(
        jnp.asarray(
            np.moveaxis(array, 0, axis) if name in mapped else array[0],
            "int32" if name == "t" else "float32",
        )
        for name, array in arrays.items()
    )


def in_axes(mapped: str, axis=0):
    return None, *(axis if name in mapped else None for name in "htwdc")


def loss_of_example(token_loss, layer, hidden, targets, weights, data, closed, **options):
    def fn(scores, advantage):
        ratio = jnp.exp(scores.log_prob + closed[0])
        clipped = jnp.clip(ratio, 0.8, 1.2)
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        return closed[1] * scores.logsumexp - surrogate - closed[2] * scores.entropy

    return token_loss(fn, layer, hidden, targets, data, weights=weights, **options)


def ours(fn, layer, hidden, targets, *data, **options):
    return layer.token_loss(fn, hidden, targets, *data, chunk_size=CHUNK_SIZE, **options)


@eqx.filter_jit
def differentiate(losses, layer, hidden, targets, *others):
    """The losses of all examples, and the gradients of a sum of them with respect to all."""

    def total(operands):
        layer, hidden, *others = operands
        values = losses(layer, hidden, targets, *others)
        # the cotangents of the examples differ
        return jnp.vdot(values, make_array(values.shape, seed=5)), values

    gradient = eqx.filter_value_and_grad(total, has_aux=True)
    (_, values), gradients = gradient((layer, hidden, *others))
    return values, gradients


PLAIN = {
    reduction: jax.vmap(
        functools.partial(loss_of_example, plain_loss, reduction=reduction), in_axes("htwdc")
    )
    for reduction in ("mean", "sum", "none")
}


def expected_of(reduction, mapped="htwdc"):
    """What `differentiate` returns, from the logits of each example."""
    examples = [
        x if name in mapped else jnp.broadcast_to(x, (EXAMPLES, *x.shape))
        for name, x in zip("htwdc", make_examples(mapped), strict=True)
    ]
    values, (for_layer, *gradients) = differentiate(PLAIN[reduction], make_layer(0.0), *examples)
    summed = [
        gradient if name in mapped else np.sum(gradient, 0)
        for name, gradient in zip("hwdc", gradients, strict=True)
    ]
    return values, (for_layer, *summed)


# The gradient of mapped losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "mapped, reduction",
    [
        ("htwd", "mean"),
        ("htwdc", "none"),
        ("htc", "sum"),
        ("w", "mean"),
        ("t", "mean"),
        ("c", "none"),
    ],
)
def test_gradients_of_a_vmap_are_those_of_plain_logits(mapped, reduction):
    loss = functools.partial(loss_of_example, ours, reduction=reduction)
    losses = jax.vmap(loss, in_axes(mapped))
    actual = differentiate(losses, make_layer(), *make_examples(mapped))
    assert_trees_close(actual, expected_of(reduction, mapped))


@pytest.mark.slow
def test_the_axis_of_examples_may_be_any():
    loss = functools.partial(loss_of_example, ours, reduction="none")

    def losses(*operands):
        return jax.vmap(loss, in_axes("htwdc", axis=1), out_axes=1)(*operands).T

    examples = make_examples("htwdc", axis=1)
    values, (for_layer, *gradients) = differentiate(losses, make_layer(), *examples)
    actual = values, (for_layer, *(np.moveaxis(gradient, 1, 0) for gradient in gradients))
    assert_trees_close(actual, expected_of("none"))


@pytest.mark.slow
def test_a_negative_axis_counts_from_the_end():
    layer, (hidden, targets, *_) = make_layer(), make_examples("ht")
    expected = jax.vmap(layer.cross_entropy)(hidden, targets)
    moved = jnp.moveaxis(hidden, 0, -1), targets.T
    np.testing.assert_array_equal(jax.vmap(layer.cross_entropy, -1)(*moved), expected)


# Without weights, data or closures, each of which a rule could forget


@pytest.mark.parametrize(
    "padding_rows, options", [(0, {}), (2, dict(ignore_index=3, reduction="none"))]
)
@pytest.mark.slow
def test_a_bare_cross_entropy_is_that_of_each_example(padding_rows, options):
    layer, (hidden, targets, *_) = make_layer(), make_examples("ht")
    if padding_rows == 0:
        arrays = dict(embeddings=layer.table.embeddings[..., :VOCAB_SIZE], bias=None)
        layer = EmbeddingDecode(dataclasses.replace(layer.table, **arrays, padding_rows=0))
    loss = functools.partial(layer.cross_entropy, **options)
    losses = eqx.filter_jit(jax.vmap(loss))(hidden, targets)
    one_by_one = [loss(h, t) for h, t in zip(hidden, targets, strict=True)]
    assert_close(losses, np.stack(one_by_one))


# Transformations around, within and beside


def nested(loss):
    def losses(layer, *examples):
        pairs = [x.reshape(2, 2, *x.shape[1:]) for x in examples]
        inner = jax.vmap(loss, in_axes("htwdc"))
        return jax.vmap(inner, in_axes("htwdc"))(layer, *pairs).reshape(EXAMPLES)

    return losses


def nested_over_different_operands(loss):
    """The outer map has the pairs of a closed-over array, the inner one the examples."""

    def losses(layer, *examples):
        inner = jax.vmap(loss, in_axes("htwd"))
        return jnp.diagonal(jax.vmap(inner, in_axes("c"))(layer, *examples))

    return losses


def in_a_scan(loss):
    def losses(layer, *examples):
        pairs = [x.reshape(2, 2, *x.shape[1:]) for x in examples]

        @jax.checkpoint
        def step(carry, pair):
            return carry, jax.vmap(loss, in_axes("htwdc"))(layer, *pair)

        return lax.scan(step, None, pairs)[1].reshape(EXAMPLES)

    return losses


def around_a_scan(loss):
    """Each example scans over its halves, which do not count alike."""

    def of_example(layer, hidden, targets, weights, data, closed):
        halves = [x.reshape(2, TOKENS // 2, *x.shape[1:]) for x in (hidden, targets, weights, data)]

        def step(total, half):
            return total + loss(layer, *half, closed), None

        return lax.scan(step, jnp.zeros(()), halves)[0]

    return jax.vmap(of_example, in_axes("htwdc"))


STRUCTURES = {
    "nested": nested,
    "nested over different operands": nested_over_different_operands,
    "in a scan": in_a_scan,
    "filter_vmap of jit": lambda loss: eqx.filter_vmap(
        jax.jit(loss), in_axes=(None, 0, 0, 0, 0, 0)
    ),
    "around a scan": around_a_scan,
}


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_vmap_may_stand_anywhere(structure):
    loss = functools.partial(loss_of_example, ours, reduction="sum")
    losses = STRUCTURES[structure](loss)
    actual = differentiate(losses, make_layer(), *make_examples("htwdc"))
    assert_trees_close(actual, expected_of("sum"))


@pytest.mark.slow
def test_second_derivatives_of_a_vmap_are_those_of_plain_logits():
    layer, (hidden, *others) = make_layer(0.0), make_examples("htwdc")
    direction = make_array(hidden.shape, seed=6)

    @eqx.filter_jit
    def product(token_loss, hidden):
        def total(hidden):
            loss = functools.partial(loss_of_example, token_loss)
            losses = jax.vmap(loss, in_axes("htwdc"))(layer, hidden, *others)
            return jnp.sum(losses**2)

        return jax.jvp(jax.grad(total), (hidden,), (direction,))[1]

    assert_close(product(ours, hidden), product(plain_loss, hidden), 1e-4, 1e-4)


# Scores


@pytest.mark.slow
@pytest.mark.parametrize("mapped", ["htw", "w", "t", "tw"])
def test_scores_of_examples_are_those_of_the_batch(mapped):
    layer, (hidden, targets, weights, *_) = make_layer(), make_examples(mapped)

    def of_example(hidden, targets, weights):
        return layer.score(hidden, targets, weights=weights, chunk_size=CHUNK_SIZE)

    def total(hidden, of_all):
        scores = of_all(hidden, targets, weights)
        factors = make_array((4, *BATCH), seed=5)
        return sum(jnp.vdot(f, s) for f, s in zip(factors, scores, strict=False)), scores

    def loop(*operands):
        repeated = (
            x if name in mapped else jnp.broadcast_to(x, (EXAMPLES, *x.shape))
            for name, x in zip("htw", operands, strict=True)
        )
        return of_example(*repeated)

    run = eqx.filter_jit(jax.value_and_grad(total, has_aux=True))
    actual = run(hidden, jax.vmap(of_example, in_axes(mapped)[1:4]))
    assert_trees_close(actual, run(hidden, loop))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mapped, reduction", [("htw", "none"), ("w", "mean"), ("t", "none"), ("tw", "mean")]
)
def test_scores_come_with_the_losses_of_examples(mapped, reduction):
    layer, (hidden, targets, weights, *_) = make_layer(), make_examples(mapped)
    options: Any = dict(reduction=reduction, return_scores=True)

    def loss(hidden, targets, weights):
        return layer.cross_entropy(hidden, targets, weights=weights, **options)

    mapped_loss = jax.vmap(loss, in_axes(mapped)[1:4])

    def total(hidden):
        losses, scores = mapped_loss(hidden, targets, weights)
        # the scores have no gradient
        return jnp.sum(losses) + jnp.sum(scores.entropy), (losses, scores)

    run = eqx.filter_jit(jax.value_and_grad(total, has_aux=True))
    (_, (losses, scores)), gradient = run(hidden)
    expected, wanted, for_hidden = [], [], []

    @eqx.filter_jit
    def one(*x) -> Any:
        return loss(*x), jax.grad(lambda h: jnp.sum(loss(h, *x[1:])[0]))(x[0])

    for i in range(EXAMPLES):
        arguments = [
            x[i] if name in mapped else x
            for name, x in zip("htw", (hidden, targets, weights), strict=True)
        ]
        (value, of_example), gradient_of_example = one(*arguments)
        expected.append(value)
        wanted.append(of_example)
        for_hidden.append(gradient_of_example)
    assert_close(losses, jnp.stack(expected))
    assert_trees_close(scores, jax.tree.map(lambda *x: jnp.stack(x), *wanted))
    for_hidden = jnp.stack(for_hidden)
    assert_close(gradient, for_hidden if "h" in mapped else jnp.sum(for_hidden, 0))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(5,), ()])
def test_a_vector_may_have_targets_of_its_own_examples(batch):
    """Candidates in two axes, some of which are ignored, or out of range."""
    layer, hidden = make_layer(), make_array((*batch, 2, 3))
    candidates = np.arange(6 * np.prod(batch, dtype=int)).reshape(2, 3, *batch) % VOCAB_SIZE
    candidates[0, 1], candidates[1, 2] = -100, VOCAB_SIZE

    def scores_of(hidden, targets):
        return layer.score(hidden, targets, ignore_index=-100)

    def total(hidden, score):
        scores = score(hidden)
        counted = jnp.where(jnp.isnan(scores.log_prob), 0, scores.log_prob)
        return jnp.vdot(make_array(counted.shape, seed=5), counted * scores.entropy), scores

    def of_all(hidden):
        score = functools.partial(scores_of, hidden)
        return jax.vmap(jax.vmap(score))(jnp.asarray(candidates))

    def one_by_one(hidden):
        each = [scores_of(hidden, targets) for row in candidates for targets in row]
        return jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *batch), *each)

    run = eqx.filter_jit(jax.value_and_grad(total, has_aux=True))
    actual = run(hidden, of_all)
    (_, scores), _ = actual
    assert jnp.all(scores.log_prob[0, 1] == 0) and jnp.all(jnp.isnan(scores.log_prob[1, 2]))
    assert_trees_close(actual, run(hidden, one_by_one))


def test_no_example_at_all_has_no_scores():
    layer, hidden = make_layer(), make_array((5, 2, 3))
    score = functools.partial(layer.score, hidden)
    scores = jax.vmap(score)(jnp.zeros((0, 5), "int32"))
    assert {x.shape for x in scores} == {(0, 5)}


# Gradients and tables of each example


@pytest.mark.slow
def test_vmap_of_grad_gives_each_example_its_own_gradients():
    def gradients(token_loss, layer, examples):
        def loss(operands, targets):
            layer, hidden, *others = operands
            return loss_of_example(token_loss, layer, hidden, targets, *others)

        hidden, targets, *others = examples
        of_example = eqx.filter_value_and_grad(loss)
        of_all = eqx.filter_vmap(of_example, in_axes=((None, 0, 0, 0, 0), 0))
        return eqx.filter_jit(of_all)((layer, hidden, *others), targets)

    examples = make_examples("htwdc")
    values, actual = gradients(ours, make_layer(), examples)
    assert actual[0].table.embeddings.shape == (EXAMPLES, 2, 3, VOCAB_SIZE + 2)
    assert_trees_close((values, actual), gradients(plain_loss, make_layer(0.0), examples))


@pytest.mark.parametrize("mapped", ["table", "bias"])
@pytest.mark.slow
def test_each_example_may_have_a_table_of_its_own(mapped):
    axes = 0 if mapped == "table" else None, 0
    tables = [make_layer(0.0, seed=i).table for i in range(EXAMPLES)]
    embeddings = np.stack([table.embeddings for table in tables])
    biases: Any = [table.bias for table in tables]
    arrays = embeddings if mapped == "table" else embeddings[0], np.stack(biases)

    def losses(token_loss):
        def of_example(embeddings, bias, *example):
            table = dataclasses.replace(tables[0], embeddings=embeddings, bias=bias)
            return loss_of_example(token_loss, EmbeddingDecode(table, soft_cap=4.0), *example)

        of_all = jax.vmap(of_example, (*axes, *in_axes("htwdc")[1:]))
        return lambda arrays, *examples: of_all(*arrays, *examples)

    arrays, examples = tuple(map(jnp.asarray, arrays)), make_examples("htwdc")
    actual = differentiate(losses(ours), arrays, *examples)
    assert_trees_close(actual, differentiate(losses(plain_loss), arrays, *examples))


# Memory


V, D = 8192, 64


def mean_of_vmap(loss):
    return lambda rows, *x: jnp.mean(jax.vmap(functools.partial(loss, rows))(*x))


def mean_of_nested_vmap(loss):
    return lambda rows, *x: jnp.mean(jax.vmap(jax.vmap(functools.partial(loss, rows)))(*x))


def mean_of_vmap_in_scan(loss):
    def mean(rows, *examples):
        def step(total, pair):
            return total + mean_of_vmap(loss)(rows, *pair), None

        return lax.scan(step, jnp.zeros(()), examples)[0] / len(examples[0])

    return mean


@functools.cache
def compile_gradient(mean, batch):
    def loss(rows, hidden, targets):
        table = EmbeddingTable(rows, ("vocabulary", "embedding"))
        return EmbeddingDecode(table).cross_entropy(hidden, targets)

    function = jax.value_and_grad(loss if mean is None else mean(loss), (0, 1))
    shapes = (
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((*batch, D), jnp.float32),
        jax.ShapeDtypeStruct(batch, jnp.int32),
    )
    return compile_by_default(jax.jit(function).lower(*shapes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mean, batch",
    [
        (mean_of_vmap, (16, 128)),
        (mean_of_nested_vmap, (4, 4, 128)),
        (mean_of_vmap_in_scan, (4, 4, 128)),
    ],
)
def test_mapped_examples_share_one_gradient_of_the_table(mean, batch):
    of_batch = temporaries(compile_gradient(None, (16, 128)))
    compiled = compile_gradient(mean, batch)
    # a scan adds the gradient of each of its steps to a sum
    of_sum = V * D * 4 if mean is mean_of_vmap_in_scan else 0
    assert temporaries(compiled) <= 1.2 * of_batch + of_sum
    text = compiled.as_text()
    assert text is not None
    assert f"f32[{V},{D}]" in text
    assert not re.findall(rf"f32\[[\d,]+,{V},{D}\]", text)


# Masked tokens cost no time


@pytest.mark.parametrize("gradients", [False, True])
def test_chunks_of_masked_tokens_are_skipped(gradients):
    layer, targets, chunks = make_layer(), np.zeros(96, np.int32), []

    def note_chunk(x):
        chunks.append(x)
        return np.zeros(x.shape, np.float32)

    def fn(scores):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        log_prob = lax.stop_gradient(scores.log_prob)
        zero = jax.pure_callback(note_chunk, shape, log_prob, vmap_method="expand_dims")
        return scores.log_prob + zero

    def loss(hidden, weights):
        options: Any = dict(weights=weights, chunk_size=CHUNK_SIZE)
        return layer.token_loss(fn, hidden, targets, **options)

    run = eqx.filter_jit(jax.value_and_grad(loss) if gradients else loss)
    hidden = make_array((96, 2, 3))

    def count(*counted):
        weights = np.zeros(96, np.float32)
        weights[list(counted)] = 1
        chunks.clear()
        result = run(np.where(weights[:, None, None] != 0, hidden, np.nan), weights)
        assert all(np.isfinite(array).all() for array in jax.tree.leaves(result))
        return len(chunks)

    assert count(*range(0, 96, 6)) == 1  # 16 tokens, apart from each other
    assert count(0, 1, *range(6, 96, 6)) == 2
    assert count(*range(96)) == 6
    assert count() == 0


@pytest.mark.slow
def test_chunks_are_skipped_under_vmap_too():
    """A condition for each example would be no branch but a choice between both results."""
    layer, (hidden, targets, weights, *_) = make_layer(), make_examples("htw")

    def total(hidden, weights):
        def loss(hidden, targets, weights):
            return layer.cross_entropy(hidden, targets, weights=weights, chunk_size=CHUNK_SIZE)

        return jnp.sum(jax.vmap(loss)(hidden, targets, weights))

    for function in total, jax.grad(total):
        assert "stablehlo.case" in jax.jit(function).lower(hidden, weights).as_text()


@pytest.mark.slow
def test_masked_places_repeat_tokens_of_their_own_example():
    """Each example closes over another number, and no token of the other one is in its domain."""
    layer, hidden = make_layer(), make_array((2, 3, 2, 3), seed=2)
    targets, weights = np.arange(6).reshape(2, 3), jnp.asarray([[1.0, 1, 1], [1, 0, 1]])
    smallest, data = jnp.asarray([0.0, 2.0]), jnp.asarray([[1.0] * 3, [3.0] * 3])

    def loss(smallest, hidden, targets, weights, data):
        def fn(scores, x):
            return jnp.sqrt(x - smallest) * scores.log_prob

        return layer.token_loss(fn, hidden, targets, data, weights=weights)

    batch = hidden, targets, weights, data
    together = jax.grad(lambda s: jnp.sum(jax.vmap(loss)(s, *batch)))(smallest)
    alone = [jax.grad(loss)(smallest[i], *(array[i] for array in batch)) for i in range(2)]
    assert_close(together, np.stack(alone))
    broken = hidden.at[0, 0].set(jnp.nan), *batch[1:]
    together = jax.grad(lambda s: jnp.sum(jax.vmap(loss)(s, *broken)))(smallest)
    assert np.isnan(together[0])
    assert_close(together[1], alone[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow
def test_a_gradient_under_vmap_counts_past_256(reduction):
    table = EmbeddingTable(jnp.zeros((2, 1), jnp.bfloat16), NAMES)
    hidden, targets = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros(4096, "int32")

    def total(table):
        layer = EmbeddingDecode(table)
        return jnp.sum(
            jax.vmap(lambda h, y: layer.cross_entropy(h, y, reduction=reduction))(hidden, targets)
        )

    assert eqx.filter_grad(total)(table).embeddings.tolist() == [[-2048], [2048]]


def test_a_constant_mask_of_one_token_for_each_example_compiles():
    """XLA for CPUs ended the process, when it folded what is computed from such a mask."""
    layer = EmbeddingDecode(EmbeddingTable(jnp.ones((23, 4)), ("vocabulary", "embedding")))
    hidden, targets = jnp.ones((3, 1, 4)), jnp.zeros((3, 1), "int32")

    @jax.jit
    def losses(hidden):
        def loss(hidden, targets):
            return layer.cross_entropy(hidden, targets, weights=jnp.ones(1))

        return jax.vmap(loss)(hidden, targets)

    np.testing.assert_allclose(losses(hidden), np.full(3, np.log(23)), rtol=1e-5)
