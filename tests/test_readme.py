"""Every line of Python in README.md runs, and says the truth about penzai.

A block of Python starts afresh, unless the comment `<!-- continues -->` above it continues the
block before it. The comment `<!-- given: ... -->` holds code that a reader will have: tokens, say.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penzai import pz

from eqx_embedding import EmbeddingTable


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(
    r"(?:^<!-- (continues|given: .*?) -->\n+)?^```python\n(.*?)^```$",
    README,
    re.MULTILINE | re.DOTALL,
)


def section(title: str) -> str:
    return re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of each row of the tables of a section, without their headings."""
    text = section(title)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    headings = {i - 1 for i, line in enumerate(lines) if line.startswith("| ---")}
    return [
        [cell.strip() for cell in line[1:-1].split("|")]
        for i, line in enumerate(lines)
        if i not in headings and i - 1 not in headings
    ]


def code(cell: str) -> str:
    """The code at the end of a cell, after what is said of it."""
    found = re.search(r"`([^`]+)`$", cell)
    assert found is not None, f"no code at the end of {cell!r}"
    return found[1]


pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    # treescope 0.1.10 touches every public name of numpy, and numpy 2.5 has deprecated one of them
    pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning"),
]


def run_block(number: int) -> dict:
    comment, source = BLOCKS[number]
    names = run_block(number - 1) if comment == "continues" else {}
    if comment.startswith("given: "):
        exec(comment.removeprefix("given: "), names)
    exec(source, names)
    return names


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_each_block_of_python_in_the_readme_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block(number)


# Coming from haliax or flax


@pytest.mark.parametrize("row", rows("Coming from haliax or flax"), ids=lambda row: row[2])
def test_what_to_write_for_haliax_or_flax_runs(row):
    names = {"vocab_size": 11, "key": jax.random.key(0)}
    exec("import jax, jax.numpy as jnp\nfrom eqx_embedding import *", names)
    names["table"] = EmbeddingTable(jnp.ones((11, 8)), ("vocabulary", "embedding"))
    names["tokens"], names["hidden"] = jnp.zeros(3, "int32"), jnp.ones((3, 8))
    eval(code(row[2]), names)


# Coming from penzai


PENZAI = rows("Coming from penzai")

# Where the two differ, and each result says so in its own way.
DIFFERENT = {
    "`name`": ("tokens.embeddings", ".embeddings"),
    "`init_base_rng=None`": ("ParameterSlot", "ShapeDtypeStruct"),
    "`attributes_dict`": ("Parameter(label='tokens.embeddings'", "'padding_rows': 0"),
    "`tree_flatten`": ("child_field_names=['embeddings']", "('vocabulary', 'embedding')"),
    "`tree_flatten_with_keys`": ("GetAttrKey(name='embeddings')", "GetAttrKey(name='embeddings')"),
    "`treescope_color`": ("transparent", "<treescope-"),
    "in treescope": ("vocabulary:50, embedding:8", "axis_names=('vocabulary', 'embedding')"),
}


@pytest.fixture(scope="module")
def penzai_names():
    [number] = [i for i, (_, source) in enumerate(BLOCKS) if "theirs = pz.nn" in source]
    return run_block(number)


def plain(value: Any) -> tuple[Any, Any]:
    """A table, parameter or named array as the sizes of its axes, sorted by name, and numbers."""
    if isinstance(value, pz.nn.EmbeddingTable):
        value = value.embeddings
    if isinstance(value, pz.Parameter | pz.ParameterValue):
        value = value.value
    if isinstance(value, EmbeddingTable):
        value = pz.nx.wrap(value.embeddings).tag(*value.axis_names)
    if isinstance(value, pz.nx.NamedArray):
        axes = dict(sorted(value.named_shape.items()))
        return axes, value.unwrap(*axes)
    return type(value), value


@pytest.mark.parametrize("row", PENZAI, ids=lambda row: row[0].strip("`"))
def test_what_to_write_for_penzai_gives_the_same_result(row, penzai_names):
    theirs, ours = (eval(code(cell), dict(penzai_names)) for cell in row[1:])
    if row[0] in DIFFERENT:
        their_sign, our_sign = DIFFERENT[row[0]]
        assert their_sign in str(theirs)
        assert our_sign in str(ours)
        return
    their_axes, theirs = plain(theirs)
    our_axes, ours = plain(ours)
    assert their_axes == our_axes
    if isinstance(ours, jax.Array):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    else:
        assert ours == theirs


def test_the_section_on_penzai_covers_every_argument_attribute_and_method():
    table = pz.nn.EmbeddingTable
    members = {name for name in dir(table) if not name.startswith("_")} - {"from_config"}
    members |= set(inspect.signature(table.from_config).parameters)
    members |= {"embeddings", "vocabulary_axis"}
    layers = {"EmbeddingLookup.table", "EmbeddingLookup.__call__"}
    layers |= {"EmbeddingDecode.table", "EmbeddingDecode.__call__"}
    assert members | layers <= {row[0].strip("`") for row in PENZAI}


def test_treescope_shows_the_names_of_the_axes(penzai_names):
    import treescope

    ours = penzai_names["ours"]
    assert "axis_names=('vocabulary', 'embedding')" in treescope.render_to_text(ours)
    named = pz.nx.wrap(ours.embeddings).tag(*ours.axis_names)
    assert "vocabulary:50, embedding:8" in treescope.render_to_text(named)
