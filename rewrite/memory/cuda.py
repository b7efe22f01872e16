"""What CUDA's caching allocator counted over a step."""

from __future__ import annotations

__all__ = ["CudaCounters"]

import gc

import torch


class CudaCounters:
    """Peak figures of one device, less what was there before.

    Make it before anything of the measurement is on the device: what others hold there is taken
    off every figure.

    Args:
        device: a CUDA device.
        alone: everything that this process holds on the device belongs to the measurement.
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
