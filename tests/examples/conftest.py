"""A text and finished runs, of which each process makes one."""

import gc
import sys

import jax
import pytest
import train_lm
from support import terminal
from support.tokenizer import train_bpe

from .helpers import tiny


@pytest.fixture(scope="module")
def only_what_scripts_show():
    """As in the scripts, what follows from an error that orbax raises as well is not shown."""
    show = sys.unraisablehook
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "__unraisablehook__", show)
        context.setattr(sys, "unraisablehook", terminal.show_ignored)
        gc.freeze()  # what is there takes seconds to collect
        yield
        gc.collect()  # else what orbax left behind would be shown in another file
        gc.unfreeze()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    return path


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    config = tiny(text, tmp_path_factory.mktemp("runs") / "finished")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, train_lm.main(config)


@pytest.fixture(scope="session")
def bpe(text):
    return train_bpe(text.read_bytes(), 300)


@pytest.fixture(scope="session")
def finished_bpe(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bpe"
    config = tiny(text, out, tokenizer="bpe", vocab_size=300, steps=20, report_every=10)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, train_lm.main(config)
