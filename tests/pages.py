"""The pages of this repository, and the blocks of Python in them."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
# What a user reads; and with it, what else has links and commands.
MANUAL = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += ["tests/README.md", "tests/MUTATION.md"]


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The comment above each block of Python, and its code."""
    pattern = r"(?:^<!-- (continues|given: .*?) -->\n+)?^```python\n(.*?)^```$"
    return re.findall(pattern, read_page(page), re.MULTILINE | re.DOTALL)


def run_block(page: str, number: int) -> dict:
    """Runs a block, and those that it continues; returns its names."""
    comment, source = blocks(page)[number]
    names = run_block(page, number - 1) if comment == "continues" else {}
    if comment.startswith("given: "):
        exec(comment.removeprefix("given: "), names)
    exec(source, names)
    return names
