"""Tables that are split over the mesh axes of the batch: equal to one device, and what is moved."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable
from eqx_embedding._devices._scatter import reduce_scatter_in_rings

from ..helpers import compile_by_default
from .helpers import (
    assert_trees_close,
    collectives,
    make_batch,
    make_mesh,
    make_table,
    place,
    poison,
    random,
    with_bias,
)


V, B, D = 96, 8, 8
CHUNK_SIZE = 32
FEW, MANY = 10, 14  # tokens of an example: fewer than the rows, or more, in all
# how the rules split the batch and the table
LAYOUTS = {
    "rows": {"batch": "data", "vocabulary": "data"},
    "columns": {"batch": "data", "embedding": "data"},
    "rows over all": {"batch": ("data", "model"), "vocabulary": ("data", "model")},
    "rows over model, then data": {"batch": "data", "vocabulary": ("model", "data")},
    "rows over data, then model": {"batch": "data", "vocabulary": ("data", "model")},
    "rows over model, columns over data": {
        "batch": "data",
        "vocabulary": "model",
        "embedding": "data",
    },
    "rows over data, columns over model": {
        "batch": "data",
        "vocabulary": "data",
        "embedding": "model",
    },
    "columns over model": {"batch": "data", "embedding": "model"},
}
MANUAL = [name for name in LAYOUTS if "columns over model" not in name and "data, then" not in name]
SETTINGS = [
    *(("explicit", layout) for layout in LAYOUTS),
    *(("rules", layout) for layout in LAYOUTS),
    *(("manual", layout) for layout in MANUAL),
]


def make_operands(length, padding_rows=3):
    """A table, hidden, targets, weights and data. Some devices have no token that counts."""
    table = with_bias(make_table(V, padding_rows))
    return table, *make_batch(table, length, masked=(np.s_[:5],))


def mean_and_scores(closed, rules, table, hidden, targets, weights, data):
    def fn(scores, data):
        ratio = jnp.exp(scores.log_prob * closed + data[0])
        return jnp.minimum(ratio, 1.2) * data[1] + scores.entropy + 0.1 * scores.mean_log_prob

    return EmbeddingDecode(table, soft_cap=5.0).token_loss(
        fn, hidden, targets, data, weights=weights, return_scores=True, rules=rules,
        chunk_size=CHUNK_SIZE,
    )  # fmt: skip


def losses_alone(closed, rules, table, hidden, targets, weights, data):
    losses = EmbeddingDecode(table).cross_entropy(
        hidden, targets, weights=weights, reduction="none", z_loss=0.1, rules=rules,
        chunk_size=CHUNK_SIZE,
    )  # fmt: skip
    return (losses * closed,)


def logits_and_vectors(closed, rules, table, hidden, targets, weights, data):
    vectors = EmbeddingLookup(table)(targets, rules=rules)
    logits = EmbeddingDecode(table)(hidden + vectors, rules=rules)
    return (logits * closed,)


def differentiate(function, closed, *operands):
    def total(closed, *operands):
        results = function(closed, *operands)
        return jnp.vdot(results[0], random(results[0].shape, seed=6)), results

    gradient = jax.value_and_grad(total, (0, 1, 2, 4, 5), has_aux=True)
    return eqx.filter_jit(gradient)(closed, *operands)


@functools.cache
def on_one_device(function, length):
    alone = functools.partial(with_rules, function, None)
    return differentiate(alone, jnp.asarray(0.7), *make_operands(length))


def on_mesh(setting, rules, function, out_specs):
    if setting != "manual":
        return functools.partial(with_rules, function, rules if setting == "rules" else None)

    def inside(closed, table, *batched):
        shardings = table.shardings(jax.sharding.get_abstract_mesh(), rules)
        table_specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        return jax.shard_map(
            functools.partial(with_rules, function, rules),
            in_specs=(P(), table_specs, *(P(rules["batch"]) for _ in batched)),
            out_specs=out_specs,
        )(closed, table, *batched)

    return inside


def with_rules(function, rules, closed, *operands):
    return function(closed, rules, *operands)


@pytest.mark.slow
@pytest.mark.parametrize("length", [FEW, MANY])
@pytest.mark.parametrize("setting, layout", SETTINGS)
def test_a_loss_and_its_gradients_equal_those_of_one_device(setting, layout, length):
    assert_equals_one_device(mean_and_scores, setting, layout, length)


@pytest.mark.slow
@pytest.mark.parametrize("function", [losses_alone, logits_and_vectors])
@pytest.mark.parametrize("setting", ["explicit", "rules", "manual"])
@pytest.mark.parametrize("layout", ["rows over model, then data", "columns"])
def test_losses_that_stay_apart_logits_and_vectors_do(function, setting, layout):
    assert_equals_one_device(function, setting, layout, FEW)


def look_up(table, tokens, rules=None):
    return jnp.sum(jnp.sin(EmbeddingLookup(table)(tokens, rules=rules)))


def decode(table, tokens, rules=None):
    hidden = jnp.cos(jnp.outer(tokens, jnp.arange(D)))
    return jnp.sum(jnp.sin(EmbeddingDecode(table)(hidden, rules=rules)))


def directional(table, tokens):
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), table)
    return jax.jvp(lambda table: look_up(table, tokens), (table,), (direction,))


def hessian_product(table, tokens):
    direction = jax.tree.map(jnp.ones_like, table)
    return jax.jvp(jax.grad(lambda table: look_up(table, tokens)), (table,), (direction,))


def gradient_of_each(table, tokens):
    return jax.vmap(lambda tokens: jax.grad(look_up)(table, tokens))(tokens)


@pytest.mark.parametrize("length", [FEW, MANY])
@pytest.mark.parametrize(
    "function, layout",
    [
        *((function, layout) for function in (directional, hessian_product) for layout in LAYOUTS),
        # `jax.vmap` maps over no mesh axis that splits a table as well
        (gradient_of_each, "columns over model"),
    ],
)
@pytest.mark.slow
def test_a_lookup_has_forward_mode_and_gradients_of_examples(function, layout, length):
    embeddings, tokens = random((V, D)), make_operands(length)[2]
    table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
    expected = eqx.filter_jit(function)(table, tokens)
    mesh, rules = make_mesh("explicit"), LAYOUTS[layout]
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        actual = eqx.filter_jit(function)(table, place(mesh, tokens, rules["batch"]))
        assert_trees_close(actual, expected)


@pytest.mark.parametrize("k", [(), (3,)])
def test_a_shard_map_along_one_axis_needs_no_rules_for_automatic_ones(k):
    """Even if these split the rows as well: XLA must not end the process."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "other"), (AxisType.Auto,) * 3)
    table, hidden = with_bias(make_table(V, padding_rows=3)), random((B, D))
    targets = jnp.arange(B * math.prod(k)).reshape(B, *k)
    weights = jnp.ones(targets.shape) / math.prod(k) if k else None

    def loss(table, hidden, targets, weights, rules=None):
        return EmbeddingDecode(table).cross_entropy(
            hidden, targets, target_weights=weights, rules=rules
        )

    of_model = jax.shard_map(
        functools.partial(loss, rules={"vocabulary": "model"}),
        in_specs=(P("model"), P(), P(), P()),
        out_specs=P(),
        axis_names={"model"},
    )
    expected = eqx.filter_jit(jax.value_and_grad(loss, (0, 1)))(table, hidden, targets, weights)
    with jax.set_mesh(mesh):
        batch = place(mesh, (hidden, targets, weights), "data")
        operands = place(mesh, table, ("model", "data")), *batch
        actual = eqx.filter_jit(jax.value_and_grad(of_model, (0, 1)))(*operands)
        assert_trees_close(actual, expected)


@pytest.mark.parametrize(
    "function, setting",
    [
        *((look_up, setting) for setting in ("explicit", "automatic", "manual")),
        (decode, "manual"),
    ],
)
def test_the_gradient_of_a_part_of_a_gathered_table_is_summed(function, setting):
    """Along the axes that split the batch alone: the part is a fourth of the table."""
    rules = {"batch": ("data", "model"), "vocabulary": "model"}
    embeddings, tokens = random((V, D)), jnp.arange(8 * V) % V

    def loss(embeddings, tokens, rules=rules):
        table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
        total = function(table, tokens, rules)
        return jax.lax.psum(total, ("data", "model")) if rules and setting == "manual" else total

    expected = jax.jit(jax.grad(functools.partial(loss, rules=None)))(embeddings, tokens)
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        arrays = place(mesh, embeddings, "model"), place(mesh, tokens, ("data", "model"))
        if setting == "manual":
            specs = P("model"), P(("data", "model"))
            loss = jax.shard_map(loss, in_specs=specs, out_specs=P())
        part = arrays[0].sharding
        compiled = jax.jit(jax.grad(loss), out_shardings=part).lower(*arrays).compile()
        assert_trees_close(compiled(*arrays), expected)
    assert collectives(compiled)["all-reduce"]["f32", (V // 4, D)] == 1
    assert ("f32", (V, D)) not in collectives(compiled)["all-reduce"]


@pytest.mark.parametrize("function", [look_up, decode])
def test_disable_jit_changes_no_gradient_of_a_gathered_table(function):
    def of_device(embeddings, tokens):
        table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
        return jax.lax.psum(function(table, tokens, LAYOUTS["rows"]), "data")

    mesh = make_mesh("rules")
    of_mesh = jax.shard_map(of_device, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    arrays = place(mesh, (random((V, D)), jnp.arange(2 * V) % V), "data")
    with jax.set_mesh(mesh):
        expected = jax.jit(jax.grad(of_mesh))(*arrays)
        with jax.disable_jit():
            assert_trees_close(jax.grad(of_mesh)(*arrays), expected)


@pytest.mark.parametrize("vocabulary_axis", [0, 1])
def test_gradients_are_summed_around_rings_of_devices(vocabulary_axis):
    """If explicit axes are left in a `jax.shard_map`."""
    embeddings, tokens = random((V, D)), make_operands(MANY)[2]
    names = ("vocabulary", "embedding") if vocabulary_axis == 0 else ("embedding", "vocabulary")

    def total(rules, embeddings, tokens):
        return look_up(EmbeddingTable(embeddings, names), tokens, rules)

    def of_device(embeddings, tokens):
        return jax.lax.psum(total(LAYOUTS["rows"], embeddings, tokens), "data")

    spec = P("data") if vocabulary_axis == 0 else P(None, "data")
    embeddings = embeddings if vocabulary_axis == 0 else embeddings.T
    expected = jax.jit(jax.grad(functools.partial(total, None)))(embeddings, tokens)
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        of_mesh = jax.shard_map(
            of_device, in_specs=(spec, P("data")), out_specs=P(), axis_names={"data"}
        )
        operands = place(mesh, embeddings, *spec), place(mesh, tokens, "data")
        assert_trees_close(jax.jit(jax.grad(of_mesh))(*operands), expected)


@pytest.mark.parametrize("position", [0, 1])
def test_rings_send_only_a_part_over_the_first_axis(position):
    """It may be a slow network between slices of TPUs."""
    array, axes = random((64, 32)), ("data", "model")

    def scatter(factor):
        part = factor[0] * (array if position == 0 else array.T)
        return reduce_scatter_in_rings(axes, position, part)

    spec = P(axes) if position == 0 else P(None, axes)
    factors = jnp.arange(8.0)
    with jax.set_mesh(make_mesh("rules")):
        function = jax.jit(jax.shard_map(scatter, in_specs=P(axes), out_specs=spec))
        result = function(factors)
        compiled = compile_by_default(function.lower(factors))
    assert_trees_close(result, 28 * (array if position == 0 else array.T))
    moved = [math.prod(shape) for _, shape in collectives(compiled)["collective-permute"]]
    # half of an eighth for each device of the other slice; then half of an eighth
    assert max(moved) == 2 * 64 * 32 / 16


def look_up_members(tables, tokens):
    return jnp.sum(jax.vmap(lambda table: look_up(as_table(table), tokens))(tables))


def losses_of_members(tables, tokens):
    hidden = jnp.cos(jnp.multiply.outer(tokens, jnp.arange(D)))

    def loss(table):
        return EmbeddingDecode(as_table(table)).cross_entropy(hidden, tokens)

    return jnp.sum(jax.vmap(loss)(tables))


def as_table(embeddings):
    return EmbeddingTable(embeddings, ("vocabulary", "embedding"))


@pytest.mark.slow
@pytest.mark.parametrize("function", [look_up_members, losses_of_members])
def test_each_member_of_an_ensemble_may_be_fully_sharded(function):
    tables, tokens = random((2, V, D)), make_operands(MANY)[2]
    expected = jax.jit(jax.grad(function))(tables, tokens)
    mesh = jax.make_mesh((2, 4), ("member", "data"))
    with jax.set_mesh(mesh):
        operands = place(mesh, tables, "member", "data"), place(mesh, tokens, "data")
        assert_trees_close(jax.jit(jax.grad(function))(*operands), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("setting", ["explicit", "rules"])
def test_tokens_of_the_host_are_looked_up_in_any_layout(setting, layout):
    table, mesh = EmbeddingTable(random((V, D)), ("vocabulary", "embedding")), make_mesh(setting)
    rules = LAYOUTS[layout]
    tokens = np.arange(2 * V).reshape(2, V) % V
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, table.shardings(mesh, rules))
        vectors = EmbeddingLookup(sharded)(tokens, rules=rules)
    np.testing.assert_array_equal(vectors, table.embeddings[tokens])


@pytest.mark.parametrize("tokens", [8, 800])
def test_vectors_in_bfloat16_are_looked_up_on_a_mesh_of_two_axes(tokens):
    """XLA for CPUs ends the process at a sum in bfloat16 over one of two mesh axes."""
    embeddings, ids = random((V, D)).astype("bfloat16"), jnp.arange(tokens) % V
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        sharded = EmbeddingTable(place(mesh, embeddings, "data"), ("vocabulary", "embedding"))
        vectors = jax.jit(lambda table, ids: EmbeddingLookup(table)(ids))(
            sharded, place(mesh, ids, "data")
        )
    np.testing.assert_array_equal(vectors, embeddings[ids])


def test_tokens_that_rules_cannot_split_are_looked_up():
    table, mesh = EmbeddingTable(random((V, D)), ("vocabulary", "embedding")), make_mesh("rules")
    tokens, rules = jnp.arange(V + 1) % V, LAYOUTS["rows"]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, table.shardings(mesh, rules))
        vectors = jax.jit(lambda table, tokens: EmbeddingLookup(table)(tokens, rules=rules))(
            sharded, tokens
        )
    np.testing.assert_array_equal(vectors, table.embeddings[tokens])


def look_up_with_each(tables, tokens):
    def total(tables):
        return jnp.sum(jnp.sin(jax.vmap(lambda table: EmbeddingLookup(table)(tokens))(tables)))

    return jax.value_and_grad(total)(tables)


def look_up_examples(table, tokens):
    def total(table):
        return jnp.sum(jnp.sin(jax.vmap(EmbeddingLookup(table))(tokens)))

    return jax.value_and_grad(total)(table)


@pytest.mark.parametrize(
    "function, of_tokens, of_table, stacked",
    [
        (look_up_with_each, ("data",), "data", 3),
        (look_up_examples, ("data", "model"), "model", 0),
        (look_up_examples, ("data", "model"), ("data", "model"), 0),
    ],
)
def test_a_lookup_may_be_mapped_where_tokens_and_table_share_an_axis(
    function, of_tokens, of_table, stacked
):
    shape = (stacked, V, D) if stacked else (V, D)
    table = EmbeddingTable(random(shape), ("vocabulary", "embedding"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (4, 128)), "int32")
    expected = eqx.filter_jit(function)(table, tokens)
    mesh = make_mesh("explicit")
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, {"vocabulary": of_table}))
        actual = eqx.filter_jit(function)(table, place(mesh, tokens, *of_tokens))
        assert_trees_close(actual, expected)


def test_a_lookup_on_a_mesh_exports_for_any_number_of_tokens():
    mesh = make_mesh("explicit")
    (size,) = jax.export.symbolic_shape("n")
    table = EmbeddingTable(random((V, D)), ("vocabulary", "embedding"))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, table.shardings(mesh, LAYOUTS["rows"]))
        tokens = jax.ShapeDtypeStruct((size,), "int32", sharding=NamedSharding(mesh, P()))
        look_up = jax.jit(lambda tokens: EmbeddingLookup(sharded)(tokens))
        exported = jax.export.export(look_up)(tokens)
        assert exported.out_avals[0].shape == (size, D)


def assert_equals_one_device(function, setting, layout, length):
    rules = LAYOUTS[layout]
    batch = P(rules["batch"])
    out_specs = (P(), batch) if function is mean_and_scores else (batch,)
    expected = on_one_device(function, length)
    mesh = make_mesh(setting)
    operands = make_operands(length)
    closed = jnp.asarray(0.7)
    table, *batched = operands
    batched = batched if function is logits_and_vectors else poison(*batched)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        batched = [place(mesh, array, rules["batch"]) for array in batched]
        actual = differentiate(
            on_mesh(setting, rules, function, out_specs), place(mesh, closed), table, *batched
        )
        assert_trees_close(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("length", [FEW, MANY])
@pytest.mark.parametrize("vocabulary_axis", [0, 1])
@pytest.mark.parametrize("setting, layout", [*SETTINGS, *(("vmap", layout) for layout in LAYOUTS)])
def test_a_lookup_and_its_gradient_equal_those_of_one_device(
    setting, layout, vocabulary_axis, length
):
    rules = LAYOUTS[layout]
    table, _, tokens, *_ = make_operands(length)
    if vocabulary_axis == 1:
        table = EmbeddingTable(table.embeddings.T, ("embedding", "vocabulary"), padding_rows=3)
    tokens = tokens.at[:, 1].set(table.vocab_size).at[2, 3].set(-1)  # out of range
    factors = random((*tokens.shape, D), seed=6)

    def look_up(_, rules, table, tokens):
        if setting == "vmap":
            return jax.vmap(EmbeddingLookup(table))(tokens)
        return EmbeddingLookup(table)(tokens, rules=rules)

    def differentiate(look_up, table, tokens, factors):
        def total(table, tokens, factors):
            vectors = look_up(None, table, tokens)
            return jnp.sum(jnp.where(jnp.isnan(vectors), 0, vectors) * factors), vectors

        return eqx.filter_jit(jax.value_and_grad(total, has_aux=True))(table, tokens, factors)

    alone = functools.partial(with_rules, look_up, None)
    expected = differentiate(alone, table, tokens, factors)
    mesh = make_mesh("explicit" if setting == "vmap" else setting)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        tokens, factors = (place(mesh, x, rules["batch"]) for x in (tokens, factors))
        on_devices = on_mesh(setting, rules, look_up, P(rules["batch"]))
        assert_trees_close(differentiate(on_devices, table, tokens, factors), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0,), (4, 0)])
@pytest.mark.parametrize("setting", ["explicit", "rules"])
def test_an_empty_batch_has_no_loss_and_no_tokens(setting, shape):
    rules = LAYOUTS["rows"]

    def of_batch(table, hidden, targets):
        decode = EmbeddingDecode(table)
        loss = decode.cross_entropy(hidden, targets, rules=rules)
        return loss, (decode.top_k(hidden, 2, rules=rules), EmbeddingLookup(table)(targets))

    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        table = jax.device_put(make_table(V), make_table(V).shardings(mesh, rules))
        hidden, targets = jnp.zeros((*shape, D)), jnp.zeros(shape, "int32")
        operands = table, *(place(mesh, array, "data") for array in (hidden, targets))
        (loss, others), gradient = eqx.filter_jit(jax.value_and_grad(of_batch, has_aux=True))(
            *operands
        )
        assert loss == 0 and not np.any(np.asarray(gradient.embeddings))
    assert [x.shape for x in jax.tree.leaves(others)] == [(*shape, 2), (*shape, 2), (*shape, D)]


@pytest.mark.slow
@pytest.mark.parametrize("shape, kinds", [((1, 8), "EA"), ((8, 1), "AE")])
def test_an_explicit_axis_of_size_one_beside_an_automatic_one_needs_rules(shape, kinds):
    """Without rules, XLA fails; so it does at a `jax.shard_map` by hand."""
    table, hidden, targets, *_ = make_operands(FEW, padding_rows=0)

    def loss(rules, table, hidden):
        return EmbeddingDecode(table).cross_entropy(hidden, targets, rules=rules)

    gradient = jax.value_and_grad(loss, (1, 2))
    expected = eqx.filter_jit(functools.partial(gradient, None))(table, hidden)
    kind = {"E": AxisType.Explicit, "A": AxisType.Auto}
    mesh = jax.make_mesh(shape, ("data", "model"), tuple(kind[name] for name in kinds))
    rules = {"batch": "data", "vocabulary": "model"}
    with jax.set_mesh(mesh):
        operands = jax.device_put(table, table.shardings(mesh, rules)), place(mesh, hidden, "data")
        assert_trees_close(eqx.filter_jit(functools.partial(gradient, rules))(*operands), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows over all", "rows over data, columns over model"])
@pytest.mark.parametrize("length", [FEW, MANY])
def test_a_shard_map_may_take_one_of_the_axes_that_split_a_table(layout, length):
    rules = {**LAYOUTS[layout], "batch": "data"}
    table, hidden, targets, *_ = make_operands(length)

    def loss(rules, table, hidden, targets):
        decode = EmbeddingDecode(table)
        return decode.cross_entropy(hidden, targets, rules=rules, chunk_size=CHUNK_SIZE)

    expected = eqx.filter_jit(jax.value_and_grad(functools.partial(loss, None), (0, 1)))(
        table, hidden, targets
    )
    mesh = make_mesh("rules")
    mapped = jax.shard_map(
        functools.partial(loss, rules),
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("data")),
        out_specs=P(),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        operands = table, place(mesh, hidden, "data"), place(mesh, targets, "data")
        assert_trees_close(eqx.filter_jit(jax.value_and_grad(mapped, (0, 1)))(*operands), expected)


@pytest.mark.slow
@pytest.mark.parametrize("length", [FEW, MANY])
@pytest.mark.parametrize(
    "setting, layout",
    [("rules", "rows"), ("rules", "rows over model, then data"), ("manual", "rows")],
)
def test_second_derivatives_equal_those_of_one_device(setting, layout, length):
    rules = LAYOUTS[layout]
    table, hidden, targets, *_ = make_operands(length)

    def loss(closed, rules, table, hidden, targets):
        decode = EmbeddingDecode(table)
        return decode.cross_entropy(hidden, targets, rules=rules, chunk_size=CHUNK_SIZE)

    def second(loss, *operands):
        def inner(table, hidden):
            gradients = jax.grad(loss, (0, 1))(table, hidden, operands[2])
            pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves((table, hidden)), strict=True)
            return sum(jnp.sum(g * jnp.sin(jnp.nan_to_num(x))) for g, x in pairs)

        return jax.grad(inner, (0, 1))(*operands[:2])

    def total(setting, *operands):
        function = on_mesh(setting, rules, loss, P())
        return second(functools.partial(function, jnp.zeros(())), *operands)

    expected = eqx.filter_jit(functools.partial(total, "alone"))(table, hidden, targets)
    mesh = make_mesh(setting)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        operands = table, *(place(mesh, x, rules["batch"]) for x in (hidden, targets))
        actual = eqx.filter_jit(functools.partial(total, setting))(*operands)
        assert_trees_close(actual, expected)


def scaled_mean(decode, numbers, hidden, targets, rules):
    return numbers["scale"] * decode.cross_entropy(hidden, targets, rules=rules)


def weighted_mean(decode, numbers, hidden, targets, rules):
    return decode.cross_entropy(hidden, targets, weights=numbers["weights"], rules=rules)


def of_data_and_closure(decode, numbers, hidden, targets, rules):
    def fn(scores, data):
        return -scores.log_prob * data * numbers["scale"] + scores.entropy * data**2

    return decode.token_loss(fn, hidden, targets, numbers["weights"], rules=rules)


def soft_targets(decode, numbers, hidden, targets, rules):
    weights = jnp.stack([0.25 * numbers["weights"], 0.75 * numbers["weights"]], axis=-1)
    targets = jnp.stack([targets, (targets + 1) % 93], axis=-1)
    return decode.cross_entropy(hidden, targets, target_weights=weights, rules=rules)


def losses_times_weights(decode, numbers, hidden, targets, rules):
    losses = decode.cross_entropy(hidden, targets, reduction="none", rules=rules)
    return jnp.mean(losses * numbers["weights"])


def scores_times_weights(decode, numbers, hidden, targets, rules):
    scores = decode.score(hidden, targets, rules=rules)
    return jnp.mean(scores.log_prob * numbers["weights"])


def top_k_times_weights(decode, numbers, hidden, targets, rules):
    log_probs, _ = decode.top_k(hidden, 3, rules=rules)
    return jnp.mean(log_probs[..., 1] * numbers["weights"])


TOTALS = scaled_mean, weighted_mean, of_data_and_closure, soft_targets
APART = losses_times_weights, scores_times_weights, top_k_times_weights
OVER_MODEL = {"batch": "data", "vocabulary": "model"}


def make_numbers(length):
    """The arguments of a loss of `TOTALS` or `APART`: numbers, embeddings, hidden and targets."""
    table, hidden, targets, weights, _ = make_operands(length)
    numbers = {"scale": jnp.asarray(0.7), "weights": weights + 0.5}
    # The second derivatives by padding rows that are NaN are NaN
    return numbers, jnp.nan_to_num(table.embeddings), hidden, targets


def with_numbers(loss, rules, numbers, embeddings, hidden, targets):
    table = EmbeddingTable(embeddings, ("vocabulary", "embedding"), padding_rows=3)
    return loss(EmbeddingDecode(table), numbers, hidden, targets, rules)


def differentiate_twice(total, *operands):
    def penalty(*operands):
        value, gradients = jax.value_and_grad(total, (0, 1, 2))(*operands)
        return value**2 + sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(gradients))

    return jax.jit(jax.grad(penalty, (0, 1, 2)))(*operands)


@functools.cache
def twice_on_one_device(loss, length):
    return differentiate_twice(functools.partial(with_numbers, loss, None), *make_numbers(length))


def assert_second_derivatives_equal_those_of_one_device(
    loss, mesh, rules, manual, length, *, needs_rules
):
    """`manual` are the mesh axes of a `jax.shard_map` around the loss."""
    total = functools.partial(with_numbers, loss, rules if needs_rules else None)
    table = make_table(V)
    spec, batch = table.partition_spec(rules), P(rules["batch"])
    specs = {"scale": P(), "weights": batch}, spec, batch, batch
    expected = twice_on_one_device(loss, length)  # before the mesh is set
    with jax.set_mesh(mesh):
        operands = jax.tree.map(
            lambda array, spec: place(mesh, array, *spec), make_numbers(length), specs
        )
        if manual:

            def manual_part(spec):
                return P(*(axes if set(np.ravel(axes)) <= manual else None for axes in spec))

            in_specs = jax.tree.map(manual_part, specs)
            total = jax.shard_map(total, in_specs=in_specs, out_specs=P(), axis_names=manual)
        assert_trees_close(differentiate_twice(total, *operands), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, length",
    [
        ("rows", FEW),
        ("rows", MANY),
        ("rows over model", FEW),
        ("rows over model, then data", FEW),
        ("columns over model", FEW),
    ],
)
@pytest.mark.parametrize(
    "loss, setting",
    [
        *((loss, kind) for loss in TOTALS + APART for kind in ("explicit", "rules")),
        *((loss, "manual") for loss in TOTALS),
        *((loss, "unused axis") for loss in (of_data_and_closure, *APART)),
    ],
)
def test_gradients_of_gradients_equal_those_of_one_device(loss, setting, layout, length):
    """By the table, the hidden vectors, and all else: each device must count once."""
    if setting == "manual" and layout == "columns over model":
        layout = "rows over all"
    if setting == "unused axis":
        axes = (AxisType.Explicit,) * 3
        mesh = jax.make_mesh((2, 2, 2), ("data", "model", "other"), axes)
    else:
        mesh = make_mesh(setting)
    manual = {"data", "model"} if setting == "manual" else set()
    assert_second_derivatives_equal_those_of_one_device(
        loss,
        mesh,
        LAYOUTS.get(layout, OVER_MODEL),
        manual,
        length,
        needs_rules=setting in ("rules", "manual"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["explicit", "rules"])
@pytest.mark.parametrize(
    "loss, layout, manual",
    [
        *((loss, "rows over model", "model") for loss in TOTALS + APART),
        *(
            (loss, layout, "data")
            for loss in TOTALS
            for layout in ("rows", "rows over model", "columns over model")
        ),
    ],
)
def test_gradients_of_gradients_in_a_shard_map_along_one_axis(kind, loss, layout, manual):
    """JAX cannot save what differs along the axes of this `jax.shard_map` and of one inside it."""
    rules = LAYOUTS.get(layout, OVER_MODEL)
    assert_second_derivatives_equal_those_of_one_device(
        loss, make_mesh(kind), rules, {manual}, FEW, needs_rules=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", TOTALS + APART)
@pytest.mark.parametrize("kind", ["explicit", "rules"])
def test_weights_may_differ_along_the_axis_of_a_shard_map_and_vectors_not(loss, kind):
    """The table and the vectors are the same on the devices of `model`, which use them apart."""
    numbers, *operands = make_numbers(FEW)
    factors, rules, data = jnp.asarray([0.5, -0.25, 0.4, 0.1]), {"batch": "data"}, P("data")

    def total(rules, factor, numbers, *operands):
        numbers = numbers | {"weights": jnp.abs(factor) * numbers["weights"]}
        return factor * with_numbers(loss, rules, numbers, *operands)

    def in_turn(*operands):
        return sum(total(None, factor, *operands) for factor in factors)

    def inside(factor, *operands):
        value = total(rules if kind == "rules" else None, factor[0], *operands)
        return jax.lax.psum(value, "model")

    expected = differentiate_twice(in_turn, numbers, *operands)
    specs, mesh = ({"scale": P(), "weights": data}, P(), data, data), make_mesh(kind)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda array, spec: place(mesh, array, *spec), (numbers, *operands), specs
        )
        of_model = jax.shard_map(
            inside,
            in_specs=(P("model"), *jax.tree.map(lambda _: P(), specs)),
            out_specs=P(),
            axis_names={"model"},
        )
        on_mesh = functools.partial(of_model, place(mesh, factors, "model"))
        assert_trees_close(differentiate_twice(on_mesh, *placed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [of_data_and_closure, losses_times_weights, top_k_times_weights])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_of_gradients_on_an_explicit_mesh_that_splits_nothing(loss, mixed):
    kinds = AxisType.Explicit, AxisType.Auto if mixed else AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), kinds)
    assert_second_derivatives_equal_those_of_one_device(
        loss, mesh, {"batch": None}, set(), FEW, needs_rules=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, setting",
    [
        *((of_data_and_closure, kind) for kind in ("explicit", "rules", "manual")),
        *((loss, kind) for loss in APART for kind in ("explicit", "rules")),
    ],
)
def test_a_linear_map_of_second_derivatives_may_be_compiled_later(loss, setting):
    """As for conjugate gradients. JAX keeps arrays for it, which differ from device to device."""
    numbers, *operands, targets = make_numbers(FEW)
    rules, mesh = OVER_MODEL, make_mesh(setting)

    def products(function, operands, jit):
        gradient = jax.grad(lambda *operands: function(numbers, *operands, targets), (0, 1))
        _, linear = jax.linearize(gradient, *operands)
        return jit(linear)(*jax.tree.map(jnp.cos, operands))

    expected = products(functools.partial(with_numbers, loss, None), operands, lambda f: f)
    total = functools.partial(with_numbers, loss, None if setting == "explicit" else rules)
    batch = P(rules["batch"])
    specs = {"scale": P(), "weights": batch}, P("model"), batch, batch
    if setting == "manual":
        total = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    with jax.set_mesh(mesh):
        numbers, *operands, targets = jax.tree.map(
            lambda array, spec: place(mesh, array, *spec), (numbers, *operands, targets), specs
        )
        assert_trees_close(products(total, operands, jax.jit), expected)


@pytest.mark.slow
def test_second_derivatives_in_bfloat16_are_summed_in_float32():
    """XLA for CPUs ends the process at a sum in bfloat16 over one of two mesh axes."""
    table, hidden, targets, *_ = make_operands(FEW, padding_rows=0)

    def penalty(rules, embeddings, hidden):
        def loss(embeddings, hidden):
            table = EmbeddingTable(embeddings, ("vocabulary", "embedding"))
            decode = EmbeddingDecode(table, dtype=jnp.bfloat16)
            return decode.cross_entropy(hidden, targets, rules=rules)

        return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(embeddings, hidden))

    def differentiate(rules, *operands):
        return jax.jit(jax.grad(functools.partial(penalty, rules), (0, 1)))(*operands)

    expected = differentiate(None, table.embeddings, hidden)
    mesh = make_mesh("rules")
    with jax.set_mesh(mesh):
        operands = place(mesh, table.embeddings, "data"), place(mesh, hidden, "data")
        actual = differentiate(LAYOUTS["rows"], *operands)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, rtol=0.05, atol=0.02 * np.max(np.abs(e)))


@pytest.mark.parametrize("layout", ["rows", "columns over model"])
@pytest.mark.slow
def test_small_gradients_in_float16_are_not_lost(layout):
    """The smallest normal number is 6e-5, which most of these are below."""
    rules = LAYOUTS[layout]
    hidden = (random((B, 512, D), seed=1) / 8).astype("float16")
    table = jax.tree.map(lambda x: x.astype("float16"), make_operands(FEW, padding_rows=0)[0])
    targets = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, 512)), "int32")

    def gradient(rules, table, hidden):
        return jax.grad(lambda h: EmbeddingDecode(table).cross_entropy(h, targets, rules=rules))(
            hidden
        )

    expected = np.asarray(
        eqx.filter_jit(functools.partial(gradient, None))(table, hidden), "float32"
    )
    assert np.sum((expected != 0) & (np.abs(expected) < 6e-5)) > expected.size / 8
    mesh = make_mesh("rules")
    with jax.set_mesh(mesh):
        table = jax.device_put(table, table.shardings(mesh, rules))
        hidden = place(mesh, hidden, "data")
        actual = eqx.filter_jit(functools.partial(gradient, rules))(table, hidden)
    np.testing.assert_allclose(np.asarray(actual, "float32"), expected, atol=5e-7)


def test_rules_of_a_shard_map_that_cannot_be_followed_are_refused():
    def inside(rules, table_axes):
        def loss(table, hidden):
            targets = jnp.zeros(hidden.shape[:-1], "int32")
            return EmbeddingDecode(table).cross_entropy(hidden, targets, rules=rules)

        specs = P(*table_axes), P(rules["batch"])
        mapped = jax.shard_map(loss, in_specs=specs, out_specs=P())
        with jax.set_mesh(make_mesh("manual")):
            jax.jit(mapped).lower(make_table(V), jnp.zeros((B, FEW, D)))

    with pytest.raises(ValueError, match=r"must come last, .*: \('model', 'data'\)"):
        inside(LAYOUTS["rows over data, then model"], [("data", "model")])
    with pytest.raises(ValueError, match="'model',.* split the embedding, but not the batch"):
        inside(LAYOUTS["columns over model"], [None, "model"])
