"""Plant faults in a copy of the tree, one at a time, and see which test finds each first.

    python tools/planted_faults.py --check          # every text is found exactly once
    python tools/planted_faults.py                  # all faults, the fast tests of the room
    python tools/planted_faults.py --suites room,fast,whole --only concat
    python tools/planted_faults.py --write docs/results/planted-faults.md

A fault is an exact text of one file and what stands there instead; a text that is not found exactly
once is an error, so that the list cannot rot in silence. A fault is first tried against the fast
tests of the room (the folder of tests that mirrors the file's folder), then against the fast tests
of the whole suite, then against all tests, each until one fails. Rooms whose tests fail without a
fault are named, and nothing is concluded from them.

Not a part of CI: a suite is run for every fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from planted_faults_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
CODE = ("rewrite", "passes", "zoo")
SUITES = {"room": 120, "fast": 600, "whole": 2400}
"""Name -> seconds until it is given up."""


class Found(NamedTuple):
    """What became of a fault.

    Attributes:
        suite: that found it; empty where none did.
        test: the first that failed, or what else happened.
        tried: the suites that were run to an end, or to the first failure.
        seconds: all of it took.
    """

    suite: str
    test: str
    tried: tuple[str, ...]
    seconds: float


def check(faults: list[Fault]) -> list[str]:
    """The faults whose text is not found exactly once in the tree."""
    wrong = []
    for fault in faults:
        path = ROOT / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.exists() else 0
        if count != 1 or fault.old == fault.new:
            wrong.append(f"{fault.name}: its text is {count} times in {fault.file}")
    return wrong


def room(file: str) -> str:
    """The folder of tests that mirrors a file's folder."""
    folder = Path("tests", *Path(file).parent.parts)
    if file.startswith("rewrite/"):
        folder = Path("tests", *Path(file).parent.parts[1:])
    while not (ROOT / folder).is_dir():
        folder = folder.parent
    return folder.as_posix()


def copy_of(root: Path, folder: Path) -> Path:
    """Copy the tree, and lay a package beside it whose parts are links into the copy."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(root, tree, ignore=ignored)
    package = folder / "site" / "pocketize"
    package.mkdir(parents=True)
    parts = [*(tree / "rewrite").iterdir(), tree / "passes", tree / "zoo"]
    for part in parts:
        (package / part.name).symlink_to(part)
    return tree


def run(tree: Path, arguments: list[str], limit: float) -> str:
    """Run pytest in the copy until a test fails; return which, or an empty text.

    Raises:
        TimeoutError: it took longer than the limit.
    """
    variables = os.environ | {
        "PYTHONPATH": str(tree.parent / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=tree,
            env=variables,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    if done.returncode in (0, 5):
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {done.returncode}"


def arguments_of(suite: str, fault: Fault) -> list[str]:
    """What pytest is called with."""
    if suite == "room":
        return ["-n", "0", "-m", "not slow", *(fault.near or room(fault.file)).split()]
    return ["-m", "not slow"] if suite == "fast" else []


def search(tree: Path, fault: Fault, suites: list[str]) -> Found:
    """Plant a fault, run the suites until one finds it, and take it out again."""
    path = tree / fault.file
    text = path.read_text(encoding="utf-8")
    started, tried = time.monotonic(), []
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        for suite in suites:
            try:
                test = run(tree, arguments_of(suite, fault), SUITES[suite])
            except TimeoutError:
                continue
            tried.append(suite)
            if test:
                return Found(suite, test, tuple(tried), time.monotonic() - started)
    finally:
        path.write_text(text, encoding="utf-8")
    return Found("", "", tuple(tried), time.monotonic() - started)


def unplanted(tree: Path, faults: list[Fault]) -> Iterator[str]:
    """The rooms whose tests fail, or take too long, without any fault."""
    for arguments in sorted({tuple(arguments_of("room", fault)) for fault in faults}):
        try:
            test = run(tree, list(arguments), SUITES["room"])
        except TimeoutError:
            test = "time limit"
        if test:
            yield f"{arguments[-1]}: {test}"


def row(fault: Fault, found: Found) -> str:
    where = f"`{found.test}` ({found.suite})" if found.suite else "**not found**"
    tried = ", ".join(found.tried) or "none to its end"
    return f"| {fault.name} | `{fault.file}` | {where} | {tried} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--check", action="store_true", help="only look whether each text is there")
    parser.add_argument("--only", default="", help="faults whose name or file has this in it")
    parser.add_argument("--suites", default="room", help="of room,fast,whole, in this order")
    parser.add_argument("--no-control", action="store_true", help="do not run rooms without faults")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if given.only in f"{fault.name} {fault.file}"]
    if wrong := check(faults):
        sys.exit("\n".join(wrong))
    print(f"{len(faults)} faults, each text found once")
    if given.check:
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(ROOT, Path(folder))
        if not given.no_control:
            for problem in unplanted(tree, faults):
                print(f"without any fault: {problem}", flush=True)
        print("| fault | file | found by (suite) | suites run |\n| --- | --- | --- | --- |")
        missed = 0
        for fault in faults:
            found = search(tree, fault, given.suites.split(","))
            missed += not found.suite
            print(row(fault, found), flush=True)
    print(f"\n{len(faults) - missed} of {len(faults)} found")


if __name__ == "__main__":
    main()
