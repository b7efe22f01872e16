"""Questions answered by a process of their own, so that nothing before has a part in it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["MARK", "Resident", "ask", "trim"]

#: Begins the line with the answer; networks and compilers print what they like before it.
MARK = "POCKETIZE-BENCH "

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

_STATUS = Path("/proc/self/status")
#: Seconds between two looks at the memory.
_PAUSE = 0.002


def ask(
    script: str,
    task: Mapping[str, Any],
    *,
    threads: int,
    timeout: float,
    returning: bool = True,
) -> dict[str, Any]:
    """Run a script beside this file in a fresh process and return its answer.

    Args:
        script: its name; it prints a line of ``MARK`` and JSON.
        task: its only argument, as JSON.
        threads: of one operator; 0 leaves them as they are.
        timeout: in seconds.
        returning: large blocks go back to the system when they are freed, so that resident memory
            follows use. Getting them again takes time, which is not the network's.

    Returns:
        What it answered, or ``failed`` with what went wrong.
    """
    environment = {**os.environ, **(_ALLOCATOR if returning else {})}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(Path(__file__).with_name(script)), json.dumps(task)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return (_answer(printed) or {}) | {"failed": f"not done after {timeout:.0f} s"}
    answer = _answer(done.stdout)
    if answer is not None and not done.returncode:
        return answer
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    why = f"status {done.returncode}: {' '.join(last.split())[:200]}"
    if done.returncode in (-9, 137):
        why = "killed, for want of memory most likely"
    return (answer or {}) | {"failed": why}  # with what was done before


def _answer(printed: str) -> dict[str, Any] | None:
    """Return the last answer, which may have parts that are still missing."""
    for line in reversed(printed.splitlines()):
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return answer | {"torch": torch.__version__, "machine": platform.machine()}
    return None


def trim() -> None:
    """Give freed heap back to the system, so that what grows again is counted."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


class Resident:
    """Looks at the memory of this process while a block runs: what is its own, and files' pages.

    Pages of files that are mapped count as resident, but the system takes them away when it needs
    memory; what is anonymous stays. Only Linux tells them apart.

    Attributes:
        own: bytes that anonymous memory grew by at most; None where the system does not tell.
        files: bytes that pages of files and shared memory grew by at most.
    """

    def __init__(self) -> None:
        self.own: int | None = None
        self.files: int | None = None
        self._before = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Resident:
        trim()
        self._before = _resident()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(_PAUSE):
            self._look()

    def _look(self) -> None:
        now = _resident()
        if now is None or self._before is None:
            return
        self.own = max(self.own or 0, now[0] - self._before[0])
        self.files = max(self.files or 0, now[1] - self._before[1])


def _resident() -> tuple[int, int] | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    found = {
        name: int(size) * 1024 for name, size in re.findall(r"(?m)^(Rss\w+):\s+(\d+) kB", text)
    }
    if "RssAnon" not in found:
        return None
    return found["RssAnon"], found.get("RssFile", 0) + found.get("RssShmem", 0)
