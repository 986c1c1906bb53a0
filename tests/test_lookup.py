"""`EmbeddingLookup`: the vectors of tokens, and what their gradient does to the table."""

import contextlib
import dataclasses
import enum

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqx_embedding import EmbeddingLookup, EmbeddingTable

from .helpers import (
    assert_close,
    float64,
    LAYOUTS,
    lookup_gradient_reference,
    lookup_reference,
    make_array,
    make_table,
    NAMES,
    rounding,
    VOCAB_SIZE,
)


# Of a vocabulary of 7 tokens with 2 padding rows: repeats, both ends, padding, and far outside.
TOKENS = np.asarray([[0, 6, 3, 3, 7], [8, 9, -1, -9, 1_000_000]], np.int32)
IN_RANGE = np.asarray([[0, 6, 3], [3, 1, 3]], np.int32)


def total(embeddings, table, tokens, cotangent, out_of_range):
    table = eqx.tree_at(lambda table: table.embeddings, table, embeddings)
    vectors = EmbeddingLookup(table, out_of_range)(tokens)
    return jnp.sum(vectors.astype("float32") * cotangent)


grad_of_total = eqx.filter_jit(jax.grad(total))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_becomes_its_embedding_with_the_batch_first(layout, dtype):
    table = make_table(layout, dtype)
    vectors = EmbeddingLookup(table)(jnp.asarray(IN_RANGE))
    assert vectors.shape == (2, 3, *table.embedding_axes.values())
    assert vectors.dtype == dtype
    np.testing.assert_array_equal(vectors, lookup_reference(table, IN_RANGE).astype(dtype))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_out_of_range_is_nan_or_clipped(layout, host, jit):
    table = make_table(layout)
    tokens = TOKENS if host else jnp.asarray(TOKENS)
    for out_of_range in ("nan", "clip"):
        lookup = EmbeddingLookup(table, out_of_range)
        vectors = eqx.filter_jit(lambda: lookup(tokens))() if jit else lookup(tokens)
        expected = lookup_reference(table, TOKENS, clip=out_of_range == "clip")
        np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize("out_of_range", ["nan", "clip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_reaches_the_rows_that_the_policy_says(layout, out_of_range):
    table = make_table(layout)
    cotangent = np.array(make_array(TOKENS.shape + tuple(table.embedding_axes.values()), seed=1))
    clip = out_of_range == "clip"
    expected = lookup_gradient_reference(table, TOKENS, cotangent, clip)
    if not clip:  # not even a NaN comes back from a token that is out of range
        cotangent[(TOKENS < 0) | (TOKENS >= VOCAB_SIZE)] = np.nan
    gradient = grad_of_total(table.embeddings, table, jnp.asarray(TOKENS), cotangent, out_of_range)
    assert_close(gradient, expected)


def test_the_gradient_under_raise_is_the_gradient_of_the_tokens_in_range():
    table = make_table("middle")
    cotangent = make_array((2, 3, 2, 3), seed=1)
    gradient = grad_of_total(table.embeddings, table, jnp.asarray(IN_RANGE), cotangent, "raise")
    expected = lookup_gradient_reference(table, IN_RANGE, cotangent)
    assert_close(gradient, expected)


def test_the_gradient_has_the_dtype_of_the_table_and_is_rounded_once(dtype):
    table = make_table("first", dtype)
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE, 300)
    cotangent = make_array((300, 4), dtype, seed=3)
    _, pullback = jax.vjp(
        lambda embeddings: EmbeddingLookup(EmbeddingTable(embeddings, table.axis_names))(tokens),
        table.embeddings,
    )
    (gradient,) = pullback(cotangent)
    assert gradient.dtype == dtype
    expected = lookup_gradient_reference(table, tokens, cotangent)
    error = np.abs(np.asarray(gradient, np.float64) - expected)
    summed = min(rounding(dtype), rounding("float32")) * 300 * np.abs(expected).max()
    assert np.all(error <= rounding(dtype) / 2 * np.abs(expected) + summed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gradient_of_100_000_repeats_is_the_exact_sum_rounded_once(dtype):
    table = make_table("last", dtype)
    tokens = jnp.full(100_000, 3)
    # multiples of an eighth, which float32 adds exactly
    cotangent = np.random.default_rng(0).integers(-2, 8, (100_000, 2, 3)) / 8
    gradient = grad_of_total(
        table.embeddings, table, tokens, jnp.asarray(cotangent, "float32"), "nan"
    )
    expected = np.zeros((2, 3, 9))
    expected[..., 3] = cotangent.sum(0)
    assert np.all(expected[..., 3] > 20_000)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, expected.astype(dtype))


# Few tokens for the rows: what is summed in float32 is not as large as a narrow table


MANY_ROWS = EmbeddingTable(
    jnp.zeros((2, 5000, 3), jnp.bfloat16), ("a", "vocabulary", "b"), padding_rows=900
)


def few_tokens():
    """Of which 0, 7 and the last one occur more often than bfloat16 can count."""
    draw = np.random.default_rng(0)
    others = draw.integers(-9, MANY_ROWS.vocab_size + 9, 150)
    tokens = draw.permutation(np.concatenate([np.repeat([0, 7, 4099], 350), others]))
    # multiples of an eighth, which float32 adds exactly
    cotangent = draw.integers(-2, 8, (len(tokens), 2, 3)) / 8
    return tokens.reshape(3, 40, 10).astype("int32"), cotangent.reshape(3, 40, 10, 2, 3)


def of_pairs(lookup):
    """Of two tokens, each with the vector of both."""
    return lambda tokens: jax.vmap(lookup)(tokens.reshape(-1, 2)).reshape(*tokens.shape, 2, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "way",
    [
        lambda lookup: lookup,
        jax.vmap,
        lambda lookup: jax.vmap(jax.vmap(lookup, 1, 1)),
        lambda lookup: jax.vmap(jax.jit(jax.checkpoint(lookup))),
        of_pairs,
    ],
    ids=["at once", "vmap", "vmap of vmap", "checkpoint", "pairs"],
)
@pytest.mark.parametrize("line_by_line", [False, True], ids=["jit", "disable_jit"])
def test_the_gradient_of_few_tokens_is_the_exact_sum_rounded_once(way, line_by_line, dtype):
    tokens, cotangent = few_tokens()

    def total(embeddings):
        lookup = EmbeddingLookup(dataclasses.replace(MANY_ROWS, embeddings=embeddings))
        vectors = jnp.nan_to_num(way(lambda tokens: lookup(tokens))(jnp.asarray(tokens)))
        return jnp.sum(jnp.asarray(cotangent, "float32") * vectors.astype("float32"))

    with jax.disable_jit(line_by_line):
        gradient = jax.grad(total)(MANY_ROWS.embeddings.astype(dtype))
    expected = lookup_gradient_reference(MANY_ROWS, tokens, cotangent)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, expected.astype(dtype))


@pytest.mark.parametrize("set_mesh", [True, False], ids=["set", "unset"])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("spec", [P(), P(None, "model"), P(None, None, "data")], ids=str)
def test_few_tokens_on_an_explicit_mesh_of_one_device(spec, jit, set_mesh):
    tokens, cotangent = few_tokens()
    expected = lookup_gradient_reference(MANY_ROWS, tokens, cotangent).astype("bfloat16")
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    batch = P("model" if "data" in spec else "data")
    embeddings = jax.device_put(MANY_ROWS.embeddings, NamedSharding(mesh, spec))
    of_batch = jax.device_put((tokens, cotangent.astype("float32")), NamedSharding(mesh, batch))
    for way in (lambda lookup: lookup, jax.vmap, lambda lookup: jax.vmap(jax.vmap(lookup))):

        def total(embeddings, tokens, cotangent, way=way):
            lookup = EmbeddingLookup(dataclasses.replace(MANY_ROWS, embeddings=embeddings))
            vectors = jnp.nan_to_num(way(lambda tokens: lookup(tokens))(tokens))
            return jnp.sum(cotangent * vectors.astype("float32"))

        compute = jax.jit(jax.grad(total))
        with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
            assert "2x5000x3xf32" not in compute.lower(embeddings, *of_batch).as_text()
            gradient = (compute if jit else jax.grad(total))(embeddings, *of_batch)
        assert jax.typeof(gradient) == jax.typeof(embeddings)
        np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("axes", [{"data"}, {"data", "model"}], ids=["some axes", "all axes"])
@pytest.mark.parametrize("rules", [None, {"batch": "data", "vocabulary": "data"}], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["from outside", "inside"])
def test_few_tokens_in_a_shard_map_over_one_device(inside, rules, axes, kind):
    tokens, cotangent = few_tokens()
    mesh = jax.make_mesh((1, 1), ("data", "model"), (kind, kind), devices=jax.devices()[:1])
    spec, batch = P(None, "data") if rules else P(), P("data")
    embeddings = jax.device_put(MANY_ROWS.embeddings, NamedSharding(mesh, spec))
    of_batch = jax.device_put((tokens, cotangent.astype("float32")), NamedSharding(mesh, batch))

    def look_up(embeddings, tokens):
        table = dataclasses.replace(MANY_ROWS, embeddings=embeddings)
        return jnp.nan_to_num(EmbeddingLookup(table)(tokens, rules=rules)).astype("float32")

    def gradient(function):
        def total(embeddings, tokens, cotangent):
            return jnp.sum(cotangent * function(embeddings, tokens))

        return jax.grad(total)

    function, out_spec = (gradient(look_up), spec) if inside else (look_up, batch)
    in_specs = (spec, batch, batch) if inside else (spec, batch)
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_spec, axis_names=axes)
    with jax.set_mesh(mesh):
        actual = jax.jit(mapped if inside else gradient(mapped))(embeddings, *of_batch)
    expected = lookup_gradient_reference(MANY_ROWS, tokens, cotangent).astype("bfloat16")
    np.testing.assert_array_equal(actual, expected)


def test_few_tokens_have_gradients_for_each_example_and_each_table():
    tokens, cotangent = few_tokens()

    def total(embeddings, tokens, cotangent):
        lookup = EmbeddingLookup(dataclasses.replace(MANY_ROWS, embeddings=embeddings))
        vectors = jnp.nan_to_num(lookup(tokens)).astype("float32")
        return jnp.sum(jnp.asarray(cotangent, "float32") * vectors)

    of_examples = jax.vmap(jax.grad(total), (None, 0, 0))(MANY_ROWS.embeddings, tokens, cotangent)
    tables = jnp.stack(3 * [MANY_ROWS.embeddings])

    def total_of_all(tables):
        return jnp.sum(jax.vmap(total)(tables, tokens, cotangent))

    of_tables = jax.jit(jax.grad(total_of_all))(tables)
    for i in range(3):
        expected = lookup_gradient_reference(MANY_ROWS, tokens[i], cotangent[i])
        np.testing.assert_array_equal(of_examples[i], expected.astype("bfloat16"))
        np.testing.assert_array_equal(of_tables[i], expected.astype("bfloat16"))


def take_of_example(rows, token, **options):
    return EmbeddingLookup(EmbeddingTable(rows, NAMES), **options)(token)


@pytest.mark.parametrize(
    "vectors",
    [
        lambda rows, tokens: jax.vmap(
            lambda token: jax.vmap(take_of_example, (0, None))(jnp.stack([rows, rows]), token)[1]
        )(tokens),
        lambda rows, tokens: jax.vmap(
            lambda token: jax.jvp(lambda x: take_of_example(x, token), (rows,), (rows,))[1]
        )(tokens),
        lambda rows, tokens: jax.lax.map(
            jax.vmap(lambda token: take_of_example(rows, token)), tokens[None]
        ),
        lambda rows, tokens: jax.vmap(
            lambda token: jax.lax.map(lambda token: take_of_example(rows, token), token[None])
        )(tokens),
    ],
    ids=["stacked tables", "jvp", "map of vmap", "vmap of map"],
)
def test_gradients_of_600_examples_of_one_token_are_added_in_float32(vectors):
    tokens = jnp.full(600, 7)
    gradient = jax.grad(lambda rows: jnp.sum(vectors(rows, tokens).astype("float32")))
    rows = jnp.zeros((3000, 2), "bfloat16")
    assert float64(gradient(rows))[7].tolist() == [600, 600]


@pytest.mark.parametrize("out_of_range", ["nan", "clip"])
def test_600_examples_may_share_a_cotangent(out_of_range):
    rows = jnp.zeros((3000, 2), "bfloat16")

    def total(cotangent):
        def gradient(token):
            def take(rows):
                return take_of_example(rows, token, out_of_range=out_of_range)

            return jax.vjp(take, rows)[1](cotangent)[0]

        return jnp.sum(jax.vmap(gradient)(jnp.full(600, 7)).astype("float32"))

    assert float64(jax.grad(total)(jnp.ones(2, "bfloat16"))).tolist() == [600, 600]


def test_few_tokens_have_all_derivatives():
    tokens = jnp.asarray([3, 3, 1, -1, 5000])
    rows = make_array((5000, 4), "bfloat16")

    def energy(rows):
        vectors = EmbeddingLookup(EmbeddingTable(rows, NAMES))(tokens)
        return jnp.sum(vectors[:3].astype("float32") ** 3)

    def of_plain_rows(rows):
        return jnp.sum(rows.astype("float32")[tokens[:3]] ** 3)

    direction = make_array((5000, 4), "bfloat16", seed=1)
    for derivative in (
        lambda f: jax.jvp(f, (rows,), (direction,))[1],
        lambda f: jax.jvp(jax.grad(f), (rows,), (direction,))[1],
        lambda f: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), direction).astype("float32"))(rows),
        lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (direction,))[1])(rows),
    ):
        actual, expected = map(derivative, (energy, of_plain_rows))
        assert_close(actual, expected, rtol=0.02)
        assert np.count_nonzero(actual) == np.count_nonzero(expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_the_gradient_of_few_tokens_holds_no_wide_table(dtype):
    table = EmbeddingTable(jnp.zeros((5003, 8), dtype), NAMES)

    @jax.grad
    def gradient(table, tokens):
        return jnp.sum(jax.vmap(EmbeddingLookup(table))(tokens).astype("float32"))

    text = jax.jit(gradient).lower(table, jnp.zeros((5, 250), "int32")).as_text()
    assert "5003x8x" in text and "5003x8xf32" not in text
    text = jax.jit(gradient).lower(table, jnp.zeros((5, 251), "int32")).as_text()
    assert "5003x8xf32" in text  # more than a quarter as many tokens as rows


# Raising


@pytest.mark.slow
def test_raise_names_the_vocabulary_and_its_size_in_and_out_of_jit():
    table = EmbeddingTable(make_array((9, 4)), ("bytes", "embedding"), "bytes", padding_rows=2)
    lookup = EmbeddingLookup(table, "raise")
    message = "a token is out of range: the vocabulary 'bytes' has 7 tokens.*below 7"
    jitted = eqx.filter_jit(lookup)
    np.testing.assert_array_equal(lookup(jnp.arange(7)), table.embeddings[:7])
    np.testing.assert_array_equal(jitted(jnp.arange(7)), table.embeddings[:7])
    for tokens in (jnp.asarray(7), jnp.asarray(-1), np.asarray(7), 7, -1, np.int64(2**32)):
        with pytest.raises(RuntimeError, match=message):
            lookup(tokens)
    with pytest.raises(RuntimeError, match=message):
        jitted(jnp.arange(8, dtype=jnp.int32)[1:])


def test_raise_checks_host_tokens_inside_jit():
    lookup = EmbeddingLookup(make_table("first"), "raise")
    with pytest.raises(RuntimeError, match="the vocabulary 'vocabulary' has 7 tokens"):
        eqx.filter_jit(lambda: lookup(np.asarray([3, 2**32 + 3])))()


# Tokens of any integer dtype

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("integer", INTEGERS)
def test_host_tokens_may_have_any_integer_dtype(integer):
    table = EmbeddingTable(make_array((300, 2)), ("vocabulary", "embedding"), padding_rows=10)
    ends = np.iinfo(integer)
    tokens = np.asarray([0, 1, 127, ends.min, ends.max], integer)
    for out_of_range in ("nan", "clip"):
        vectors = EmbeddingLookup(table, out_of_range)(tokens)
        expected = lookup_reference(table, tokens.tolist(), clip=out_of_range == "clip")
        np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize("integer", INTEGERS)
def test_traced_tokens_may_have_any_integer_dtype(integer):
    with jax.enable_x64(True):
        table = EmbeddingTable(make_array((300, 2)), ("vocabulary", "embedding"), padding_rows=10)
        ends = np.iinfo(integer)
        far = [2**32 + 3, ends.max - 2**32 + 4] if ends.bits == 64 else []  # 3 if narrowed
        tokens = np.asarray([0, 1, 127, ends.min, ends.max, *far], integer)
        for out_of_range in ("nan", "clip"):
            lookup = EmbeddingLookup(table, out_of_range)
            vectors = eqx.filter_jit(lookup)(jnp.asarray(tokens))
            expected = lookup_reference(table, tokens.tolist(), clip=out_of_range == "clip")
            np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize("integer", ["int8", "uint8"])
def test_a_small_integer_dtype_serves_a_vocabulary_that_it_cannot_count(integer):
    table = EmbeddingTable(make_array((1000, 2)), ("vocabulary", "embedding"))
    tokens = jnp.arange(100, 128, dtype=integer)
    gradient = grad_of_total(table.embeddings, table, tokens, jnp.ones((28, 2)), "nan")
    expected = np.zeros((1000, 2))
    expected[100:128] = 1
    np.testing.assert_array_equal(gradient, expected)


FAR = [2**31, 2**32, 2**32 + 3, 2**40 + 3, 2**63 - 1]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("far", FAR + [-token for token in FAR])
@pytest.mark.slow
def test_a_64_bit_host_id_never_lands_on_the_row_of_another_token(far, x64):
    with jax.enable_x64(x64):
        table = make_table("first")
        end = table.embeddings[6 if far > 0 else 0]
        kinds = [far, np.int64(far), np.asarray(far), np.asarray([far])[0]]
        for tokens in kinds + ([np.uint64(far)] if far > 0 else []):
            assert np.all(np.isnan(EmbeddingLookup(table)(tokens)))
            np.testing.assert_array_equal(EmbeddingLookup(table, "clip")(tokens), end)
            # Outside jit: jit narrows its arguments before the library sees them.
            gradient = eqx.filter_grad(lambda table: jnp.sum(EmbeddingLookup(table)(tokens)))(table)
            np.testing.assert_array_equal(gradient.embeddings, np.zeros((9, 4)))
            with pytest.raises(RuntimeError, match="out of range"):
                EmbeddingLookup(table, "raise")(tokens)


@pytest.mark.parametrize("token", [2**64 + 3, -(2**63) - 1])
def test_a_python_int_that_no_dtype_holds_is_refused(token):
    with pytest.raises(TypeError, match="tokens must be integers, got object"):
        EmbeddingLookup(make_table("first"))(token)


class Special(enum.IntEnum):
    UNKNOWN = 3


@pytest.mark.parametrize(
    "token",
    [3, np.int8(3), np.uint64(3), np.asarray(3), jnp.asarray(3), jnp.uint8(3), Special.UNKNOWN],
    ids=lambda token: type(token).__name__,
)
def test_a_single_token_of_any_kind_gives_a_single_embedding(token):
    table = make_table("middle")
    np.testing.assert_array_equal(EmbeddingLookup(table)(token), table.embeddings[:, 3])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("kind", [np.zeros, jnp.zeros])
def test_an_empty_batch_gives_an_empty_batch(shape, kind):
    table = make_table("middle")
    for out_of_range in ("nan", "raise", "clip"):
        vectors = EmbeddingLookup(table, out_of_range)(kind(shape, "int32"))
        assert vectors.shape == (*shape, 2, 3)


def test_a_key_is_accepted_and_ignored(getkey):
    table = make_table("first")
    vectors = EmbeddingLookup(table)(tokens=jnp.asarray([1, 2]), key=getkey())
    np.testing.assert_array_equal(vectors, table.embeddings[1:3])
    with pytest.raises(TypeError, match="positional"):
        EmbeddingLookup(table)(jnp.asarray([1, 2]), None)  # pyright: ignore[reportCallIssue]


# Transformations


def test_the_embeddings_are_all_that_transformations_see():
    table = make_table("first")
    [leaf] = jax.tree.leaves(EmbeddingLookup(table, "clip"))
    assert leaf is table.embeddings


@pytest.mark.parametrize("out_of_range", ["nan", "clip"])
def test_forward_mode_moves_the_vectors_as_their_rows_move(out_of_range):
    table, direction = make_table("middle"), make_table("middle", seed=1)

    def lookup(embeddings):
        moved = eqx.tree_at(lambda table: table.embeddings, table, embeddings)
        return EmbeddingLookup(moved, out_of_range)(jnp.asarray(TOKENS))

    vectors, tangent = jax.jvp(lookup, (table.embeddings,), (direction.embeddings,))
    clip = out_of_range == "clip"
    np.testing.assert_array_equal(vectors, lookup_reference(table, TOKENS, clip))
    expected = np.nan_to_num(lookup_reference(direction, TOKENS, clip))
    np.testing.assert_array_equal(tangent, expected)


@pytest.mark.slow
def test_the_second_derivative_is_right_in_every_order_of_modes():
    table = make_table("first")
    tokens = jnp.asarray([3, 3, 1, 9])

    def energy(embeddings):
        vectors = EmbeddingLookup(EmbeddingTable(embeddings, table.axis_names))(tokens)
        return jnp.sum(vectors[:3] ** 3)

    # d/dx of the gradient, 3 n x**2 in a row that occurs n times, along ones
    counts = np.asarray([0, 1, 0, 2, 0, 0, 0, 0, 0])[:, None]
    expected = 6 * counts * np.asarray(table.embeddings)
    ones = jnp.ones_like(table.embeddings)
    x = table.embeddings
    forward_reverse = jax.jvp(jax.grad(energy), (x,), (ones,))[1]
    reverse_reverse = jax.grad(lambda x: jnp.vdot(jax.grad(energy)(x), ones))(x)
    reverse_forward = jax.grad(lambda x: jax.jvp(energy, (x,), (ones,))[1])(x)
    for second in (forward_reverse, reverse_reverse, reverse_forward):
        assert_close(second, expected)


def test_vmap_over_tokens_over_tables_and_over_gradients_is_a_loop():
    tables = eqx.filter_vmap(lambda rows: EmbeddingTable(rows, ("vocabulary", "embedding")))(
        make_array((3, 9, 4))
    )
    tokens = jnp.asarray([[0, 6, 3], [3, 3, 10], [1, -1, 1]])
    cotangents = make_array((3, 3, 4), seed=1)

    def gradient(table, tokens, cotangent):
        return eqx.filter_grad(
            lambda table: jnp.nansum(cotangent * EmbeddingLookup(table)(tokens))
        )(table)

    rows = [jax.tree.map(lambda leaf: leaf[i], tables) for i in range(3)]
    one_table = eqx.filter_vmap(lambda tokens: EmbeddingLookup(rows[0])(tokens))(tokens)
    all_tables = eqx.filter_vmap(lambda table, tokens: EmbeddingLookup(table)(tokens))(
        tables, tokens
    )
    gradients = eqx.filter_jit(eqx.filter_vmap(gradient))(tables, tokens, cotangents)
    for i in range(3):
        np.testing.assert_array_equal(one_table[i], lookup_reference(rows[0], tokens[i]))
        np.testing.assert_array_equal(all_tables[i], lookup_reference(rows[i], tokens[i]))
        expected = lookup_gradient_reference(rows[i], tokens[i], cotangents[i])
        assert_close(gradients.embeddings[i], expected)


def test_vmap_over_one_table_adds_the_gradients_of_the_batch():
    table = make_table("middle")
    tokens, cotangent = jnp.asarray(IN_RANGE), make_array((2, 3, 2, 3), seed=1)

    def loss(table):
        return jnp.sum(cotangent * jax.vmap(jax.vmap(EmbeddingLookup(table)))(tokens))

    expected = lookup_gradient_reference(table, IN_RANGE, cotangent)
    assert_close(eqx.filter_grad(loss)(table).embeddings, expected)


def test_a_float4_table_has_no_nan_to_return():
    table = EmbeddingTable(jnp.asarray([[0.5], [1], [3]], "float4_e2m1fn"), NAMES)
    with pytest.raises(ValueError, match='float4_e2m1fn has no NaN.*"raise" or "clip"'):
        EmbeddingLookup(table)(np.asarray([1]))
    clipped = EmbeddingLookup(table, "clip")(np.asarray([1, 9, -9]))
    assert float64(clipped).tolist() == [[1], [3], [0.5]]


@pytest.mark.parametrize("wide", [False, True])
def test_a_scan_adds_gradients_in_the_dtype_of_the_table(wide):
    # JAX adds the gradients of the steps of a scan in the dtype of what it closes over: a table of
    # bfloat16 counts to 256 there, and one that was cast before the scan does not stop.
    tokens = jnp.full(1000, 2)

    @jax.grad
    def gradient(table):
        if wide:
            table = jax.tree.map(lambda x: x.astype(jnp.float32), table)
        one = jnp.zeros((), table.embeddings.dtype) + 1

        def step(total, token):
            return total + jnp.sum(EmbeddingLookup(table)(token) * one), None

        return jax.lax.scan(step, one, tokens)[0].astype(jnp.float32)

    table = EmbeddingTable(jnp.ones((5, 1), jnp.bfloat16), NAMES)
    assert gradient(table).embeddings.ravel().tolist() == [0, 0, 1000 if wide else 256, 0, 0]


def test_raise_also_checks_if_only_the_gradient_is_used():
    # the gradient of a sum needs no vector, and XLA computes none
    table = make_table("first")

    def total(table, tokens):
        return jnp.sum(EmbeddingLookup(table, "raise")(tokens))

    gradient = eqx.filter_jit(eqx.filter_grad(total))
    tokens = jnp.asarray([3, 3])
    expected = lookup_gradient_reference(table, tokens, np.ones((2, 4)))
    np.testing.assert_array_equal(gradient(table, tokens).embeddings, expected)
    with pytest.raises(RuntimeError, match="7 tokens"):
        gradient(table, jnp.asarray([3, 9]))
