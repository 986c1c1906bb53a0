"""Samples from a model, and `examples/generate.py`."""

import itertools
import json
import math
import shutil
from pathlib import Path

import equinox as eqx
import generate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import generation
from support.generation import sample
from support.tokenizer import Tokenizer
from toy_transformer import ModelConfig, Transformer

from eqx_embedding import EmbeddingDecode


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("temperature, top_k", [(0.0, None), (0.8, None), (1.5, 3), (1.0, 999)])
@pytest.mark.parametrize("size, prompt", [(8, range(5)), (7, range(20)), (1, [3])])
def test_a_sample_follows_windows_that_keep_their_newer_half(
    size, prompt, temperature, top_k, cache
):
    model = Transformer(32, ModelConfig(size, 1, 2, 8), key=jax.random.key(1))
    key = jax.random.key(2)
    hidden_of, decode = eqx.filter_jit(model.hidden), EmbeddingDecode(model.tokens)
    options = {"temperature": temperature, "top_k": None if top_k is None else min(top_k, 32)}
    window, expected = list(prompt)[-size:], []
    step_key = key
    for _ in range(12):
        step_key, draw = jax.random.split(step_key)
        if len(window) > size:
            window = window[-(size // 2 + 1) :]
        padded = jnp.asarray(window + [0] * (size - len(window)))
        hidden = hidden_of(padded)[len(window) - 1]
        token = int(decode.sample(hidden, key=draw, **options))
        expected.append(token)
        window.append(token)
    options = {"top_k": top_k, "cache": cache, "key": key}
    assert list(sample(model, np.asarray(prompt), 12, temperature, **options)) == expected


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-10])
def test_a_temperature_next_to_zero_is_the_likeliest_token(temperature):
    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    likeliest = list(sample(model, np.arange(5), 12, 0.0, key=jax.random.key(2)))
    assert list(sample(model, np.arange(5), 12, temperature, key=jax.random.key(2))) == likeliest


def test_a_sample_of_three_billion_tokens_begins_at_once():
    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    written = sample(model, np.arange(5), 3 * 10**9, 0.8, key=jax.random.key(2))
    assert len(list(itertools.islice(written, 5))) == 5


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_with_the_cache_there_is_one_token_to_encode_unless_the_window_is_full(monkeypatch, cache):
    encoded = []

    def next_token(model, tokens, start, last, caches, *_):
        encoded.append(len(tokens))
        return jnp.asarray(7), caches

    model = Transformer(32, ModelConfig(8, 1, 2, 8), key=jax.random.key(1))
    monkeypatch.setattr(generation, "next_token", next_token)
    list(sample(model, np.arange(5), 12, 1.0, cache=cache, key=jax.random.key(2)))
    assert encoded == ([8, 1, 1, 1] * 3 if cache else [8] * 12)


def printed(capsys, run, **settings):
    generate.main(generate.Config(run, **{"length": 40, **settings}))
    return capsys.readouterr().out


@pytest.mark.slow
def test_generation_is_the_same_for_a_seed_with_and_without_the_cache(finished_bpe, capsys):
    run = finished_bpe[0].run.out
    written = printed(capsys, run, prompt="2 times ")
    assert written.startswith("2 times ") and len(written) > 40
    assert written == printed(capsys, run, prompt="2 times ", cache=False)
    assert written != printed(capsys, run, prompt="2 times ", seed=1)
    long = "7 times 7 is 49.\n" * 5
    assert printed(capsys, run, prompt=long, length=0) == long + "\n"
    after_line_break = printed(capsys, run, prompt="\n", temperature=0.0)
    assert "\n" + printed(capsys, run, temperature=0.0) == after_line_break


def test_a_character_is_printed_when_it_is_whole(finished, monkeypatch):
    text = "é中🙂".encode() + b"\xff!" + "中".encode()[:2]
    monkeypatch.setattr(generate, "sample", lambda *args, **options: iter(text))
    shown = []
    monkeypatch.setattr("builtins.print", lambda part, **options: shown.append(part))
    generate.main(generate.Config(finished[0].run.out, prompt=">"))
    assert [part for part in shown if part] == [">", "é", "中", "🙂", "\ufffd", "!", "\ufffd"]


def test_a_prompt_that_the_tokenizer_changes_is_refused(finished_bpe, monkeypatch):
    """It would leave the "é" out, and continue another text."""
    model, tokenizer, identity = generate.load(finished_bpe[0].run.out)
    assert tokenizer.json is not None
    content = json.loads(tokenizer.json)
    content["model"]["vocab"]["unused"] = content["model"]["vocab"].pop("Ã")
    known = generate.Trained(model, Tokenizer(json.dumps(content)), identity)
    monkeypatch.setattr(generate, "load", lambda run: known)
    with pytest.raises(SystemExit, match="the tokenizer of run cannot spell 'é times'"):
        generate.main(generate.Config(Path("run"), prompt="é times"))


def test_a_run_that_cannot_be_used_is_refused_in_one_line(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(finished[0].run.out, broken)
    shutil.rmtree(broken / "checkpoints" / "300" / "model")
    for run, message in [
        (tmp_path / "missing", "missing holds no checkpoint"),
        (tmp_path / "empty", "empty holds no checkpoint"),
        (finished[0].data.text, "text.txt is not a folder"),
        (broken, "checkpoints/300 is broken"),
    ]:
        with pytest.raises(SystemExit, match=message) as error:
            generate.main(generate.Config(run))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "missing").exists() and not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": -0.1}, "--temperature must be at least 0, got -0.1"),
        ({"temperature": math.nan}, "--temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "--top-k must be above 0, got 0"),
        ({"length": -1}, "--length must be at least 0, got -1"),
    ],
)
def test_a_setting_of_generation_out_of_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        generate.Config(Path("run"), **setting)
