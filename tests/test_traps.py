"""What common ways to write a training step cost in memory, products and compilations.

Programs of memory are compiled, but do not run, so that their shapes may be large.
"""

import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from benchmarks.programs import count_products
from eqx_embedding import (
    combine_rows,
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    partition_rows,
    resize_vocabulary,
)

from .helpers import compile_by_default, compiled_memory, make_array, NAMES, temporaries


pytestmark = pytest.mark.usefixtures("jax_defaults")

EXAMPLES, LENGTH, D, V = 8, 128, 64, 16384
N = EXAMPLES * LENGTH
TABLE, LOGITS = 4 * V * D, 4 * N * V  # bytes in float32


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


ROWS, TOKENS = shape(V, D), (shape(N, D), shape(N, dtype="int32"))
SEQUENCES = shape(EXAMPLES, LENGTH, D), shape(EXAMPLES, LENGTH, dtype="int32")


def decode_with(rows):
    return EmbeddingDecode(EmbeddingTable(rows, NAMES))


def loss(rows, hidden, targets, **options):
    return decode_with(rows).cross_entropy(hidden, targets, **options)


def plain_loss(rows, hidden, targets):
    logits = hidden @ rows.T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def gradients(function):
    return jax.value_and_grad(function, (0, 1))


def compiled(function, *shapes, **options):
    return compile_by_default(jax.jit(function, **options).lower(*shapes))


def held(function, *shapes, **options) -> int:
    """Bytes of temporaries."""
    return temporaries(compiled(function, *shapes, **options))


@functools.cache
def held_for_batch() -> int:
    """By one call for all tokens, with the gradients of the table and of the vectors."""
    return held(gradients(loss), ROWS, *TOKENS)


def count(function, *shapes) -> float:
    """Matrix products of all tokens and the whole table."""
    traced = jax.jit(function).trace(*shapes)
    return count_products(traced.jaxpr.jaxpr, "cpu").operations / (2 * N * V * D)


# Loops


def in_scan(of_sequence, rows, *batch):
    def step(total, sequence):
        return total + of_sequence(rows, *sequence), None

    return lax.scan(step, jnp.zeros(()), batch)[0] / len(batch[0])


def in_map(of_sequence, rows, *batch):
    return jnp.mean(lax.map(lambda sequence: of_sequence(rows, *sequence), batch))


def in_python(of_sequence, rows, *batch):
    count = len(batch[0])
    return sum(of_sequence(rows, *(x[i] for x in batch)) for i in range(count)) / count


def mean_of_losses(rows, hidden, targets):
    return jnp.mean(loss(rows, hidden, targets, reduction="none"))


@pytest.mark.slow
@pytest.mark.parametrize("loop", [in_scan, in_map, in_python])
def test_a_loop_of_losses_holds_a_gradient_for_each(loop):
    function = gradients(functools.partial(loop, loss))
    assert EXAMPLES * TABLE < held(function, ROWS, *SEQUENCES)
    assert count(function, ROWS, *SEQUENCES) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop, of_sequence",
    [(in_scan, jax.checkpoint(loss)), (in_map, jax.checkpoint(loss)), (in_scan, mean_of_losses)],
    ids=["scan", "map", "scan of none"],
)
def test_a_checkpointed_loop_holds_one_gradient(loop, of_sequence):
    function = gradients(functools.partial(loop, of_sequence))
    assert held(function, ROWS, *SEQUENCES) < held_for_batch() + 1.2 * TABLE
    assert count(function, ROWS, *SEQUENCES) == 4


@pytest.mark.slow
def test_a_checkpoint_holds_no_more():
    assert held(gradients(jax.checkpoint(loss)), ROWS, *TOKENS) < 1.05 * held_for_batch()


@pytest.mark.slow
def test_gradients_of_each_example_hold_all_logits():
    def in_turn(rows, *batch):
        return lax.map(lambda example: jax.grad(loss, 1)(rows, *example), batch)

    each, plain = (jax.vmap(jax.grad(f, 1), (None, 0, 0)) for f in (loss, plain_loss))
    assert LOGITS < held(each, ROWS, *SEQUENCES) < 1.05 * held(plain, ROWS, *SEQUENCES)
    assert held(in_turn, ROWS, *SEQUENCES) <= 1.05 * held_for_batch()


@pytest.mark.slow
def test_added_gradients_hold_one_sum():
    def accumulate(rows, *batch):
        def step(total, sequence):
            return total + jax.grad(loss)(rows, *sequence), None

        return lax.scan(step, jnp.zeros_like(rows), batch)[0]

    assert held(accumulate, ROWS, *SEQUENCES) < held_for_batch() + 1.2 * TABLE


def descend(optimizer, of_batch, rows, state, *batch):
    updates, state = optimizer.update(jax.grad(of_batch)(rows, *batch), state, rows)
    return optax.apply_updates(rows, updates), state


@pytest.mark.slow
def test_multi_steps_hold_what_optax_needs():
    def of_step(optimizer, of_batch):
        step = functools.partial(descend, optimizer, of_batch)
        state = jax.eval_shape(optimizer.init, ROWS)
        return held(step, ROWS, state, *TOKENS, donate_argnums=(0, 1))

    adam = optax.adam(1e-3)
    several: optax.GradientTransformation = optax.MultiSteps(adam, 4)  # pyright: ignore
    assert of_step(several, loss) < of_step(adam, loss) + 2.2 * TABLE
    assert of_step(several, loss) < of_step(several, plain_loss)


@pytest.mark.slow
def test_an_ensemble_holds_what_its_members_do():
    members, tokens = 4, (shape(N // 4, D), shape(N // 4, dtype="int32"))

    def mean(rows, hidden, targets):
        return jnp.mean(jax.vmap(loss, (0, 0, None))(rows, hidden, targets))

    together = held(gradients(mean), shape(members, V, D), shape(members, N // 4, D), tokens[1])
    assert together < 1.1 * members * held(gradients(loss), ROWS, *tokens)


# One call


def masked(rows, hidden, targets):
    return loss(rows, hidden, targets, weights=targets % 2 == 0)


def weighted_by_hand(rows, hidden, targets):
    weights = (targets % 2).astype(hidden.dtype)
    return jnp.sum(weights * loss(rows, hidden, targets, reduction="none")) / jnp.sum(weights)


def from_scores(rows, hidden, targets):
    return -jnp.mean(decode_with(rows).score(hidden, targets).log_prob)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, products",
    [(masked, 3), (mean_of_losses, 4), (weighted_by_hand, 4), (from_scores, 4)],
)
def test_masks_and_means_by_hand_hold_no_more(function, products):
    assert held(gradients(function), ROWS, *TOKENS) < 1.1 * held_for_batch()
    assert count(gradients(function), ROWS, *TOKENS) == products


def test_no_cumulative_sum_is_taken_of_a_mask():
    masked = functools.partial(loss, ignore_index=-1, chunk_size=LENGTH)
    program = str(jax.make_jaxpr(gradients(masked))(ROWS, *TOKENS))
    assert "sort[" in program and "cumsum[" not in program


def test_a_second_call_for_scores_computes_logits_again():
    def twice(rows, *batch):
        return loss(rows, *batch) - jnp.mean(decode_with(rows).score(*batch).entropy)

    def once(rows, *batch):
        return decode_with(rows).token_loss(lambda s: -s.log_prob - s.entropy, *batch)

    assert count(gradients(twice), ROWS, *TOKENS) == 7
    assert count(gradients(once), ROWS, *TOKENS) == 3


@pytest.mark.slow
def test_targets_of_the_same_vectors_share_their_logits():
    candidates = shape(4, N, dtype="int32")

    def mapped(rows, hidden, candidates):
        score = functools.partial(decode_with(rows).score, hidden)
        return jnp.mean(jax.vmap(score)(candidates).log_prob)

    def repeated(rows, hidden, candidates):
        hidden = jnp.broadcast_to(hidden, (4, *hidden.shape))
        return jnp.mean(decode_with(rows).score(hidden, candidates).log_prob)

    assert count(mapped, ROWS, TOKENS[0], candidates) == 1
    assert count(repeated, ROWS, TOKENS[0], candidates) == 4
    assert count(gradients(mapped), ROWS, TOKENS[0], candidates) == 4
    assert count(gradients(repeated), ROWS, TOKENS[0], candidates) == 16


@pytest.mark.slow
def test_float64_holds_twice_as_much():
    with jax.enable_x64(True):
        wide = shape(V, D, dtype="float64"), shape(N, D, dtype="float64"), TOKENS[1]
        assert held(gradients(loss), *wide) < 2.1 * held_for_batch()


@pytest.mark.slow
def test_a_table_with_the_vocabulary_last_is_copied_once():
    def of_transposed(rows, *batch):
        table = EmbeddingTable(rows, NAMES[::-1])
        return EmbeddingDecode(table).cross_entropy(*batch)

    held_now = held(gradients(of_transposed), shape(D, V), *TOKENS)
    assert held_now < held_for_batch() + 1.2 * TABLE


def entropies(rows, hidden, targets, **options):
    scores = decode_with(rows).score(hidden, targets, **options)
    return jnp.vdot(scores.entropy, scores.log_prob)


def plain_entropies(rows, hidden, targets):
    log_probs = jax.nn.log_softmax(hidden @ rows.T)
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    return jnp.vdot(entropy, jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0])


def reverse_over_reverse(function, rows, hidden, targets):
    def slope(*operands):
        return optax.tree.norm(jax.grad(function, (0, 1))(*operands, targets), squared=True)

    return jax.grad(slope, (0, 1))(rows, hidden)


def linearized(function, rows, hidden, targets):
    gradient = jax.grad(lambda operands: function(*operands, targets))
    return jax.linearize(gradient, (rows, hidden))[1]((rows, hidden))


@pytest.mark.slow
@pytest.mark.parametrize("order", [reverse_over_reverse, linearized])
@pytest.mark.parametrize("function, plain", [(loss, plain_loss), (entropies, plain_entropies)])
def test_second_derivatives_hold_half_of_what_they_do_from_logits(function, plain, order):
    ours, theirs = (held(functools.partial(order, f), ROWS, *TOKENS) for f in (function, plain))
    assert ours < theirs / 2


# What is frozen


def dots(function, *shapes) -> int:
    """The products of a compiled program, in the text of its loops."""
    options: Any = {"xla_backend_optimization_level": 0}
    text = jax.jit(function).lower(*shapes).compile(compiler_options=options).as_text()
    assert text is not None
    return len(re.findall(r" dot\(", text))


@pytest.mark.slow
def test_the_gradient_of_what_is_frozen_is_not_computed():
    frozen_table = dots(jax.grad(loss, 1), ROWS, *TOKENS)
    frozen_body = dots(jax.grad(loss, 0), ROWS, *TOKENS)
    stopped = gradients(lambda rows, *batch: loss(lax.stop_gradient(rows), *batch))
    assert dots(stopped, ROWS, *TOKENS) == frozen_table
    stopped = gradients(lambda rows, x, y: loss(rows, lax.stop_gradient(x), y))
    assert dots(stopped, ROWS, *TOKENS) == frozen_body
    assert max(frozen_table, frozen_body) < dots(gradients(loss), ROWS, *TOKENS)


@pytest.mark.slow
def test_frozen_rows_cost_a_copy_and_a_gradient_of_the_table():
    parts = eqx.filter_eval_shape(
        lambda rows: partition_rows(EmbeddingTable(rows, NAMES), slice(V - 100, None)), ROWS
    )

    def of_rows(trained, frozen, *batch):
        return EmbeddingDecode(combine_rows(trained, frozen)).cross_entropy(*batch)

    held_now = held(jax.value_and_grad(of_rows), *parts, *TOKENS)
    assert held_now < held_for_batch() + 2.2 * TABLE


# Programs


@pytest.mark.parametrize("as_host", [False, True])
def test_a_table_that_jit_closes_over_is_part_of_the_program(as_host):
    rows = np.zeros((V, D), np.float32) + np.arange(V, dtype=np.float32)[:, None]
    rows = rows if as_host else jnp.asarray(rows)
    closed = jax.jit(lambda *batch: loss(rows, *batch)).lower(*TOKENS)
    given = jax.jit(loss).lower(ROWS, *TOKENS)
    assert len(closed.as_text()) > 2 * TABLE > 20 * len(given.as_text())


@pytest.mark.slow
def test_a_new_table_holds_what_its_initializer_does():
    initializer = jax.nn.initializers.normal(0.1)

    def make(key):
        return EmbeddingTable.from_config(V, {"embedding": D}, key=key).embeddings

    key = jax.random.key(0)
    assert held(make, key) < 1.05 * held(lambda key: initializer(key, (V, D)), key)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tables", [("float32", 0.1), ("bfloat16", 1.1)])
def test_a_resize_in_half_precision_holds_a_float32_copy(dtype, tables):
    def grow(rows):
        table = EmbeddingTable(rows, NAMES)
        return resize_vocabulary(table, V + 100, key=jax.random.key(0)).embeddings

    assert held(grow, shape(V, D, dtype=dtype)) < tables * TABLE


def test_the_gradient_of_one_token_is_as_large_as_the_table():
    batch = shape(1, D), shape(1, dtype="int32")
    memory = compiled_memory(compiled(gradients(loss), ROWS, *batch))
    assert memory.output_size_in_bytes > TABLE
    assert memory.temp_size_in_bytes < TABLE / 8


# Compilations


def compilations(caplog, *calls) -> list[int]:
    """How many programs each call compiles."""
    found = []
    for call in calls:
        with jax.log_compiles():
            caplog.clear()
            call()
        found.append(sum("XLA compilation" in r.getMessage() for r in caplog.records))
    return found


HIDDEN, TARGETS = make_array((13, 6), seed=2), np.arange(13)


def make_decode(seed=0, **options):
    return EmbeddingDecode(EmbeddingTable(make_array((21, 6), seed=seed), NAMES), **options)


def scaled(factor, scores):
    return factor * scores.log_prob


METHODS = {
    "lookup": lambda decode, i: EmbeddingLookup(decode.table)(TARGETS + i),
    "decode": lambda decode, i: decode(HIDDEN),
    "loss": lambda decode, i: decode.cross_entropy(HIDDEN, TARGETS + i),
    "gradient": lambda decode, i: eqx.filter_grad(
        lambda decode: decode.cross_entropy(HIDDEN, TARGETS + i)
    )(decode),
    "score": lambda decode, i: decode.score(HIDDEN, TARGETS + i),
    "top_k": lambda decode, i: decode.top_k(HIDDEN, 3),
    "sample": lambda decode, i: decode.sample(HIDDEN, temperature=0.5 + i, key=jax.random.key(i)),
    "divergence": lambda decode, i: decode.divergence(HIDDEN, decode, HIDDEN),
    "array in fn": lambda decode, i: decode.token_loss(
        functools.partial(scaled, jnp.asarray(0.1 * i)), HIDDEN, TARGETS
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_a_second_eager_call_compiles_nothing(method, caplog):
    """Of another table, batch, key and temperature, of the same shapes."""
    call = METHODS[method]
    calls = (functools.partial(call, make_decode(i), i) for i in range(3))
    assert compilations(caplog, *calls)[1:] == [0, 0]


OPTIONS = {
    "soft_cap": lambda x: make_decode(soft_cap=x).cross_entropy(HIDDEN, TARGETS),
    "label_smoothing": lambda x: make_decode().cross_entropy(
        HIDDEN, TARGETS, label_smoothing=x / 16
    ),
    "z_loss": lambda x: make_decode().cross_entropy(HIDDEN, TARGETS, z_loss=x),
    "chunk_size": lambda x: make_decode().cross_entropy(HIDDEN, TARGETS, chunk_size=int(4 * x)),
    "k": lambda x: make_decode().top_k(HIDDEN, int(x / 0.5)),
    "temperature of a divergence": lambda x: make_decode().divergence(
        HIDDEN, make_decode(), HIDDEN, temperature=x
    ),
    "NumPy number in fn": lambda x: make_decode().token_loss(
        functools.partial(scaled, np.float32(x)), HIDDEN, TARGETS
    ),
    "number in fn": lambda x: make_decode().token_loss(
        functools.partial(scaled, x), HIDDEN, TARGETS
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_each_value_of_a_python_number_is_compiled(option, caplog):
    shift = list(OPTIONS).index(option)  # so that no other test compiled it
    call, values = OPTIONS[option], (1.25 + shift, 1.25 + shift, 1.5 + shift)
    found = compilations(caplog, *(functools.partial(call, value) for value in values))
    assert found[1] == 0 and found[2] > 0


def test_a_last_batch_filled_up_with_weights_of_zero_compiles_nothing(caplog):
    decode = make_decode()

    def filled(count):
        return decode.cross_entropy(HIDDEN, TARGETS, weights=np.arange(13) < count)

    def shorter(count):
        return decode.cross_entropy(np.asarray(HIDDEN)[:count], TARGETS[:count])

    assert compilations(caplog, *(functools.partial(filled, n) for n in (13, 5, 0)))[1:] == [0, 0]
    found = compilations(caplog, *(functools.partial(shorter, n) for n in (13, 5)))
    assert found[1] > 0
    np.testing.assert_allclose(filled(5), shorter(5), 1e-6)


def test_a_jitted_step_is_traced_once_for_all_tables():
    traces = []

    @eqx.filter_jit
    def step(decode, hidden, targets):
        traces.append(decode)
        return decode.cross_entropy(hidden, targets)

    for seed in range(3):
        step(make_decode(seed, soft_cap=5.0), HIDDEN, jnp.asarray(TARGETS))
    assert len(traces) == 1


def test_a_table_is_printed_without_its_numbers():
    rows = jnp.zeros((21, 6))
    table = EmbeddingTable(rows, NAMES)
    rows.delete()  # so that nobody can read them
    assert "f32[21,6]" in repr(table) and "f32[21,6]" in repr(EmbeddingDecode(table))
