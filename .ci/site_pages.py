"""The pages of the site that are not Markdown in `docs/`. MkDocs calls these functions.

Pages are written for GitHub, with relative links to any file of the repository. The site has the
pages of `PAGES` as well, and one page of text for each other file that a page links to. The
quickstart is a notebook without outputs, which is run here. Names of JAX and Equinox in the API
become links to their documentation.
"""

import contextlib
import functools
import io
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib
import matplotlib.pyplot as plt
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files


matplotlib.use("agg")

ROOT = Path(__file__).parent.parent
PAGES = {  # path in the repository: path in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples/index.md",
    "tests/README.md": "tests/index.md",
    "tests/MUTATION.md": "tests/mutation.md",
}
NOTEBOOK = "docs/quickstart.ipynb"
IMAGES = ".png", ".svg"
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
FOREIGN = re.compile(r"<code>((jax|eqx|equinox)\.[\w.]+)</code>")
JAX = "https://docs.jax.dev/en/latest"
EQUINOX = "https://docs.kidger.site/equinox/api"
EQUINOX_PAGES = {  # one page has many names
    "error_if": "errors",
    "filter_eval_shape": "transformations",
    "filter_jit": "transformations",
    "is_inexact_array": "manipulation",
    "nn.Sequential": "nn/sequential",
    "nn.Shared": "nn/shared",
    "partition": "manipulation",
}
CELL = re.compile(r"<td.*?</td>", re.DOTALL)
LONG = re.compile(r"(?<=<code>)[^<]{24,}(?=</code>)")
BREAK = re.compile(r"(::|[_./])(?=\w)")  # where a long name in a table may go on in another line
HIDDEN = re.compile(r"^<!-- only in the repository -->.*?<!-- end -->\n", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    files.remove(files.src_uris["index.md"])  # the README, and the navigation, say the same
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=_read(path)))
    files.remove(files.src_uris["quickstart.ipynb"])
    page, pictures = _run(_read(NOTEBOOK))
    files.append(File.generated(config, "quickstart.md", content=page))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))
    for path in sorted({path for file in list(files) for path in _linked(file)}):
        uri = _site_uri(path)
        if uri is None or uri in files.src_uris:
            continue
        if path.endswith(IMAGES):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, uri, content=_as_page(path)))
    return files


def on_post_build(config: Any) -> None:
    (Path(config["site_dir"]) / "404.html").unlink()  # it needs a server, and to be at its root


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)
    if folder == "tests" or folder.startswith("source"):
        page.meta["search"] = {"boost": 0.1}  # a guide says it better

    def link(path: str, fragment: str) -> str | None:
        uri = _site_uri(path)
        if uri is None:
            return None
        return posixpath.relpath(uri, folder) + (f"#{fragment}" if fragment else "")

    return _map_links(HIDDEN.sub("", markdown), _repository_path(page.file.src_uri), link)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("api/"):
        html = FOREIGN.sub(lambda name: f'<a href="{_foreign(name[1])}">{name[0]}</a>', html)
    return CELL.sub(
        lambda cell: LONG.sub(lambda name: BREAK.sub(r"\1<wbr>", name[0]), cell[0]), html
    )


def _foreign(name: str) -> str:
    """Where JAX or Equinox documents a name of theirs."""
    module, _, rest = name.partition(".")
    if module != "jax":
        if rest not in EQUINOX_PAGES:
            raise PluginError(f"EQUINOX_PAGES of {__file__} does not say on which page {name} is.")
        return f"{EQUINOX}/{EQUINOX_PAGES[rest]}/#equinox.{rest}"
    if name.startswith("jax.sharding."):
        return f"{JAX}/jax.sharding.html#{name}"
    if name == "jax.nn.initializers":
        return f"{JAX}/{name}.html"
    return f"{JAX}/_autosummary/{name}.html"


@functools.cache
def _run(source: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown with what its code prints and draws; and the pictures by name."""
    names: dict[str, Any] = {}
    page, pictures = [], {}
    with matplotlib.rc_context(fname=str(ROOT / ".ci/matplotlibrc")):
        for cell in json.loads(source)["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                page.append(text)
                continue
            page.append(f"```python\n{text}\n```")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(text, names)
            if printed.getvalue():
                page.append(f"```text\n{printed.getvalue()}```")
            if plt.get_fignums():
                name, file = f"images/quickstart_{len(pictures)}.png", io.BytesIO()
                plt.savefig(file, bbox_inches="tight")
                plt.close("all")
                pictures[name] = file.getvalue()
                page.append(f"![{cell['metadata']['picture']}]({name})")
    return "\n\n".join(page), pictures


def _linked(file: File) -> list[str]:
    """The files of the repository that a page links to."""
    found = []
    if file.is_documentation_page():
        path = _repository_path(file.src_uri)
        _map_links(file.content_string, path, lambda path, _: found.append(path))
    return found


def _map_links(markdown: str, path: str, fn: Callable[[str, str], str | None]) -> str:
    """Replaces relative links of a page to other files. Where `fn` returns `None`, text is left."""

    def replace(match: re.Match) -> str:
        text, target = match.groups()
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return match[0]
        link = fn(
            posixpath.normpath(posixpath.join(posixpath.dirname(path), parts.path)), parts.fragment
        )
        return text[1:-1] if link is None else f"{text}({link})"

    pieces = FENCE.split(markdown)
    return "".join(piece if FENCE.match(piece) else LINK.sub(replace, piece) for piece in pieces)


def _repository_path(uri: str) -> str:
    if uri == "quickstart.md":
        return NOTEBOOK
    return {uri: path for path, uri in PAGES.items()}.get(uri, f"docs/{uri}")


def _site_uri(path: str) -> str | None:
    if path == NOTEBOOK:
        return "quickstart.md"
    if path == "docs/index.md":
        return "index.md"
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(IMAGES):
        return path
    return f"source/{path}.md" if (ROOT / path).is_file() else None


def _as_page(path: str) -> str:
    language = "python" if path.endswith(".py") else "text"
    return (
        f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n~~~~~~{language}\n{_read(path)}~~~~~~\n"
    )


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")
