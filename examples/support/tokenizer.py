"""Text to tokens and back: bytes, or what a tokenizer.json of Hugging Face says."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer


PIECE = 2**14  # characters of text that `tokenizers` gets at once, where that changes no token


class Tokenizer:
    """A token is a number, and stands for the bytes `pieces[token]`.

    `content` is that of a byte-level tokenizer.json, such as those of GPT-2, Llama 3 and Qwen.
    Without it each of the 256 bytes is a token.
    """

    def __init__(self, content: str | None = None):
        self.json = content
        if content is None:
            self.name = "bytes"
            self.pieces = [bytes([byte]) for byte in range(256)]
            return
        import tokenizers

        self.name = f"sha256 {hashlib.sha256(content.encode()).hexdigest()}"
        self._encoder = tokenizers.Tokenizer.from_str(content)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        if hasattr(self._encoder.model, "dropout"):  # of merges, which draws other tokens each time
            self._encoder.model.dropout = None
        byte_of = {char: byte for byte, char in enumerate(_chars_of_bytes())}
        vocabulary = self._encoder.get_vocab(with_added_tokens=True)
        added = self._encoder.get_added_tokens_decoder()
        self.names = frozenset(vocabulary)
        self.pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            spelled = index not in added and all(char in byte_of for char in token)
            self.pieces[index] = bytes(byte_of[c] for c in token) if spelled else token.encode()
        self._token_of_byte = {p[0]: i for i, p in enumerate(self.pieces) if len(p) == 1}
        # what `tokenizers` has read: files of GPT-2's time leave out what has a default
        self._may_cut = _cuts_before_spaces(self._encoder.to_str())

    def encode(self, data: bytes) -> Integer[np.ndarray, " tokens"]:
        """The tokens of `data`, of which nothing is lost, be it UTF-8 or not."""
        if self.json is None:
            return np.frombuffer(data, np.uint8)
        tokens = [np.zeros(0, np.int32)]
        # Every other part is a run of bytes that are no UTF-8, which Python marks by surrogates.
        parts = re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape"))
        for i, part in enumerate(parts):
            if i % 2 == 0:
                for piece in _cut(part) if self._may_cut else [part]:
                    ids = self._encoder.encode(piece, add_special_tokens=False).ids
                    tokens.append(np.array(ids, np.int32))
            else:
                stray = part.encode(errors="surrogateescape")
                ids = [self._token_of_byte[b] for b in stray if b in self._token_of_byte]
                tokens.append(np.array(ids, np.int32))
        return np.concatenate(tokens)

    def decode(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        if self.json is None:
            return tokens.astype(np.uint8).tobytes()
        # In parts, because Python holds 88 bytes for each piece until all are joined
        parts = (tokens[i : i + PIECE].tolist() for i in range(0, len(tokens), PIECE))
        return b"".join(b"".join(self.pieces[token] for token in part) for part in parts)


def _cut(text: str) -> Iterator[str]:
    """Pieces of `text`, which begin with a space or a line break behind another character."""
    start = 0
    for space in re.finditer(r"(?<=\S)[ \n]", text):
        if space.start() - start >= PIECE:
            yield text[start : space.start()]
            start = space.start()
    yield text[start:]


def _short_pieces(text: str) -> Iterator[str]:
    """The same, where words and spaces of more than 1024 characters are cut as well.

    The time that training takes grows with the square of the longest word, such as a genome.
    """
    for piece in _cut(text):
        start = 0
        for long in re.finditer(r"\S{1024}(?=\S)|\s{1024}(?=\s)", piece):
            yield piece[start : long.end()]
            start = long.end()
        yield piece[start:]


def _cuts_before_spaces(tokenizer_json: str) -> bool:
    """Whether no token of this tokenizer.json reaches from a character to a space behind it.

    True of byte pair encoding after GPT-2's regular expression, which ends there what it finds.
    """
    content = json.loads(tokenizer_json)
    before = content["pre_tokenizer"] or {}
    return (
        content["model"]["type"] == "BPE"
        and content["normalizer"] is None
        and before.get("type") == "ByteLevel"
        and before["use_regex"]
        and not before["add_prefix_space"]
        and not any(
            re.search(r"\s", token["content"]) or token["lstrip"] or token["rstrip"]
            for token in content["added_tokens"]
        )
    )


def _chars_of_bytes() -> list[str]:
    """How byte-level tokenizers spell the bytes 0 to 255, so that all of them can be seen."""
    from tokenizers.pre_tokenizers import ByteLevel

    chars = sorted(ByteLevel.alphabet())
    themselves = {ord(char): char for char in chars if ord(char) < 256}
    others = (char for char in chars if ord(char) >= 256)
    return [themselves.get(byte) or next(others) for byte in range(256)]


def train_bpe(data: bytes, vocab_size: int) -> Tokenizer:
    """Byte pair encoding: the 256 bytes, and pieces that occur most often, up to `vocab_size`."""
    from tokenizers import decoders, models, pre_tokenizers, Tokenizer as HuggingFace, trainers

    encoder = HuggingFace(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 256 + len(data)),  # there cannot be more, and it makes room
        min_frequency=2,
        initial_alphabet=_chars_of_bytes(),
        show_progress=False,
    )
    encoder.train_from_iterator(_short_pieces(data.decode(errors="ignore")), trainer)
    return Tokenizer(encoder.to_str())


def add_tokens(tokenizer: Tokenizer, pieces: list[bytes]) -> Tokenizer:
    """A tokenizer that takes `pieces`, which are UTF-8, as tokens wherever they stand in a text.

    They come after the tokens that there are. All other text is cut as before. No piece may be one
    of `tokenizer.names`: "é" is the name of the byte 0xe9 there, which would become the piece.
    """
    from tokenizers import AddedToken, Tokenizer as HuggingFace

    if tokenizer.json is None:
        raise ValueError("the tokens of this tokenizer are bytes, and always will be.")
    encoder = HuggingFace.from_str(tokenizer.json)
    encoder.add_tokens([AddedToken(piece.decode(), normalized=False) for piece in pieces])
    return Tokenizer(encoder.to_str())


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json, or stops the program with one line."""
    try:
        tokenizer = Tokenizer(path.read_text("utf-8"))
        tokenizer.encode(bytes(range(256)))
        return tokenizer
    except OSError as error:
        raise SystemExit(
            f"cannot read the tokenizer {path}: {error.strerror}. Give bytes, bpe, or the path "
            "of a tokenizer.json."
        ) from None
    except Exception as error:  # tokenizers raises no class of its own
        raise SystemExit(f"cannot use {path} as a tokenizer.json: {error}.") from None


def named_tokenizer(name: str) -> Tokenizer | None:
    """The one that --tokenizer names, or None if it is to be trained."""
    if name == "bpe":
        return None
    return Tokenizer() if name == "bytes" else read_tokenizer(Path(name))
