"""Text to tokens and back: by bytes, or by a tokenizer.json of Hugging Face."""

import hashlib
import re
from pathlib import Path

import numpy as np
from jaxtyping import Integer


class Tokenizer:
    """A token is a number, and stands for the bytes `pieces[token]`.

    `json` is the content of a byte-level tokenizer.json, such as those of GPT-2, Llama 3 and Qwen.
    Without it each of the 256 bytes is a token.
    """

    def __init__(self, json: str | None = None):
        self.json = json
        if json is None:
            self.name = "bytes"
            self.pieces = [bytes([byte]) for byte in range(256)]
            return
        import tokenizers

        self.name = f"sha256 {hashlib.sha256(json.encode()).hexdigest()}"
        self._encoder = tokenizers.Tokenizer.from_str(json)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        byte_of = {char: byte for byte, char in enumerate(_chars_of_bytes())}
        vocabulary = self._encoder.get_vocab(with_added_tokens=True)
        added = self._encoder.get_added_tokens_decoder()
        self.pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            spelled = index not in added and all(char in byte_of for char in token)
            self.pieces[index] = bytes(byte_of[c] for c in token) if spelled else token.encode()
        self._token_of_byte = {p[0]: i for i, p in enumerate(self.pieces) if len(p) == 1}

    def encode(self, data: bytes) -> Integer[np.ndarray, " tokens"]:
        """The tokens of `data`, which need not be UTF-8."""
        if self.json is None:
            return np.frombuffer(data, np.uint8)
        tokens = []
        # Every other part is a run of bytes that are not UTF-8, which Python reads as surrogates.
        parts = re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape"))
        for i, part in enumerate(parts):
            if i % 2 == 0:
                tokens += self._encoder.encode(part, add_special_tokens=False).ids
            else:
                stray = part.encode(errors="surrogateescape")
                tokens += [self._token_of_byte[b] for b in stray if b in self._token_of_byte]
        return np.array(tokens, np.int32)

    def decode(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        return b"".join(self.pieces[token] for token in tokens)


def _chars_of_bytes() -> list[str]:
    """The visible characters that stand for the bytes 0 to 255 in byte-level tokenizers."""
    from tokenizers.pre_tokenizers import ByteLevel

    chars = sorted(ByteLevel.alphabet())
    themselves = {ord(char): char for char in chars if ord(char) < 256}
    others = (char for char in chars if ord(char) >= 256)
    return [themselves.get(byte) or next(others) for byte in range(256)]


def train_bpe(data: bytes, vocab_size: int) -> Tokenizer:
    """Byte pair encoding: the 256 bytes and the most frequent pieces, up to `vocab_size`."""
    from tokenizers import decoders, models, pre_tokenizers, Tokenizer as HuggingFace, trainers

    encoder = HuggingFace(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=_chars_of_bytes(),
        show_progress=False,
    )
    encoder.train_from_iterator([data.decode(errors="ignore")], trainer)
    return Tokenizer(encoder.to_str())


def add_tokens(tokenizer: Tokenizer, pieces: list[bytes]) -> Tokenizer:
    """A tokenizer with `pieces`, which are UTF-8, as new tokens, wherever they are in a text.

    They get the next numbers. All other text is tokenized as before.
    """
    from tokenizers import AddedToken, Tokenizer as HuggingFace

    if tokenizer.json is None:
        raise ValueError("tokens cannot be added to a tokenizer of bytes.")
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
        raise SystemExit(f"cannot read the tokenizer {path}: {error.strerror}.") from None
    except Exception as error:  # tokenizers raises nothing more specific
        raise SystemExit(f"{path} is not a usable tokenizer.json: {error}.") from None
