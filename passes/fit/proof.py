"""Take a real step of the network that was chosen, in a fresh process."""

from __future__ import annotations

__all__ = ["Proof", "prove_step"]

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from pocketize.errors import MeasureError, PocketizeError
from pocketize.memory.counters import available_memory
from pocketize.memory.isolate import measure_isolated
from pocketize.memory.meter import measure_here
from pocketize.memory.profile import MemoryProfile
from pocketize.memory.step import Request
from pocketize.passes.fit.result import FitPoint
from pocketize.units import bytes_text, percent_text

#: A step is not taken if it is predicted to last longer, or if its tensors would take more than
#: this part of the memory that is free.
_SECONDS, _PART = 120.0, 0.6


class Proof(NamedTuple):
    """What a real step took.

    Attributes:
        text: a sentence or two.
        resident: bytes that the process grew by; ``None`` if no process was measured.
    """

    text: str
    resident: int | None = None


def prove_step(
    model: nn.Module, request: Request, point: FitPoint, device: torch.device, cap: int
) -> Proof:
    """Measure two steps of a network, and say what they took, or why they were not taken.

    Args:
        model: the rewritten network.
        request: the step that was estimated.
        point: the estimate.
        device: where it runs.
        cap: on CUDA, the bytes that the allocator may reserve.
    """
    if reason := _obstacle(request, point):
        return Proof(f"Estimated only: {reason}.")
    request = replace(request, model=model, estimate=False, step_in_backward=point.step_in_backward)
    where = "in a fresh process"
    try:
        with _capped(device, cap):
            measured = measure_isolated(request)
            if isinstance(measured, MeasureError):
                raise measured
            if isinstance(measured, str):
                where = f"in this process ({measured})"
                measured = measure_here(request)
    except PocketizeError as error:
        return Proof(f"Estimated only: a step on this machine failed: {error}")
    assert isinstance(measured, MemoryProfile)
    text = (
        f"Measured {where}: {bytes_text(measured.peak)} of tensors at the peak of the second step, "
        f"{percent_text(point.peak, measured.peak)} against the estimate"
    )
    if measured.rss is not None:
        text += f"; the process grew by {bytes_text(measured.rss)}"
    if measured.reserved is not None:
        text += (
            f"; the allocator, which could reserve {bytes_text(cap)}, reserved "
            f"{bytes_text(measured.reserved)}"
        )
    return Proof(f"{text}.", measured.rss)


@contextlib.contextmanager
def _capped(device: torch.device, cap: int) -> Iterator[None]:
    """On CUDA, let the allocators of this process and of its children reserve no more."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    _, whole = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(before, cap / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _obstacle(request: Request, point: FitPoint) -> str:
    device = request.device
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        return f"this machine has no {device.type} device"
    if point.seconds is not None and point.seconds > _SECONDS:
        return f"two steps would take about {2 * point.seconds:.0f} s"
    free = available_memory()
    if free is not None and point.peak > _PART * free:
        return f"{bytes_text(free)} of memory are free here"
    return ""
