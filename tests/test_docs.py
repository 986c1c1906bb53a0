"""The code, commands and links of README.md, docs/ and the other pages.

A block of Python starts afresh, unless the comment `<!-- continues -->` above it continues the
block before it. The comment `<!-- given: ... -->` holds code that a reader will have: tokens, say.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
from support.terminal import from_command_line

import eqx_embedding

from . import mutation
from .pages import last_blocks, MANUAL, NOTEBOOK, PAGES, read_page, ROOT, run_block


METHODS = types.FunctionType, property, classmethod
PYTHON = [(page, number) for page in MANUAL if page != NOTEBOOK for number in last_blocks(page)]


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
# treescope 0.1.10 reads every public name in NumPy, and NumPy 2.5 has deprecated one
@pytest.mark.filterwarnings("ignore:The chararray class is deprecated:DeprecationWarning")
@pytest.mark.parametrize("page, number", PYTHON)
def test_each_block_of_python_runs(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_block(page, number)


@pytest.mark.slow
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.exhaustive
def test_the_notebook_runs_in_a_few_steps(monkeypatch):
    monkeypatch.setitem(os.environ, "MPLBACKEND", "agg")
    steps = "STEPS = 800"
    assert steps in read_page(NOTEBOOK)
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    names, drawn = {}, 0
    for cell in cells:
        assert "outputs" not in cell or not cell["outputs"]
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(source.replace(steps, "STEPS = 3").replace("plt.show()", "plt.close()"), names)
            assert ("plt.show()" in source) == ("picture" in cell["metadata"])
            drawn += "picture" in cell["metadata"]
    assert drawn == 3


@pytest.mark.parametrize("page", MANUAL)
def test_each_block_says_what_it_is(page):
    fences = re.findall(r"^```(.*)$", read_page(page), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "sh", "text"} and set(fences[1::2]) <= {""}


# The README


def test_the_readme_is_short():
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", read_page("README.md"), flags=re.M | re.S)
    assert len(text.split()) <= 900


@pytest.mark.usefixtures("jax_defaults")
def test_before_and_after_give_the_same_loss():
    names = run_block("README.md", 1)
    np.testing.assert_allclose(names["same_loss"], names["loss"], rtol=1e-6)


@pytest.mark.usefixtures("jax_defaults")
def test_layers_of_equinox_become_tables():
    names = run_block("README.md", 4)
    vectors, tokens = names["vectors"], np.arange(5)
    np.testing.assert_array_equal(vectors, jax.vmap(names["embedding"])(tokens))
    expected = jax.vmap(names["linear"])(vectors)
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-5, atol=1e-5)


# Commands


def commands():
    """Each page with its commands: all in blocks, and those in the text that run Python."""
    for page in PAGES:
        text = read_page(page)
        lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        lines = lines.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:\S*/)?python[^`\n]* [^`\n]+)`", text)
        for line in lines:
            for command in line.split("&&"):
                command = " ".join(re.split("[>#&]", command)[0].split())
                if command:
                    yield page, command


COMMANDS = sorted(set(commands()))


class Parsed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("page, command", COMMANDS)
def test_each_command_has_what_it_names(page, command, monkeypatch):
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    if "install" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\.\[(\w+)\]", command)
        assert set(named) <= set(extras["optional-dependencies"])
    elif "benchmarks" in command:
        module = importlib.import_module(words[words.index("-m") + 1])
        arguments = words[words.index("-m") + 2 :]
        parse = argparse.ArgumentParser.parse_args

        def parse_only(parser, arguments=None, namespace=None):
            parse(parser, arguments, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        with pytest.raises(Parsed):
            module.main(arguments)
    elif "examples/" in command:
        script = next(word for word in words if word.startswith("examples/"))
        config = importlib.import_module(Path(script).stem).Config
        monkeypatch.setattr(sys, "argv", words[words.index(script) :])
        if "--help" not in words:
            from_command_line(config, None)
    else:
        files = [word for word in words if re.fullmatch(r"(tests|\.ci)/\S+", word)]
        assert all((ROOT / file).exists() for file in files)


def test_the_setup_command_for_tests_is_found_by_ci():
    [command] = re.findall("^python3 -m venv .*pytest$", read_page("README.md"), re.MULTILINE)
    for script in "run", "versions":
        assert "grep '^python3 -m venv .*pytest$' README.md" in (ROOT / ".ci" / script).read_text()
    assert '".[tests]"' in command


# Links


def links(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", read_page(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_somewhere(page):
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and re.fullmatch(r"[\w\-]+(\.[\w\-]+)+", parts.netloc)
            continue
        path = (ROOT / page).parent / parts.path if parts.path else ROOT / page
        assert path.exists(), f"{page}: {link}"
        assert not parts.fragment or parts.fragment in anchors(path), f"{page}: {link}"


def test_each_page_of_the_docs_is_in_the_index():
    assert documents() - {"index.md"} == {
        link for link in links("docs/index.md") if not link.startswith("..")
    }


# The site


def documents() -> set[str]:
    folder = ROOT / "docs"
    return {
        path.relative_to(folder).as_posix()
        for pattern in ("*.md", "*.ipynb")
        for path in folder.rglob(pattern)
    }


def test_each_page_is_in_the_navigation_of_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    found = re.findall(r"^ +- .*: (\S+\.md)$", text, re.MULTILINE)
    assert len(found) == len(set(found))
    outside = dict(re.findall(r'^    "(\S+)": "(\S+\.md)",$', read_page(".ci/site_pages.py"), re.M))
    assert set(outside) == set(PAGES) - set(MANUAL) | {"README.md"}
    inside = {page.replace(".ipynb", ".md") for page in documents()}
    assert set(found) == inside | set(outside.values())


def test_each_public_name_has_an_entry_on_the_site():
    entries = [
        name
        for page in MANUAL
        for name in re.findall(r"^::: eqx_embedding\.(\w+)$", read_page(page), re.MULTILINE)
    ]
    assert sorted(entries) == sorted(eqx_embedding.__all__)


def test_each_public_method_has_an_entry_on_the_site():
    for page in MANUAL:
        found = re.findall(
            r"^::: eqx_embedding\.(\w+)\n    options:\n      members: \[(.*)\]",
            read_page(page),
            re.MULTILINE,
        )
        for name, members in found:
            public = {
                member
                for member, value in vars(getattr(eqx_embedding, name)).items()
                if not member.startswith("_") and isinstance(value, METHODS)
            }
            assert set(members.split(", ")) - {"__call__"} == public


def test_each_method_named_on_a_page_exists():
    classes = [name for name in eqx_embedding.__all__ if name[0].isupper()]
    pattern = rf"(?<!pz\.nn\.)\b({'|'.join(classes)})\.([a-z]\w+)"
    for page in PAGES:
        for name, member in re.findall(pattern, read_page(page)):
            fields = getattr(eqx_embedding, name).__annotations__
            assert hasattr(getattr(eqx_embedding, name), member) or member in fields, page


def test_mutants_are_made_of_each_module():
    package = ROOT / "eqx_embedding"
    modules = {str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py")}
    assert set(mutation.TESTS) == modules
    assert all((ROOT / file).exists() for module in modules for file in mutation.files_of(module))
    named = re.findall(r"`(_[\w/]+)`", read_page("tests/MUTATION.md"))
    assert set(named) <= modules | {"_blockwise"}


@pytest.mark.slow
def test_each_test_in_the_fault_table_exists():
    folder = Path(__file__).parent
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (folder / "README.md").read_text())
    assert len(named) > 60
    for file, test in named:
        assert f"def {test}(" in (folder / file).read_text(), f"{file}::{test}"
