"""`examples/word_vectors.py` from end to end, on a text and tables that are small."""

import dataclasses
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import word_vectors
from support.folder import FILES, new_folder
from support.terminal import from_command_line, run_script
from word_vectors import Config

from ..helpers import assert_close, float64, python_environment, temporaries
from .helpers import EXAMPLES, written


pytestmark = pytest.mark.usefixtures("jax_defaults")

ANIMALS, TOOLS = ["horse", "goose", "mouse"], ["hammer", "pliers", "wrench"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A text whose sentences have either animals or tools."""
    folder, random = tmp_path_factory.mktemp("words"), np.random.default_rng(0)
    lines = []
    for i in range(200):
        verb, nouns = ("Feed", ANIMALS) if i % 2 else ("Clean", TOOLS)
        lines.append(f"{verb} {' '.join(random.permutation(nouns))} {i}, twice.\n")
    (folder / "text").write_text("".join(lines))
    return Config(
        folder / "text",
        folder / "out",
        words=("Horse", "pliers"),
        rows=4000,
        embedding_size=8,
        steps=600,
        batch_size=16,
        window=2,
        negatives=4,
        report_every=200,
    )


@pytest.fixture(scope="module")
def trained(config):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return word_vectors.main(config)


def start(config):
    words = word_vectors.read_words(config)
    ngrams = word_vectors.find_ngrams(words.names, config)
    model = word_vectors.Model(config, len(words.names), jax.random.key(1))
    # Not zero, so that every row of a batch gets a gradient
    near = jax.random.normal(jax.random.key(2), model.near.embeddings.shape)
    model = eqx.tree_at(lambda m: m.near.embeddings, model, near)
    return model, next(word_vectors.batches(config, words, ngrams))


def one_step(config):
    """The loss, the model and the state of the optimizer after one step."""
    model, batch = start(config)
    optimizer = word_vectors.make_optimizer(config)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return word_vectors.make_step(config)(batch, model, opt_state)


@pytest.mark.exhaustive
def test_the_loss_falls_and_the_files_are_written(config, trained):
    assert [line["step"] for line in trained] == [200, 400, 600]
    first, second, third = (line["loss"] for line in trained)
    know_nothing = (1 + config.negatives) * np.log(2)
    assert know_nothing > first > second > third and third < 0.7 * know_nothing
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trained
    assert (config.out / "words.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_words_that_occur_together_become_neighbours(config, trained):
    header, *lines = (config.out / "vectors.txt").read_text().splitlines()
    names = [line.split()[0] for line in lines]
    assert header == "9 8" and set(names) == {*ANIMALS, *TOOLS, "feed", "clean", "twice"}
    vectors = np.array([line.split()[1:] for line in lines], np.float64)
    near = word_vectors.neighbours(vectors, names, ["horse", "pliers"])
    assert set(near["horse"][:2]) < {*ANIMALS, "feed"}
    assert set(near["pliers"][:2]) < {*TOOLS, "clean"}


def test_neighbours_have_the_largest_cosines():
    vectors = np.array([[2.0, 0.0], [0.0, 3.0], [9.0, 9.0], [-1.0, 0.1]])
    near = word_vectors.neighbours(vectors, ["a", "b", "c", "d"], ["a", "b"])
    assert near == {"a": ["c", "b", "d"], "b": ["c", "d", "a"]}


@pytest.mark.slow
def test_the_loss_is_that_of_numpy(config):
    model, batch = start(config)
    table, near = float64(model.ngrams.embeddings), float64(model.near.embeddings)
    shares, rows = float64(batch.ngrams.shares), np.asarray(batch.ngrams.rows)
    total = 0.0
    weights, words = float64(batch.weights), np.asarray(batch.words)
    for i in range(config.batch_size):
        logits = near[words[i]] @ (shares[i] @ table[rows[i]])
        count = weights.shape[1]
        random = np.log1p(np.exp(logits[count:])).sum()
        total += np.sum(weights[i] * (np.log1p(np.exp(-logits[:count])) + random))
    assert_close(word_vectors.loss_of(model, batch), total / weights.sum())


@pytest.mark.slow
def test_sparse_and_dense_steps_agree_in_the_rows_of_the_batch(config):
    model, batch = start(config)
    sparse_loss, sparse, sparse_state = one_step(config)
    loss, dense, state = one_step(dataclasses.replace(config, dense=True))
    assert_close(sparse_loss, loss)
    for name, tokens in ("ngrams", batch.ngrams.rows), ("near", batch.words):
        used = np.isin(np.arange(getattr(model, name).vocab_size), tokens)
        trees = model, sparse, dense, sparse_state[0].mu, state[0].mu
        before, after, expected, moment, expected_moment = (
            np.asarray(getattr(tree, name).embeddings) for tree in trees
        )
        assert_close(after[used], expected[used])
        assert_close(moment[used], expected_moment[used])
        np.testing.assert_array_equal(after[~used], before[~used])
        np.testing.assert_array_equal(moment[~used], 0)
        assert np.any(after[used] != before[used]) and np.any(~used) == (name == "ngrams")


@pytest.mark.slow
def test_a_step_copies_no_table(config):
    wide = dataclasses.replace(config, rows=500_000)
    model, batch = start(wide)
    opt_state = word_vectors.make_optimizer(wide).init(eqx.filter(model, eqx.is_inexact_array))
    lowered = word_vectors.make_step(wide).lower(batch, model, opt_state)
    memory = lowered.compile().compiled.memory_analysis()
    table = model.ngrams.embeddings.nbytes
    assert memory.alias_size_in_bytes >= 3 * table and memory.temp_size_in_bytes < table / 10


def test_places_and_words_are_drawn_as_often_as_they_should(config):
    config = dataclasses.replace(config, batch_size=20_000, threshold=1e-2, negatives=2)
    words = word_vectors.read_words(config)
    # One n-gram a word, the word's number, tells which word a batch has at each place
    numbers = np.arange(len(words.names), dtype=np.int32)[:, None]
    ngrams = word_vectors.Ngrams(numbers, np.ones_like(numbers, np.float32))
    batch = next(word_vectors.batches(config, words, ngrams))
    shares = words.counts / words.counts.sum()
    keep = np.minimum(1, np.sqrt(1e-2 / shares))
    noise = words.counts**0.75
    centers, random = np.ravel(batch.ngrams.rows), np.ravel(batch.words[:, -2:])
    for drawn, expected in (centers, shares * keep), (random, noise):
        found = np.bincount(drawn, minlength=len(words.names)) / len(drawn)
        np.testing.assert_allclose(found, expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize("threshold", [5e-324, 1e-300, 1e300])
def test_a_threshold_beyond_all_shares_weighs_as_the_nearest_share(config, threshold):
    shares = (counts := word_vectors.read_words(config).counts) / counts.sum()
    nearest = float(shares.min() if threshold < 1 else shares.max())
    (_, batch), (_, expected) = (
        start(dataclasses.replace(config, threshold=value)) for value in (threshold, nearest)
    )
    assert np.all(np.any(np.asarray(batch.weights) > 0, axis=1))
    np.testing.assert_array_equal(batch.weights, expected.weights)


def test_a_window_reaches_no_further_than_the_text(config):
    count = len(word_vectors.read_words(config).text)
    _, batch = start(dataclasses.replace(config, batch_size=2, window=2**31 - 1))
    assert batch.weights.shape == (2, 2 * (count - 1))
    assert np.all(np.sum(np.asarray(batch.weights) > 0, axis=1) == count - 1)


def test_ngrams_are_those_of_the_paper():
    config = Config(min_length=3, max_length=4)
    assert word_vectors.ngrams_of("where", config) == [
        *["<where>", "<wh", "whe", "her", "ere", "re>"],
        *["<whe", "wher", "here", "ere>"],
    ]
    assert word_vectors.ngrams_of("a", config) == ["<a>"]
    endless = Config(min_length=3, max_length=2**31 - 1)
    assert word_vectors.ngrams_of("a", endless) == ["<a>"]
    ngrams = word_vectors.find_ngrams(["where", "a"], config)
    assert ngrams.rows.shape == (2, 10) and np.all(ngrams.rows < config.rows)
    np.testing.assert_allclose(ngrams.shares, [[0.1] * 10, [1] + [0] * 9], rtol=1e-6)


def test_words_are_whole_in_every_script(config, tmp_path):
    words = ["हिन्दी", "தமிழ்", "שָׁלוֹם", "café", "İstanbul", "x2"]
    text = " ".join(words) + ", cafe\u0301; 2x हिन्दी\n"
    (tmp_path / "text").write_text(text * 10)
    config = dataclasses.replace(
        config, text=tmp_path / "text", min_count=10, words=("CAFE\u0301",)
    )
    found = word_vectors.read_words(config)
    expected = [unicodedata.normalize("NFC", word.lower()) for word in words]
    assert sorted(found.names) == sorted([*expected, "x"])
    assert found.counts[found.names.index("café")] == 20
    assert word_vectors.words_to_show(config, found) == ["café"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text": Path("missing")}, "cannot read the text missing: No such file"),
        ({"words": ("horse", "king", "queen")}, "have these --words 5 times: king queen. Choose"),
        ({"min_count": 1000}, "text has 0 words that occur 1000 times. Give a longer --text"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(config, changes, message, tmp_path):
    config = dataclasses.replace(config, out=tmp_path / "out", **changes)
    with pytest.raises(SystemExit, match=message) as error:
        word_vectors.main(config)
    assert "\n" not in str(error.value) and not config.out.exists()


@pytest.mark.parametrize("encoding, start", [("latin-1", 2), ("utf-16", 0)])
def test_a_text_that_is_not_utf8_is_refused(config, encoding, start, tmp_path):
    (tmp_path / "text").write_bytes("früher ".encode(encoding) * 10)
    config = dataclasses.replace(config, text=tmp_path / "text")
    with pytest.raises(SystemExit, match=f"text is not UTF-8 from byte {start} on"):
        word_vectors.read_words(config)


def test_a_long_word_does_not_fill_the_memory(config):
    """As many n-grams as the longest word has would be held for each word."""
    names = [f"word{i}" for i in range(2000)] + ["long" * 50]
    ngrams = word_vectors.find_ngrams(names, config)
    model = word_vectors.Model(config, len(names), jax.random.key(0))
    compiled = eqx.filter_jit(word_vectors.vectors_of).lower(model, ngrams).compile().compiled
    assert temporaries(compiled) < ngrams.rows.size * config.embedding_size * 4 / 2
    vectors = word_vectors.vectors_of(model, ngrams)
    assert_close(vectors[-300:], model.vectors(word_vectors.Ngrams(*(x[-300:] for x in ngrams))))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_runs_while_jax_is_strict_about_dtypes_and_ranks(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ["--text", str(config.text), "--out", str(out), "--rows=100", "--steps=2"]
    monkeypatch.setattr(sys, "argv", ["word_vectors.py", *options])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        run_script(word_vectors.main, Config, word_vectors.__doc__)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "learning_rate, what", [(1e38, "the loss"), (1e19, "the length of the vectors")]
)
def test_numbers_that_are_not_finite_stop_the_run(config, tmp_path, learning_rate, what):
    config = dataclasses.replace(config, out=tmp_path / "out", steps=2, learning_rate=learning_rate)
    with pytest.raises(SystemExit, match=f"{what} is not finite: try a lower --learning-rate"):
        word_vectors.main(config)
    assert list(config.out.iterdir()) == []


@pytest.mark.exhaustive
def test_a_folder_that_is_in_use_is_refused(config, trained, tmp_path):
    assert written(config.out) <= {*FILES}
    (tmp_path / "file").touch()
    (tmp_path / "killed" / "checkpoints" / "0").mkdir(parents=True)
    with new_folder(tmp_path / "busy"):
        for out, message in [
            (config.out, "out holds a run: choose another --out."),
            (tmp_path / "killed", "killed holds a run: choose another --out."),
            (tmp_path / "busy", "another run is writing to .*busy: choose another --out."),
            (tmp_path / "file", "cannot use the folder .*file: File exists."),
        ]:
            with pytest.raises(SystemExit, match=message):
                word_vectors.main(dataclasses.replace(config, out=out))


@pytest.mark.parametrize(
    "option, message",
    [
        ("--rows=0", "--rows must be above 0, got 0."),
        (f"--batch-size={2**63}", f"--batch-size must be above 0 and below {2**31}, got {2**63}."),
        ("--min-length=7", "--max-length must be at least 7, got 6."),
        ("--threshold=nan", "--threshold must be above 0 and finite, got nan."),
        ("--learning-rate=1e39", "--learning-rate must be above 0 and at most 1e+38, got 1e+39."),
        ("--stepz=5", "Unrecognized options: --stepz"),
    ],
)
def test_a_setting_out_of_range_is_refused(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["word_vectors.py", option])
    with pytest.raises(SystemExit):
        from_command_line(Config, word_vectors.__doc__)
    out, err = capsys.readouterr()
    assert message in " ".join(err.replace("│", " ").split()) and out == ""


def test_help_explains_each_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["word_vectors.py", "--help"])
    with pytest.raises(SystemExit):
        from_command_line(Config, word_vectors.__doc__)
    shown = capsys.readouterr().out.replace(",", " ")
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')} " in shown


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_runs_from_any_folder(config, tmp_path):
    command = [sys.executable, str(EXAMPLES / "word_vectors.py"), f"--text={config.text}"]
    options = ["--steps=2", "--rows=500", "--words", "horse", "PLIERS"]
    environment = python_environment()
    done = subprocess.run(
        command + options, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "horse\n    before: " in done.stdout and "pliers\n    before: " in done.stdout
    assert (tmp_path / "runs" / "word_vectors" / "words.png").exists()
