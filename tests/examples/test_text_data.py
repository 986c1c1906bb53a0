"""Texts that cannot be used, windows of a text, and baselines."""

import math
from pathlib import Path

import numpy as np
import pytest
import train_lm
from support import text_data

from .helpers import tiny


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


def test_a_text_that_cannot_be_used_is_refused_in_one_line(text, tmp_path):
    for name, data, message in [
        ("missing", None, "cannot read the text .*missing: No such file or directory"),
        ("empty", b"", "empty is empty"),
        ("short", b"too short" * 5, "short is too short: its last tenth has 5 tokens"),
    ]:
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(SystemExit, match=message) as error:
            train_lm.main(tiny(path, tmp_path / "out"))
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="Is a directory"):
        train_lm.main(tiny(tmp_path, tmp_path / "out"))
    with pytest.raises(SystemExit, match="cannot read the text x*: File name too long"):
        train_lm.main(tiny(Path("x" * 300), tmp_path / "out"))
    with pytest.raises(SystemExit, match="/dev/zero is a device, which may have no end"):
        train_lm.main(tiny(Path("/dev/zero"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_last_tenth_is_held_out_up_to_128_kib():
    for size, held_out in (19, 2), (1_310_720, 131_072), (1_310_730, 131_072):
        text = text_data.cut_text("text", bytes(size - held_out) + b"h" * held_out)
        assert text.train.tolist() == [0] * (size - held_out)
        assert text.held_out.tobytes() == b"h" * held_out


def test_windows_ask_for_each_byte_but_the_first_exactly_once():
    values = np.arange(100, 131, dtype=np.uint8)
    inputs, targets, weights = text_data.windows(values, length=4, batch_size=3)
    assert inputs.shape == targets.shape == weights.shape == (3, 3, 4)
    real = weights.reshape(-1) == 1
    np.testing.assert_array_equal(targets.reshape(-1)[real], values[1:])
    np.testing.assert_array_equal(inputs.reshape(-1)[real], values[:-1])


def test_baselines_are_those_of_counting():
    train = np.frombuffer(b"ab" * 500, np.uint8)
    text = text_data.Text("ab", train, np.frombuffer(b"ab" * 50, np.uint8), "")
    reached = text_data.baselines(text)
    assert reached["unigram"] == pytest.approx(-math.log2(501 / 1256))
    a_then_b = (500 + 501 / 1256) / 501
    b_then_a = (499 + 501 / 1256) / 500
    expected = -(50 * math.log2(a_then_b) + 49 * math.log2(b_then_a)) / 99
    assert reached["bigram"] == pytest.approx(expected)
    assert 0 < reached["zlib"] < 8


def test_a_text_too_short_in_tokens_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"again and " * 50)
    with pytest.raises(SystemExit, match="last tenth has .* tokens, and one sequence needs 31"):
        train_lm.main(
            tiny(tmp_path / "text", tmp_path / "out", tokenizer="bpe", sequence_length=30)
        )
    assert not (tmp_path / "out").exists()
