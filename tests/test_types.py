"""Runtime type checks: on by default, off with `JAXTYPING_DISABLE=1`, each in a fresh process."""

import pydoc
import re

import pytest

import eqx_embedding

from .helpers import run_python


# The error of each wrong call, as "name of its class: its text", or null if there was none.
WRONG_CALLS = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from eqx_embedding import (
    EmbeddingDecode, EmbeddingLookup, EmbeddingTable, combine_rows, load_safetensors,
    partition_rows, put_rows, resize_vocabulary, save_safetensors, take_rows, unique_tokens,
)

key, names = jax.random.key(0), ("vocabulary", "embedding")
table = EmbeddingTable(jnp.ones((5, 3)), ("vocabulary", "embedding"))
make, decode, hidden = EmbeddingTable.from_config, EmbeddingDecode(table), jnp.ones((2, 3))
loss, targets = decode.cross_entropy, np.asarray([0, 1])
trained, frozen = partition_rows(table, [1])
nowhere = "/no/such/directory/x"
calls = {
    "out_of_range": lambda: EmbeddingLookup(table, "wrap"),
    "float tokens": lambda: EmbeddingLookup(table)(jnp.asarray([1.0])),
    "python float": lambda: EmbeddingLookup(table)(1.0),
    "bool tokens": lambda: EmbeddingLookup(table)(jnp.asarray([True])),
    "numpy bools": lambda: EmbeddingLookup(table)(np.asarray([True])),
    "python bool": lambda: EmbeddingLookup(table)(True),
    "text": lambda: EmbeddingLookup(table)("1"),
    "hidden size": lambda: EmbeddingDecode(table)(jnp.ones((2, 5))),
    "integer hidden": lambda: EmbeddingDecode(table)(jnp.ones((2, 3), "int32")),
    "bias": lambda: EmbeddingTable(jnp.ones((5, 3)), names, bias=jnp.ones(4)),
    "bias of two axes": lambda: EmbeddingTable(jnp.ones((5, 3)), names, bias=jnp.ones((5, 1))),
    "list as bias": lambda: EmbeddingTable(jnp.ones((5, 3)), names, bias=[0.0] * 5),
    "number as use_bias": lambda: make(5, {"embedding": 3}, use_bias=2, key=key),
    "text as soft cap": lambda: EmbeddingDecode(table, soft_cap="30"),
    "integer table": lambda: EmbeddingTable(jnp.ones((5, 3), "int32"), ("vocabulary", "embedding")),
    "list of names": lambda: EmbeddingTable(jnp.ones((5, 3)), ["vocabulary", "embedding"]),
    "float size": lambda: EmbeddingTable.from_config(5.0, {"embedding": 3}, key=key),
    "a layer of what": lambda: EmbeddingLookup(jnp.ones((5, 3))),
    "text as size": lambda: make(5, {"embedding": "3"}, key=key),
    "float as second size": lambda: make(5, {"heads": 3, "features": 2.5}, key=key),
    "size as axes": lambda: make(5, 8, key=key),
    "pairs of axes": lambda: make(5, [("embedding", 3)], key=key),
    "number as axis": lambda: make(5, {"embedding": 3}, 0, key=key),
    "text as initializer": lambda: make(5, {"embedding": 3}, initializer="normal", key=key),
    "number as dtype": lambda: make(5, {"embedding": 3}, dtype=3, key=key),
    "no such dtype": lambda: make(5, {"embedding": 3}, dtype="float33", key=key),
    "float to pad to": lambda: make(5, {"embedding": 3}, pad_to_multiple_of=2.0, key=key),
    "number as key": lambda: make(5, {"embedding": 3}, key=0),
    "numpy table": lambda: EmbeddingTable(np.ones((5, 3), "float32"), names),
    "integer numpy table": lambda: EmbeddingTable(np.ones((5, 3), "int32"), names),
    "mesh": lambda: table.shardings("model", {}),
    "number as bias of a file": lambda: load_safetensors(nowhere, bias=3),
    "name of one": lambda: EmbeddingTable(jnp.ones(5), "vocabulary"),
    "list of names": lambda: EmbeddingTable(jnp.ones((5, 3)), list(names)),
    "numbers as names": lambda: EmbeddingTable(jnp.ones((5, 3)), [0, 1]),
    "float of padding": lambda: EmbeddingTable(jnp.ones(5), ("vocabulary",), padding_rows=1.0),
    "pairs of rules": lambda: table.partition_spec([("vocabulary", "model")]),
    "list of tokens": lambda: EmbeddingLookup(table)([0, 1]),
    "key as tokens": lambda: EmbeddingLookup(table)(jax.random.key(0)),
    "list of rows of several lengths": lambda: EmbeddingLookup(table)([[0, 1], [2]]),
    "no tokens": lambda: EmbeddingLookup(table)(None),
    "complex tokens": lambda: EmbeddingLookup(table)(jnp.ones(2, "complex64")),
    "objects as tokens": lambda: EmbeddingLookup(table)(np.asarray([0, 1], object)),
    "lookup rules": lambda: EmbeddingLookup(table)(targets, rules="model"),
    "lookup key": lambda: EmbeddingLookup(table)(targets, key=0),
    "a decode of what": lambda: EmbeddingDecode(hidden),
    "integer bias": lambda: EmbeddingTable(jnp.ones((5, 3)), names, bias=jnp.ones(5, "int32")),
    "bias of a decode": lambda: EmbeddingDecode(table, jnp.ones(5)),
    "array as soft cap": lambda: EmbeddingDecode(table, soft_cap=jnp.ones(())),
    "no logits dtype": lambda: EmbeddingDecode(table, logits_dtype="float33"),
    "number as logits dtype": lambda: EmbeddingDecode(table, logits_dtype=3),
    "hidden as a list": lambda: decode([[1.0, 1.0, 1.0]]),
    "complex hidden": lambda: decode(hidden.astype("complex64")),
    "decode rules": lambda: decode(hidden, rules="model"),
    "bool hidden of a loss": lambda: loss(hidden > 0, targets),
    "short hidden of a loss": lambda: loss(hidden[:, :2], targets),
    "float targets": lambda: loss(hidden, jnp.ones(2)),
    "numpy float as target": lambda: loss(hidden[0], np.float32(1)),
    "array as temperature": lambda: decode.divergence(
        hidden, decode, hidden, temperature=jnp.ones(())
    ),
    "a loss of a table": lambda: EmbeddingDecode.cross_entropy(table, hidden, targets),
    "vectors of a table": lambda: EmbeddingLookup.__call__(table, targets),
    "data in the place of options": lambda: decode.token_loss(
        lambda scores, *data: None, hidden, targets, hidden, hidden, hidden
    ),
    "list of targets": lambda: loss(hidden, [0, 1]),
    "targets of another rank": lambda: loss(hidden, targets[:, None]),
    "targets of another size": lambda: loss(hidden, np.asarray([0, 1, 2])),
    "weights of another rank": lambda: loss(hidden, targets, weights=np.ones((2, 1))),
    "one weight": lambda: loss(hidden, targets, weights=1.0),
    "list of weights": lambda: loss(hidden, targets, weights=[1, 0]),
    "complex weights": lambda: loss(hidden, targets, weights=np.ones(2, "complex64")),
    "complex weight": lambda: loss(hidden[0], 1, weights=np.complex64(1)),
    "array to ignore": lambda: loss(hidden, targets, ignore_index=jnp.ones(2, "int32")),
    "text as smoothing": lambda: loss(hidden, targets, label_smoothing="0.1"),
    "no z-loss": lambda: loss(hidden, targets, z_loss=None),
    "no reduction": lambda: loss(hidden, targets, reduction=None),
    "other reduction": lambda: loss(hidden, targets, reduction="average"),
    "float chunk": lambda: loss(hidden, targets, chunk_size=2.0),
    "loss rules": lambda: loss(hidden, targets, rules=3),
    "float vocabulary": lambda: resize_vocabulary(table, 7.0),
    "number as vocabulary axis": lambda: resize_vocabulary(table, 7, 3),
    "number as key of a resize": lambda: resize_vocabulary(table, 7, key=0),
    "float to pad a resize to": lambda: resize_vocabulary(table, 7, pad_to_multiple_of=4.0),
    "text as rows": lambda: partition_rows(table, "all"),
    "float rows": lambda: partition_rows(table, [0.5]),
    "traced rows": lambda: jax.jit(lambda rows: partition_rows(table, rows))(targets),
    "frozen of another kind": lambda: combine_rows(trained, table),
    "list of tokens to take": lambda: take_rows(table, [0, 1]),
    "float tokens to take": lambda: take_rows(table, np.ones(2)),
    "tokens to take of two axes": lambda: take_rows(table, np.asarray([[0, 1]])),
    "float tokens to put": lambda: put_rows(table, np.ones(2), table),
    "float tokens to be unique": lambda: unique_tokens(np.ones(2), 2),
    "float size of unique tokens": lambda: unique_tokens(targets, 2.0),
    "number as path": lambda: load_safetensors(3),
    "number as name": lambda: load_safetensors(nowhere, 3),
    "name of one axis": lambda: load_safetensors(nowhere, axis_names="vocabulary"),
    "number as dtype of a file": lambda: load_safetensors(nowhere, dtype=3),
    "an array to save": lambda: save_safetensors(table.embeddings, nowhere),
    "number as path to save to": lambda: save_safetensors(table, 3),
    "number as name to save by": lambda: save_safetensors(table, nowhere, 3),
}


def error(call):
    try:
        call()
    except Exception as e:
        notes = [note for note in getattr(e, "__notes__", []) if note.startswith("Instead of")]
        return "\\n".join([f"{type(e).__name__}: {e}", *notes])


errors = {name: error(call) for name, call in calls.items()}
"""

# Type-checked by its user, who calls other things by the names that the library uses.
USER = """
import equinox as eqx
import jax
import jax.numpy as jnp
from beartype import beartype
from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable
from jaxtyping import Array, Float, Int, Scalar, jaxtyped


@jaxtyped(typechecker=beartype)
class Model(eqx.Module):
    table: EmbeddingTable
    scale: Float[Array, " vocab_size"]

    @jaxtyped(typechecker=beartype)
    def __call__(self, tokens: Int[Array, "batch embedding"]) -> Float[Array, "batch embedding 6"]:
        x: Float[Array, "batch embedding vocab_size"] = EmbeddingLookup(self.table)(tokens)
        return EmbeddingDecode(self.table)(jnp.tanh(x) * self.scale)


@jaxtyped(typechecker=beartype)
def loss(model: Model, tokens: Int[Array, "vocab_size batch"]) -> Scalar:
    return jnp.mean(model(tokens) ** 2)


@jaxtyped(typechecker=beartype)
def make(embeddings: Float[Array, "rows vocab_size"]) -> Model:
    return Model(EmbeddingTable(embeddings, ("vocabulary", "embedding")), jnp.ones(4))


tokens = jnp.asarray([[1, 2, 3], [0, 5, 1]])
model = make(jnp.ones((6, 4)))
params, static = eqx.partition(model, eqx.is_inexact_array)


@eqx.filter_jit
def step(model, tokens):
    gradient = eqx.filter_grad(loss)(model, tokens)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -g, gradient))


after = step(model, tokens)
assert after.table.embeddings.shape == (6, 4)
assert loss(after, tokens) != loss(model, tokens)
assert eqx.tree_equal(eqx.combine(params, static), model)
assert eqx.filter_eval_shape(loss, model, tokens).shape == ()
stacked = eqx.filter_vmap(make)(jnp.ones((2, 6, 4)))
assert eqx.filter_vmap(loss, in_axes=(eqx.if_array(0), None))(stacked, tokens).shape == (2,)
dynamic, rest = eqx.partition(stacked, eqx.is_array)
body = lambda carry, model: (carry + loss(eqx.combine(model, rest), tokens), None)
assert jax.lax.scan(body, jnp.zeros(()), dynamic)[0].shape == ()
zero = eqx.tree_at(lambda model: model.table.embeddings, model, replace_fn=jnp.zeros_like)
assert eqx.filter_jit(eqx.filter_checkpoint(loss))(zero, tokens) == 0
print("true")
"""


@pytest.fixture(scope="module")
def checked():
    return run_python(WRONG_CALLS + "\nprint(json.dumps(errors))")


@pytest.fixture(scope="module")
def unchecked():
    return run_python(WRONG_CALLS + "\nprint(json.dumps(errors))", JAXTYPING_DISABLE="1")


@pytest.mark.parametrize(
    "call, parameter, given",
    [
        ("out_of_range", "out_of_range", "'wrap'"),
        ("float tokens", "tokens", r"f32\[1\]"),
        ("python float", "tokens", "1.0"),
        ("bool tokens", "tokens", r"bool\[1\]"),
        ("numpy bools", "tokens", r"bool\[1\]\(numpy\)"),
        ("text", "tokens", "'1'"),
        ("integer hidden", "hidden", r"i32\[2,3\]"),
        ("list as bias", "bias", r"\[0.0, 0.0, 0.0, 0.0, 0.0\]"),
        ("number as use_bias", "use_bias", "2"),
        ("bias of a decode", "soft_cap", r"f32\[5\]"),
        ("text as soft cap", "soft_cap", "'30'"),
        ("integer table", "embeddings", r"i32\[5,3\]"),
        ("list of names", "axis_names", r"\['vocabulary', 'embedding'\]"),
        ("float size", "vocab_size", "5.0"),
        ("a layer of what", "table", r"f32\[5,3\]"),
        ("text as size", "embedding_axes", "{'embedding': '3'}"),
        ("size as axes", "embedding_axes", "8"),
        ("pairs of axes", "embedding_axes", r"\[\('embedding', 3\)\]"),
        ("number as axis", "vocabulary_axis", "0"),
        ("text as initializer", "initializer", "'normal'"),
        ("number as dtype", "dtype", "3"),
        ("float to pad to", "pad_to_multiple_of", "2.0"),
        ("number as key", "key", "0"),
        ("integer numpy table", "embeddings", r"i32\[5,3\]\(numpy\)"),
        ("name of one", "axis_names", "'vocabulary'"),
        ("float of padding", "padding_rows", "1.0"),
        ("pairs of rules", "rules", r"\[\('vocabulary', 'model'\)\]"),
        ("list of tokens", "tokens", r"\[0, 1\]"),
        ("no tokens", "tokens", "None"),
        ("complex tokens", "tokens", r"c64\[2\]"),
        ("objects as tokens", "tokens", r"object\[2\]\(numpy\)"),
        ("lookup rules", "rules", "'model'"),
        ("lookup key", "key", "0"),
        ("a decode of what", "table", r"f32\[2,3\]"),
        ("integer bias", "bias", r"i32\[5\]"),
        ("array as soft cap", "soft_cap", r"f32\[\]"),
        ("number as logits dtype", "logits_dtype", "3"),
        ("hidden as a list", "hidden", r"\[\[1.0, 1.0, 1.0\]\]"),
        ("complex hidden", "hidden", r"c64\[2,3\]"),
        ("decode rules", "rules", "'model'"),
        ("bool hidden of a loss", "hidden", r"bool\[2,3\]"),
        ("float targets", "targets", r"f32\[2\]"),
        ("list of targets", "targets", r"\[0, 1\]"),
        ("list of weights", "weights", r"\[1, 0\]"),
        ("complex weights", "weights", r"c64\[2\]\(numpy\)"),
        ("text as smoothing", "label_smoothing", "'0.1'"),
        ("no z-loss", "z_loss", "None"),
        ("no reduction", "reduction", "None"),
        ("float chunk", "chunk_size", "2.0"),
        ("loss rules", "rules", "3"),
        ("float vocabulary", "vocab_size", "7.0"),
        ("number as vocabulary axis", "vocabulary_axis", "3"),
        ("number as key of a resize", "key", "0"),
        ("float to pad a resize to", "pad_to_multiple_of", "4.0"),
        ("text as rows", "rows", "'all'"),
        ("float rows", "rows", r"\[0.5\]"),
        ("frozen of another kind", "frozen", "EmbeddingTable"),
        ("list of tokens to take", "tokens", r"\[0, 1\]"),
        ("float tokens to take", "tokens", r"f64\[2\]\(numpy\)"),
        ("tokens to take of two axes", "tokens", r"i64\[1,2\]\(numpy\)"),
        ("float tokens to put", "tokens", r"f64\[2\]\(numpy\)"),
        ("float tokens to be unique", "tokens", r"f64\[2\]\(numpy\)"),
        ("float size of unique tokens", "size", "2.0"),
        ("number as path", "path", "3"),
        ("number as name", "name", "3"),
        ("number as bias of a file", "bias", "3"),
        ("mesh", "mesh", "'model'"),
        ("name of one axis", "axis_names", "'vocabulary'"),
        ("number as dtype of a file", "dtype", "3"),
        ("an array to save", "table", r"f32\[5,3\]"),
        ("number as path to save to", "path", "3"),
        ("number as name to save by", "name", "3"),
    ],
)
@pytest.mark.slow
def test_checks_are_on_by_default_and_name_the_parameter_and_what_was_given(
    checked, call, parameter, given
):
    pattern = rf"^TypeCheckError: .*\n.*parameter '{parameter}'\.\nActual value: {given}"
    assert re.match(pattern, checked[call])


@pytest.mark.exhaustive
def test_errors_of_our_own_are_the_same_with_and_without_checks(checked, unchecked):
    for call in ("python bool", "hidden size", "bias", "bias of two axes"):
        assert checked[call] == unchecked[call]
    assert checked["numpy table"] is unchecked["numpy table"] is None
    assert checked["python bool"] == "TypeError: tokens must be integers, got bool."
    assert checked["hidden size"] == (
        "ValueError: hidden must end with the embedding axes (embedding=3) of the table, got the "
        "shape (2, 5)."
    )
    assert checked["bias"].startswith("ValueError: the bias must have shape (5,)")


@pytest.mark.parametrize(
    "call, expected",
    [
        (
            "float as second size",
            "ValueError: every size must be an integer of at least 1, got vocabulary=5, heads=3, "
            "features=2.5, pad_to_multiple_of=1.",
        ),
        (
            "no such dtype",
            "ValueError: embeddings must be floating, got dtype='float33', which is not a dtype.",
        ),
        (
            "no logits dtype",
            "ValueError: logits must be floating, got logits_dtype='float33', which is not a "
            "dtype.",
        ),
        ("numpy float as target", "TypeError: targets must be integers, got float32."),
        (
            "short hidden of a loss",
            "ValueError: hidden must end with the embedding axes (embedding=3) of the table, got "
            "the shape (2, 2).",
        ),
        (
            "targets of another rank",
            "ValueError: targets must have the shape (2,) of hidden without its embedding axes, "
            "got (2, 1).",
        ),
        (
            "targets of another size",
            "ValueError: targets must have the shape (2,) of hidden without its embedding axes, "
            "got (3,).",
        ),
        (
            "weights of another rank",
            "ValueError: weights must have the shape (2,) of hidden without its embedding axes, "
            "got (2, 1).",
        ),
        (
            "one weight",
            "ValueError: weights must have the shape (2,) of hidden without its embedding axes, "
            "got ().",
        ),
        (
            "complex weight",
            "TypeError: weights must be bool, integer or floating, got complex64.",
        ),
        (
            "other reduction",
            'ValueError: reduction must be "mean", "sum" or "none", got \'average\'.',
        ),
        (
            "traced rows",
            "TypeError: rows must be known when partition_rows is called, not traced: split the "
            "model outside of `jax.jit`, and give it both parts.",
        ),
    ],
)
def test_what_no_annotation_can_say_is_an_error_of_our_own(checked, unchecked, call, expected):
    assert checked[call] == unchecked[call] == expected


def test_wrong_tokens_and_policies_are_clear_errors_without_checks(unchecked):
    assert unchecked["out_of_range"] == (
        "ValueError: out_of_range must be one of ('nan', 'raise', 'clip'), got 'wrap'."
    )
    assert unchecked["float tokens"].startswith(
        "TypeError: tokens must be integers, got float32.\n"
    )
    assert unchecked["python float"] == "TypeError: tokens must be integers, got float64."
    assert unchecked["bool tokens"] == "TypeError: tokens must be integers, got bool."
    assert unchecked["numpy bools"] == "TypeError: tokens must be integers, got bool."
    assert unchecked["text"].startswith("TypeError: tokens must be integers")


@pytest.mark.parametrize(
    "call, suggestion",
    [
        ("size as axes", "Instead of embedding_axes=8, use {'embedding': 8}."),
        ("number as key", "Instead of key=0, use jax.random.key(0)."),
        ("number as key of a resize", "Instead of key=0, use jax.random.key(0)."),
        (
            "hidden as a list",
            "Instead of hidden=[[1.0, 1.0, 1.0]], use jnp.asarray([[1.0, 1.0, 1.0]]).",
        ),
        ("list of tokens", "Instead of tokens=[0, 1], use jnp.asarray([0, 1])."),
        ("list of tokens to take", "Instead of tokens=[0, 1], use jnp.asarray([0, 1])."),
        ("key as tokens", None),
        ("list of rows of several lengths", None),
        ("list of targets", "Instead of targets=[0, 1], use jnp.asarray([0, 1])."),
        ("list of weights", "Instead of weights=[1, 0], use jnp.asarray([1, 0])."),
        ("data in the place of options", None),
        ("a loss of a table", "Instead of self=EmbeddingTable(...), use EmbeddingDecode(table)."),
        ("vectors of a table", "Instead of self=EmbeddingTable(...), use EmbeddingLookup(table)."),
        (
            "float targets",
            "Instead of targets=float32[2], use integers; for one-hot vectors these are "
            "jnp.argmax(..., axis=-1).",
        ),
        (
            "float tokens to be unique",
            "Instead of tokens=float64[2], use integers; for one-hot vectors these are "
            "jnp.argmax(..., axis=-1).",
        ),
        (
            "array to ignore",
            "Instead of ignore_index=int32[2], use a Python number, which is known while JAX "
            "traces the program.",
        ),
    ],
)
def test_a_common_mistake_ends_with_what_to_write(checked, unchecked, call, suggestion):
    if suggestion is None:  # there is no such thing
        assert all("Instead of" not in error for error in (checked[call], unchecked[call]))
        return
    accepted = {None} if suggestion.endswith("]).") else set()  # lists, if nothing checks them
    for error in {checked[call], unchecked[call]} - accepted:
        assert re.match("(TypeCheck|Type|Attribute)Error: ", error) and error.endswith(
            f"\n{suggestion}"
        )


@pytest.mark.parametrize(
    "call, suggestion",
    [
        (
            "list of names",
            "Instead of axis_names=['vocabulary', 'embedding'], use ('vocabulary', 'embedding').",
        ),
        ("name of one", "Instead of axis_names='vocabulary', use ('vocabulary',)."),
        ("numbers as names", None),
        (
            "a decode of what",
            "Instead of table=float32[2, 3], use EmbeddingTable(array, ('vocabulary', "
            "'embedding')).",
        ),
        (
            "array as temperature",
            "Instead of temperature=float32[], use a Python number, which is known while JAX "
            "traces the program.",
        ),
        (
            "array as soft cap",
            "Instead of soft_cap=float32[], use a Python number, which is known while JAX traces "
            "the program.",
        ),
    ],
)
def test_a_common_mistake_that_only_the_checks_find_ends_with_what_to_write(
    checked, call, suggestion
):
    error = checked[call]
    assert "TypeCheckError: " in error
    assert "Instead of" not in error if suggestion is None else error.endswith(f"\n{suggestion}")


@pytest.mark.slow
def test_help_shows_the_public_names_and_no_other():
    names = run_python("import eqx_embedding, json; print(json.dumps(eqx_embedding.__all__))")
    text = pydoc.plain(pydoc.render_doc(eqx_embedding))
    sections = dict(re.findall(r"^([A-Z]+)\n((?:    .*\n|\n)+)", text, re.MULTILINE))
    functions = set(re.findall(r"^    (\w+)\(", sections["FUNCTIONS"], re.MULTILINE))
    classes = set(re.findall(r"^    class (\w+)\(", sections["CLASSES"], re.MULTILINE))
    assert functions | classes == set(names)
    assert re.findall(r"^    (\w+) =", sections["DATA"], re.MULTILINE) == ["__all__"]


def test_checks_are_off_with_jaxtyping_disable(unchecked):
    assert not any(error and "TypeCheckError" in error for error in unchecked.values())
    assert unchecked["hidden as a list"] is None


@pytest.mark.slow
def test_code_that_its_user_type_checks_works_under_every_transformation():
    assert run_python(USER)


@pytest.mark.slow
def test_the_import_brings_in_what_equinox_brings_in_and_our_modules():
    code = """
import json
import sys
import equinox

before = set(sys.modules)
import eqx_embedding

print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""
    before, brought = run_python(code)
    assert "eqx_embedding" in brought
    assert [name for name in brought if name.split(".")[0] != "eqx_embedding"] == []
    everything = {name.split(".")[0] for name in before + brought}
    assert everything.isdisjoint(
        {"beartype", "optax", "penzai", "treescope", "flax", "safetensors"}
    )
