"""What a study has found out, kept in a folder so that an interrupted run goes on where it was."""

from __future__ import annotations

__all__ = ["Findings"]

import fcntl
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocketize.artifact.files import atomic_write


class Findings:
    """Results by name, in ``results.json`` of a folder, which one run at a time uses.

    Args:
        folder: made if it is not there.
        only: find out what has one of these texts in its name; the rest is left for later.
        until: find out nothing new after this time of the day, ``"HH:MM"``; "" is no limit.

    Raises:
        SystemExit: another run uses the folder.
    """

    def __init__(self, folder: Path, only: Sequence[str] = ("",), until: str = "") -> None:
        self.folder, self.only, self.until = folder, only, until
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")  # the system unlocks it when the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(
                f"another run uses {folder}: wait for it, or give another --out"
            ) from None
        self._file = folder / "results.json"
        self.results: dict[str, Any] = {}
        if self._file.exists():
            self.results = json.loads(self._file.read_text(encoding="utf-8"))

    def find(self, name: str, look: Callable[[], Any]) -> Any:
        """Return what was found out under this name, now or in an earlier run; else None."""
        late = bool(self.until) and time.strftime("%H:%M") >= self.until
        if name not in self.results and any(each in name for each in self.only) and not late:
            self.keep(name, look())
        return self.results.get(name)

    def keep(self, name: str, result: Any) -> None:
        self.results[name] = result
        sys.stderr.write(f"{time.strftime('%H:%M')} {name}: {str(result)[:100]}\n")
        text = json.dumps(self.results, indent=1)
        with atomic_write(self._file, overwrite=True) as new:
            new.write_text(text, encoding="utf-8")
