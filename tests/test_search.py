"""The likeliest tokens, and draws: against JAX's from the logits, and against the distribution."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from eqx_embedding import EmbeddingDecode, EmbeddingTable

from .helpers import (
    compile_by_default,
    decode_reference,
    float64,
    make_array,
    make_table,
    temporaries,
)


V, N, D = 300, 10, 6  # three blocks of rows, the last of them with 44


@functools.cache
def make_operands(dtype="float32"):
    bias = make_array((V + 7,), dtype, 1)
    rows = make_array((V + 7, D), dtype)
    table = EmbeddingTable(rows, ("vocabulary", "embedding"), padding_rows=7, bias=bias)
    return EmbeddingDecode(table, soft_cap=9.0), make_array((N, D), dtype, 2)


def from_logits(decode, hidden):
    """The log-probabilities of all tokens, in float64."""
    logits = decode_reference(decode.table, hidden, decode.soft_cap)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))


def as_logits(*logits):
    """A decode and a hidden vector whose logits are given, in float32."""
    table = EmbeddingTable(jnp.zeros((len(logits), 1)), ("vocabulary", "embedding"))
    return EmbeddingDecode(
        EmbeddingTable(table.embeddings, table.axis_names, bias=jnp.asarray(logits, "float32"))
    ), jnp.ones((1, 1))


# The likeliest tokens


@pytest.mark.parametrize("k", [1, 2, 40, V])
def test_the_likeliest_tokens_are_those_of_the_logits(dtype, k):
    decode, hidden = make_operands(dtype.name)
    log_probs, tokens = eqx.filter_jit(EmbeddingDecode.top_k)(decode, hidden, k)
    expected = from_logits(decode, hidden)
    tolerance = 1e-12 if dtype == "float64" else 3e-6
    assert log_probs.dtype == (dtype if dtype == "float64" else "float32")
    assert tokens.dtype == "int32"
    np.testing.assert_allclose(log_probs, -np.sort(-expected)[:, :k], tolerance, tolerance)
    np.testing.assert_allclose(
        log_probs, np.take_along_axis(expected, np.asarray(tokens), 1), tolerance, tolerance
    )
    assert all(len(set(row)) == k for row in np.asarray(tokens).tolist())


@pytest.mark.parametrize("layout", ["first", "middle", "last"])
def test_any_table_is_searched(layout):
    table = make_table(layout, with_bias=True)
    hidden = make_array((2, 3, *table.embedding_axes.values()), seed=3)
    log_probs, tokens = EmbeddingDecode(table).top_k(hidden, 4)
    expected, places = lax.top_k(jax.nn.log_softmax(EmbeddingDecode(table)(hidden)), 4)
    np.testing.assert_array_equal(tokens, places)
    np.testing.assert_allclose(log_probs, expected, 1e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 16, 33, 1000])
def test_chunks_change_no_token(chunk_size):
    decode, _ = make_operands()
    hidden = make_array((50, D), seed=4)

    def search(decode, hidden, size):
        draw = functools.partial(decode.sample, hidden, key=jax.random.key(0), chunk_size=size)
        return decode.top_k(hidden, 3, chunk_size=size)[1], draw(), draw(top_k=9)

    actual = eqx.filter_jit(search)(decode, hidden, chunk_size)
    jax.tree.map(
        np.testing.assert_array_equal, actual, eqx.filter_jit(search)(decode, hidden, None)
    )


@pytest.mark.parametrize("k", [1, 2, 3, 130, 140])
def test_of_equal_logits_the_lower_token_comes_first(k):
    logits = np.zeros(3 * 128)
    logits[[40, 129, 300]] = 1.0
    decode, hidden = as_logits(*logits)
    _, tokens = decode.top_k(hidden, k)
    np.testing.assert_array_equal(tokens[0], np.argsort(-logits, stable=True)[:k])


def test_of_equal_logits_zero_comes_before_minus_zero():
    """As by `jax.lax.top_k`. Only a table of one feature has logits of -0."""
    decode = EmbeddingDecode(
        EmbeddingTable(jnp.asarray([[-1.0], [1.0], [-1.0]]), ("vocabulary", "embedding"))
    )
    _, tokens = decode.top_k(jnp.zeros((1, 1)), 3)
    np.testing.assert_array_equal(tokens[0], jax.lax.top_k(decode(jnp.zeros(1)), 3)[1])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_token_of_probability_zero_comes_before_padding(k):
    rows = jnp.zeros((6, 1))
    bias = jnp.asarray([-jnp.inf, 1.0, -jnp.inf, 2.0, 9.0, 9.0])
    table = EmbeddingTable(rows, ("vocabulary", "embedding"), padding_rows=2, bias=bias)
    log_probs, tokens = EmbeddingDecode(table).top_k(jnp.ones((1, 1)), k)
    np.testing.assert_array_equal(tokens[0], [3, 1, 0, 2][:k])
    expected = [-np.log1p(np.exp(-1)), -np.log1p(np.exp(1)), -np.inf, -np.inf]
    np.testing.assert_allclose(log_probs[0], expected[:k], 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("k", [1, 2, 150])
@pytest.mark.slow
def test_a_logit_that_is_not_finite_gives_no_token(bad, k):
    logits = np.zeros(200)
    logits[150] = bad
    decode, hidden = as_logits(*logits)
    log_probs, tokens = decode.top_k(hidden, k)
    assert jnp.all(jnp.isnan(log_probs)) and jnp.all(tokens == -1)
    draw = functools.partial(decode.sample, hidden, key=jax.random.key(0))
    assert draw() == draw(temperature=0) == draw(top_k=k) == -1
    assert draw(temperature=jnp.zeros(1)) == -1


def test_a_vector_of_nan_affects_no_other():
    decode, hidden = make_operands()
    poisoned = hidden.at[3].set(jnp.nan)
    for search in (
        lambda x: decode.top_k(x, 5)[1],
        lambda x: decode.sample(x, key=jax.random.key(0)),
    ):
        np.testing.assert_array_equal(search(poisoned), search(hidden).at[3].set(-1))


def test_logits_of_minus_infinity_alone_give_no_token():
    decode, hidden = as_logits(-np.inf, -np.inf)
    assert jnp.all(decode.top_k(hidden, 2)[1] == -1)
    assert decode.sample(hidden, key=jax.random.key(0)) == -1


def test_the_dtype_of_the_logits_does_not_round_them():
    decode, hidden = make_operands()
    rounded = EmbeddingDecode(decode.table, decode.soft_cap, logits_dtype="bfloat16")
    actual, expected = rounded.top_k(hidden, 9), decode.top_k(hidden, 9)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("k", [1, 5])
def test_log_probabilities_have_gradients(k):
    decode, hidden = make_operands()

    def total(log_probs):
        return jnp.vdot(log_probs, make_array((N, k), seed=5))

    def searched(decode, hidden):
        return total(decode.top_k(hidden, k)[0])

    def plain(decode, hidden):
        return total(lax.top_k(jax.nn.log_softmax(decode(hidden)), k)[0])

    actual, expected = (
        eqx.filter_jit(jax.grad(f, (0, 1)))(decode, hidden) for f in (searched, plain)
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, 2e-5, 2e-5)


# Draws


def chi_square(tokens, probabilities):
    """How far the counts of tokens are from their expectation, in standard deviations.

    Tokens that are expected less than ten times are counted together.
    """
    expected = tokens.size * probabilities
    counts = np.bincount(np.asarray(tokens).reshape(-1), minlength=len(probabilities))
    assert np.all(counts[probabilities == 0] == 0)
    often = expected >= 10
    counts, expected = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    statistic = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9))
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def distribution(logits, temperature=1.0, top_k=None):
    logits = float64(logits) / temperature
    if top_k is not None:
        logits = np.where(np.argsort(np.argsort(-logits, stable=True)) < top_k, logits, -np.inf)
    e = np.exp(logits - logits.max())
    return e / e.sum()


@pytest.mark.slow
@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.0, 20), (2.0, 150)])
def test_tokens_are_drawn_from_the_distribution(temperature, top_k):
    decode, hidden = make_operands()
    many = jnp.broadcast_to(hidden[:1], (100_000, D))
    tokens = decode.sample(many, temperature=temperature, top_k=top_k, key=jax.random.key(1))
    logits = decode_reference(decode.table, hidden[0], decode.soft_cap)
    assert abs(chi_square(tokens, distribution(logits, temperature, top_k))) < 4


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tokens_of_one_in_a_million_are_drawn():
    logits = np.where(np.arange(140) == 17, np.log(1e6), 0.0)
    decode, hidden = as_logits(*logits)
    tokens = decode.sample(jnp.broadcast_to(hidden, (2**20, 1)), key=jax.random.key(2))
    rare = np.asarray(tokens)[np.asarray(tokens) != 17]
    expected = 2**20 * 139 / (1e6 + 139)
    assert abs(len(rare) - expected) < 4 * np.sqrt(expected)
    assert np.sum(rare < 128) / len(rare) == pytest.approx(127 / 139, abs=0.1)


@pytest.mark.slow
def test_the_draws_of_tokens_are_independent():
    decode, hidden = as_logits(0.0, 0.0)
    drawn = decode.sample(jnp.broadcast_to(hidden, (2, 20_000, 1)), key=jax.random.key(0))
    first, second = float64(drawn)
    assert abs(np.mean(first * second) - np.mean(first) * np.mean(second)) < 4 * 0.25 / np.sqrt(
        20_000
    )
    assert np.mean(first) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-40, np.float32(0), jnp.zeros(()), jnp.zeros(N)])
def test_at_temperature_zero_the_likeliest_token_is_drawn(temperature):
    decode, hidden = make_operands()
    for top_k in (None, 4):
        tokens = decode.sample(hidden, temperature=temperature, top_k=top_k, key=jax.random.key(0))
        np.testing.assert_array_equal(tokens, np.argmax(from_logits(decode, hidden), 1))


@pytest.mark.slow
def test_low_temperatures_beside_a_soft_cap_draw_the_likeliest_token():
    table = EmbeddingTable(make_array((129, 4)), ("vocabulary", "embedding"))
    decode, hidden = EmbeddingDecode(table, soft_cap=30.0), 4 * make_array((16, 4), seed=1)
    expected = np.argmax(from_logits(decode, hidden), 1)
    for temperature in 1e-12, 1e-29:
        tokens = decode.sample(hidden, temperature=temperature, key=jax.random.key(0))
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_each_token_has_its_own_temperature():
    decode, hidden = make_operands()
    many = jnp.broadcast_to(hidden[:1], (3, 50_000, D))
    temperature = jnp.broadcast_to(jnp.asarray([[0.0], [0.5], [1.5]]), (3, 50_000))
    tokens = decode.sample(many, temperature=temperature, key=jax.random.key(3))
    logits = decode_reference(decode.table, hidden[0], decode.soft_cap)
    assert jnp.all(tokens[0] == np.argmax(logits))
    assert abs(chi_square(tokens[1], distribution(logits, 0.5))) < 4
    assert abs(chi_square(tokens[2], distribution(logits, 1.5))) < 4


def test_a_traced_temperature_out_of_range_gives_no_token():
    decode, hidden = make_operands()

    @jax.jit
    def draw(temperature):
        return decode.sample(hidden, temperature=temperature, key=jax.random.key(0))

    wrong = jnp.asarray([-1.0, -0.5, jnp.nan, jnp.inf, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(draw(wrong) == -1, np.arange(N) < 4)


@pytest.mark.parametrize("temperature", [-0.5, np.nan, np.inf, jnp.full(N, -1.0), np.full(N, -2)])
def test_a_temperature_out_of_range_is_refused(temperature):
    decode, hidden = make_operands()
    with pytest.raises(ValueError, match="temperature must be at least 0 and finite, got"):
        decode.sample(hidden, temperature=temperature, key=jax.random.key(0))


@pytest.mark.parametrize("temperature", [1e31, 1e38, 1e39, np.asarray([1e300] * 10)])
def test_at_the_highest_temperatures_tokens_are_equally_likely(temperature):
    decode, hidden = make_operands()
    tokens = decode.sample(hidden, temperature=temperature, key=jax.random.key(0))
    expected = decode.sample(hidden, temperature=1e20, key=jax.random.key(0))
    np.testing.assert_array_equal(tokens, expected)
    traced = jax.jit(lambda t: decode.sample(hidden, temperature=t, key=jax.random.key(0)))
    np.testing.assert_array_equal(traced(jnp.asarray(1e38)), expected)


def test_a_temperature_that_is_no_real_number_is_refused():
    decode, hidden = make_operands()
    for temperature in jnp.ones(N, complex), np.ones(N, bool):
        with pytest.raises(TypeError, match="temperature"):
            decode.sample(hidden, temperature=temperature, key=jax.random.key(0))  # type: ignore
    with pytest.raises(TypeError, match="temperature must be integer or floating, got bool"):
        decode.sample(hidden, temperature=True, key=jax.random.key(0))


def test_temperatures_of_another_shape_are_refused():
    decode, hidden = make_operands()
    with pytest.raises(ValueError, match=r"temperature must .* shape \(10,\) .* got \(3,\)"):
        decode.sample(hidden, temperature=jnp.ones(3), key=jax.random.key(0))


@pytest.mark.parametrize("k", [0, -1, V + 1])
def test_k_out_of_range_is_refused(k):
    decode, hidden = make_operands()
    with pytest.raises(ValueError, match=f"k must be .* at most vocab_size=300, got {k}"):
        decode.top_k(hidden, k)
    with pytest.raises(ValueError, match=f"top_k must be .* at most vocab_size=300, got {k}"):
        decode.sample(hidden, top_k=k, key=jax.random.key(0))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.slow
def test_any_kind_of_key_draws_alike_in_chunks(impl):
    decode, _ = make_operands()
    hidden, key = make_array((50, D), seed=4), jax.random.key(7, impl=impl)
    whole, chunks = (decode.sample(hidden, key=key, chunk_size=size) for size in (None, 16))
    np.testing.assert_array_equal(whole, chunks)
    assert jnp.any(whole != decode.sample(hidden, key=jax.random.key(8, impl=impl)))


def test_an_old_key_draws_like_a_new_one():
    decode, hidden = make_operands()
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    np.testing.assert_array_equal(decode.sample(hidden, key=old), decode.sample(hidden, key=new))


def test_a_seed_in_the_place_of_a_key_is_a_clear_error():
    decode, hidden = make_operands()
    with pytest.raises(TypeError) as error:
        decode.sample(hidden, key=0)  # type: ignore
    assert "Instead of key=0, use jax.random.key(0)." in error.value.__notes__


def test_k_is_no_switch():
    decode, hidden = make_operands()
    with pytest.raises(TypeError, match="top_k must be an integer, got True"):
        decode.sample(hidden, top_k=True, key=jax.random.key(0))


# Transformations


@pytest.mark.slow
def test_under_vmap_each_example_is_searched_alone():
    decode, hidden = make_operands()
    hidden = jnp.stack([hidden, hidden[::-1], 2 * hidden])
    keys, temperature = jax.random.split(jax.random.key(0), 3), jnp.asarray([0.0, 0.5, 2.0])

    def search(hidden, key, temperature):
        draw = functools.partial(decode.sample, hidden, key=key, temperature=temperature)
        return decode.top_k(hidden, 3), decode.top_k(hidden, 1), draw(), draw(top_k=20)

    expected = [eqx.filter_jit(search)(*example) for example in zip(hidden, keys, temperature)]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *expected)
    actual = eqx.filter_jit(jax.vmap(search))(hidden, keys, temperature)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-5), actual, expected)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_any_kind_may_be_mapped(impl):
    decode, hidden = make_operands()
    keys = jax.random.split(jax.random.key(0, impl=impl), 4)
    actual = jax.vmap(lambda key: decode.sample(hidden, key=key))(keys)
    expected = [decode.sample(hidden, key=key) for key in keys]
    np.testing.assert_array_equal(actual, np.stack(expected))


@pytest.mark.slow
def test_tables_may_be_mapped():
    decode, hidden = make_operands()
    rows = jnp.stack([decode.table.embeddings, decode.table.embeddings[::-1]])

    def search(rows):
        decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
        return decode.top_k(hidden, 3)[1], decode.sample(hidden, key=jax.random.key(0))

    actual = jax.vmap(search)(rows)
    expected = [search(some) for some in rows]
    jax.tree.map(
        np.testing.assert_array_equal, actual, jax.tree.map(lambda *x: jnp.stack(x), *expected)
    )


def test_a_scan_draws_token_after_token():
    decode, hidden = make_operands()
    keys = jax.random.split(jax.random.key(0), 4)
    _, actual = lax.scan(lambda _, key: (None, decode.sample(hidden[0], key=key)), None, keys)
    np.testing.assert_array_equal(actual, [decode.sample(hidden[0], key=key) for key in keys])


@pytest.mark.parametrize("batch", [(0,), (2, 0, 3)])
def test_an_empty_batch_has_no_tokens(batch):
    decode, _ = make_operands()
    hidden = jnp.zeros((*batch, D))
    assert decode.sample(hidden, key=jax.random.key(0)).shape == batch
    assert decode.top_k(hidden, 4)[0].shape == (*batch, 4)


def test_a_numpy_vector_gives_a_token():
    decode, hidden = make_operands()
    assert decode.sample(np.asarray(hidden[0]), key=jax.random.key(0)).shape == ()
    log_probs, tokens = decode.top_k(np.asarray(hidden[0]), np.int64(3))
    assert log_probs.shape == tokens.shape == (3,)


@pytest.mark.parametrize("batch", [(), (1,)])
@pytest.mark.parametrize("dtype, tables", [("bfloat16", 1 / 4), ("float16", 2.1)])
@pytest.mark.slow
def test_one_vector_in_bfloat16_copies_no_table_and_in_float16_one(batch, dtype, tables):
    rows = jax.ShapeDtypeStruct((4096, 256), dtype)
    hidden = jax.ShapeDtypeStruct((*batch, 256), dtype)

    def search(rows, hidden):
        decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
        draw = functools.partial(decode.sample, hidden, key=jax.random.key(0))
        return decode.top_k(hidden, 5), draw(), draw(temperature=0)

    compiled = compile_by_default(jax.jit(search).lower(rows, hidden))
    assert temporaries(compiled) < 4096 * 256 * 2 * tables


@pytest.mark.slow
def test_logits_of_all_tokens_never_exist():
    rows = jax.ShapeDtypeStruct((8192, 64), "float32")
    hidden = jax.ShapeDtypeStruct((4096, 64), "float32")

    def search(rows, hidden):
        decode = EmbeddingDecode(EmbeddingTable(rows, ("vocabulary", "embedding")))
        return decode.top_k(hidden, 20), decode.sample(hidden, key=jax.random.key(0))

    compiled = compile_by_default(jax.jit(search).lower(rows, hidden))
    assert temporaries(compiled) < 4096 * 8192 * 4 / 8


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.slow
def test_draws_are_int32_in_the_64_bit_mode_too(top_k, temperature):
    decode, hidden = make_operands()
    options: Any = dict(temperature=temperature, top_k=top_k, key=jax.random.key(0))
    expected = decode.sample(hidden, **options)
    with jax.enable_x64(True):
        actual = decode.sample(hidden, **options)
    assert actual.dtype == expected.dtype == "int32"
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_traced_float64_temperatures_are_cut_before_they_are_narrowed():
    decode, hidden = make_operands()
    temperatures = np.asarray([0, 1e-60, 0.5, 1e31, 1e60, 1e300, -1e-60, -1, np.nan, np.inf])

    def draw(temperature):
        return decode.sample(hidden, temperature=temperature, key=jax.random.key(0))

    with jax.enable_x64(True):
        actual = jax.jit(draw)(jnp.asarray(temperatures))
        expected = draw(np.where(np.arange(10) < 6, temperatures, 1.0))
    np.testing.assert_array_equal(actual, np.where(np.arange(10) < 6, expected, -1))
