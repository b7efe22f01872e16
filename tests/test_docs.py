"""The documentation names only what exists: links, files, modules and their contents."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layering import BETWEEN, ENGINE

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "tools" / "README.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
#: Where a path in a page may start.
STARTS = ("", "tools", "docs", "docs/results", "rewrite", "passes", "tests")
#: Files that examples make, and placeholders.
MADE = re.compile(r"mypackage|<|>|\*|^/|^runs/|^images/|^masks/|^DATA|^build/|^PIL")

_CODE = re.compile(r"`([^`\n]+)`")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w./])((?:[\w-]+/)+(?:[\w.-]+\.(?:py|md|toml|svg))?|[\w-]+\.(?:py|md))\b")
_DOTTED = re.compile(r"\bpocketize(?:\.(?!toml\b)\w+)+")


def _prose(page: Path) -> str:
    """The text of a page without its fenced blocks, which run."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def _named(page: Path) -> Iterator[str]:
    """Paths in code of a page's prose, and in its diagrams."""
    text = page.read_text(encoding="utf-8")
    spans = _CODE.findall(_prose(page))
    spans += [body for language, body in _FENCE.findall(text) if language == "mermaid"]
    for span in spans:
        yield from (path for path in _PATH.findall(span) if not MADE.search(path))


@functools.cache
def _files() -> frozenset[str]:
    """The names of all files of the project."""
    folders = ("rewrite", "passes", "zoo", "tests", "tools", "docs")
    found = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    return frozenset(found | {path.name for path in ROOT.iterdir()})


def _exists(page: Path, name: str) -> bool:
    if "/" not in name:
        return name in _files()
    starts = [page.parent, *(ROOT / start for start in STARTS)]
    return any((start / name).exists() for start in starts)


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in _anchors(target), f"{page.name}: no heading for {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_exist(page: Path) -> None:
    missing = [path for path in _named(page) if not _exists(page, path)]
    assert missing == [], page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_dotted_names_exist(page: Path) -> None:
    for name in sorted(set(_DOTTED.findall(_prose(page)))):
        assert _reaches(name), f"{page.name}: {name}"


def _reaches(name: str) -> bool:
    """Whether a dotted name is an entry point group, a module, or an attribute of one."""
    if f'entry-points."{name}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        return True
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in _LINK.findall(_prose(index))
    }
    missing = {page.name for page in (ROOT / "docs").rglob("*.md")} - {page.name for page in linked}
    assert missing <= {"README.md"}


def test_tables_of_files_and_names_are_right() -> None:
    """Rows of the architecture page name what the file of the row defines."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert rows
    for file, names in rows:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in _CODE.findall(names):
            for part in name.split("."):
                defined = re.search(rf"^\s*(?:def|class) {part}\b", source, flags=re.MULTILINE)
                assert defined, f"{file} defines no {part}"


def test_the_picture_of_the_rooms_is_right() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r'^ +e\d+\["(\w+):', page, flags=re.MULTILINE)
    assert shown == list(ENGINE[ENGINE.index("_torch") : ENGINE.index("__main__")])
    passes = {path.name for path in (ROOT / "passes").iterdir() if (path / "__init__.py").exists()}
    assert all(re.search(rf'\b{room}\["{room}', page) for room in passes)
    arrows = set(re.findall(r"^ +(\w+)(?:\[[^\]]*\])? --> (\w+)", page, flags=re.MULTILINE))
    between = {(lower, upper) for lower, upper in arrows if lower not in ("shared", "e0")}
    assert between == {(lower, upper) for upper, lowers in BETWEEN.items() for lower in lowers}
