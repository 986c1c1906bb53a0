"""Prints, for pip, the lowest versions that pyproject.toml admits: each lower bound as the version.

A dependency without a bound is an error, for it has no lowest version.
"""

import re
import tomllib
from pathlib import Path


def main():
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    # `dev` is tools, whose newest versions are wanted
    for needed in project["dependencies"] + sum((extras[e] for e in extras if e != "dev"), []):
        if not needed.startswith(project["name"]):
            found = re.fullmatch(r"([\w-]+)>=([\w.]+)", needed)
            if found is None:
                raise SystemExit(f"{needed!r} in pyproject.toml has no lower bound `>=`.")
            print("==".join(found.groups()))


if __name__ == "__main__":
    main()
