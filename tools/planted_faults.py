"""Plant faults in a copy of the tree, one at a time, and see which test finds each first.

    python tools/planted_faults.py --check          # every text is found exactly once
    python tools/planted_faults.py                  # all faults, the tests of the room
    python tools/planted_faults.py --suites room,fast,whole --only concat
    python tools/planted_faults.py --part 1/2       # every second fault, for two processes

A fault is an exact text of one file and what stands there instead; a text that is not found exactly
once is an error, so that the list cannot rot in silence. A fault is first tried against the tests
of the room (the folder of tests that mirrors the file's folder), the fast ones first, then against
the fast tests of the whole suite, then against all tests, each until one fails. Rooms whose tests
fail without a fault are named, and nothing is concluded from them.

Not a part of CI: a suite is run for every fault.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from planted_faults_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
SUITES = {"room": 600, "fast": 600, "whole": 2400}
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


class _First:
    """A plugin of pytest that remembers the first failure."""

    def __init__(self) -> None:
        self.test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.test = self.test or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.test = self.test or (report.nodeid if report.failed else "")


def run(tree: Path, arguments: list[str], limit: float) -> str:
    """Run pytest in the copy until a test fails; return which, or an empty text.

    In a fork of this process, which has imported torch already and nothing of ours.

    Raises:
        TimeoutError: it took longer than the limit.
    """
    answer, say = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(tree, arguments, say))
    child.start()
    say.close()
    try:
        if not answer.poll(limit):
            raise TimeoutError
        return str(answer.recv())
    except EOFError:
        return "the process died"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # with the workers that it started
        child.join()


def _run(tree: Path, arguments: list[str], say: Connection) -> None:
    os.setpgid(0, 0)
    os.chdir(tree)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    site = str(tree.parent / "site")
    os.environ |= {"PYTHONPATH": site, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(tree), site]
    torch.set_num_threads(1)
    first = _First()
    code = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments], [first])
    say.send(first.test or ("" if code in (0, 5) else f"pytest ended with {code}"))
    os._exit(0)


def arguments_of(suite: str, fault: Fault) -> list[str]:
    """What pytest is called with."""
    if suite == "room":
        return ["-n", "0", *(fault.near or room(fault.file)).split()]
    return ["-m", "not slow"] if suite == "fast" else []


def search(tree: Path, fault: Fault, suites: list[str], patience: float) -> Found:
    """Plant a fault, run the suites until one finds it, and take it out again."""
    path = tree / fault.file
    text = path.read_text(encoding="utf-8")
    started, tried = time.monotonic(), []
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        for suite in suites:
            try:
                test = run(tree, arguments_of(suite, fault), patience * SUITES[suite])
            except TimeoutError:
                continue
            tried.append(suite)
            if test:
                return Found(suite, test, tuple(tried), time.monotonic() - started)
    finally:
        path.write_text(text, encoding="utf-8")
    return Found("", "", tuple(tried), time.monotonic() - started)


def unplanted(tree: Path, faults: list[Fault], patience: float) -> Iterator[str]:
    """The rooms whose tests fail, or take too long, without any fault."""
    for arguments in sorted({tuple(arguments_of("room", fault)) for fault in faults}):
        try:
            test = run(tree, list(arguments), patience * SUITES["room"])
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
    parser.add_argument("--patience", type=float, default=1.0, help="a factor of all time limits")
    parser.add_argument("--part", default="1/1", help="which of how many parts of the list")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if given.only in f"{fault.name} {fault.file}"]
    part, parts = map(int, given.part.split("/"))
    faults = faults[part - 1 :: parts]
    if wrong := check(faults):
        sys.exit("\n".join(wrong))
    print(f"{len(faults)} faults, each text found once")
    if given.check:
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(ROOT, Path(folder))
        if not given.no_control:
            for problem in unplanted(tree, faults, given.patience):
                print(f"without any fault: {problem}", flush=True)
        print("| fault | file | found by (suite) | suites run |\n| --- | --- | --- | --- |")
        missed = 0
        for fault in faults:
            found = search(tree, fault, given.suites.split(","), given.patience)
            missed += not found.suite
            print(row(fault, found), flush=True)
    print(f"\n{len(faults) - missed} of {len(faults)} found")


if __name__ == "__main__":
    main()
