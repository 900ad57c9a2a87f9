"""Hooks of mkdocs: pages out of other folders, links that leave docs/, docstrings as Markdown."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Files outside docs/ that are pages of the site.
PAGES = {
    "AGENTS.md": "map.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/FACTS.md": "facts.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^()#\s]+)((?:#[^()\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Make links between files of the repository links of the site, or of the code host."""
    uri = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        if "://" in found[2] or not (ROOT / target).exists():
            return found[0]
        inside = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is not None:
            return found[1] + posixpath.relpath(inside, posixpath.dirname(uri) or ".") + found[3]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{found[1]}{config.repo_url.rstrip('/')}/{kind}/main/{target}{found[3]}"

    return LINK.sub(link, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Show the examples of commands as code.

    Raises:
        PluginError: a private name stands in the reference.
    """
    text = re.sub(r"<[^>]+>", "", html)
    if page.file.src_uri.startswith("reference/") and (private := re.search(r"(?<!\w)_[A-Za-z]\w*", text)):
        raise PluginError(f"{page.file.src_uri}: expected public names, got {private[0]}")
    return re.sub(r"<p>Example:\n(.*?)</p>", r"<p>Example:</p>\n<pre><code>\1</code></pre>", html, flags=re.DOTALL)


class Docstrings(griffe.Extension):
    """Turn docstrings into Markdown: roles such as :func:`.gate.score_`, and lines that describe a field each."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r":(?:mod|func|class|meth):`[.~]*", "`", obj.docstring.value)
        if not obj.is_module:
            text = re.sub(r"^([a-z_]+(?:, [a-z_]+)*): ", r"- `\1`: ", text, flags=re.MULTILINE)
        obj.docstring.value = text
