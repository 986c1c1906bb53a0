"""Checks the HTML in a folder: links and anchors lead somewhere, pictures have alternative texts,
and nothing that a browser loads by itself comes from another host.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loaded, self.no_alt = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or values.get("name"))
        target = values.get("href") or values.get("src")
        if tag == "img" and not values.get("alt"):
            self.no_alt.append(target)
        if target:
            (self.links if tag == "a" else self.loaded).append(target)


def main(folder: Path) -> None:
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    problems = []
    for path, page in pages.items():
        problems += [(path, f"no alternative text: {target}") for target in page.no_alt]
        for target in page.loaded + page.links:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    problems.append((path, f"loaded from elsewhere: {target}"))
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not file.is_file():
                problems.append((path, f"leads nowhere: {target}"))
            elif anchor and file in pages and anchor not in pages[file].ids:
                problems.append((path, f"no such anchor: {target}"))
    for style in folder.rglob("*.css"):
        if "url(http" in style.read_text(encoding="utf-8"):
            problems.append((style, "loads from elsewhere"))
    for path, problem in problems:
        print(f"{path}: {problem}")
    if problems or not pages:
        raise SystemExit(f"{len(problems)} problems in {len(pages)} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
