"""`EmbeddingTable`: how it is made, what it knows of itself, and what it refuses."""

import copy
import dataclasses
import functools
import pickle
import re
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

from .helpers import FOUR_TARGETS, FOUR_TOKENS, LAYOUTS, make_array, make_table, VOCAB_SIZE


def test_a_new_table_is_variance_scaling_over_the_embedding_axes_bit_for_bit(dtype, getkey):
    key = getkey()
    table = EmbeddingTable.from_config(7, {"heads": 2, "features": 3}, dtype=dtype, key=key)
    draw = initializers.variance_scaling(
        1.0, "fan_out", "normal", in_axis=(), out_axis=(1, 2), batch_axis=0
    )
    assert table.embeddings.dtype == dtype
    np.testing.assert_array_equal(table.embeddings, draw(key, (7, 2, 3), dtype))


def test_a_new_embedding_has_a_standard_deviation_of_one_over_the_root_of_its_size():
    table = EmbeddingTable.from_config(2000, {"heads": 4, "features": 16}, key=jax.random.key(0))
    assert np.std(table.embeddings) == pytest.approx(1 / 8, rel=0.01)
    assert np.mean(table.embeddings) == pytest.approx(0, abs=0.002)


def test_the_default_dtype_is_float32_and_float64_in_64_bit_mode(getkey):
    make = eqx.filter_eval_shape
    assert make(EmbeddingTable.from_config, 3, {"e": 2}, key=getkey()).embeddings.dtype == "float32"
    with jax.enable_x64(True):
        table = make(EmbeddingTable.from_config, 3, {"e": 2}, key=getkey())
    assert table.embeddings.dtype == "float64"


@pytest.mark.parametrize(
    "initializer",
    [initializers.normal(0.02), initializers.orthogonal(), initializers.he_uniform()],
    ids=["normal", "orthogonal", "he_uniform"],
)
def test_any_initializer_of_jax_is_drawn_with_the_vocabulary_first(initializer, getkey):
    key = getkey()
    table = EmbeddingTable.from_config(
        7, {"heads": 2, "features": 3}, "bytes", initializer, jnp.float32, key=key
    )
    assert table.axis_names == ("bytes", "heads", "features")
    assert table.vocabulary_axis == "bytes"
    expected = initializer(key, (7, 2, 3), jnp.float32)
    np.testing.assert_array_equal(table.embeddings, expected)


def test_an_initializer_is_called_once_with_key_shape_and_dtype_by_position(getkey):
    calls = []

    def initializer(*args):
        calls.append(args)
        return jnp.zeros(args[1], args[2])

    key = getkey()
    EmbeddingTable.from_config(
        5, {"embedding": 2}, initializer=initializer, pad_to_multiple_of=4, key=key
    )
    assert calls == [(key, (5, 2), jnp.float32)]


def test_an_initializer_may_return_an_array_of_numpy_of_another_dtype():
    array = np.arange(10.0).reshape(5, 2)
    table = EmbeddingTable.from_config(
        5,
        {"embedding": 2},
        initializer=lambda *_: array,
        dtype=jnp.bfloat16,
        key=jax.random.key(0),
    )
    assert table.embeddings.dtype == jnp.bfloat16
    np.testing.assert_array_equal(table.embeddings, array.astype(jnp.bfloat16))


@pytest.mark.parametrize("multiple, padding_rows", [(1, 0), (2, 1), (7, 0), (8, 1), (128, 121)])
def test_padding_fills_up_to_a_multiple_and_does_not_change_what_is_drawn(multiple, padding_rows):
    key = jax.random.key(0)
    plain = EmbeddingTable.from_config(7, {"heads": 2, "features": 3}, key=key)
    padded = EmbeddingTable.from_config(
        7, {"heads": 2, "features": 3}, pad_to_multiple_of=multiple, key=key
    )
    assert padded.padding_rows == padding_rows
    assert padded.vocab_size == plain.vocab_size == 7
    assert padded.embeddings.shape == (7 + padding_rows, 2, 3)
    np.testing.assert_array_equal(padded.embeddings[:7], plain.embeddings)
    np.testing.assert_array_equal(padded.embeddings[7:], 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_tells_its_vocabulary_without_padding_and_its_embedding_axes_in_order(layout):
    table = make_table(layout)
    sizes = dict(LAYOUTS[layout])
    del sizes["vocabulary"]
    assert table.vocab_size == VOCAB_SIZE
    assert list(table.embedding_axes.items()) == list(sizes.items())


def test_the_vocabulary_may_have_any_name_and_any_place():
    table = EmbeddingTable(jnp.zeros((2, 5, 3)), ("heads", "bytes", "features"), "bytes")
    assert table.vocab_size == 5
    assert table.embedding_axes == {"heads": 2, "features": 3}


def test_a_table_is_read_only():
    table = make_table("first")
    for name in ("embeddings", "vocab_size", "embedding_axes", "padding_rows"):
        with pytest.raises(AttributeError):
            setattr(table, name, 3)


def test_a_new_bias_is_zero_for_each_row_and_changes_no_draw(dtype, getkey):
    key = getkey()
    make = functools.partial(EmbeddingTable.from_config, 7, {"embedding": 3}, dtype=dtype, key=key)
    for multiple in 1, 4:
        table = make(use_bias=True, pad_to_multiple_of=multiple)
        assert table.bias is not None and table.bias.dtype == dtype
        np.testing.assert_array_equal(table.bias, np.zeros(7 + table.padding_rows))
        plain = make(pad_to_multiple_of=multiple)
        assert plain.bias is None
        np.testing.assert_array_equal(table.embeddings, plain.embeddings)


def test_arrays_may_be_numpy_arrays():
    table = make_table("middle", with_bias=True)
    same = EmbeddingTable(
        np.asarray(table.embeddings), table.axis_names, padding_rows=2, bias=np.asarray(table.bias)
    )
    assert isinstance(same.embeddings, np.ndarray) and isinstance(same.bias, np.ndarray)
    assert eqx.tree_equal(jax.tree.map(jnp.asarray, same), table)
    hidden = make_array((5, 2, 3), seed=2)
    np.testing.assert_array_equal(EmbeddingDecode(same)(hidden), EmbeddingDecode(table)(hidden))


# Stacked tables


def test_tables_stacked_by_vmap_are_a_table_whose_names_describe_the_last_axes():
    array = make_array((3, 8, 2))
    names = ("vocabulary", "embedding")
    stacked = eqx.filter_vmap(lambda rows: EmbeddingTable(rows, names, padding_rows=3))(array)
    assert isinstance(stacked, EmbeddingTable)
    assert (stacked.vocab_size, stacked.padding_rows) == (5, 3)
    assert stacked.embedding_axes == {"embedding": 2}
    np.testing.assert_array_equal(stacked.embeddings, array)
    assert eqx.tree_equal(stacked, EmbeddingTable(array, names, padding_rows=3))


def test_a_stacked_table_has_a_stacked_bias():
    arrays, biases = make_array((3, 2, 8)), make_array((3, 8), seed=1)
    names = ("embedding", "vocabulary")

    def make(array, bias):
        return EmbeddingTable(array, names, padding_rows=3, bias=bias)

    stacked = eqx.filter_vmap(make)(arrays, biases)
    assert eqx.tree_equal(stacked, EmbeddingTable(arrays, names, padding_rows=3, bias=biases))
    for shape in (8,), (3, 1), (3, 5), (1, 3, 8):
        message = r"bias must have shape \(3, 8\).*got .* for embeddings of shape \(3, 2, 8\)"
        with pytest.raises(ValueError, match=message):
            make(arrays, jnp.zeros(shape))


@pytest.mark.parametrize("use", [EmbeddingLookup, EmbeddingDecode])
def test_a_stacked_table_says_how_it_can_be_used(use):
    stacked = EmbeddingTable(jnp.zeros((3, 5, 2)), ("vocabulary", "embedding"))
    argument = jnp.asarray([0, 1]) if use is EmbeddingLookup else jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"stacked.*\(3, 5, 2\).*last 2 axes.*filter_vmap"):
        use(stacked)(argument)


# Splitting over devices


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({"vocabulary": "model"}, PartitionSpec(None, "model", None)),
        ({"features": "model", "vocabulary": ("data", "expert")}, None),
        ({"batch": "data", "mlp": "model"}, PartitionSpec(None, None, None)),
        ({"heads": None}, PartitionSpec(None, None, None)),
        ({}, PartitionSpec(None, None, None)),
    ],
)
def test_partition_spec_follows_the_rules_for_the_names_that_the_table_has(rules, expected):
    table = EmbeddingTable(jnp.zeros((2, 5, 3)), ("heads", "vocabulary", "features"))
    expected = PartitionSpec(None, ("data", "expert"), "model") if expected is None else expected
    assert table.partition_spec(rules) == expected


def test_rules_that_name_a_mesh_axis_twice_are_refused():
    table = make_table("first")
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    rules = {"vocabulary": ("data", "model"), "embedding": "model"}
    for split in table.partition_spec, functools.partial(table.shardings, mesh):
        with pytest.raises(ValueError, match="'model' twice, for 'vocabulary' and 'embedding'"):
            split(rules)


def test_partition_spec_leaves_stacked_axes_whole_and_works_on_a_skeleton(getkey):
    keys = jax.random.split(getkey(), 3)

    def make(keys):
        return eqx.filter_vmap(
            lambda key: EmbeddingTable.from_config(5, {"embedding": 2}, key=key)
        )(keys)

    skeleton = eqx.filter_eval_shape(make, keys)
    assert isinstance(skeleton.embeddings, jax.ShapeDtypeStruct)
    spec = skeleton.partition_spec({"embedding": "model"})
    assert spec == PartitionSpec(None, None, "model")


def test_a_table_is_placed_by_its_partition_spec():
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("model",))
    table = make_table("first")
    sharding = NamedSharding(mesh, table.partition_spec({"vocabulary": "model"}))
    placed = jax.device_put(table, sharding)
    assert placed.embeddings.sharding == sharding
    np.testing.assert_array_equal(placed.embeddings, table.embeddings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_table_is_placed_by_its_shardings(layout, with_bias):
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    rules = {"vocabulary": ("data", "model"), "unknown": "model"}
    table = make_table(layout, with_bias=with_bias)
    skeleton = eqx.filter_eval_shape(lambda: table)
    shardings = skeleton.shardings(mesh, rules)
    assert jax.tree.structure(shardings) == jax.tree.structure(table)
    assert jax.tree.leaves(shardings) == jax.tree.leaves(table.shardings(mesh, rules))
    assert shardings.embeddings == NamedSharding(mesh, table.partition_spec(rules))
    if with_bias:
        assert shardings.bias == NamedSharding(mesh, PartitionSpec(("data", "model")))
    for placed in (
        jax.device_put(table, shardings),
        jax.jit(lambda: table, out_shardings=shardings)(),
    ):
        assert eqx.tree_equal(placed, table)
        for array, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(shardings)):
            assert array.sharding.is_equivalent_to(sharding, array.ndim)


def test_the_shardings_of_a_stacked_table_leave_stacked_axes_whole():
    mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    stacked = EmbeddingTable(
        jnp.zeros((2, 3, 5, 4)), ("vocabulary", "embedding"), bias=jnp.zeros((2, 3, 5))
    )
    shardings: Any = stacked.shardings(mesh, {"vocabulary": "model"})
    assert shardings.embeddings.spec == PartitionSpec(None, None, "model", None)
    assert shardings.bias.spec == PartitionSpec(None, None, "model")


# Errors


@pytest.mark.parametrize(
    "shape, options, message",
    [
        (
            (5, 5),
            {"axis_names": ("vocabulary", "vocabulary")},
            r"axis names must be unique, got axis_names=\('vocabulary', 'vocabulary'\)",
        ),
        (
            (5, 2),
            {"axis_names": ("tokens", "embedding")},
            r"vocabulary_axis='vocabulary' is not one of axis_names=\('tokens', 'embedding'\)",
        ),
        (
            (5, 2),
            {"axis_names": ("vocabulary", "heads", "features")},
            r"shape \(5, 2\) have 2 axes, but 3 are named: axis_names=\('vocabulary', 'heads', ",
        ),
        ((), {"axis_names": ("vocabulary",)}, r"shape \(\) have 0 axes, but 1 are named"),
        ((5, 2), {"axis_names": ()}, r"vocabulary_axis='vocabulary' is not one of axis_names=\(\)"),
        (
            (0, 2),
            {"axis_names": ("vocabulary", "embedding")},
            "size of at least 1, got vocabulary=0, embedding=2",
        ),
        (
            (5, 0),
            {"axis_names": ("vocabulary", "embedding")},
            "size of at least 1, got vocabulary=5, embedding=0",
        ),
        (
            (5, 2),
            {"axis_names": ("vocabulary", "embedding"), "padding_rows": -1},
            "padding_rows must be at least 0 and below 5.*'vocabulary', got -1 for a table of "
            "vocabulary=5, embedding=2",
        ),
        (
            (5, 2),
            {"axis_names": ("embedding", "bytes"), "vocabulary_axis": "bytes", "padding_rows": 2},
            "below 2, the number of rows on axis 'bytes', got 2 for a table of embedding=5, ",
        ),
        (
            (5, 2),
            {"axis_names": ("vocabulary", "embedding"), "padding_rows": 2, "bias": jnp.zeros(3)},
            r"bias must have shape \(5,\), one number for each row of the vocabulary "
            r"'vocabulary', padding rows included, got \(3,\) for embeddings of shape \(5, 2\)",
        ),
        (
            (2, 5),
            {"axis_names": ("embedding", "vocabulary"), "bias": jnp.zeros((1, 5))},
            r"bias must have shape \(5,\).*got \(1, 5\) for embeddings of shape \(2, 5\)",
        ),
        ((5, 2), {"axis_names": ("vocabulary", "e"), "bias": jnp.zeros(())}, r"got \(\) for"),
    ],
)
def test_a_table_that_does_not_fit_its_names_is_an_error(shape, options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingTable(jnp.zeros(shape), **options)


def test_invariants_are_checked_again_when_fields_are_replaced():
    table = make_table("first")
    assert dataclasses.replace(table, padding_rows=0).vocab_size == 9
    with pytest.raises(ValueError, match="padding_rows must be at least 0 and below 9"):
        dataclasses.replace(table, padding_rows=9)


@pytest.mark.parametrize(
    "vocab_size, embedding_axes, options, message",
    [
        (
            5,
            {"vocabulary": 2},
            {},
            "axis names must be unique, got axis_names=.'vocabulary', 'vocabulary'",
        ),
        (
            5,
            {"bytes": 2, "embedding": 3},
            {"vocabulary_axis": "bytes"},
            "axis names must be unique, got axis_names=.'bytes', 'bytes', 'embedding'",
        ),
        (0, {"embedding": 2}, {}, "at least 1, got vocabulary=0, embedding=2"),
        (-5, {"embedding": 2}, {}, "at least 1, got vocabulary=-5, embedding=2"),
        (5, {"heads": 2, "features": 0}, {}, "at least 1, got vocabulary=5, heads=2, features=0"),
        (5, {"embedding": -2}, {}, "at least 1, got vocabulary=5, embedding=-2"),
        (5, {"embedding": 2}, {"pad_to_multiple_of": 0}, "at least 1.*pad_to_multiple_of=0"),
        (5, {"embedding": 2}, {"dtype": jnp.int32}, "embeddings must be floating, got dtype=int32"),
        (
            5,
            {"embedding": 2},
            {"dtype": "complex64"},
            "embeddings must be floating, got dtype=complex64",
        ),
        (
            5,
            {"embedding": 2},
            {"initializer": lambda key, shape, dtype: jnp.zeros(shape[::-1], dtype)},
            r"shape \(2, 5\), expected \(5, 2\) \(vocabulary=5, embedding=2\)",
        ),
    ],
)
def test_a_configuration_that_makes_no_table_is_an_error(
    vocab_size, embedding_axes, options, message
):
    with pytest.raises(ValueError, match=message):
        EmbeddingTable.from_config(vocab_size, embedding_axes, **options, key=jax.random.key(0))


def test_there_is_no_default_key():
    with pytest.raises(TypeError, match="key"):
        EmbeddingTable.from_config(5, {"embedding": 2})  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
def test_replaced_embeddings_are_checked_on_use():
    table, hidden = make_table("middle"), make_array((4, 2, 3), seed=1)
    uses = (
        lambda table: EmbeddingLookup(table)(FOUR_TOKENS),
        lambda table: EmbeddingDecode(table)(hidden),
        lambda table: EmbeddingDecode(table).cross_entropy(hidden, FOUR_TARGETS),
    )

    def replaced(array):
        return eqx.tree_at(lambda t: t.embeddings, table, array)

    restored = replaced(np.asarray(table.embeddings))  # as many checkpoints give it back
    masked = replaced(np.ma.masked_array(np.asarray(table.embeddings), False))
    skeleton = eqx.filter_eval_shape(lambda: table)
    for use in uses:
        np.testing.assert_array_equal(use(restored), use(table))
        for other, name, advice in (
            (skeleton, "ShapeDtypeStruct", "combine"),
            (replaced(None), "NoneType", "combine"),
            (masked, "MaskedArray", "Its mask would be lost: .*filled"),
        ):
            message = f"has {name} in place of its embeddings.*{advice}"
            with pytest.raises(ValueError, match=message):
                use(other)


def test_the_size_of_a_table_without_arrays_is_refused():
    table = eqx.filter(make_table("first"), False)
    for use in (
        lambda: table.vocab_size,
        lambda: table.embedding_axes,
        lambda: table.partition_spec({}),
    ):
        with pytest.raises(ValueError, match="has NoneType in place of its embeddings.*combine"):
            use()


def test_a_table_that_lacks_a_name_is_told_to_name_all_axes():
    table = EmbeddingTable(jnp.ones((9, 4)), ("vocabulary",))
    with pytest.raises(ValueError, match="this table is stacked: .* name all of its axes"):
        EmbeddingLookup(table)(FOUR_TOKENS)


def test_embeddings_of_a_wrong_rank_or_dtype_are_refused():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    for array, error, message in (
        (jnp.ones(9), ValueError, r"shape \(9,\) have 1 axes, but 2 are named"),
        (np.ones((9, 4), np.int8), TypeError, "embeddings must be floating, got int8"),
        (jnp.ones((9, 4), jnp.complex64), TypeError, "embeddings must be floating, got complex64"),
    ):
        broken = eqx.tree_at(lambda t: t.embeddings, table, array)
        for use in (
            lambda table: EmbeddingLookup(table)(FOUR_TOKENS),
            lambda table: EmbeddingDecode(table)(hidden),
            lambda table: EmbeddingDecode(table).cross_entropy(hidden, FOUR_TARGETS),
        ):
            with pytest.raises(error, match=message):
                use(broken)


def test_a_replaced_bias_is_checked_on_use():
    layer = EmbeddingDecode(make_table("first", with_bias=True))
    hidden = make_array((4, 4), seed=2)

    def replaced(bias):
        return eqx.tree_at(lambda d: d.table.bias, layer, bias)

    restored = replaced(np.asarray(layer.table.bias))
    np.testing.assert_array_equal(restored(hidden), layer(hidden))
    assert restored.cross_entropy(hidden, FOUR_TARGETS) == layer.cross_entropy(hidden, FOUR_TARGETS)
    skeleton = replaced(jax.ShapeDtypeStruct((9,), jnp.float32))
    masked = replaced(np.ma.masked_array(np.ones(9, np.float32), True))
    for broken, name in (skeleton, "ShapeDtypeStruct"), (masked, "MaskedArray"):
        for use in broken, lambda hidden: broken.cross_entropy(hidden, FOUR_TARGETS):
            with pytest.raises(ValueError, match=f"has {name} in place of its bias.*combine"):
                use(hidden)
    integers = replaced(np.ones(9, np.int32))
    for use in integers, lambda hidden: integers.cross_entropy(hidden, FOUR_TARGETS):
        with pytest.raises(TypeError, match="bias must be floating, got int32"):
            use(hidden)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (10,), (9, 1)], ids=str)
def test_a_bias_of_a_wrong_shape_is_refused_on_use(shape):
    layer = EmbeddingDecode(make_table("first", with_bias=True))
    layer, hidden = eqx.tree_at(lambda d: d.table.bias, layer, jnp.ones(shape)), make_array((4, 4))
    for use in layer, lambda hidden: layer.cross_entropy(hidden, FOUR_TARGETS):
        message = rf"bias must have shape \(9,\).*got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            use(hidden)


def test_each_axis_name_must_be_a_string():
    for names in (1, "vocabulary"), ("vocabulary", 1):
        for _ in range(20):  # the type checks look at one name, at random
            with pytest.raises((ValueError, TypeCheckError)):
                EmbeddingTable(jnp.ones((3, 3)), names)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "copied",
    [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_tables_and_layers_can_be_copied_and_pickled(copied):
    table = make_table("middle", "bfloat16", with_bias=True)
    layer = EmbeddingDecode(table, 3.0, "float32")
    lookup = EmbeddingLookup(table, "clip")
    for original in (table, layer, lookup):
        again = copied(original)
        assert type(again) is type(original) and eqx.tree_equal(again, original)
        assert jax.tree.structure(again) == jax.tree.structure(original)
    np.testing.assert_array_equal(copied(lookup)(9), lookup(9))
    np.testing.assert_array_equal(
        copied(layer)(jnp.ones((2, 3), "bfloat16")), layer(jnp.ones((2, 3), "bfloat16"))
    )


def test_a_subclass_whose_fields_would_be_lost_is_refused():
    Named: Any = types.new_class("Named", (EmbeddingTable,))
    with pytest.raises(TypeError, match="Named is a subclass of EmbeddingTable, which is final"):
        Named(jnp.zeros((3, 2)), ("vocabulary", "embedding"))
