"""`examples/grow_vocabulary.py` from end to end, on texts and a model that are small."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import generate
import grow_vocabulary
import jax
import numpy as np
import pytest
import train_lm
from grow_vocabulary import Config, frequent_strings, more_tokens
from support.folder import FILES
from support.text_data import cut_text, read_text, Tokens
from support.tokenizer import add_tokens, Tokenizer, train_bpe

from ..helpers import python_environment
from .helpers import EXAMPLES, tiny, written


pytestmark = pytest.mark.usefixtures("jax_defaults")

TINY = {"steps": 60, "batch_size": 4, "report_every": 20, "new_tokens": 12}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the toy model, and a new text with other words."""
    folder = tmp_path_factory.mktemp("growth")
    old_text, text = folder / "old.txt", folder / "new.txt"
    old_text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(200)))
    text.write_text("".join(f"The square root of {i * i} is {i}; " for i in range(200)))
    tokens = {"tokenizer": "bpe", "vocab_size": 280}
    config = tiny(old_text, folder / "run", steps=60, report_every=60, sample_length=1, **tokens)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train_lm.main(config)
    return Config(run=config.run.out, text=text, old_text=old_text, out=folder / "out", **TINY)


@pytest.fixture(scope="module")
def grown(run):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return run, grow_vocabulary.main(run)


@pytest.mark.exhaustive
def test_new_tokens_are_learned_and_nothing_but_their_rows_changes(grown):
    config, reports = grown
    assert [step for step, _ in reports] == [-1, 0, 20, 40, 60]
    without, untrained, *_, trained = [value for _, value in reports]
    assert trained < untrained - 0.2 and trained < without
    old, old_tokenizer, _ = generate.load(config.run)
    new, tokenizer, _ = generate.load(config.out)
    size = len(old_tokenizer.pieces)
    assert tokenizer.pieces[:size] == old_tokenizer.pieces
    assert new.tokens.vocab_size == len(tokenizer.pieces) == size + config.new_tokens
    np.testing.assert_array_equal(new.tokens.embeddings[:size], old.tokens.embeddings[:size])
    np.testing.assert_array_equal(new.positions.embeddings, old.positions.embeddings)
    np.testing.assert_array_equal(new.blocks[0].expand, old.blocks[0].expand)
    assert (config.out / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_a_new_token_stands_for_its_string_wherever_that_stands(grown):
    config, _ = grown
    _, tokenizer, _ = generate.load(config.out)
    data = read_text(config.text).train.tobytes()
    tokens = tokenizer.encode(data)
    assert tokenizer.decode(tokens) == data
    assert np.sum(tokens >= len(tokenizer.pieces) - config.new_tokens) > 0.3 * len(tokens)


def test_frequent_strings_are_those_of_byte_pair_encoding_by_hand():
    pieces = [bytes([byte]) for byte in range(256)]
    tokens = np.frombuffer(b"abab abab aaaa abac", np.uint8)
    # ab occurs 5 times; abab, then made of two new tokens, twice; "aaaa" holds two pairs, not three
    strings = frequent_strings(tokens, pieces, 3)
    assert strings[0] == b"ab" and b"aa" in strings
    assert frequent_strings(np.frombuffer(b"abcd", np.uint8), pieces, 3) == []
    # half of a character cannot be a string
    euros = np.frombuffer("€€€".encode(), np.uint8)
    assert all(string.decode() for string in frequent_strings(euros, pieces, 3))


@pytest.mark.parametrize("encoding", ["cp1251", "gbk"])
def test_a_text_that_is_not_utf8_is_not_merged_to_its_end(monkeypatch, encoding):
    rounds = []

    def unique(*args, **options):
        rounds.append(1)
        return real_unique(*args, **options)

    real_unique, draw = np.unique, np.random.default_rng(0)
    words = ["".join(draw.choice(list("абвгдежзиклмнопрстуфхцчшщыэюя"), 5)) for _ in range(300)]
    text = np.frombuffer(" ".join(draw.choice(words, 3000)).encode(encoding), np.uint8)
    monkeypatch.setattr(np, "unique", unique)
    frequent_strings(text, [bytes([byte]) for byte in range(256)], 256)
    assert len(rounds) < 500


@pytest.mark.parametrize("word", ["é", "für", "Ã©", "電話", "łąkę 🙂"])
def test_new_tokens_of_any_characters_change_no_old_token(word):
    """A tokenizer.json spells the byte 0xe9 as "é", and the bytes of "é" as "Ã©"."""
    old = train_bpe("été 2 times ".encode() * 50, 280)
    data = f"{word} {word}; caf{word} {word}!\n".encode() * 20
    new_strings = frequent_strings(old.encode(data), old.pieces, 9, reserved=old.names)
    new = add_tokens(old, new_strings)
    assert any(word in string.decode() for string in new_strings)
    assert new.pieces == old.pieces + new_strings
    for text in data, "é Ã© 電話 für".encode(), bytes(range(256)):
        assert new.decode(new.encode(text)) == text


def test_added_tokens_leave_the_rest_of_a_text_as_it_was():
    old = train_bpe(b"one two three " * 50, 270)
    new = add_tokens(old, [b"\n    ", b" of the "])
    assert new.pieces[: len(old.pieces)] == old.pieces
    assert new.pieces[len(old.pieces) :] == [b"\n    ", b" of the "]
    np.testing.assert_array_equal(new.encode(b"one two three"), old.encode(b"one two three"))
    assert new.decode(new.encode(b"one\n     of the two")) == b"one\n     of the two"
    assert len(old.pieces) in new.encode(b"one\n    two")


def test_numbers_that_stand_for_nothing_leave_no_place_for_new_tokens():
    bpe = train_bpe(b"one two three " * 50, 270)
    assert bpe.json is not None
    content = json.loads(bpe.json)
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] += 50
    holes, data = Tokenizer(json.dumps(content)), b"a text of some words, " * 30
    text = cut_text("text", data)
    with pytest.raises(SystemExit, match="some of its numbers below .* stand for nothing"):
        more_tokens(Config(Path("run")), holes, text, Tokens(holes.encode(data), 1.0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"run": Path("missing")}, "missing holds no checkpoint"),
        ({"text": Path("missing")}, "cannot read the text missing: No such file"),
        ({"learning_rate": 1e30}, "the loss is not finite: try a lower --learning-rate"),
        (
            {"old_text": None},
            r"the built-in text of Python 3\.\d+ is not what .* learned from: "
            "give --old-text the text of that run",
        ),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_used_is_refused_in_one_line(run, changes, message, tmp_path):
    config = dataclasses.replace(run, out=tmp_path / "out", **changes)
    with pytest.raises(SystemExit, match=message) as error:
        grow_vocabulary.main(config)
    assert "\n" not in str(error.value) and not list(config.out.glob("*"))


@pytest.mark.exhaustive
def test_a_run_is_not_overwritten_and_settings_out_of_range_are_refused(grown):
    with pytest.raises(SystemExit, match="holds a run"):
        grow_vocabulary.main(grown[0])
    assert written(grown[0].out) <= {*FILES, "checkpoints"}
    with pytest.raises(ValueError, match="--new-tokens must be above 0, got 0"):
        dataclasses.replace(grown[0], new_tokens=0)


def test_a_folder_that_cannot_be_made_is_refused_before_training(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(grow_vocabulary, "train_rows", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit, match="cannot write to .*out: Not a directory"):
        grow_vocabulary.main(dataclasses.replace(run, out=tmp_path / "file" / "out"))


@pytest.mark.exhaustive
def test_training_does_not_go_on_from_a_grown_model(grown):
    config, _ = grown
    training = tiny(config.old_text, config.out, tokenizer="bpe", vocab_size=280, resume=True)
    with pytest.raises(SystemExit, match="cannot resume: .* is another one: tokenizer is bpe here"):
        train_lm.main(training)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_runs_from_any_folder_and_help_explains_each_option(run, tmp_path):
    environment = python_environment(COLUMNS="200", TERM="dumb")

    def call(*options):
        command = [sys.executable, str(EXAMPLES / "grow_vocabulary.py"), *options]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    shown = call("--help").stdout
    assert "python examples/grow_vocabulary.py --run" in shown
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown
    options = [f"--run={run.run}", f"--text={run.text}", f"--old-text={run.old_text}"]
    done = call(*options, "--steps=3", "--new-tokens=4", "--batch-size=2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d{3} after 3 steps, \d+ s, of their rows alone", done.stdout)
    assert (tmp_path / "runs" / "grown" / "growth.png").exists()
    failed = call("--run=missing")
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (1, "", 1)
