"""What mkdocs needs besides ``docs/``: pages from outside of it, and the reference.

A hook of mkdocs (``mkdocs.yml``). The README becomes the home page, and CONTRIBUTING, SECURITY, the
changelog and ``tools/README.md`` pages of their own; links to them follow. The reference lists what
``pocketize``, ``pocketize.passes`` and ``pocketize.zoo`` export, for mkdocstrings to fill in. Each
tutorial can be downloaded as a Jupyter notebook.
"""

from __future__ import annotations

import importlib
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: Pages of the site, and the files that they are made of.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "tools.md": "tools/README.md",
    "pages.md": "docs/README.md",
}
_BLOCK = re.compile(r"^```python\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside, and the reference."""
    for page, source in PAGES.items():
        found = files.get_file_from_path(source.removeprefix("docs/"))
        if found is not None:
            files.remove(found)
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_links(text, source, page)))
    files.append(File.generated(config, "reference.md", content=_reference()))
    for tutorial in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
        made = json.dumps(_notebook(tutorial.read_text(encoding="utf-8")), indent=1)
        files.append(File.generated(config, f"tutorials/{tutorial.stem}.ipynb", content=made))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links out of ``docs/`` lead to the pages that are made of their targets."""
    path = page.file.src_uri
    if path in PAGES:
        return markdown
    if path.startswith("tutorials/"):
        name = posixpath.basename(path).replace(".md", ".ipynb")
        markdown += f"\n[Download this page as a notebook]({name})\n"
    return _links(markdown, f"docs/{path}", path)


def _links(text: str, source: str, page: str) -> str:
    """Rewrite the relative links of a file for the page that it becomes."""
    pages = {file: made for made, file in PAGES.items()}

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        made = pages.get(target, target.removeprefix("docs/"))
        if target == "LICENSE" or target == "docs/results":
            made = {"LICENSE": "index.md", "docs/results": "results/training-memory.md"}[target]
        return posixpath.relpath(made, posixpath.dirname(page) or ".")

    return _LINK.sub(moved, text)


def _notebook(page: str) -> dict[str, Any]:
    """Make a notebook of a page, a cell of each block of Python and of each text between."""
    cells: list[dict[str, Any]] = []
    for index, part in enumerate(_BLOCK.split(page)):
        cell = {"metadata": {}, "source": part.strip().splitlines(keepends=True)}
        if index % 2:
            cell |= {"cell_type": "code", "outputs": [], "execution_count": None}
        else:
            cell["cell_type"] = "markdown"
        if cell["source"]:
            cells.append(cell)
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def _reference() -> str:
    lines = ["# Reference", "", "This page describes all public names.", ""]
    for package in "pocketize", "pocketize.passes", "pocketize.zoo":
        module = importlib.import_module(package)
        lines += [f"## {package}", ""]
        for name in sorted(n for n in module.__all__ if not n.startswith("_")):
            made = getattr(module, name)
            if hasattr(made, "__qualname__"):
                lines += [f"::: {made.__module__}.{made.__qualname__}", ""]
    return "\n".join(lines)
