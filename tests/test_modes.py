"""Modes of JAX and Equinox: no `jit`, debugging, `checkify`, `EQX_ON_ERROR`, threads."""

import functools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from eqx_embedding import (
    combine_rows,
    EmbeddingDecode,
    EmbeddingLookup,
    EmbeddingTable,
    partition_rows,
    resize_vocabulary,
)

from .flags import xla_flags
from .helpers import (
    assert_close,
    cross_entropy_reference,
    float64,
    FOUR_TARGETS,
    FOUR_TOKENS,
    FOUR_WEIGHTS,
    lookup_reference,
    make_array,
    make_table,
    NAMES,
    python_environment,
    run_python,
)


@pytest.mark.slow
@pytest.mark.parametrize("disable_jit, reduction", [(False, "mean"), (True, "none")])
def test_debug_nans_raises_no_false_alarm(disable_jit, reduction):
    table, hidden = make_table("first"), make_array((4, 4), seed=1)
    targets = jnp.where(FOUR_WEIGHTS == 0, -100, FOUR_TARGETS)

    def loss(table):
        losses = EmbeddingDecode(table).cross_entropy(
            EmbeddingLookup(table)(jnp.asarray(FOUR_TOKENS)) + hidden,
            targets,
            weights=jnp.asarray(FOUR_WEIGHTS),
            label_smoothing=0.1,
            reduction=reduction,
        )
        return jnp.sum(losses)

    with jax.debug_nans(True), jax.disable_jit(disable_jit):
        value, gradient = eqx.filter_value_and_grad(loss)(table)
        expected, *_ = cross_entropy_reference(
            EmbeddingDecode(table),
            lookup_reference(table, FOUR_TOKENS) + float64(hidden),
            FOUR_TARGETS,
            FOUR_WEIGHTS,
            label_smoothing=0.1,
            reduction=reduction,
        )
        assert_close(value, np.sum(expected))
        assert np.isfinite(gradient.embeddings).all()
        for out_of_range in ("raise", "clip"):
            EmbeddingLookup(table, out_of_range)(jnp.asarray(FOUR_TOKENS))
        with pytest.raises(FloatingPointError):
            EmbeddingLookup(table)(jnp.asarray([7]))
        with pytest.raises(FloatingPointError):
            EmbeddingDecode(table).cross_entropy(hidden, targets)


def test_debug_nans_points_at_the_caller():
    layer = EmbeddingDecode(make_table("first"))

    @jax.jit
    def step(hidden):
        return jnp.log(-1 - layer.cross_entropy(hidden, FOUR_TARGETS))

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="encountered in log"):
        step(make_array((4, 4), seed=1))


def test_debug_infs_reports_masked_padding():
    layer, hidden = EmbeddingDecode(make_table("first")), make_array((4, 4), seed=1)
    with jax.debug_infs(True), jax.disable_jit(True), pytest.raises(FloatingPointError):
        layer.cross_entropy(hidden, FOUR_TARGETS)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_disable_jit_changes_no_result():
    table = make_table("middle", with_bias=True)
    layer = EmbeddingDecode(table, 3.0)
    key = jax.random.key(0)

    @eqx.filter_jit
    def everything(layer):
        def loss(layer):
            hidden = jnp.tanh(EmbeddingLookup(layer.table)(jnp.asarray(FOUR_TOKENS)))
            loss = layer.cross_entropy(hidden, FOUR_TARGETS, weights=FOUR_WEIGHTS, chunk_size=2)
            log_probs, _ = layer.top_k(hidden, 2)
            return loss + jnp.sum(layer(hidden) ** 2) + jnp.sum(log_probs)

        trained, frozen = partition_rows(layer, [2, 5])
        return (
            eqx.filter_value_and_grad(loss)(layer),
            resize_vocabulary(layer, 9, key=key, pad_to_multiple_of=4),
            combine_rows(jax.tree.map(lambda x: x + 1, trained), frozen),
        )

    expected = everything(layer)
    with jax.disable_jit():
        actual = everything(layer)
        with pytest.raises(RuntimeError, match="the vocabulary 'vocabulary' has 7 tokens"):
            EmbeddingLookup(table, "raise")(jnp.asarray(7))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(assert_close, actual, expected)


RAISING = """
import json
import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_embedding import EmbeddingLookup, EmbeddingTable

table = EmbeddingTable(jnp.ones((5, 2)), ("vocabulary", "embedding"))
lookup = eqx.filter_jit(EmbeddingLookup(table, "raise"))
try:
    result = jax.block_until_ready(lookup(jnp.asarray([1, 5])))
    print(json.dumps(jnp.isnan(result).tolist()))
except RuntimeError as error:
    print(json.dumps(str(error)))
"""


def test_checkify_finds_only_a_token_out_of_range():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)

    @jax.jit
    @functools.partial(checkify.checkify, errors=checkify.all_checks)
    def loss(table, tokens):
        vectors = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(
            vectors + hidden, FOUR_TARGETS, weights=FOUR_WEIGHTS
        )

    error, value = loss(table, jnp.asarray(FOUR_TOKENS))
    error.throw()
    expected, *_ = cross_entropy_reference(
        EmbeddingDecode(table),
        lookup_reference(table, FOUR_TOKENS) + float64(hidden),
        FOUR_TARGETS,
        FOUR_WEIGHTS,
    )
    assert_close(value, expected)
    error, _ = loss(table, jnp.asarray([0, 6, 3, 7]))
    assert "out-of-bounds" in str(error.get())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_no_tracer_leaks_and_no_key_is_used_twice():
    table, hidden = make_table("first"), make_array((4, 4), seed=1)

    def loss(table, tokens):
        vectors = EmbeddingLookup(table)(tokens)
        return EmbeddingDecode(table).cross_entropy(vectors + hidden, FOUR_TARGETS, chunk_size=2)

    tokens = jnp.asarray([FOUR_TOKENS, FOUR_TARGETS])
    with jax.checking_leaks(), jax.debug_key_reuse(True):
        each = eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0))(table, tokens)
        whole = eqx.filter_jit(eqx.filter_grad(lambda t: loss(t, tokens[0]) + loss(t, tokens[1])))
        assert_close(whole(table).embeddings, jnp.sum(each.embeddings, 0))
        made = EmbeddingTable.from_config(5, {"embedding": 4}, key=jax.random.key(0))
        tables = table, make_table("last", with_bias=True)
        grown = resize_vocabulary(tables, 9, key=jax.random.key(1), pad_to_multiple_of=1)
    assert len(np.unique(made.embeddings)) == 20
    assert len(np.unique(grown[0].embeddings[7:])) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, expected",
    [("raise", "5 tokens"), ("nan", [[True] * 2] * 2), ("off", [[False] * 2, [True] * 2])],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_each_setting_of_eqx_on_error_is_followed(setting, expected, devices):
    result = run_python(RAISING, EQX_ON_ERROR=setting, XLA_FLAGS=xla_flags(devices))
    assert result == expected or (setting == "raise" and expected in result)


@pytest.mark.slow
def test_eqx_on_error_breakpoint_opens_the_debugger():
    process = subprocess.run(
        [sys.executable, "-c", RAISING],
        env=python_environment(EQX_ON_ERROR="breakpoint"),
        input="c\n",
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "the vocabulary 'vocabulary' has 5 tokens" in process.stdout + process.stderr
    assert "(jdb)" in process.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_sixteen_threads_may_call_at_once():
    code = """
import json, sys, threading
import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable

assert "beartype" not in sys.modules, "it is imported by the first call"
array = jnp.arange(15.0).reshape(5, 3) / 10
gate, results = threading.Barrier(16), {}

def work(i):
    gate.wait()
    table = EmbeddingTable(array, ("vocabulary", "embedding"))
    tokens = jnp.arange(i % 4 + 1, dtype="int32")

    def loss(table):
        return EmbeddingDecode(table).cross_entropy(EmbeddingLookup(table)(tokens), tokens)

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(table)
    results[i] = [float(value), gradient.embeddings.tolist()]

threads = [threading.Thread(target=work, args=[i]) for i in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([results.get(i) for i in range(16)]))
"""
    results = run_python(code)
    table = EmbeddingTable(jnp.arange(15.0).reshape(5, 3) / 10, NAMES)
    for i, result in enumerate(results):
        assert result == results[i % 4]
        tokens = np.arange(i % 4 + 1)
        value, *_ = cross_entropy_reference(
            EmbeddingDecode(table), lookup_reference(table, tokens), tokens
        )
        assert_close(result[0], value)


def test_a_profile_names_each_method():
    table, hidden, targets = make_table("first"), make_array((4, 4), seed=1), FOUR_TARGETS
    decode, key = EmbeddingDecode(table), jax.random.key(0)
    for name, method, argument in [
        ("EmbeddingLookup", EmbeddingLookup(table), jnp.asarray(FOUR_TOKENS)),
        ("EmbeddingDecode", decode, hidden),
        ("EmbeddingDecode.score", lambda hidden: decode.score(hidden, targets), hidden),
        ("EmbeddingDecode.top_k", lambda hidden: decode.top_k(hidden, 2), hidden),
        ("EmbeddingDecode.sample", lambda hidden: decode.sample(hidden, key=key), hidden),
        ("EmbeddingDecode.divergence", lambda x: decode.divergence(x, decode, x), hidden),
        ("EmbeddingDecode.cross_entropy", lambda x: decode.cross_entropy(x, targets), hidden),
        (
            "EmbeddingDecode.token_loss",
            lambda x: decode.token_loss(lambda scores: scores.entropy, x, targets),
            hidden,
        ),
    ]:
        text = jax.jit(lambda x: method(x)).lower(argument).as_text(debug_info=True)
        assert f"/{name}/" in text, name
