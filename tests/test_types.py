"""Runtime type checks: on by default, off with `JAXTYPING_DISABLE=1`, each in a fresh process."""

import re

import pytest

from .helpers import run_python


# The error of each wrong call, as "name of its class: its text", or null if there was none.
WRONG_CALLS = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

key = jax.random.key(0)
table = EmbeddingTable(jnp.ones((5, 3)), ("vocabulary", "embedding"))
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
    "bias": lambda: EmbeddingDecode(table, jnp.ones(4)),
    "bias of two axes": lambda: EmbeddingDecode(table, jnp.ones((5, 1))),
    "text as soft cap": lambda: EmbeddingDecode(table, soft_cap="30"),
    "integer table": lambda: EmbeddingTable(jnp.ones((5, 3), "int32"), ("vocabulary", "embedding")),
    "list of names": lambda: EmbeddingTable(jnp.ones((5, 3)), ["vocabulary", "embedding"]),
    "float size": lambda: EmbeddingTable.from_config(5.0, {"embedding": 3}, key=key),
    "a layer of what": lambda: EmbeddingLookup(jnp.ones((5, 3))),
}


def error(call):
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


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
        ("bias of two axes", "bias", r"f32\[5,1\]"),
        ("text as soft cap", "soft_cap", "'30'"),
        ("integer table", "embeddings", r"i32\[5,3\]"),
        ("list of names", "axis_names", r"\['vocabulary', 'embedding'\]"),
        ("float size", "vocab_size", "5.0"),
        ("a layer of what", "table", r"f32\[5,3\]"),
    ],
)
def test_checks_are_on_by_default_and_name_the_parameter_and_what_was_given(
    checked, call, parameter, given
):
    pattern = rf"^TypeCheckError: .*\n.*parameter '{parameter}'\.\nActual value: {given}\n"
    assert re.match(pattern, checked[call])


def test_errors_of_our_own_are_the_same_with_and_without_checks(checked, unchecked):
    for call in ("python bool", "hidden size", "bias"):
        assert checked[call] == unchecked[call]
    assert checked["python bool"] == "TypeError: tokens must be integers, got bool."
    assert checked["hidden size"] == (
        "ValueError: hidden must end with the embedding axes (embedding=3) of the table, got the "
        "shape (2, 5)."
    )
    assert checked["bias"].startswith("ValueError: the bias must have shape (5,)")


def test_wrong_tokens_and_policies_are_clear_errors_without_checks(unchecked):
    assert unchecked["out_of_range"] == (
        "ValueError: out_of_range must be one of ('nan', 'raise', 'clip'), got 'wrap'."
    )
    assert unchecked["float tokens"] == "TypeError: tokens must be integers, got float32."
    assert unchecked["python float"] == "TypeError: tokens must be integers, got float64."
    assert unchecked["bool tokens"] == "TypeError: tokens must be integers, got bool."
    assert unchecked["numpy bools"] == "TypeError: tokens must be integers, got bool."
    assert unchecked["text"].startswith("TypeError: tokens must be integers")


def test_checks_are_off_with_jaxtyping_disable(unchecked):
    assert not any(error and "TypeCheckError" in error for error in unchecked.values())
    assert unchecked["integer hidden"] is None


def test_code_that_its_user_type_checks_works_under_every_transformation():
    assert run_python(USER)


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
