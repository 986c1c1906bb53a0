"""What docs/ says to users of penzai, haliax and flax is so."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penzai import pz

from eqx_embedding import EmbeddingTable

from .pages import read_page, run_block


pytestmark = [
    pytest.mark.usefixtures("jax_defaults"),
    # treescope 0.1.10 reads every public name in NumPy, and NumPy 2.5 has deprecated one
    pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning"),
]


def rows(page: str) -> list[list[str]]:
    """The cells of each row of the tables of a page, without their headings."""
    lines = [line for line in read_page(page).splitlines() if line.startswith("|")]
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


# haliax and flax


@pytest.mark.parametrize("row", rows("docs/from_haliax_and_flax.md"), ids=lambda row: row[2])
def test_what_to_write_for_haliax_or_flax_runs(row):
    names = {"vocab_size": 11, "key": jax.random.key(0)}
    exec("import jax, jax.numpy as jnp\nfrom eqx_embedding import *", names)
    names["table"] = EmbeddingTable(jnp.ones((11, 8)), ("vocabulary", "embedding"))
    names["tokens"], names["hidden"] = jnp.zeros(3, "int32"), jnp.ones((3, 8))
    eval(code(row[2]), names)


# penzai


PENZAI = rows("docs/from_penzai.md")

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
    return run_block("docs/from_penzai.md", 0)


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
def test_what_to_write_for_penzai_gives_the_same(row, penzai_names):
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


def test_the_page_covers_each_member_of_penzais_table():
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
