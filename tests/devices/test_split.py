"""Lookup, decode and loss over eight devices equal those of one."""

import contextlib
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable
from eqx_embedding._sharding import Split

from ..helpers import compile_by_default, compiled_memory
from .helpers import (
    assert_trees_close,
    collectives,
    make_mesh,
    make_table,
    on_mesh,
    place,
    random,
    RULES,
    SETTINGS,
    split,
    with_bias,
)


V, B, T, D = 96, 8, 10, 8
settings = pytest.mark.parametrize("setting", SETTINGS)
padded = pytest.mark.parametrize("padding_rows", [0, 3])


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


# What one device computes is the same for each setting: `precision` is a part of the key.
on_one_device = functools.cache


def draw_tokens(vocab_size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab_size, (B, T)), "int32")


def cross_entropy(rules, table, hidden, targets, weights=None, reduction="mean", **layer):
    # 16 tokens of 40, so that a device has more than one chunk
    return EmbeddingDecode(table, **layer).cross_entropy(
        hidden,
        targets,
        weights=weights,
        label_smoothing=0.1,
        z_loss=1e-3,
        reduction=reduction,
        chunk_size=16,
        rules=rules,
    )


def arguments_of_a_loss(padding_rows):
    weights = jnp.abs(random((B, T), seed=2)).at[0, :3].set(0.0)
    hidden, table = random((B, T, D), seed=1), make_table(V, padding_rows)
    return table, hidden, draw_tokens(table.vocab_size), weights


@pytest.mark.slow
def test_a_rule_for_the_batch_and_for_an_axis_of_that_name_is_refused():
    table, hidden = EmbeddingTable(jnp.ones((8, 4)), ("vocabulary", "batch")), jnp.ones((8, 4))
    targets = jnp.zeros(8, "int32")
    with jax.set_mesh(make_mesh("rules")):
        EmbeddingDecode(table).cross_entropy(hidden, targets, rules={"vocabulary": "model"})
        with pytest.raises(ValueError, match='rule for "batch" .* give the axis another name'):
            EmbeddingDecode(table).cross_entropy(hidden, targets, rules={"batch": "data"})


def test_rules_may_be_lists_as_a_file_of_settings_has_them():
    table, hidden, tokens, _ = arguments_of_a_loss(0)
    mesh, rules = make_mesh("rules"), {"batch": "data", "vocabulary": ["model"], "embedding": []}
    assert table.partition_spec({"vocabulary": ["data", "model"]}) == P(("data", "model"), None)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, table.shardings(mesh, rules))
        vectors = jax.jit(lambda table: EmbeddingLookup(table)(tokens, rules=rules))(sharded)
        loss = jax.jit(lambda table: cross_entropy(rules, table, hidden, tokens))(sharded)
    np.testing.assert_array_equal(vectors, table.embeddings[tokens])
    np.testing.assert_allclose(loss, cross_entropy(None, table, hidden, tokens), 1e-6)


def loss_of_tokens(rules, table, tokens):
    vectors = EmbeddingLookup(table)(tokens, rules=rules)
    return EmbeddingDecode(table).cross_entropy(vectors, tokens, rules=rules)


SEQUENCES = P("data", "model")  # splits the batch over `data`, and its sequences over `model`


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [None, ("data", "model")])
@pytest.mark.parametrize("setting", ["rules", "manual"])
@pytest.mark.parametrize(
    "batch", [SEQUENCES, P(None, ("data", "model")), P(("model", "data"), None)]
)
def test_rules_may_split_any_axes_of_the_batch(setting, vocabulary, batch):
    table, tokens = make_table(V), draw_tokens(V)[:, :8]
    function = functools.partial(loss_of_tokens, {"batch": batch, "vocabulary": vocabulary})
    expected = jax.value_and_grad(functools.partial(loss_of_tokens, None))(table, tokens)
    if setting == "manual":
        function = jax.shard_map(function, in_specs=(P(vocabulary), batch), out_specs=P())
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        operands = place(mesh, table, vocabulary), place(mesh, tokens, *batch)
        assert_trees_close(jax.jit(jax.value_and_grad(function))(*operands), expected)


def operations(function, *operands):
    """Of the gradient, on each device."""
    lowered = jax.jit(jax.grad(function)).lower(*operands)
    return compile_by_default(lowered).cost_analysis()["flops"]


@pytest.mark.slow
def test_rules_for_sequences_spare_the_logits_of_other_devices():
    mesh = make_mesh("rules")
    with jax.set_mesh(mesh):
        operands = place(mesh, make_table(V)), place(mesh, draw_tokens(V)[:, :8], *SEQUENCES)
        # With a rule for the first axis alone, four devices compute the logits of all sequences
        # that they share.
        some, all_ = (
            operations(functools.partial(loss_of_tokens, {"batch": axes}), *operands)
            for axes in (SEQUENCES, "data")
        )
    assert 3 * some < all_


def masked(table, hidden, targets):
    return cross_entropy(None, table, hidden, targets, weights=targets % 3)


def apart(table, hidden, targets):
    return jnp.mean(jnp.square(cross_entropy(None, table, hidden, targets, reduction="none")))


def likeliest(table, hidden, targets):
    return jnp.mean(EmbeddingDecode(table).top_k(hidden, 2)[0])


def of_examples(table, hidden, targets):
    return jnp.mean(jax.vmap(lambda *one: cross_entropy(None, table, *one))(hidden, targets))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [masked, apart, likeliest, of_examples])
def test_without_rules_no_device_computes_the_logits_of_others(loss):
    table, hidden, targets, _ = arguments_of_a_loss(0)
    alone = operations(loss, table, hidden, targets)
    mesh = make_mesh("automatic", data=8, model=1)
    with jax.set_mesh(mesh):
        batch = (place(mesh, array, "data") for array in (hidden, targets))
        assert operations(loss, place(mesh, table), *batch) < 0.2 * alone


@pytest.mark.slow
def test_without_rules_chunks_are_planned_for_all_devices():
    V, N = 8192, 4096
    shapes = jax.ShapeDtypeStruct((V, D), "float32"), jax.ShapeDtypeStruct((N, D), "float32")

    def sizes(rules, platform):
        def loss(embeddings, hidden):
            table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
            return EmbeddingDecode(table).cross_entropy(hidden, jnp.zeros(N, int), rules=rules)

        text = jax.jit(loss).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        return {int(size) for size in re.findall(r"dot_general.*-> tensor<\d+x(\d+)xf32>", text)}

    with jax.set_mesh(make_mesh("automatic", data=2, model=1)):
        assert sizes({"batch": "data"}, "cuda") == sizes({"batch": None}, "cuda") == {1024}
        assert sizes(None, "cuda") == {2048}


@pytest.mark.parametrize("length", [127, 255, 509])
def test_without_rules_chunks_of_an_uneven_length_move_no_hidden_vectors(length):
    def loss(table, hidden, targets):
        return EmbeddingDecode(table).cross_entropy(hidden[:, :-1], targets[:, 1:])

    table = make_table(8192)
    hidden = random((B, length + 1, D), seed=1)
    targets = jnp.zeros((B, length + 1), "int32")
    with split("automatic", table, hidden, targets, data=4, model=1) as operands:
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*operands).compile()
    found = re.findall(r" (all-\w+|collective-permute|reduce-scatter)\(", str(program.as_text()))
    assert set(found) == {"all-reduce"}  # of the gradient of the table


@pytest.mark.slow
@pytest.mark.parametrize("counted", ["all", "half", "none"])
def test_chunks_that_are_planned_without_rules_give_the_same(counted):
    table, hidden = make_table(8192), random((B, 256, D), seed=1)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 8192, (B, 256)), "int32")

    weights = jnp.zeros((B, 256)).at[::2].set(float(counted == "half"))
    weights = None if counted == "all" else weights

    def loss(table, hidden, targets):
        return EmbeddingDecode(table).cross_entropy(hidden, targets, weights=weights)

    if weights is not None:
        hidden = jnp.where(weights[..., None] == 0, jnp.nan, hidden)
    function = jax.value_and_grad(loss, (0, 1))
    expected = jax.jit(function)(table, hidden, targets)
    with split("automatic", table, hidden, targets, data=4, model=1) as operands:
        assert_trees_close(jax.jit(function)(*operands), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding_rows", [0, 3])
def test_logits_of_mapped_examples_have_derivatives_in_a_shard_map(dtype, padding_rows):
    table, hidden, _, _ = arguments_of_a_loss(padding_rows)
    array, hidden = table.embeddings.astype(dtype), hidden.astype(dtype)

    def total(rules, array, hidden):
        decode = EmbeddingDecode(EmbeddingTable(array, table.axis_names, padding_rows=padding_rows))
        logits = jax.vmap(lambda hidden: decode(hidden, rules=rules))(hidden)
        numbers = jnp.sum(jnp.sin(logits).astype("float32"))
        # Without padding, each device has a part of the logits.
        return numbers if rules is None or padding_rows else jax.lax.psum(numbers, "model")

    def gradient_and_slope(total):
        def both(array, hidden):
            gradient = jax.grad(total, (0, 1))(array, hidden)
            slope = jax.jvp(lambda hidden: total(array, hidden), (hidden,), (hidden,))[1]
            return gradient, slope

        return jax.jit(both)

    expected = gradient_and_slope(functools.partial(total, None))(array, hidden)
    mesh = make_mesh("manual")
    with jax.set_mesh(mesh):
        of_mesh = jax.shard_map(
            functools.partial(total, {"vocabulary": "model"}),
            in_specs=(P("model"), P()),
            out_specs=P(),
        )
        actual = gradient_and_slope(of_mesh)(place(mesh, array, "model"), place(mesh, hidden))
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x, np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, tolerance, tolerance * np.abs(e).max())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_jax_may_check_the_effects_of_what_is_mapped():
    """After it removes what nobody uses, from the derivative of examples that share a table."""
    table, hidden, targets, _ = arguments_of_a_loss(0)

    def loss(table, hidden, targets):
        decode = EmbeddingDecode(table)
        return jnp.mean(jax.vmap(decode.cross_entropy)(hidden, targets))

    expected = jax.jit(jax.grad(loss))(table, hidden, targets)
    with jax.enable_checks(True), split("explicit", table, hidden, targets) as operands:
        assert_trees_close(jax.jit(jax.grad(loss))(*operands), expected)


@settings
@padded
@pytest.mark.slow
def test_a_lookup_equals_that_of_one_device(setting, padding_rows, precision):
    table = make_table(V, padding_rows)
    tokens = draw_tokens(table.vocab_size)
    factors = random((B, T, D), seed=3)

    def lookup(rules, table, tokens):
        return EmbeddingLookup(table)(tokens, rules=rules)

    def loss(lookup, table, tokens, factors):
        vectors = lookup(table, tokens)
        return jnp.sum(vectors * factors), vectors

    def differentiate(function):
        return jax.jit(lambda *a: jax.value_and_grad(loss, 1, has_aux=True)(function, *a))

    expected = differentiate(lambda *a: lookup(None, *a))(table, tokens, factors)
    with split(setting, table, tokens, factors) as arguments:
        function = differentiate(on_mesh(setting, lookup, ["data"]))
        assert_trees_close(function(*arguments), expected)


def decode(rules, table, hidden):
    return EmbeddingDecode(table, soft_cap=3.0)(hidden, rules=rules)


def gradient_of_logits(decode):
    def loss(table, hidden, factors):
        logits = decode(table, hidden)
        return jnp.sum(logits * factors), logits

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def arguments_of_a_decode(padding_rows, biased):
    table = make_table(V, padding_rows)
    factors = random((B, T, table.vocab_size), seed=3)
    return with_bias(table) if biased else table, random((B, T, D), seed=1), factors


@on_one_device
def decode_on_one_device(padding_rows, biased, precision):
    arguments = arguments_of_a_decode(padding_rows, biased)
    return gradient_of_logits(functools.partial(decode, None))(*arguments)


@pytest.mark.slow
@settings
@pytest.mark.parametrize("padding_rows", [0, 1, 3])
@pytest.mark.parametrize("biased", [False, True])
def test_a_decode_equals_that_of_one_device(setting, padding_rows, biased, precision):
    columns = None if padding_rows else "model"
    with split(setting, *arguments_of_a_decode(padding_rows, biased)) as (table, hidden, factors):
        factors = place(make_mesh(setting), factors, "data", None, columns)
        function = gradient_of_logits(on_mesh(setting, decode, ["data", None, columns]))
        expected = decode_on_one_device(padding_rows, biased, precision)
        assert_trees_close(function(table, hidden, factors), expected)


def gradient_of_losses(function):
    def loss(*arguments):
        losses = function(*arguments)
        return jnp.sum(losses**2), losses

    return jax.jit(jax.value_and_grad(loss, (0, 1, 3), has_aux=True))


@on_one_device
def loss_on_one_device(padding_rows, reduction, precision):
    function = functools.partial(cross_entropy, None, reduction=reduction)
    return gradient_of_losses(function)(*arguments_of_a_loss(padding_rows))


@pytest.mark.slow
@settings
@padded
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_equals_that_of_one_device(setting, padding_rows, reduction, precision):
    expected = loss_on_one_device(padding_rows, reduction, precision)
    function = functools.partial(cross_entropy, reduction=reduction)
    out_axes = [] if reduction == "mean" else ["data"]
    with split(setting, *arguments_of_a_loss(padding_rows)) as arguments:
        actual = gradient_of_losses(on_mesh(setting, function, out_axes))(*arguments)
        assert_trees_close(actual, expected)


def arguments_with_a_bias(padding_rows):
    table, *others = arguments_of_a_loss(padding_rows)
    return with_bias(table), *others


capped_cross_entropy = functools.partial(cross_entropy, soft_cap=5.0)


@on_one_device
def biased_loss_on_one_device(padding_rows):
    function = functools.partial(capped_cross_entropy, None)
    return jax.jit(jax.value_and_grad(function, (0, 1)))(*arguments_with_a_bias(padding_rows))


@pytest.mark.slow
@settings
@pytest.mark.parametrize("padding_rows", [0, 1, 3])
def test_a_loss_with_a_bias_equals_that_of_one_device(setting, padding_rows):
    expected = biased_loss_on_one_device(padding_rows)
    with split(setting, *arguments_with_a_bias(padding_rows)) as arguments:
        function = on_mesh(setting, capped_cross_entropy, [])
        actual = jax.jit(jax.value_and_grad(function, (0, 1)))(*arguments)
        assert_trees_close(actual, expected)


@pytest.mark.slow
def test_the_gradient_may_be_taken_inside_a_shard_map():
    arguments = arguments_of_a_loss(padding_rows=3)

    def differentiate(rules, table, hidden, targets, weights):
        def loss(table, hidden, weights):
            return cross_entropy(rules, table, hidden, targets, weights)

        return jax.value_and_grad(loss, (0, 1, 2))(table, hidden, weights)

    expected = jax.jit(lambda *a: differentiate(None, *a))(*arguments)
    with split("manual", *arguments) as arguments:
        inside = jax.shard_map(
            lambda *a: differentiate(RULES, *a),
            in_specs=(P("model"), P("data"), P("data"), P("data")),
            out_specs=(P(), (P("model"), P("data"), P("data"))),
        )
        assert_trees_close(jax.jit(inside)(*arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{"batch": "data"}, RULES])
@pytest.mark.parametrize("setting", ["automatic", "explicit"])
def test_a_shard_map_may_take_some_of_the_axes(setting, rules):
    *arguments, _ = arguments_of_a_loss(padding_rows=3)

    def differentiate(rules, table, hidden, targets):
        def loss(table, hidden):
            vectors = EmbeddingLookup(table)(targets, rules=rules)
            return cross_entropy(rules, table, hidden + vectors, targets)

        return jax.value_and_grad(loss, (0, 1))(table, hidden)

    expected = jax.jit(lambda *a: differentiate(None, *a))(*arguments)
    with split(setting, *arguments) as arguments:
        inside = jax.shard_map(
            lambda *a: differentiate(rules, *a),
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P(), (P(), P("data"))),
            axis_names={"data"},
        )
        assert_trees_close(jax.jit(inside)(*arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, "data"])
def test_a_lookup_has_a_gradient_through_a_shard_map_along_an_explicit_axis(rows):
    """JAX cannot differentiate a lookup that is given a sharding there."""
    table, hidden, targets, _ = arguments_of_a_loss(padding_rows=0)
    rules = {"batch": "data", "vocabulary": rows}

    def loss(rules, table, hidden, targets):
        vectors = EmbeddingLookup(table)(targets, rules=rules)
        return cross_entropy(rules, table, hidden + vectors, targets)

    expected = jax.jit(jax.value_and_grad(lambda *a: loss(None, *a), (0, 1)))(
        table, hidden, targets
    )
    mesh = make_mesh("explicit")
    mapped = jax.shard_map(
        functools.partial(loss, rules),
        mesh=mesh,
        in_specs=(P(rows), P("data"), P("data")),
        out_specs=P(),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        operands = place(mesh, table, rows), *(place(mesh, x, "data") for x in (hidden, targets))
        assert_trees_close(jax.jit(jax.value_and_grad(mapped, (0, 1)))(*operands), expected)


def test_two_kinds_of_axes_that_split_the_rows_of_a_lookup_are_refused():
    table, _, targets, _ = arguments_of_a_loss(padding_rows=0)
    mesh = make_mesh("explicit")
    mapped = jax.shard_map(
        lambda table, tokens: EmbeddingLookup(table)(
            tokens, rules={"batch": "data", "vocabulary": "data"}
        ),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        table = place(mesh, table, ("data", "model"))
        with pytest.raises(ValueError, match=r"\('model',\) split the same axis of the table"):
            mapped(table, place(mesh, targets, "data"))


def test_a_mean_inside_a_shard_map_is_of_the_devices_tokens_unless_rules_say_more():
    *arguments, _ = arguments_of_a_loss(padding_rows=0)
    expected = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(None, *a), (0, 1)))(*arguments)

    def mean_of_means(*arguments):
        mean = cross_entropy({"vocabulary": "model"}, *arguments)
        return jax.lax.pmean(mean, "data")

    with split("manual", *arguments) as arguments:
        mapped = jax.shard_map(
            mean_of_means, in_specs=(P("model"), P("data"), P("data")), out_specs=P()
        )
        assert_trees_close(jax.jit(jax.value_and_grad(mapped, (0, 1)))(*arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, axes", [("explicit", ()), ("explicit", ("model",)), ("automatic", ("model",))]
)
def test_layers_work_under_vmap_over_split_sequences(setting, axes):
    *arguments, _ = arguments_of_a_loss(padding_rows=3)

    def loss(table, hidden, targets):
        def of_sequence(hidden, targets):
            vectors = EmbeddingLookup(table)(targets)
            logits = EmbeddingDecode(table)(hidden + vectors)
            loss = cross_entropy(None, table, hidden + vectors, targets)
            return loss + jnp.mean(jnp.square(logits))

        return jnp.mean(jax.vmap(of_sequence)(hidden, targets))

    table, *batched = arguments
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(table, *batched)
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        arguments = place(mesh, table, *axes), *place(mesh, batched, "data")
        assert_trees_close(jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments), expected)


def tied_loss(table, hidden, targets):
    hidden = hidden + EmbeddingLookup(table)(targets)
    logits = EmbeddingDecode(table)(hidden)
    return cross_entropy(None, table, hidden, targets) + jnp.mean(jnp.square(logits))


@on_one_device
def tied_loss_on_one_device(padding_rows):
    *arguments, _ = arguments_of_a_loss(padding_rows)
    return jax.jit(jax.value_and_grad(tied_loss, (0, 1)))(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(None, "model"), ("data",), (("data", "model"),)])
@pytest.mark.parametrize("setting", ["automatic", "explicit"])
@padded
def test_a_table_may_be_split_in_any_way(padding_rows, setting, axes):
    """Over its embedding; over the same mesh axis as the batch; over two mesh axes."""
    *arguments, _ = arguments_of_a_loss(padding_rows)
    expected = tied_loss_on_one_device(padding_rows)
    with split(setting, *arguments) as (table, hidden, targets):
        table = place(make_mesh(setting), table, *axes)
        function = jax.jit(jax.value_and_grad(tied_loss, (0, 1)))
        assert_trees_close(function(table, hidden, targets), expected)


@pytest.mark.slow
def test_columns_may_be_split_if_the_mesh_does_not_divide_the_rows():
    _, hidden, targets, _ = arguments_of_a_loss(0)
    table, targets = make_table(V - 6), targets % (V - 6)
    function = jax.jit(jax.value_and_grad(tied_loss, (0, 1)))
    expected = function(table, hidden, targets)
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        hidden, targets = place(mesh, (hidden, targets), "data")
        table = place(mesh, table, None, "model")
        assert_trees_close(jax.jit(function)(table, hidden, targets), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        ("model",),
        (None, "model"),
        ("data",),
        (None, "data"),
        ("data", "model"),
        ("model", "data"),
        (("data", "model"),),
        (("model", "data"),),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(8, 1), (1, 8), (4, 2)], ids=str)
@pytest.mark.parametrize("setting", ["automatic", "explicit"])
def test_a_mesh_may_have_any_shape(setting, sizes, axes):
    *arguments, _ = arguments_of_a_loss(padding_rows=3)
    expected = tied_loss_on_one_device(3)
    data, model = sizes
    with split(setting, *arguments, data=data, model=model) as (table, hidden, targets):
        table = place(make_mesh(setting, data, model), table, *axes)
        function = eqx.filter_jit(jax.value_and_grad(tied_loss, (0, 1)))
        assert_trees_close(function(table, hidden, targets), expected)


def test_vectors_are_split_as_their_tokens_and_the_embedding_are():
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        table = place(mesh, make_table(V), None, "model")
        vectors = EmbeddingLookup(table)(place(mesh, draw_tokens(V), "data"))
    assert jax.typeof(vectors).sharding.spec == P("data", None, "model")


@pytest.mark.slow
@pytest.mark.parametrize("rows, padding_rows", [(4, 0), (8, 3)])
@pytest.mark.parametrize("setting", ["explicit", "manual"])
def test_a_device_may_have_a_single_token_or_nothing_but_padding(setting, rows, padding_rows):
    table, hidden = make_table(rows, padding_rows), random((B, T, D), seed=1)
    targets = draw_tokens(table.vocab_size)

    def differentiate(function):
        return jax.jit(jax.value_and_grad(function, (0, 1)))

    expected = differentiate(lambda *a: cross_entropy(None, *a))(table, hidden, targets)
    with split(setting, table, hidden, targets) as arguments:
        actual = differentiate(on_mesh(setting, cross_entropy, []))(*arguments)
        assert_trees_close(actual, expected)


@pytest.mark.slow
def test_several_embedding_axes_around_the_vocabulary():
    array = random((2, V, 3))
    names = ("heads", "vocabulary", "features")
    hidden, targets = random((B, T, 2, 3), seed=1), draw_tokens(V)

    def loss(rules, array, hidden, targets):
        table = EmbeddingTable(array, names)
        hidden = hidden + EmbeddingLookup(table)(targets)
        return cross_entropy(rules, table, hidden, targets)

    expected = jax.jit(jax.value_and_grad(lambda *a: loss(None, *a), (0, 1)))(
        array, hidden, targets
    )
    for setting in ("rules", "explicit"):
        with split(setting, array[0], hidden, targets) as (_, hidden_, targets_):
            array_ = place(make_mesh(setting), array, None, "model")
            function = on_mesh(setting, loss, [])
            actual = jax.jit(jax.value_and_grad(function, (0, 1)))(array_, hidden_, targets_)
            assert_trees_close(actual, expected)


@pytest.mark.parametrize("out_of_range", ["nan", "clip"])
def test_tokens_out_of_range_stay_so_on_every_device(out_of_range):
    table = make_table(V, padding_rows=3)
    tokens = jnp.asarray([-1, 0, 23, 24, 92, 93, 95, 96, 10**6, -(2**31)], "int32")
    tokens = jnp.stack([tokens] * B)

    def lookup(rules, table, tokens):
        return EmbeddingLookup(table, out_of_range)(tokens, rules=rules)

    expected = jax.jit(lambda *a: lookup(None, *a))(table, tokens)
    for setting in SETTINGS:
        with split(setting, table, tokens) as arguments:
            actual = jax.jit(on_mesh(setting, lookup, ["data"]))(*arguments)
            np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@settings
def test_a_target_out_of_range_is_nan_on_every_device(setting):
    table, hidden, targets, _ = arguments_of_a_loss(padding_rows=3)
    wrong = targets.at[0, 0].set(table.vocab_size)

    def loss(rules, *arguments):
        return cross_entropy(rules, *arguments, reduction="none")

    with split(setting, table, hidden, wrong) as arguments:
        losses = np.asarray(jax.jit(on_mesh(setting, loss, ["data"]))(*arguments))
    assert np.isnan(losses[0, 0]) and np.isnan(losses).sum() == 1


@pytest.mark.exhaustive
def test_layers_work_without_jit():
    *arguments, _ = arguments_of_a_loss(padding_rows=3)

    def use(table, hidden, targets):
        vectors = EmbeddingLookup(table)(targets)
        logits = EmbeddingDecode(table)(hidden)
        loss, gradient = jax.value_and_grad(lambda h: cross_entropy(None, table, h, targets))(
            hidden
        )
        return vectors, logits, loss, gradient

    expected = use(*arguments)
    for setting in ("automatic", "explicit"):
        with split(setting, *arguments) as split_arguments:
            assert_trees_close(use(*split_arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["automatic", "explicit"])
@pytest.mark.parametrize("padding_rows", [0, 3])
def test_a_table_is_made_in_parts(setting, padding_rows):
    rows = 4096 - padding_rows

    def make(key):
        return EmbeddingTable.from_config(rows, {"embedding": D}, pad_to_multiple_of=8, key=key)

    key = jax.random.key(0)
    expected, temporaries = jax.jit(make)(key), []
    for devices in (1, 2, 4, 8):
        mesh = make_mesh(setting, data=1, model=devices)
        spec = eqx.filter_eval_shape(make, key).partition_spec({"vocabulary": "model"})
        create = jax.jit(make, out_shardings=NamedSharding(mesh, spec))
        temporaries.append(
            compiled_memory(compile_by_default(create.lower(key))).temp_size_in_bytes
        )
        table = create(key)
        assert {s.data.shape for s in table.embeddings.addressable_shards} == {(4096 // devices, D)}
        assert_trees_close(table, expected)
    assert all(few < 0.7 * many for many, few in zip(temporaries, temporaries[1:], strict=False))


def compiled_loss(setting, data, model, rows=2048, padding_rows=0):
    table, hidden = make_table(rows, padding_rows), random((16, 32, D), seed=1)
    targets = jnp.zeros((16, 32), "int32")

    def loss(rules, *arguments):
        return cross_entropy(rules, *arguments)

    with split(setting, table, hidden, targets, data=data, model=model) as arguments:
        function = jax.value_and_grad(on_mesh(setting, loss, []), (0, 1))
        shardings = jax.tree.map(lambda a: a.sharding, arguments[:2])
        jitted = jax.jit(function, out_shardings=(None, shardings))
        return compile_by_default(jitted.lower(*arguments))


@pytest.mark.slow
@padded
@pytest.mark.parametrize("setting", ["rules", "explicit", "manual"])
def test_a_loss_moves_a_few_numbers_a_chunk_and_each_gradient_once(setting, padding_rows):
    found = collectives(compiled_loss(setting, data=2, model=4, padding_rows=padding_rows))
    assert set(found) == {"all-reduce"}
    scalars = {(), (16,), (3, 16)}  # chunks of 16 tokens: a maximum and three sums for each
    moved = {shape: count for (_, shape), count in found["all-reduce"].items()}
    hidden = [shape for shape in moved if shape not in scalars and shape[0] != 512]
    assert moved[16,] == moved[3, 16] == 1  # in the loop
    assert moved[512, D] == 1  # the gradient of a device's rows, over `data`
    assert len(hidden) == 1 and moved[hidden[0]] == 1 and np.prod(hidden[0]) == 8 * 32 * D


@padded
@pytest.mark.slow
def test_without_rules_neither_the_table_nor_logits_are_gathered(padding_rows):
    found = collectives(compiled_loss("automatic", data=2, model=4, padding_rows=padding_rows))
    assert "all-gather" not in found and "all-to-all" not in found
    assert max(np.prod(shape) for _, shape in found["all-reduce"]) == 512 * D


@settings
@padded
def test_a_lookup_costs_one_all_reduce(setting, padding_rows):
    table = make_table(V, padding_rows)

    def lookup(rules, table, tokens):
        return EmbeddingLookup(table)(tokens, rules=rules)

    with split(setting, table, draw_tokens(table.vocab_size)) as arguments:
        compiled = compile_by_default(jax.jit(on_mesh(setting, lookup, ["data"])).lower(*arguments))
    found = collectives(compiled)
    assert {kind: dict(shapes) for kind, shapes in found.items()} == {
        "all-reduce": {("f32", (B // 2, T, D)): 1}
    }


@settings
def test_a_decode_moves_nothing(setting):
    def decode(rules, table, hidden):
        return EmbeddingDecode(table)(hidden, rules=rules)

    with split(setting, make_table(V), random((B, T, D))) as arguments:
        function = on_mesh(setting, decode, ["data", None, "model"])
        compiled = compile_by_default(jax.jit(function).lower(*arguments))
        assert compiled.output_shardings.spec == P("data", None, "model")
    assert not collectives(compiled)


@settings
@pytest.mark.exhaustive
def test_memory_per_device_falls_as_the_mesh_grows(setting):
    def size(data, model):
        analysis = compiled_memory(compiled_loss(setting, data, model, rows=8192))
        return (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            + analysis.temp_size_in_bytes
        )

    meshes = [(1, 1), (1, 2), (1, 4), (1, 8)]
    sizes = [size(*mesh) for mesh in meshes]
    assert all(few < 0.7 * many for many, few in zip(sizes, sizes[1:], strict=False)), sizes


def test_bad_rules_are_refused_before_anything_is_compiled():
    table, tokens, hidden = make_table(V), jnp.zeros((6, T), "int32"), jnp.zeros((6, T, D))

    def loss(rules, table=table):
        return EmbeddingDecode(table).cross_entropy(hidden, tokens, rules=rules)

    with pytest.raises(ValueError, match="mesh axis 'data', but the mesh is not set"):
        loss(RULES)
    with pytest.raises(ValueError, match="mesh axis 'data', but the mesh is not set"):
        EmbeddingLookup(table)(tokens, rules=RULES)
    with jax.set_mesh(make_mesh("rules", data=4, model=2)):
        with pytest.raises(ValueError, match=r"mesh axis 'modle', .* \('data', 'model'\)"):
            loss({"vocabulary": "modle"})
        with pytest.raises(ValueError, match="'batch' of size 6 .* 'data', whose size 4"):
            loss(RULES)
        with pytest.raises(ValueError, match="'vocabulary' of size 95 .* `pad_to_multiple_of`"):
            loss({"vocabulary": "model"}, make_table(95))
        with pytest.raises(ValueError, match="'model' twice, for 'vocabulary' and 'embedding'"):
            loss({"vocabulary": "model", "embedding": "model"})
        with pytest.raises(ValueError, match="'data' twice, for 'batch', but"):
            EmbeddingLookup(table)(tokens, rules={"batch": ("data", "data")})
        with pytest.raises(ValueError, match="'batch' of size 10 .* 'data', whose size 4"):
            loss({"batch": P("model", "data")})
        with pytest.raises(ValueError, match="PartitionSpec to 'vocabulary', one axis of a table"):
            loss({"vocabulary": P("model", None)})
        # lookup and decode need no batch that the mesh divides
        assert EmbeddingLookup(table)(tokens, rules=RULES).shape == (6, T, D)
        assert EmbeddingDecode(table)(hidden, rules=RULES).shape == (6, T, V)


@pytest.mark.slow
def test_a_split_that_a_shard_map_does_not_show_is_refused():
    table, tokens = make_table(V), jnp.zeros((B, T), "int32")

    def inside(function, table_axes, token_axes, **options):
        mapped = jax.shard_map(
            function, in_specs=(table_axes, token_axes), out_specs=P(), **options
        )
        with jax.set_mesh(make_mesh("manual")):
            jax.jit(mapped).lower(table, tokens)

    def lookup(rules, table, tokens):
        return EmbeddingLookup(table)(tokens, rules=rules)

    def loss(rules, table, tokens):
        hidden = jnp.zeros((*tokens.shape, D)) + tokens[..., None].astype("float32")
        return EmbeddingDecode(table).cross_entropy(hidden, tokens, rules=rules)

    for use in (lookup, loss):
        with pytest.raises(ValueError, match="table differs along.*'model'.*say so by rules"):
            inside(lambda *a, use=use: use(None, *a), P("model"), P())
        with pytest.raises(ValueError, match="it is the same .*check_vma=True"):
            inside(lambda *a, use=use: use(RULES, *a), P("model"), P("data"), check_vma=False)
        with pytest.raises(ValueError, match="must be the same along .*'model'.*under \"batch\""):
            rules = {"vocabulary": "model"}
            inside(lambda *a, use=use: use(rules, *a), P("model"), P("model"))
        with pytest.raises(ValueError, match="table differs along.*'model'.*a table of its own"):
            inside(lambda *a, use=use: use(None, *a), P("model"), P("model"))


def test_an_error_of_a_mapped_function_stays_as_it_is():
    def fails(array):
        raise ValueError("another error")

    with jax.set_mesh(make_mesh("rules")):
        mapping = Split(jax.sharding.get_abstract_mesh(), batch=(("data",),))
        with pytest.raises(ValueError, match="^another error"):
            mapping.map(fails, (P("data"),), P("data"), (jnp.ones(8),))
