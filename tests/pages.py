"""The pages of this repository, and the blocks of Python in them."""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
# What a user reads; and with it, what else has links and commands.
NOTEBOOK = "docs/quickstart.ipynb"
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
MANUAL = ["README.md", *DOCS, NOTEBOOK]
PAGES = [*MANUAL, "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += ["tests/README.md", "tests/MUTATION.md"]


def read_page(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n\n".join(map(_cell, json.loads(text)["cells"])) if page == NOTEBOOK else text


def _cell(cell: dict) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    return f"<!-- continues -->\n```python\n{text}\n```"


def blocks(page: str) -> list[tuple[str, str]]:
    """The comment above each block of Python, and its code."""
    pattern = r"(?:^<!-- (continues|given: .*?) -->\n+)?^```python\n(.*?)^```$"
    return re.findall(pattern, read_page(page), re.MULTILINE | re.DOTALL)


def last_blocks(page: str) -> list[int]:
    """Those that no other block continues. To run them is to run all."""
    comments = [comment for comment, _ in blocks(page)] + [""]
    return [n for n, after in enumerate(comments[1:]) if after != "continues"]


def run_block(page: str, number: int) -> dict:
    """Runs a block, and those that it continues; returns their names."""
    comment, source = blocks(page)[number]
    names = run_block(page, number - 1) if comment == "continues" and number > 0 else {}
    if comment.startswith("given: "):
        exec(comment.removeprefix("given: "), names)
    exec(compile(source, f"{page}, block {number}", "exec"), names)
    return names
