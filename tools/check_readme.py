"""Run the Python and shell examples of Markdown pages, in order, in a scratch folder for each page.

    python tools/check_readme.py              # the README and all of docs/
    python tools/check_readme.py README.md

Blocks fenced as ``python`` are run with this interpreter, each with names of its own; those that
follow each other share a process, which imports torch once. ``bash`` blocks are run with ``bash
-e``; of ``console`` blocks the lines behind ``$`` are, and the rest is taken for their output and
not compared. A later block finds the files that an earlier one wrote. A block is left out only
behind a comment that says why::

    <!-- not run: CI installs in its own way -->

A page that needs what CI installs in one of its environments only says so, and is run there::

    <!-- needs nnunetv2.utilities.find_objects: nnunetv2 2.8 or newer -->

The Python blocks of a page in a folder ``tutorials`` share their names, as a notebook's cells do.
Every block must end with exit code 0, and within the time limit. Pages do not depend on each other:
``--jobs 2`` runs two at a time, and what is told of a page stays together.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
LANGUAGES = ("python", "bash", "console")
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+?) -->\n+)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
_NEEDS = re.compile(r"^<!-- needs (\S+): ([^\n]+?) -->$", flags=re.MULTILINE)
#: Runs blocks as ``__main__``, so that warnings, pickles and classes are as in a script.
_SCRIPT = """
import sys, types
for number, body in enumerate({bodies!r}):
    if not ({shared} and number):
        sys.modules["__main__"] = main = types.ModuleType("__main__")
    exec(compile(body, "page", "exec"), vars(main))
"""


@dataclass(frozen=True)
class Example:
    """A fenced block: its language, the line of the page it starts on, and why it is not run."""

    language: str
    line: int
    body: str
    why_not: str | None

    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", self.body]
        script = self.body
        if self.language == "console":
            script = "".join(f"{m[1]}\n" for m in re.finditer(r"^\$ (.*(?:\\\n.*)*)", script, re.M))
        return ["bash", "-euo", "pipefail", "-c", script]


def examples(page: str) -> list[Example]:
    """Find the fenced blocks of a page that could be run."""
    return [
        Example(
            language=found["language"],
            line=page.count("\n", 0, found.start("body")),
            body=found["body"],
            why_not=found["why"],
        )
        for found in _FENCE.finditer(page)
        if found["language"] in LANGUAGES
    ]


def joined(found: list[Example], shared: bool) -> list[Example]:
    """Make one example of Python blocks that follow each other; their lines are those of the page.

    Args:
        shared: a block knows the names of the blocks before it.
    """
    made: list[Example] = []
    for runs, group in itertools.groupby(found, lambda e: e.language == "python" and not e.why_not):
        blocks = list(group)
        if runs:
            bodies = ["\n" * example.line + example.body for example in blocks]
            script = _SCRIPT.format(bodies=bodies, shared=shared)
            made.append(Example("python", blocks[0].line, script, None))
        else:
            made += blocks
    return made


def run(example: Example, folder: str, limit: float) -> str | None:
    """Run an example; give what went wrong, or ``None``."""
    try:
        done = subprocess.run(
            example.command(),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {limit:g} s"
    if done.returncode:
        return f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the examples of Markdown pages.")
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and docs/")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one example")
    parser.add_argument("--jobs", type=int, default=1, help="pages that run at the same time")
    arguments = parser.parse_args()
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        pages = arguments.pages or all_pages()
        for wrong, told in pool.map(lambda page: check(page, arguments.limit), pages):
            failed += wrong
            sys.stdout.write(told)
            sys.stdout.flush()
    return 1 if failed else 0


def all_pages() -> list[Path]:
    """Return the README and the pages of ``docs/`` that have examples to run."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    has_examples = (any(not e.why_not for e in examples(page.read_text("utf-8"))) for page in pages)
    return [page for page, runs in zip(pages, has_examples, strict=True) if runs]


def check(page: Path, limit: float) -> tuple[int, str]:
    """Run the examples of a page; give how many failed, and a line on each."""
    text = page.read_text(encoding="utf-8")
    found = examples(text)
    if (needs := _NEEDS.search(text)) and not _is_installed(needs[1]):
        found = [replace(e, why_not=e.why_not or f"needs {needs[2]}") for e in found]
    found = joined(found, shared="tutorials" in page.parts)
    if not found:
        return 1, f"{page}: no example found; are its blocks fenced with a language?\n"
    with tempfile.TemporaryDirectory() as folder:
        lines = [_tell(page, example, folder, limit) for example in found]
    return sum(failed for failed, _ in lines), "".join(line for _, line in lines)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _tell(page: Path, example: Example, folder: str, limit: float) -> tuple[bool, str]:
    name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
    place = f"{name}:{example.line} {example.language}"
    if example.why_not:
        return False, f"{place}: not run ({example.why_not})\n"
    started = time.perf_counter()
    wrong = run(example, folder, limit)
    took = time.perf_counter() - started
    return wrong is not None, f"{place}: {'FAILED, ' + wrong if wrong else f'ok in {took:.1f} s'}\n"


if __name__ == "__main__":
    sys.exit(main())
