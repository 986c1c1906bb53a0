"""Tokenizers of bytes, trained ones, and those of files."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
import tokenizers
import train_lm
from support import text_data, tokenizer as tokenizer_module
from support.tokenizer import add_tokens, read_tokenizer, Tokenizer, train_bpe

from .helpers import tiny


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


TEXTS = [
    b"",
    b"The list of the elements.\n\n\tThe end.\r\n",
    "Größe, 中文, 🙂, e\u0301 and \u00e9 <|endoftext|>".encode(),
    "中".encode()[1:] + b" is cut in two " + "中".encode()[:2],
    bytes(range(256)) * 2,
    np.random.default_rng(0).bytes(500),
]


@pytest.mark.parametrize("data", TEXTS)
def test_every_byte_survives_a_tokenizer(bpe, data):
    for tokenizer in Tokenizer(), bpe, Tokenizer(bpe.json):
        assert tokenizer.decode(tokenizer.encode(data)) == data


def test_pieces_are_those_of_hugging_face(text, bpe):
    theirs = tokenizers.Tokenizer.from_str(bpe.json)
    assert 256 < len(bpe.pieces) <= 300 and b" times " not in bpe.pieces
    assert b" times" in bpe.pieces and " is" in map(bytes.decode, bpe.pieces[256:])
    tokens = bpe.encode(text.read_bytes())
    assert list(tokens) == theirs.encode(text.read_text()).ids
    assert bpe.decode(tokens).decode() == theirs.decode(list(tokens))
    assert len(tokens) < 0.6 * len(text.read_bytes())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_decoding_holds_little_more_than_the_text(bpe, kind):
    """Python holds 88 bytes for each piece that it joins."""
    tokenizer, data = Tokenizer() if kind == "bytes" else bpe, b"3 times 3 is 9.\n" * 20_000
    tokens = tokenizer.encode(data)
    tracemalloc.start()
    try:
        assert tokenizer.decode(tokens) == data
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data) + 100 * tokenizer_module.PIECE


def test_a_text_is_cut_where_no_token_reaches(bpe):
    """A long text goes to `tokenizers` in pieces, with the tokens of the whole."""
    words = ["  two ", "\n\n", "it's", " 中文", "\t!", " a\n", "\r\n x", "42 ", "\x1c", "\xa0b "]
    text = "".join(np.random.default_rng(0).choice(words, 40_000))
    pieces = list(tokenizer_module._cut(text))
    assert len(pieces) > 5 and "".join(pieces) == text
    assert max(map(len, pieces)) < 2 * tokenizer_module.PIECE
    whole = tokenizers.Tokenizer.from_str(bpe.json).encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(bpe.encode(text.encode()), whole)


def test_words_of_any_length_are_learned_from_in_short_pieces():
    """The time of `tokenizers` grows with the square of the longest word."""
    word = "".join(np.random.default_rng(0).choice([*"ACGT"], 100_000))
    pieces = list(tokenizer_module._short_pieces(f"a genome: {word} ends"))
    assert "".join(pieces) == f"a genome: {word} ends"
    assert max(len(part) for piece in pieces for part in piece.split()) == 1024
    spaces = " " * 50_000 + "\n" * 50_000
    pieces = list(tokenizer_module._short_pieces(f"a{spaces}b"))
    assert "".join(pieces) == f"a{spaces}b" and max(map(len, pieces)) < 2100
    tokenizer = train_bpe(word.encode(), 300)
    assert tokenizer.decode(tokenizer.encode(word.encode())) == word.encode()
    assert len(tokenizer.pieces) == 300 and len(tokenizer.encode(word.encode())) < len(word) / 2


def test_a_tokenizer_with_dropout_gives_the_same_tokens_each_time(bpe):
    content = json.loads(bpe.json)
    content["model"]["dropout"] = 0.5
    tokenizer, text = Tokenizer(json.dumps(content)), b"the rest of the world " * 20
    np.testing.assert_array_equal(tokenizer.encode(text), bpe.encode(text))


def test_a_tokenizer_of_the_time_of_gpt2_leaves_out_what_has_a_default(bpe, tmp_path):
    content = json.loads(bpe.json)
    del content["model"]["type"], content["pre_tokenizer"]["use_regex"], content["normalizer"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    old = read_tokenizer(tmp_path / "old.json")
    assert old.pieces == bpe.pieces and old._may_cut


def test_a_text_is_not_cut_for_tokens_that_reach_over_spaces(bpe):
    assert bpe._may_cut
    for added in "of the", "<a> ":
        assert not add_tokens(bpe, [added.encode()])._may_cut
    assert add_tokens(bpe, [b"<|endoftext|>"])._may_cut
    other = tokenizers.Tokenizer.from_str(bpe.json)
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
    assert not Tokenizer(other.to_str())._may_cut


def test_a_vocabulary_larger_than_memory_is_as_large_as_the_text_allows():
    assert len(train_bpe(b"one one two two", 10**15).pieces) < 256 + 15


def test_a_tokenizer_of_bytes_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    np.testing.assert_array_equal(Tokenizer().encode(b"\x00a\xff"), [0, 97, 255])
    with pytest.raises(ImportError):
        train_bpe(b"text", 300)


def test_a_file_is_the_same_tokenizer_by_its_content(text, bpe, tmp_path):
    path, copy = tmp_path / "tokenizer.json", tmp_path / "copy.json"
    path.write_text(bpe.json)
    copy.write_text(bpe.json)
    config, read = tiny(text, tmp_path), text_data.read_text(text)
    assert config.identity(read, read_tokenizer(path)) == config.identity(
        read, read_tokenizer(copy)
    )
    copy.write_text(train_bpe(text.read_bytes(), 299).json)
    assert config.identity(read, read_tokenizer(path)) != config.identity(
        read, read_tokenizer(copy)
    )


def test_a_tokenizer_that_cannot_be_used_is_refused_in_one_line(text, bpe, tmp_path):
    lower = tokenizers.Tokenizer.from_str(bpe.json)
    lower.normalizer = tokenizers.normalizers.Replace("times", "x")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"is": 0}, unk_token="?"))
    for name, content, message in [
        (
            "missing",
            None,
            "cannot read the tokenizer .*missing: No such file or directory. "
            "Give bytes, bpe, or the path of a tokenizer.json",
        ),
        ("empty", "", "cannot use .*empty as a tokenizer.json: EOF"),
        ("json", "{}", "cannot use .*json as a tokenizer.json: Model missing"),
        ("words", words.to_str(), r"cannot use .*words as a tokenizer.json: .*\[UNK\]"),
        ("lower", lower.to_str(), "does not reproduce .*text.txt byte for byte"),
    ]:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit, match=message) as error:
            train_lm.main(tiny(text, tmp_path / "out", tokenizer=str(tmp_path / name)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
