"""How much memory this process holds, and has held at most, as the operating system sees it."""

from __future__ import annotations

__all__ = ["ProcessMemory"]

import gc
import re
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class ProcessMemory:
    """Reads resident memory of this process, in bytes; ``None`` where the system does not tell.

    On Linux the high-water mark can be reset, so that it is one of a step; elsewhere it is that of
    the whole life of the process, which still is an upper bound.
    """

    def current(self) -> int | None:
        """Return the memory that is resident now, or the most so far where only that is known."""
        gc.collect()
        now = self._status("VmRSS")
        return self.peak() if now is None else now

    def reset_peak(self) -> bool:
        """Forget the high-water mark; tell whether that was possible."""
        gc.collect()
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def peak(self) -> int | None:
        """Return the high-water mark since the last reset, or since the process began."""
        marked = self._status("VmHWM")
        if marked is not None:
            return marked
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _status(self, name: str) -> int | None:
        try:
            text = _STATUS.read_text()
        except OSError:
            return None
        match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(match[1]) * 1024 if match else None
