"""Memory as others count it: the operating system, and CUDA's caching allocator."""

from __future__ import annotations

__all__ = ["CudaCounters", "ProcessMemory", "available_memory"]

import gc
import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def available_memory() -> int | None:
    """Return the bytes that a program can take here, ``None`` where the system does not tell.

    A container's limit counts, if it is lower than what the machine has.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if match is None:
        return None
    free = int(match[1]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return max(0, min(free, limit - used))


class ProcessMemory:
    """Reads resident memory of this process, in bytes; ``None`` where the system has no figure.

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


class CudaCounters:
    """Peak figures of one device, less what was there before.

    Make it before the measurement puts anything on the device: what is there already is
    subtracted from every figure.

    Args:
        device: a CUDA device.
        alone: everything that this process has on the device belongs to the measurement.
    """

    def __init__(self, device: torch.device, *, alone: bool = False) -> None:
        self._device = device
        self._empty()
        self._allocated_before = 0 if alone else torch.cuda.memory_allocated(device)
        self._reserved_before = 0 if alone else torch.cuda.memory_reserved(device)

    def reset(self) -> None:
        """Begin to count: give back what is cached, and forget earlier peaks."""
        self._empty()
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> tuple[int, int]:
        """Return bytes at the peaks since :meth:`reset`: handed out, and held in all."""
        torch.cuda.synchronize(self._device)
        allocated = torch.cuda.max_memory_allocated(self._device) - self._allocated_before
        reserved = torch.cuda.max_memory_reserved(self._device) - self._reserved_before
        return allocated, reserved

    def _empty(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
