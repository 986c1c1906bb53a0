"""Programs for TPUs and GPUs: lowered anywhere, compiled where their compilers are installed."""

import dataclasses
import functools
import re
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from toy_transformer import ModelConfig

from benchmarks import accelerators, mesh_cost, programs, whole_step
from benchmarks.losses import LOSSES
from eqx_embedding import (
    combine_rows,
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    partition_rows,
    put_rows,
    resize_vocabulary,
    take_rows,
    unique_tokens,
)


N, D, V = 4096, 16, 4096
TARGETS = "v6e", "h100"
loss, plain_loss = LOSSES["cross_entropy"].here, LOSSES["cross_entropy"].plain


def operands():
    return (
        jax.ShapeDtypeStruct((N, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((N,), jnp.int32),
    )


def chunk_sizes(text):
    """The numbers of tokens of the products that are logits."""
    found = re.findall(r"dot_general.*-> tensor<\d+x(\d+)xf32>", text)
    return {int(size) for size in found} - {D}


# A program is planned for the platform that it is lowered for, on any machine.


def mean_of_examples(hidden, rows, targets):
    hidden, targets = (x.reshape(2, N // 2, *x.shape[1:]) for x in (hidden, targets))
    return jnp.mean(jax.vmap(loss, (0, None, 0))(hidden, rows, targets))


@pytest.mark.parametrize(
    "function",
    [
        loss,
        jax.value_and_grad(loss, (0, 1)),
        jax.value_and_grad(mean_of_examples, (0, 1)),
        jax.value_and_grad(jax.checkpoint(loss), (0, 1)),
    ],
    ids=["loss", "gradients", "vmap", "checkpoint"],
)
@pytest.mark.parametrize("platform, chunk_size", [("cpu", 256), ("tpu", 1024), ("cuda", 1024)])
def test_a_program_has_the_chunks_of_its_platform_and_no_others(platform, chunk_size, function):
    text = jax.jit(function).trace(*operands()).lower(lowering_platforms=(platform,)).as_text()
    assert chunk_sizes(text) == {chunk_size}


@pytest.mark.slow
def test_an_exported_program_has_a_plan_for_each_platform_and_runs_on_this_one():
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    exported = export.export(gradient, platforms=("cpu", "tpu", "cuda"))(*operands())
    assert chunk_sizes(exported.mlir_module()) == {256, 1024}
    draw = np.random.default_rng(0)
    hidden, rows = (draw.normal(size=x.shape).astype("float32") for x in operands()[:2])
    targets = draw.integers(0, V, N).astype("int32")
    actual = export.deserialize(exported.serialize()).call(hidden, rows, targets)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(gradient(hidden, rows, targets))):
        np.testing.assert_array_equal(a, e)


def likeliest(hidden, rows, targets):
    return EmbeddingDecode(make_table(rows)).top_k(hidden, 20)


@pytest.mark.parametrize("platform, gathers", [("cpu", True), ("tpu", False), ("cuda", True)])
def test_only_on_tpus_no_logits_are_gathered_to_find_the_likeliest(platform, gathers):
    text = jax.jit(likeliest).trace(*operands()).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.gather" in text) == gathers


@pytest.mark.parametrize("platform, count", [("cpu", 2), ("tpu", 1), ("cuda", 1)])
def test_only_cpus_compute_one_vector_in_bfloat16_as_two(platform, count):
    shapes = (jax.ShapeDtypeStruct((n, D), jnp.bfloat16) for n in (1, V))
    traced = jax.jit(lambda x, rows: EmbeddingDecode(make_table(rows)).top_k(x, 20)).trace(*shapes)
    assert chunk_sizes(traced.lower(lowering_platforms=(platform,)).as_text()) == {count}


# What the compilers of accelerators say


@pytest.fixture(params=TARGETS)
def target(request):
    try:
        accelerators.find_devices(request.param, 1)
    except accelerators.NotInstalled as error:
        pytest.skip(f"{request.param}: {error}")
    return request.param


def trace(target, shape, layout, devices, loss=loss):
    found = accelerators.find_devices(target, devices)
    kind = AxisType.Explicit
    given = accelerators.make_operands(found, layout, shape, jnp.dtype("bfloat16"), kind)
    return accelerators.trace(loss, *given)


def compiled_text(target, layout, tokens=1024):
    traced = trace(target, (tokens, 128, 4096), layout, 8)
    text = accelerators.compile_for(target, traced).as_text()
    assert text is not None
    return text


def one_device(target, shape, dtype="bfloat16", kind=AxisType.Explicit):
    found = accelerators.find_devices(target, 1)
    return accelerators.make_operands(found, "one device", shape, jnp.dtype(dtype), kind)


def compile_alone(target, shape, function):
    found, mesh = one_device(target, shape)
    with jax.set_mesh(mesh):
        return accelerators.compile_for(target, jax.jit(function).trace(*found))


def temporaries_of(program):
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def bytes_accessed(program):
    costs = program.cost_analysis()
    assert costs is not None
    return costs["bytes accessed"]


def figures(target, shape, loss, dtype="bfloat16"):
    return accelerators.measure(target, loss, *one_device(target, shape, dtype))


def plain_losses(hidden, rows, targets, bias=None, soft_cap=None, padding_rows=0):
    """Of each token, from all logits."""
    logits = jnp.dot(hidden, rows.T, preferred_element_type="float32")
    logits = logits if bias is None else logits + bias
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    if padding_rows:
        logits = jnp.where(jnp.arange(len(rows)) < len(rows) - padding_rows, logits, -jnp.inf)
    found = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - found


# The largest shapes that docs/benchmarks.md has numbers of, and what each may hold in MiB.
@pytest.mark.parametrize("target", ["v6e", "v5p", "h100"], indirect=True)
@pytest.mark.parametrize(
    "shape, on_tpu, on_gpu",
    [
        ((4096, 4096, 128256), 2005, 2400),
        ((8192, 2304, 256000), 3080, 3080),
        ((32768, 4096, 128256), 3200, 3200),
        ((32768, 2560, 128256), 2600, 2600),
        ((32768, 768, 50304), 880, 880),
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_the_loss_holds_as_little_as_promised(target, shape, on_tpu, on_gpu):
    found = figures(target, shape, loss)
    assert found["temporaries"] <= (on_gpu if target == "h100" else on_tpu)
    assert found["smallest product"] >= min(1024, shape[1])


@pytest.mark.parametrize("target, devices", [("v5e", 16), ("h100", 8)], indirect=["target"])
@pytest.mark.parametrize("layout", ["fully sharded", "split over both"])
@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_a_large_sharded_table_takes_two_gradients_of_it(target, devices, layout):
    traced = trace(target, (8192 if target == "v5e" else 16384, 4096, 128256), layout, devices)
    memory = accelerators.compile_for(target, traced).memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 4300 * 2**20


@pytest.mark.parametrize("tokens", [4096, 8192])
@pytest.mark.usefixtures("jax_defaults")
def test_without_a_gradient_of_the_table_logits_of_1024_tokens_are_held(target, tokens):
    N, D, V = tokens, 1024, 32000
    logits = 4 * 1024 * V

    def temporaries(function):
        return temporaries_of(compile_alone(target, (N, D, V), function))

    assert temporaries(loss) < 1.2 * logits + 12 * N * D
    # with the gradient of the logits, in bfloat16
    assert temporaries(jax.value_and_grad(loss)) < 1.2 * 1.5 * logits + 12 * N * D


# Few tokens, for which the plain way is best, and just as many as chunks are made for. The worst
# are numbers of tokens that are no multiple of 128.
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((333, 768, 50304), "bfloat16"),
        ((1000, 768, 50304), "bfloat16"),
        ((1600, 768, 50304), "bfloat16"),
        ((1600, 768, 50304), "float32"),
        ((2100, 1024, 32000), "bfloat16"),
        ((3000, 2048, 50304), "bfloat16"),
        ((1900, 768, 50304), "bfloat16"),
        ((1300, 1024, 16384), "bfloat16"),
        ((2400, 256, 16384), "bfloat16"),
        ((3200, 1024, 16384), "bfloat16"),
        ((4200, 4096, 32000), "bfloat16"),
        ((5000, 4096, 32000), "bfloat16"),
    ],
)
@pytest.mark.usefixtures("jax_defaults")
def test_the_loss_never_takes_more_memory_than_the_plain_way(target, shape, dtype):
    ours, plain = (figures(target, shape, f, dtype) for f in (loss, plain_loss))
    assert ours["temporaries"] <= plain["temporaries"] + 1
    # the last chunk may be filled up
    assert ours["operations"] == pytest.approx(plain["operations"], rel=0.02)


@pytest.mark.parametrize("target", ["v5e", "v5p", "tpu7x"], indirect=True)
@pytest.mark.parametrize(
    "shape", [(1600, 768, 50304), (3200, 1024, 16384), (5000, 4096, 32000), (7208, 3072, 32000)]
)
@pytest.mark.usefixtures("jax_defaults")
def test_neither_does_it_on_other_tpus(target, shape):
    ours, plain = (figures(target, shape, f) for f in (loss, plain_loss))
    assert ours["temporaries"] <= plain["temporaries"] + 1


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("function", [loss, jax.value_and_grad(loss, (0, 1))])
@pytest.mark.parametrize("tokens", [1500, 2100, 3000, 4100, 5000])
def test_no_chunk_has_fewer_than_1024_tokens(platform, tokens, function):
    hidden, rows, targets = operands()
    given = (jax.ShapeDtypeStruct((tokens, *x.shape[1:]), x.dtype) for x in (hidden, targets))
    hidden, targets = given
    traced = jax.jit(function).trace(hidden, rows, targets)
    (size,) = chunk_sizes(traced.lower(lowering_platforms=(platform,)).as_text())
    assert size >= 1024


@pytest.mark.parametrize("kind, expected", [("TPU v6 lite", 1264), ("TPU7x", 5000)])
def test_a_tpu_whose_compiler_copies_rows_for_a_loop_has_one_chunk(monkeypatch, kind, expected):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    jax.clear_caches()  # what was traced for other devices
    N, D, V = 5000, 4096, 32000
    shapes = ((N, D), "bfloat16"), ((V, D), "bfloat16"), ((N,), "int32")
    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
    traced = gradient.trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert chunk_sizes(text) & {1264, N} == {expected}
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_the_likeliest_take_the_memory_and_bytes_of_a_search_of_all(target):
    def plain(hidden, rows, targets):
        logits = jnp.dot(hidden, rows.T, preferred_element_type="float32")
        return jax.lax.top_k(jax.nn.log_softmax(logits), 20)

    ours, allowed = (compile_alone(target, (1024, 1024, 50257), f) for f in (likeliest, plain))
    assert temporaries_of(ours) <= 1.01 * temporaries_of(allowed)
    if target == "v6e":  # of GPUs, the compiler does not know what a search reads
        assert bytes_accessed(ours) <= 1.5 * bytes_accessed(allowed)


@pytest.mark.parametrize("target", ["h100"], indirect=True)
@pytest.mark.usefixtures("jax_defaults")
def test_a_loop_over_examples_with_a_bias_each_holds_less_than_the_plain_way(target):
    N, D, V = 1024, 512, 16384

    def mean_of(loss, map_examples):
        def of_example(rows, hidden, targets):
            banned = jnp.arange(V) % 7 == targets[0] % 7 + 1
            return loss(hidden, rows, targets, jnp.where(banned, -jnp.inf, 0.0))

        def mean(hidden, rows, targets):
            examples = hidden.reshape(8, -1, D), targets.reshape(8, -1)
            return jnp.mean(map_examples(functools.partial(of_example, rows), *examples))

        return jax.value_and_grad(mean, (0, 1))

    def ours(hidden, rows, targets, bias):
        table = dataclasses.replace(make_table(rows), bias=bias)
        return EmbeddingDecode(table).cross_entropy(hidden, targets)

    def plain(hidden, rows, targets, bias):
        return jnp.mean(plain_losses(hidden, rows, targets, bias))

    def loop(function, *examples):
        return jax.lax.map(lambda each: jax.checkpoint(function)(*each), examples)

    def at_once(function, *examples):
        return jax.vmap(function)(*examples)

    programs = mean_of(ours, loop), mean_of(plain, at_once)
    held, allowed = (temporaries_of(compile_alone(target, (N, D, V), f)) for f in programs)
    assert held < allowed / 2


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_to_draw_one_of_the_likeliest_holds_no_more_than_to_find_them(target):
    def draw(hidden, rows, targets):
        decode = EmbeddingDecode(make_table(rows))
        return decode.sample(hidden, key=jax.random.key(0), top_k=20)

    held, allowed = (
        temporaries_of(compile_alone(target, (2048, 512, 32768), f)) for f in (draw, likeliest)
    )
    assert held <= 1.01 * allowed


@pytest.mark.parametrize("changed", [False, True], ids=["alone", "bias, cap and padding"])
@pytest.mark.parametrize("target", ["v5e", "v6e"], indirect=True)
@pytest.mark.usefixtures("jax_defaults")
def test_on_tpus_the_logits_are_read_no_more_than_by_the_plain_way(target, changed):
    N, D, V = 1024, 512, 16384
    bias, soft_cap, padding_rows = (jnp.ones(V), 30.0, 100) if changed else (None, None, 0)

    def ours(hidden, rows, targets):
        table = dataclasses.replace(make_table(rows), bias=bias, padding_rows=padding_rows)
        return EmbeddingDecode(table, soft_cap=soft_cap).cross_entropy(hidden, targets)

    def plain(hidden, rows, targets):
        return jnp.mean(plain_losses(hidden, rows, targets, bias, soft_cap, padding_rows))

    def bytes_of(function):
        gradient = jax.value_and_grad(function, (0, 1))
        return bytes_accessed(compile_alone(target, (N, D, V), gradient))

    assert bytes_of(ours) <= 1.02 * bytes_of(plain)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_padding_and_weights_hold_the_logits_once(target):
    N, D, V = 2048, 512, 16384

    def weights(targets):
        return (targets % 2).astype("float32")

    def ours(hidden, rows, targets):
        table = dataclasses.replace(make_table(rows), padding_rows=100)
        return EmbeddingDecode(table).cross_entropy(hidden, targets, weights=weights(targets))

    def plain(hidden, rows, targets):
        losses = plain_losses(hidden, rows, targets, padding_rows=100)
        return jnp.sum(losses * weights(targets)) / jnp.sum(weights(targets))

    held, allowed = (figures(target, (N, D, V), f)["temporaries"] for f in (ours, plain))
    assert held <= allowed + 1


def masked_loss(hidden, rows, targets):
    return EmbeddingDecode(make_table(rows)).cross_entropy(hidden, targets, ignore_index=-100)


def mean_by_hand(hidden, rows, targets):
    losses = EmbeddingDecode(make_table(rows)).cross_entropy(hidden, targets, reduction="none")
    return jnp.sum(losses) / len(losses)


@pytest.mark.parametrize("function", [masked_loss, mean_by_hand])
@pytest.mark.usefixtures("jax_defaults")
def test_chunks_that_may_be_skipped_copy_no_gradient(function):
    """XLA for GPUs would: for TPUs it does not."""
    try:
        accelerators.find_devices("h100", 1)
    except accelerators.NotInstalled as error:
        pytest.skip(f"h100: {error}")
    shape = 8192, 4096, 32000
    held, allowed = (figures("h100", shape, f)["temporaries"] for f in (function, loss))
    assert held <= allowed + 1


def mean_of_16_examples(loss, hidden, rows, targets):
    hidden, targets = (x.reshape(16, -1, *x.shape[1:]) for x in (hidden, targets))
    return jnp.mean(jax.vmap(loss, (0, None, 0))(hidden, rows, targets))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(640, 128, 4096), (1000, 1024, 50257)])
@pytest.mark.usefixtures("jax_defaults")
def test_few_tokens_whose_losses_stay_apart_hold_their_logits_once(target, shape):
    """XLA for GPUs would make one product of the logits of both passes."""
    held, allowed = (figures(target, shape, f)["temporaries"] for f in (mean_by_hand, plain_loss))
    assert held <= allowed + 1


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
def test_few_tokens_of_several_examples_hold_their_logits_once(target):
    functions = (functools.partial(mean_of_16_examples, f) for f in (loss, plain_loss))
    held, allowed = (figures(target, (1024, 256, 8192), f)["temporaries"] for f in functions)
    assert held <= allowed + 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one device", "vocabulary split"])
@pytest.mark.usefixtures("jax_defaults")
def test_few_tokens_whose_losses_stay_apart_hold_their_logits_once_on_a_mesh(target, layout):
    rules = {"batch": "data", "vocabulary": accelerators.LAYOUTS[layout]}

    def ours(hidden, rows, targets):
        decode, options = EmbeddingDecode(make_table(rows)), {"reduction": "none", "rules": rules}
        return jnp.mean(decode.cross_entropy(hidden, targets, **options))

    found, shape = accelerators.find_devices(target, 8), (1024, 256, 8192)
    given = accelerators.make_operands(found, layout, shape, jnp.dtype("bfloat16"), AxisType.Auto)
    held, allowed = (
        accelerators.measure(target, f, *given)["temporaries"] for f in (ours, plain_loss)
    )
    assert held <= allowed + 1


def test_many_tokens_take_little_more_than_the_gradient_of_the_table(target):
    N, D, V = shape = 8192, 2048, 32000
    found = figures(target, shape, loss)
    assert found["temporaries"] < 1.6 * V * D * 4 / 2**20
    assert found["smallest product"] >= 1024
    assert found["operations"] == 6 * N * D * V / 1e12


# Over devices

SCATTERS = "reduce-scatter", "collective-permute"
FEW, MANY = 256, 1024  # tokens of each of eight devices: fewer than the rows in all, or more


def collectives(text):
    """The kind of each collective, what it returns, and how often it runs."""
    pattern = re.compile(rf" = (.*?) ({programs.COLLECTIVES})(?:-start)?\(")
    found = ((pattern.search(line), trips) for _, line, trips in programs.each_instruction(text))
    return [(match[2], match[1], trips) for match, trips in found if match is not None]


@pytest.mark.parametrize("layout", ["vocabulary split", "fully sharded"])
def test_gradients_in_bfloat16_are_summed_over_devices_in_float32(target, layout):
    """XLA for TPUs would round them before, if it saw no more than a conversion."""
    sums = [
        (kind, types)
        for kind, types, _ in collectives(compiled_text(target, layout))
        if kind in ("all-reduce", "reduce-scatter", "collective-permute")
    ]
    assert any(re.search(r"f32\[\d{3,},", types) for _, types in sums), sums  # that of the table
    assert not any("bf16" in types for _, types in sums), sums


def test_a_fully_sharded_table_is_gathered_once_and_its_gradient_scattered(target):
    found = collectives(compiled_text(target, "fully sharded", MANY))
    gathers = [(types, trips) for kind, types, trips in found if kind == "all-gather"]
    assert len(gathers) == 1 and "bf16[4096,128]" in gathers[0][0] and gathers[0][1] == 1
    # the gradient is never summed whole
    assert not any(kind == "all-reduce" and "4096,128" in types for kind, types, _ in found)
    scatters = [(types, trips) for kind, types, trips in found if kind in SCATTERS]
    if target == "h100":
        assert [trips for _, trips in scatters] == [1]
    else:  # half of a part goes each way around the ring
        assert [trips for _, trips in scatters] == [7, 7]
        assert all("f32[256,128]" in types for types, _ in scatters)


def test_few_tokens_are_gathered_and_the_table_is_not(target):
    text = compiled_text(target, "fully sharded", FEW)
    assert "4096,128" not in text
    assert "all-gather" in text


@pytest.mark.parametrize("layout", ["vocabulary split", "fully sharded"])
def test_a_table_over_devices_takes_few_temporaries(target, layout):
    N, D, V = 4096, 1024, 16384
    traced = trace(target, (N, D, V), layout, 8)
    memory = accelerators.compile_for(target, traced).memory_analysis()
    assert memory is not None
    gradient, logits = 4 * V * D, 4 * 1024 * V
    held = gradient / 4 if layout == "vocabulary split" else 1.5 * gradient + 2 * logits
    assert memory.temp_size_in_bytes < 1.25 * held + 12 * N * D


def make_table(rows):
    """A table with the shape of an array in place of the array."""
    table = EmbeddingTable(jnp.zeros((1, 1), rows.dtype), ("vocabulary", "embedding"))
    return eqx.tree_at(lambda t: t.embeddings, table, rows)


def lookup(table, tokens):
    return jnp.sum(jnp.sin(EmbeddingLookup(table)(tokens).astype("float32")))


def mapped_lookup(table, tokens):
    return jnp.sum(jnp.sin(jax.vmap(EmbeddingLookup(table))(tokens).astype("float32")))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("function", [lookup, mapped_lookup])
def test_the_gradient_of_few_tokens_holds_a_float32_row_for_each(target, function, kind):
    N, D, V = 2048, 256, 32768
    (_, rows, tokens), mesh = one_device(target, (N, D, V), kind=kind)
    table = make_table(rows)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=tokens.sharding)
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(function)).trace(table, tokens)
        program = accelerators.compile_for(target, traced)
    assert temporaries_of(program) < 1.1 * 4 * N * D + 8 * V  # of 4 V D without this


@pytest.mark.parametrize("way", ["map", "scan"])
def test_a_loop_of_checkpointed_losses_holds_no_wide_table(target, way):
    steps, N, D, V = 8, 64, 512, 32768
    (_, rows, tokens), mesh = one_device(target, (N, D, V), kind=AxisType.Auto)
    tokens = jax.ShapeDtypeStruct((steps, N), jnp.int32, sharding=tokens.sharding)

    def total(rows, tokens):
        @jax.checkpoint
        def of_step(rows, tokens):
            table = make_table(rows)
            hidden = jnp.tanh(EmbeddingLookup(table)(tokens))
            return EmbeddingDecode(table).cross_entropy(hidden, tokens)

        if way == "map":
            return jnp.sum(jax.lax.map(lambda step: of_step(rows, step), tokens))
        return jax.lax.scan(lambda sum, step: (sum + of_step(rows, step), None), 0.0, tokens)[0]

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(total)).trace(rows, tokens)
        program = accelerators.compile_for(target, traced)
    logits, table = 4 * N * V, 2 * D * V  # which takes twice as much in float32
    assert temporaries_of(program) < 1.6 * logits + 1.1 * table


SEARCHES = {
    "top_k": lambda decode, hidden, tokens: decode.top_k(hidden, 10),
    "sample": lambda decode, hidden, tokens: decode.sample(hidden, key=jax.random.key(0)),
    "greedy": lambda decode, hidden, tokens: decode.sample(
        hidden, temperature=0.0, key=jax.random.key(0)
    ),
    "score": lambda decode, hidden, tokens: decode.score(hidden, tokens),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_no_search_copies_a_table_in_float8(target, search):
    N, D, V = 8, 1024, 32768
    (hidden, rows, tokens), mesh = one_device(target, (N, D, V))
    rows = jax.ShapeDtypeStruct(rows.shape, "float8_e4m3fn", sharding=rows.sharding)

    def find(hidden, rows, tokens):
        decode = EmbeddingDecode(make_table(rows), dtype=jnp.bfloat16)
        return SEARCHES[search](decode, hidden, tokens)

    with jax.set_mesh(mesh):
        program = accelerators.compile_for(target, jax.jit(find).trace(hidden, rows, tokens))
    assert temporaries_of(program) < 4 * 4 * N * V  # a table takes eight times as much


def make_hidden(tokens):
    """Vectors that are split over devices as the tokens are."""
    return jnp.broadcast_to(tokens.astype("bfloat16")[..., None], (*tokens.shape, 128))


def decode(table, tokens):
    return jnp.sum(jnp.sin(EmbeddingDecode(table)(make_hidden(tokens))))


def scores(table, tokens):
    scores = EmbeddingDecode(table).score(make_hidden(tokens), tokens)
    return jnp.sum(scores.log_prob + scores.entropy)


def some_rows(table, tokens):
    trained, frozen = partition_rows(table, range(4000, 4096))
    return jax.grad(lambda t: lookup(combine_rows(t, frozen), tokens))(trained)


def resized(table, tokens):
    return resize_vocabulary(table, 8192, key=jax.random.key(0))


def step_on_rows(table, tokens):
    ids, places = unique_tokens(tokens, 512)
    small = take_rows(table, ids)
    gradient = jax.grad(lookup)(small, places)
    return put_rows(table, ids, jax.tree.map(lambda x, g: x - g, small, gradient))


@pytest.mark.parametrize("layout", ["one device", "vocabulary split"])
def test_a_donated_step_on_rows_copies_no_table(target, layout):
    devices = accelerators.find_devices(target, 1 if layout == "one device" else 8)
    shape, dtype = (256, 128, 262_144), jnp.dtype("float32")
    operands, mesh = accelerators.make_operands(devices, layout, shape, dtype, AxisType.Explicit)
    table = make_table(operands.rows)
    with jax.set_mesh(mesh):
        donated = jax.jit(step_on_rows, donate_argnums=0)
        traced = donated.trace(table, operands.targets)
        compiled = accelerators.compile_for(target, traced)
    memory, parts = compiled.memory_analysis(), 1 if layout == "one device" else 4
    assert memory is not None
    assert memory.alias_size_in_bytes == 4 * 262_144 * 128 / parts
    assert memory.temp_size_in_bytes < 4 * 262_144 * 128 / parts / 8


@pytest.mark.parametrize("layout", ["one device", "vocabulary split"])
@pytest.mark.parametrize(
    "function",
    [jax.grad(lookup), jax.grad(decode), jax.grad(scores), some_rows, step_on_rows, resized],
)
def test_everything_else_compiles_and_holds_no_second_table(target, layout, function):
    """Each takes less than two tables in float32, eight times its logits, and its vectors."""
    devices = accelerators.find_devices(target, 1 if layout == "one device" else 8)
    shape, dtype = (256, 128, 4096), jnp.dtype("bfloat16")
    given = accelerators.make_operands(devices, layout, shape, dtype, AxisType.Explicit)
    operands, mesh = given
    table = make_table(operands.rows)
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(table, operands.targets)
        memory = accelerators.compile_for(target, traced).memory_analysis()
    assert memory is not None
    parts = 1 if layout == "one device" else 4
    tables, logits = 2 * 4 * 4096 * 128 / parts, 4 * 256 * 4096 / parts
    assert memory.temp_size_in_bytes < tables + 8 * logits + 4 * 4 * 256 * 128


SHARDED = {  # the rules of the table, and the shape of what each device has of it
    "rows": ({"vocabulary": "data"}, "4096,128"),
    "columns": ({"embedding": "data"}, "4096,128"),
    "both": ({"vocabulary": ("model", "data")}, "1024,128"),
}


def sharded_operands(target, kind, rules, tokens):
    """A table of 4096 rows on eight devices, and so many tokens for each that `data` splits."""
    model = 4 if "model" in str(rules) else 1
    grid = np.asarray(accelerators.find_devices(target, 8)).reshape(8 // model, model)
    mesh = Mesh(grid, ("data", "model"), axis_types=(kind, kind))
    table = make_table(jax.ShapeDtypeStruct((4096, 128), "bfloat16"))
    spec = table.partition_spec(rules)
    rows = jax.ShapeDtypeStruct((4096, 128), "bfloat16", sharding=NamedSharding(mesh, spec))
    shape, sharding = (8 // model, tokens), NamedSharding(mesh, P("data"))
    return mesh, make_table(rows), jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)


def with_loss(table, tokens, rules=None):
    return EmbeddingDecode(table).cross_entropy(make_hidden(tokens), tokens, rules=rules)


def with_lookup(table, tokens, rules=None):
    vectors = EmbeddingLookup(table)(tokens, rules=rules)
    return jnp.sum(jnp.sin(vectors.astype("float32")))


def with_mapped_lookup(table, tokens, rules=None):
    vectors = jax.vmap(EmbeddingLookup(table))(tokens)
    return jnp.sum(jnp.sin(vectors.astype("float32")))


@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize(
    "setting, function",
    [
        *((setting, with_loss) for setting in ("explicit", "rules", "manual")),
        *((setting, with_lookup) for setting in ("explicit", "rules", "manual")),
        ("explicit", with_mapped_lookup),
    ],
)
def test_in_every_setting_a_sharded_table_is_gathered_once(target, layout, setting, function):
    """And its gradient is summed in float32, by each device for the part that it keeps."""
    rules, whole = SHARDED[layout]
    rules = {"batch": "data", **rules}
    kind = AxisType.Explicit if setting == "explicit" else AxisType.Auto
    mesh, table, tokens = sharded_operands(target, kind, rules, 1152)

    def total(table, tokens):
        if setting == "explicit":
            return function(table, tokens)
        if setting == "rules":
            return function(table, tokens, rules)
        return jax.shard_map(
            lambda *operands: jax.lax.psum(function(*operands, rules), ("data",)),
            in_specs=(table.partition_spec(rules), P("data")),
            out_specs=P(),
        )(table, tokens)

    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(total)).trace(table, tokens)
        found = collectives(accelerators.compile_for(target, traced).as_text())
    gathers = [(types, trips) for kind, types, trips in found if kind == "all-gather"]
    assert len(gathers) == 1 and f"bf16[{whole}]" in gathers[0][0] and gathers[0][1] == 1, found
    assert not any(kind == "all-reduce" and whole in types for kind, types, _ in found), found
    scattered = [types for kind, types, _ in found if kind in SCATTERS]
    assert scattered and all("f32[" in types for types in scattered), found


@pytest.mark.parametrize("function", [lookup, decode])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_gradients_of_a_table_on_each_device_are_summed_in_float32(target, kind, function):
    mesh = Mesh(np.asarray(accelerators.find_devices(target, 8)), ("data",), axis_types=(kind,))

    def place(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    table = make_table(place((4096, 128), "bfloat16"))
    tokens = place((512,), "int32", "data")
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(function)).trace(table, tokens)
        found = collectives(accelerators.compile_for(target, traced).as_text())
    sums = [types for kind, types, _ in found if kind == "all-reduce" and "4096,128" in types]
    assert sums and not any("bf16" in types for types in sums), found


@pytest.mark.parametrize("layout, d, m", [("vocabulary split", 32, 8), ("fully sharded", 256, 1)])
@pytest.mark.parametrize("target", ["v5p"], indirect=True)
def test_what_256_tpus_send_is_as_predicted(target, layout, d, m):
    devices = accelerators.find_devices(target, 256)
    sizes = mesh_cost.Sizes(N=2**16, D=128, V=2**15, C=256)
    predicted = mesh_cost.LAYOUTS[layout](sizes, d, m)
    counted = mesh_cost.measure(sizes, layout, d, m, devices, "tpu")
    assert counted.operations == predicted.operations
    if layout == "fully sharded":
        assert counted.sent == pytest.approx(predicted.sent, rel=0.01)
    else:  # XLA for TPUs adds the gradients of lookup and loss before it sums them
        assert 0.4 * predicted.sent < counted.sent < predicted.sent


@pytest.mark.slow
def test_times_are_those_of_the_same_losses():
    losses, _ = accelerators.losses_of(None)
    times = accelerators.run_for_time((64, 8, 100), losses, "float32", rounds=1)
    assert list(times) == list(losses) and all(seconds > 0 for seconds in times.values())


@pytest.mark.usefixtures("jax_defaults")
def test_a_whole_step_is_compared_with_its_parts(monkeypatch, capsys):
    try:
        accelerators.find_devices("v6e", 8)
    except accelerators.NotInstalled as error:
        pytest.skip(f"v6e: {error}")
    config = ModelConfig(sequence_length=64, num_layers=2, num_heads=2, embedding_size=256)
    monkeypatch.setattr(whole_step, "CONFIG", config)
    monkeypatch.setattr(whole_step, "VOCAB_SIZE", 32768)
    whole_step.main(["--target", "v6e", "--devices", "8"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [re.split(r"\s{2,}", line)[0] for line in lines] == list(whole_step.PROGRAMS)
    parameters = [int(line.split()[-2].replace(",", "")) for line in lines]
    assert parameters[0] == parameters[1] > parameters[-1]
