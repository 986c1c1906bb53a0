"""`load_safetensors` and `save_safetensors`: what comes back, what is read, what is refused."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as reference, safe_open

from eqx_embedding import _safetensors, EmbeddingTable, load_safetensors, save_safetensors

from .helpers import LAYOUTS, make_array, make_table, NAMES, python_environment, run_python


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.safetensors"


def save(path, tensors, metadata=None):
    reference.save_file(tensors, path, metadata)


def shard(folder, files, metadata=None):
    """Writes files of tensors, and an index that says where they are."""
    where = {}
    for file, tensors in files.items():
        save(folder / file, tensors, metadata)
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_that_was_saved_comes_back_bit_for_bit(layout, with_bias, dtype, path):
    table = make_table(layout, dtype, with_bias=with_bias)
    save_safetensors(table, path)
    back: Any = load_safetensors(path)
    assert back.embeddings.dtype == dtype
    assert eqx.tree_equal(back, table)
    assert not with_bias or back.bias.dtype == dtype
    assert eqx.tree_equal(load_safetensors(path=str(path), name="embeddings"), table)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_programs_read_rows_of_tokens(layout, dtype, path):
    table = make_table(layout, dtype)
    save_safetensors(table, path, "model.embed_tokens.weight")
    [(name, array)] = reference.load_file(path).items()
    axis = table.axis_names.index("vocabulary")
    expected = np.moveaxis(np.asarray(table.embeddings), axis, 0).reshape(9, -1)
    assert (name, array.dtype) == ("model.embed_tokens.weight", dtype)
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    "name, bias_name", [("lm_head.weight", "lm_head.bias"), ("embeddings", "embeddings.bias")]
)
def test_a_bias_is_a_tensor_of_its_own_beside_the_rows(name, bias_name, path):
    table: Any = make_table("middle", with_bias=True)
    table = dataclasses.replace(table, bias=table.bias.astype(jnp.bfloat16))
    save_safetensors(table, path, name)
    tensors = reference.load_file(path)
    assert tensors.keys() == {name, bias_name} and tensors[name].shape == (9, 6)
    np.testing.assert_array_equal(tensors[bias_name], table.bias)
    for given in {}, {"name": name}, {"name": name, "bias": bias_name}:
        assert eqx.tree_equal(load_safetensors(path, **given), table)
    wide: Any = load_safetensors(path, dtype=jnp.float32)
    assert wide.bias.dtype == "float32"
    np.testing.assert_array_equal(wide.bias, table.bias.astype(jnp.float32))


def test_a_bias_of_another_program_is_loaded_by_its_name(tmp_path):
    rows, bias = np.asarray(make_array((5, 3))), np.asarray(make_array((5,), seed=1))
    shard(
        tmp_path,
        {
            "model-1.safetensors": {"lm_head.weight": rows},
            "model-2.safetensors": {"lm_head.bias": bias, "short": bias[:4], "wide": rows},
            "model-3.safetensors": {"integers": np.ones(5, np.int32)},
        },
    )
    table = load_safetensors(tmp_path, "lm_head.weight", bias="lm_head.bias")
    assert eqx.tree_equal(table, EmbeddingTable(jnp.asarray(rows), NAMES, bias=jnp.asarray(bias)))
    assert load_safetensors(tmp_path, "lm_head.weight").bias is None
    for name, message in {
        "short": r"the bias must have shape \(5,\), one number for each row .*got \(4,\) for",
        "wide": r"the bias must have shape \(5,\), .* got \(5, 3\) for",
        "integers": "'integers' of .* has dtype I32",
        "lm_head.biases": "has no tensor 'lm_head.biases'.*nearest names are 'lm_head.bias'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_safetensors(tmp_path, "lm_head.weight", bias=name)


def test_another_vocabulary_axis_comes_back(path):
    table = EmbeddingTable(make_array((3, 5)), ("features", "bytes"), "bytes", padding_rows=1)
    save_safetensors(table, path)
    assert eqx.tree_equal(load_safetensors(path), table)
    assert eqx.tree_equal(load_safetensors(path, axis_names=("features", "bytes")), table)
    # the default cannot be told from the same names, written out: the file knows better
    assert eqx.tree_equal(load_safetensors(path, axis_names=NAMES), table)
    with pytest.raises(ValueError, match=r"saved with axis_names=\('features', 'bytes'\), which"):
        load_safetensors(path, axis_names=("bytes", "features"))
    with pytest.raises(ValueError, match=r"which disagree with axis_names=\(\)"):
        load_safetensors(path, axis_names=())


@pytest.mark.parametrize(
    "shape, names, vocabulary_axis",
    [
        ((5, 3), NAMES, "vocabulary"),
        ((3, 5), ("embedding", "vocabulary"), "vocabulary"),
        ((5, 2, 3), ("bytes", "heads", "features"), "bytes"),
        ((5,), ("vocabulary",), "vocabulary"),
    ],
)
def test_a_tensor_of_another_program_gets_the_names_it_is_given(
    shape, names, vocabulary_axis, path
):
    array = np.asarray(make_array(shape))
    save(path, {"x": array, "y": array + 1}, {"format": "pt"})
    table = load_safetensors(path, "x", axis_names=names)
    assert eqx.tree_equal(table, EmbeddingTable(jnp.asarray(array), names, vocabulary_axis))


@pytest.mark.parametrize(
    "stored, largest", [("float32", 1e5), ("bfloat16", -1e5), ("float64", 65520.0)]
)
def test_a_dtype_that_cannot_hold_the_numbers_is_refused(stored, largest, path):
    array = np.asarray([[1.0, np.inf], [np.nan, -np.inf], [largest, 0]]).astype(jnp.dtype(stored))
    save(path, {"wte.weight": array[:2]})
    table = load_safetensors(path, dtype=jnp.float16)  # infinity stays
    np.testing.assert_array_equal(table.embeddings, array[:2].astype(np.float16))
    save(path, {"wte.weight": array})
    with pytest.raises(ValueError, match="has numbers that float16 cannot hold: load it in"):
        load_safetensors(path, dtype=jnp.float16)


@pytest.mark.parametrize("number", [500.0, -np.inf])
def test_a_dtype_without_infinity_holds_no_larger_numbers(number, path):
    save(path, {"wte.weight": np.asarray([[448.0, np.nan], [number, 0.0]], np.float32)})
    with pytest.raises(ValueError, match="has numbers that float8_e4m3fn cannot hold"):
        load_safetensors(path, dtype=jnp.float8_e4m3fn)


@pytest.mark.parametrize("number", [8.0, -100.0, np.inf, np.nan])
def test_four_bits_hold_no_number_above_six(number, path):
    save(path, {"wte.weight": np.asarray([[6.0, -6.0], [0.5, 0.0]], np.float32)})
    table = load_safetensors(path, dtype=jnp.float4_e2m1fn)
    np.testing.assert_array_equal(table.embeddings.astype("float32"), [[6.0, -6.0], [0.5, 0.0]])
    save(path, {"wte.weight": np.asarray([[6.0, number], [0.5, 0.0]], np.float32)})
    with pytest.raises(ValueError, match="has numbers that float4_e2m1fn cannot hold"):
        load_safetensors(path, dtype=jnp.float4_e2m1fn)


@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_is_that_of_the_file_or_as_wanted(stored, wanted, path):
    array = np.random.default_rng(0).normal(size=(5, 3)).astype(jnp.dtype(stored))
    save(path, {"wte.weight": array})
    table = load_safetensors(path, dtype=wanted)
    assert table.embeddings.dtype == wanted
    np.testing.assert_array_equal(table.embeddings, array.astype(jnp.dtype(wanted)))
    if stored == "float64":
        with pytest.raises(
            ValueError, match="would be float64, which JAX has only in its 64-bit mode"
        ):
            load_safetensors(path)
        with jax.enable_x64(True):
            np.testing.assert_array_equal(load_safetensors(path).embeddings, array)
    else:
        np.testing.assert_array_equal(load_safetensors(path).embeddings, array)
    with pytest.raises(ValueError, match="embeddings must be floating, got dtype=int32"):
        load_safetensors(path, dtype=jnp.int32)


# Model directories


TWO = {
    "model-1.safetensors": {"model.embed_tokens.weight": np.ones((5, 3), np.float32)},
    "model-2.safetensors": {"lm_head.weight": np.zeros((5, 3), np.float32)},
}


def test_a_directory_has_a_file_or_an_index(tmp_path):
    shard(tmp_path, TWO)
    np.testing.assert_array_equal(load_safetensors(tmp_path).embeddings, 1)
    np.testing.assert_array_equal(load_safetensors(tmp_path, "lm_head.weight").embeddings, 0)
    save(tmp_path / "model.safetensors", {"wte.weight": np.full((5, 3), 7, np.float32)})
    np.testing.assert_array_equal(load_safetensors(tmp_path).embeddings, 7)


def test_only_the_shard_that_has_the_table_is_needed(tmp_path):
    shard(tmp_path, TWO)
    (tmp_path / "model-2.safetensors").unlink()
    np.testing.assert_array_equal(load_safetensors(tmp_path).embeddings, 1)
    with pytest.raises(FileNotFoundError, match="cannot find the file .*model-2.safetensors"):
        load_safetensors(tmp_path, "lm_head.weight")


@pytest.mark.parametrize(
    "index, message",
    [
        ("", "is not the index of a model: .*JSONDecodeError"),
        ("[]", "is not the index of a model"),
        ('{"weight_map": ["x"]}', "is not the index of a model"),
        ('{"weight_map": {"x": 3}}', "is not the index of a model"),
        ("null", "is not the index of a model"),
        ("\ufeff{}", "is not the index of a model"),
        pytest.param("[" * 100_000, "is not the index of a model: .*RecursionError", id="deep"),
        ('{"weight_map": {}}', "none of the 0 tensors"),
        ('{"weight_map": {"x": ""}}', "is not the index .* outside of the directory"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "outside of the directory"),
        ('{"weight_map": {"x": "/model.safetensors"}}', "outside of the directory"),
        (
            '{"weight_map": {"wte.weight": "model-1.safetensors"}}',
            "says that 'wte.weight' is in model-1.safetensors, but it is not",
        ),
    ],
)
def test_a_broken_index_is_refused(index, message, tmp_path):
    shard(tmp_path, TWO)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load_safetensors(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot find the file .*nothing.safetensors"):
        load_safetensors(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*index\.json\.$"):
        load_safetensors(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    save(tmp_path / "adapter.safetensors", {"x": np.ones((2, 2), np.float32)})
    with pytest.raises(FileNotFoundError, match="Give one of its files: adapter.safetensors"):
        load_safetensors(tmp_path)


def test_files_are_read_through_symbolic_links_as_in_the_cache_of_hugging_face(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shard(tmp_path / "blobs", TWO)
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    np.testing.assert_array_equal(load_safetensors(tmp_path / "snapshot").embeddings, 1)
    # a save replaces the link, and not what others read
    link = tmp_path / "snapshot" / "model-1.safetensors"
    save_safetensors(make_table("first"), link)
    assert not link.is_symlink() and eqx.tree_equal(load_safetensors(link), make_table("first"))
    np.testing.assert_array_equal(load_safetensors(tmp_path / "blobs").embeddings, 1)


@pytest.mark.slow
def test_a_file_that_may_not_be_read_is_there_all_the_same(path):
    save_safetensors(make_table("first"), path)
    name, message = run_python(
        f"""
import json, os, shutil, tempfile
from eqx_embedding import load_safetensors
load_safetensors({str(path)!r})  # imports what it takes, which another user may not read
with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    copy = shutil.copy({str(path)!r}, folder)
    os.chmod(copy, 0)
    if os.geteuid() == 0:  # who may read everything
        os.seteuid(65534)
    try:
        load_safetensors(copy)
    except OSError as error:
        print(json.dumps([type(error).__name__, str(error)]))
    os.seteuid(os.getuid())
"""
    )
    assert name == "PermissionError" and path.name in message


# Names


@pytest.mark.parametrize(
    "names, message",
    [
        (["model.layers.0.w", "tok_embeddings.weight"], "such as 'tok_embeddings.weight'"),
        (["a", "b"], "none of the 2 tensors .* such as 'a', 'b'"),
        (
            ["wte.weight", "shared.weight"],
            r"several tables: give the name of one of \['wte.weight', ",
        ),
    ],
)
def test_without_a_name_it_says_what_it_found_when_it_cannot_choose(names, message, path):
    save(path, {name: np.ones((2, 2), np.float32) for name in names})
    with pytest.raises(ValueError, match=message):
        load_safetensors(path)


def test_a_name_that_is_not_there_lists_the_nearest(path):
    layers = [f"transformer.h.{layer}.{name}" for layer in range(50) for name in ("q", "k", "v")]
    names = ["transformer.wte.weight", "transformer.wpe.weight", *layers]
    save(path, {name: np.ones((2, 2), np.float32) for name in names})
    with pytest.raises(ValueError) as error:
        load_safetensors(path, "transformer.wte")
    assert "has no tensor 'transformer.wte'. Of its 152 tensors" in str(error.value)
    listed = re.findall(r"'(\S+)'", str(error.value).split("nearest names are")[1])
    assert listed[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert {*listed[2:]} == {*layers[:3]}  # of the first layer


# Files that are not what they should be


def test_a_file_cut_short_anywhere_is_refused(path):
    save_safetensors(make_table("first"), path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"not a whole safetensors file .* {length} bytes"):
            load_safetensors(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_safetensors(path)


@pytest.mark.parametrize(
    "data",
    [b"PK\x03\x04" + bytes(500), b"\x89PNG\r\n" * 50, b'{"a": 1}' * 50, b"\xff" * 500],
    ids=["zip", "png", "json", "ff"],
)
def test_a_file_of_another_kind_is_refused(data, path):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a whole safetensors file .* another format"):
        load_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 16]}}',
    ],
    ids=["nothing", "list", "too few bytes", "too many"],
)
def test_a_header_that_does_not_describe_the_file_is_refused(header, path):
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_safetensors(path)
    path.write_bytes((2**63).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_safetensors(path)


def damaged(data: bytes, draw: np.random.Generator) -> bytes:
    """The file with a few bytes of its header changed, or with a part of it replaced."""
    size = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.5:
        changed = bytearray(data)
        for _ in range(draw.integers(1, 4)):
            changed[draw.integers(size)] = draw.integers(256)
        return bytes(changed)
    parts = b'-1|1e3|[[|{}|null|true|"|,|99999999999999999999|NaN|4.0|F64|vocabulary|\xff'.split(
        b"|"
    )
    start = draw.integers(8, size)
    header = (
        data[8:start] + parts[draw.integers(len(parts))] + data[start + draw.integers(8) : size]
    )
    return len(header).to_bytes(8, "little") + header + data[size:]


def test_a_damaged_header_is_refused_or_changes_no_number(path):
    """Names of axes and the number of padding rows may change: nothing in the file contradicts."""
    table: Any = make_table("first", with_bias=True)
    save_safetensors(table, path)
    data, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(500):
        path.write_bytes(damaged(data, draw))
        try:
            loaded: Any = load_safetensors(path)
        except ValueError:
            refused += 1
            continue
        np.testing.assert_array_equal(loaded.embeddings, table.embeddings)
        np.testing.assert_array_equal(loaded.bias, table.bias)
    assert 450 < refused < 500


def test_a_file_without_tensors_is_refused(path):
    save(path, {})
    for name, message in (None, "none of the 0 tensors"), ("wte.weight", "has no tensor 'wte"):
        with pytest.raises(ValueError, match=message):
            load_safetensors(path, name)


@pytest.mark.parametrize("integers", ["int8", "uint8", "int32", "int64", "bool", "float8_e4m3fn"])
def test_weights_of_other_dtypes_are_refused(integers, path):
    save(path, {"wte.weight": np.ones((5, 3), jnp.dtype(integers))})
    with pytest.raises(ValueError, match="'wte.weight' .* expected float16 or bfloat16"):
        load_safetensors(path)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_tensor_of_another_rank_is_refused(shape, path):
    save(path, {"wte.weight": np.ones(shape, np.float32)})
    with pytest.raises(ValueError, match=f"has {len(shape)} axes, .* but 2 are named"):
        load_safetensors(path)


def test_several_embedding_axes_without_sizes_say_what_to_do(path):
    save(path, {"wte.weight": np.arange(24, dtype=np.float32).reshape(4, 6)})
    with pytest.raises(ValueError, match="EmbeddingTable.table.embeddings.reshape.-1, heads, feat"):
        load_safetensors(path, axis_names=("vocabulary", "heads", "features"))
    with pytest.raises(ValueError, match=r"but 1 are named: axis_names=\('vocabulary',\)\.$"):
        load_safetensors(path, axis_names=("vocabulary",))


def test_axis_names_that_make_no_table_are_refused(path):
    save(path, {"x": np.ones((4, 6), np.float32), "y": np.ones((), np.float32)})
    with pytest.raises(ValueError, match="axis names must be unique"):
        load_safetensors(path, "x", axis_names=("vocabulary", "vocabulary"))
    with pytest.raises(ValueError, match=r"vocabulary_axis='vocabulary' is not one of .*=\(\)"):
        load_safetensors(path, "y", axis_names=())


@pytest.mark.parametrize(
    "noted",
    [
        "no json",
        "[]",
        pytest.param("[" * 100_000, id="deep"),
        '{"name": "x"}',
        '{"name": "x", "axes": {"a": 0}, "vocabulary_axis": "a", "padding_rows": 0}',
        '{"name": "x", "axes": {"a": 4, "b": 7}, "vocabulary_axis": "a", "padding_rows": 0}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "c", "padding_rows": 0}',
        '{"name": "x", "axes": {"a": 4, "b": 6.0}, "vocabulary_axis": "a", "padding_rows": 0}',
        '{"name": "x", "axes": {"a": 4, "b": -2, "c": -3}, "vocabulary_axis": "a", '
        '"padding_rows": 0}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "a", "padding_rows": 2.9}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "a", "padding_rows": "3"}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "a", "padding_rows": true}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "a", "padding_rows": 0, '
        '"bias": ["y"]}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "a", "padding_rows": 0}',
        '{"name": "x", "axes": {"a": 4, "b": 6}, "vocabulary_axis": "a", "padding_rows": 0, '
        '"bia#": null}',
    ],
)
def test_metadata_that_do_not_fit_the_tensor_are_refused(noted, path):
    save(path, {"x": np.ones((4, 6), np.float32)}, {"eqx_embedding": noted})
    with pytest.raises(
        ValueError, match=r"metadata of tensor 'x' .* does not fit its shape \(4, 6"
    ):
        load_safetensors(path)


def test_names_that_may_be_those_of_input_embeddings_are_suggested(path):
    """As in BART: positions and norms come first in the alphabet."""
    matrix, vector = np.ones((4, 6), np.float32), np.ones(6, np.float32)
    others = "embed_positions.weight", "token_type_embeddings.weight", "layers.0.fc1.weight"
    tensors = {f"model.decoder.{name}": matrix for name in others}
    tensors |= {"model.decoder.layernorm_embedding.bias": vector, "model.shared.weight": matrix}
    save(path, tensors, {})
    with pytest.raises(ValueError, match="Give a name, such as 'model.shared.weight'.$"):
        load_safetensors(path)


def test_metadata_of_one_tensor_say_nothing_of_another(path):
    noted: dict[str, Any] = {"name": "x", "axes": {"bytes": 4, "d": 6}, "vocabulary_axis": "bytes"}
    noted |= {"padding_rows": 1, "bias": None}
    tensors = {name: np.ones((4, 6), np.float32) for name in "xy"}
    save(path, tensors, {"eqx_embedding": json.dumps(noted)})
    x, y = (load_safetensors(path, name) for name in "xy")
    assert (x.axis_names, x.padding_rows) == (("bytes", "d"), 1)
    assert (y.axis_names, y.padding_rows) == (NAMES, 0)


@pytest.mark.parametrize("bias_name", ["old.bias", "new.bias"])
@pytest.mark.parametrize("new_name", ["new.weight", "wte.weight"])
def test_a_table_renamed_in_its_file_is_refused(new_name, bias_name, path):
    table = make_table("first", with_bias=True)
    save_safetensors(table, path, "old.weight")
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = reference.load_file(path)
    save(path, {new_name: tensors["old.weight"], bias_name: tensors["old.bias"]}, metadata)
    with pytest.raises(ValueError, match=f"metadata .*|known name .* such as .*{new_name}"):
        load_safetensors(path)
    message = f"'old.weight' are padding, but .* no such tensor, only .*'{new_name}'.* write that"
    given: Any
    for given in {}, {"bias": bias_name}, {"axis_names": ("vocabulary", "features")}:
        with pytest.raises(ValueError, match=message):
            load_safetensors(path, new_name, **given)
    noted = json.loads(metadata["eqx_embedding"]) | {"name": new_name, "bias": bias_name}
    save(path, reference.load_file(path), {"eqx_embedding": json.dumps(noted)})
    assert eqx.tree_equal(load_safetensors(path), table)
    save(path, reference.load_file(path))  # without metadata, it is a tensor of another program
    assert load_safetensors(path, new_name).padding_rows == 0


# Reading and writing


# Code for a fresh process. `resource.getrusage` starts from the peak of the parent process.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])
"""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 7, 10, 36])
def test_a_table_is_read_in_blocks_of_any_size(block, layout, path, monkeypatch):
    monkeypatch.setattr(_safetensors, "COPIED_AT_ONCE", block)
    table = make_table(layout, with_bias=True)
    save_safetensors(table, path)
    assert eqx.tree_equal(load_safetensors(path), table)
    narrow = load_safetensors(path, dtype=jnp.bfloat16)
    assert eqx.tree_equal(narrow, jax.tree.map(lambda x: x.astype(jnp.bfloat16), table))


@pytest.mark.slow
def test_loading_takes_the_memory_of_the_table_once(tmp_path):
    tables = {
        "first": EmbeddingTable(np.ones((2**14, 1024), np.float32), NAMES),
        "last": EmbeddingTable(np.ones((1024, 2**14), np.float32), NAMES[::-1]),
        "wide": EmbeddingTable(np.ones((2**14, 1024), jnp.bfloat16), NAMES),
    }
    for name, table in tables.items():
        save_safetensors(table, tmp_path / name)
    save(tmp_path / "other", {"wte.weight": np.ones((1, 2**14, 1024), np.float32)})
    loads: dict[str, dict[str, Any]] = {
        "first": {},
        "last": {"dtype": "bfloat16"},
        "wide": {"dtype": "float32"},
        "other": {"axis_names": ("stacked", "vocabulary", "embedding")},
    }
    peaks = run_python(
        PEAK
        + f"""
import json, jax
from pathlib import Path
from eqx_embedding import EmbeddingTable, load_safetensors, save_safetensors
folder, tables, peaks = Path({str(tmp_path)!r}), [], []
save_safetensors(EmbeddingTable(jax.numpy.ones((2, 2)), {NAMES}), folder / "small")
load_safetensors(folder / "small")  # imports
for name, given in {loads!r}.items():
    before = peak()
    tables.append(jax.block_until_ready(load_safetensors(folder / name, **given)))
    peaks.append((peak() - before) / tables[-1].embeddings.nbytes)
print(json.dumps(peaks))
"""
    )
    assert all(0.7 < peak < 1.3 for peak in peaks), dict(zip(loads, peaks))


def test_the_first_donated_update_copies_a_loaded_table(path):
    save_safetensors(EmbeddingTable(np.ones((2**10, 64), np.float32), NAMES), path)
    update: Any = jax.jit(lambda table: jax.tree.map(jnp.negative, table), donate_argnums=0)
    tables, places = load_safetensors(path), []
    for _ in range(3):
        places.append(tables.embeddings.unsafe_buffer_pointer())  # pyright: ignore
        tables = update(tables)
    np.testing.assert_array_equal(tables.embeddings, -1)
    assert places[0] != places[1] == places[2]


def test_a_file_that_is_replaced_while_it_is_read_comes_back_whole(path, monkeypatch):
    old, new = (make_table("first", seed=seed, with_bias=True) for seed in (0, 5))
    save_safetensors(old, path)
    read = np.fromfile

    def replace_and_read(*given):
        save_safetensors(new, path)
        return read(*given)

    monkeypatch.setattr(np, "fromfile", replace_and_read)
    assert eqx.tree_equal(load_safetensors(path), old), "the bias must not be that of the new file"
    assert eqx.tree_equal(load_safetensors(path), new)


def test_a_file_cut_short_while_it_is_read_is_refused(path, monkeypatch):
    save_safetensors(make_table("first"), path)
    read = np.fromfile

    def cut_and_read(*given):
        os.truncate(path, path.stat().st_size - 1)
        return read(*given)

    monkeypatch.setattr(np, "fromfile", cut_and_read)
    with pytest.raises(ValueError, match="tensor 'embeddings' of .* was cut short while it was"):
        load_safetensors(path)


@pytest.mark.slow
def test_one_table_of_a_large_file_is_read_alone(path):
    header = {
        "before": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]},
        "wte.weight": {"dtype": "F32", "shape": [256, 64], "data_offsets": [2**31, 2**31 + 2**16]},
        "after": {
            "dtype": "BF16",
            "shape": [2**30],
            "data_offsets": [2**31 + 2**16, 2**32 + 2**16],
        },
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    array = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    with open(path, "wb") as file:  # four gigabytes, of which the disk holds almost nothing
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.seek(2**31, os.SEEK_CUR)
        file.write(array.tobytes())
        file.truncate(8 + len(encoded) + 2**32 + 2**16)
    peaks = run_python(
        PEAK
        + f"""
import json, jax
import jax.numpy as jnp
from eqx_embedding import load_safetensors
jax.block_until_ready(jnp.asarray(jnp.ones(3)))
import safetensors.numpy
before = peak()
table = load_safetensors({str(path)!r})
print(json.dumps([before, peak(), float(table.embeddings[255, 63])]))
"""
    )
    assert peaks[1] - peaks[0] < 100 * 2**20
    assert peaks[2] == array[255, 63]


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_old_file_whole(path):
    table = make_table("first")
    save_safetensors(table, path)
    code = f"""
import jax.numpy as jnp
from eqx_embedding import EmbeddingTable, save_safetensors
table = EmbeddingTable(jnp.ones((50_000, 1000)), ("vocabulary", "embedding"))
print("ready", flush=True)
save_safetensors(table, {str(path)!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not any(path.parent.glob("*.partial/*")):  # 200 MB, whose first bytes are written
            assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it must not have ended before it was killed"
    assert eqx.tree_equal(load_safetensors(path), table)
    [left] = set(path.parent.iterdir()) - {path}
    assert left.is_dir() and re.fullmatch(r"table.safetensors\.\w+\.partial", left.name)
    save_safetensors(make_table("last"), path)  # what is left is in nobody's way
    assert eqx.tree_equal(load_safetensors(path), make_table("last"))


@pytest.mark.slow
def test_saves_that_are_killed_at_any_moment_leave_a_whole_file(path):
    """A process saves two tables in turn, and is killed 30 times."""
    code = f"""
import os, signal, sys, time
import numpy as np
from eqx_embedding import EmbeddingTable, save_safetensors
def make(number):
    rows, bias = np.full((5000, 20), number, np.float32), np.full(5000, number, np.float32)
    return EmbeddingTable(rows, ("vocabulary", "embedding"), bias=bias)
tables = make(0), make(1)
save_safetensors(tables[0], {str(path)!r})
for i, wait in enumerate(np.random.default_rng(0).uniform(0, 0.02, 30)):
    child = os.fork()
    if child == 0:
        while True:
            for table in tables[:: (-1) ** i]:
                save_safetensors(table, {str(path)!r})
    time.sleep(0.005 + wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
    sys.stdin.readline()
"""
    seen = set()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=python_environment(),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in process.stdout:
            loaded: Any = load_safetensors(path)
            [number] = np.unique(loaded.embeddings)
            np.testing.assert_array_equal(loaded.bias, np.full(5000, number))
            seen.add(int(number))
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0 and seen == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_save_that_is_killed_when_all_is_written_leaves_the_old_file_whole(moment, path):
    save_safetensors(make_table("first"), path)
    code = f"""
import os, signal
import jax.numpy as jnp
from eqx_embedding import EmbeddingTable, save_safetensors
{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_safetensors(EmbeddingTable(jnp.ones((5, 3)), ("vocabulary", "embedding")), {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert eqx.tree_equal(load_safetensors(path), make_table("first"))


def test_one_of_many_savers_at_once_wins_and_a_reader_sees_whole_files(path):
    tables = [EmbeddingTable(jnp.full((50, 30), i, "float32"), NAMES) for i in range(4)]
    save_safetensors(tables[0], path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        saves = [pool.submit(save_safetensors, tables[i % 4], path) for i in range(40)]
        for _ in range(40):
            seen = np.unique(load_safetensors(path).embeddings)
            assert len(seen) == 1 and seen[0] in range(4)
        for save in saves:
            save.result()
    assert list(path.parent.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    save_safetensors(make_table("first"), path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save_safetensors(make_table("last"), path)
    assert eqx.tree_equal(load_safetensors(path), make_table("first"))
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_an_os_error_and_the_old_file_stays(path):
    save_safetensors(make_table("first"), path)
    large = EmbeddingTable(np.ones((1000, 100), np.float32), NAMES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # Python ignores its signal
    try:
        with pytest.raises(OSError, match="File too large.*table.safetensors") as error:
            save_safetensors(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert eqx.tree_equal(load_safetensors(path), make_table("first"))
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    (tmp_path / "device").symlink_to(os.devnull)  # the device itself might not survive this test
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to pipe").symlink_to("pipe")
    with open(tmp_path / "output", "wb") as output:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{output.fileno()}")
        for name in "device", "pipe", "link to pipe", "stdout":
            with pytest.raises(OSError, match=f"{name} is a device, a named pipe or a socket"):
                save_safetensors(make_table("first"), tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "output").read_bytes() == b""
    assert all((tmp_path / name).is_symlink() for name in ("device", "link to pipe", "stdout"))
    assert len(list(tmp_path.iterdir())) == 5


def test_a_dangling_link_is_replaced(tmp_path):
    path = tmp_path / "link"
    path.symlink_to("missing")
    save_safetensors(make_table("first"), path)
    assert not path.is_symlink() and list(tmp_path.iterdir()) == [path]
    assert eqx.tree_equal(load_safetensors(path), make_table("first"))


def test_permissions_are_the_usual_ones_or_those_of_the_file_that_is_replaced(path):
    (path.parent / "usual").touch()
    save_safetensors(make_table("first"), path)
    assert path.stat().st_mode == (path.parent / "usual").stat().st_mode
    path.chmod(0o600)
    save_safetensors(make_table("last"), path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path):
    table = make_table("first")
    stacked = EmbeddingTable(make_array((2, 5, 3)), NAMES)
    with pytest.raises(ValueError, match="this table is stacked"):
        save_safetensors(stacked, tmp_path / "x")
    masked = np.ma.masked_array(np.ones((9, 4), np.float32), True)
    for other in (
        jax.eval_shape(lambda: table),
        eqx.filter(table, False),
        eqx.tree_at(lambda t: t.embeddings, table, masked),
    ):
        with pytest.raises(ValueError, match="has (Shape|None|Masked).* in place of its embedd"):
            save_safetensors(other, tmp_path / "x")
    biased = make_table("first", with_bias=True)
    for bias, message in (
        (jax.ShapeDtypeStruct((9,), jnp.float32), "has ShapeDtypeStruct in place of its bias"),
        (np.ones(7, np.float32), r"bias must have shape \(9,\).*got \(7,\)"),
        (jnp.ones(9, "float8_e5m2"), "a table of float8_e5m2 cannot be saved"),
    ):
        with pytest.raises(ValueError, match=message):
            save_safetensors(eqx.tree_at(lambda t: t.bias, biased, bias), tmp_path / "x")
    with pytest.raises(ValueError, match="reserves the name '__metadata__'"):
        save_safetensors(table, tmp_path / "x", "__metadata__")
    with pytest.raises(IsADirectoryError, match="is a directory: give the name of a file"):
        save_safetensors(table, tmp_path)
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*missing"):
        save_safetensors(table, tmp_path / "missing" / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_could_not_be_loaded_is_not_saved(path):
    save_safetensors(make_table("first"), path)
    for dtype in ("float8_e4m3fn", "float4_e2m1fn"):
        table = EmbeddingTable(jnp.ones((5, 3), dtype), NAMES)
        with pytest.raises(ValueError, match=f"a table of {dtype} cannot be saved"):
            save_safetensors(table, path)
    assert eqx.tree_equal(load_safetensors(path), make_table("first"))


def test_a_table_of_one_row_comes_back(path):
    table = EmbeddingTable(make_array((1, 3)), NAMES)
    save_safetensors(table, path)
    assert eqx.tree_equal(load_safetensors(path), table)


def test_a_file_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("€" * 80 + "x" * 15)  # 255 bytes
    save_safetensors(make_table("first"), path)
    assert eqx.tree_equal(load_safetensors(path), make_table("first"))


def test_a_file_name_alone_is_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_safetensors(make_table("first"), "x.safetensors")
    assert eqx.tree_equal(load_safetensors("x.safetensors"), make_table("first"))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]
    with safe_open(Path("x.safetensors"), "numpy") as file:
        assert list(json.loads(file.metadata()["eqx_embedding"])["axes"]) == list(NAMES)


def test_without_the_package_it_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: load_safetensors(path),
        lambda: save_safetensors(make_table("first"), path),
    ):
        with pytest.raises(ImportError, match="pip install safetensors, or pip install 'eqx_embed"):
            call()


def test_a_saved_table_is_preferred_to_a_common_name(tmp_path):
    table = EmbeddingTable.from_config(
        6, {"embedding": 2}, use_bias=True, pad_to_multiple_of=4, key=jax.random.key(0)
    )
    save_safetensors(table, tmp_path / "a")
    tensors = reference.load_file(tmp_path / "a")
    with safe_open(tmp_path / "a", "numpy") as file:
        metadata = file.metadata()
    tensors["wte.weight"] = tensors["embeddings"]
    reference.save_file(tensors, tmp_path / "b", metadata)
    assert eqx.tree_equal(load_safetensors(tmp_path / "b"), table)
