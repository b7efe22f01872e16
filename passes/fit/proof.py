"""Take a real step of the network that was chosen, in a fresh process."""

from __future__ import annotations

__all__ = ["prove_step"]

from dataclasses import replace

import torch
from torch import nn

from pocketize.errors import PocketizeError
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


def prove_step(model: nn.Module, request: Request, point: FitPoint) -> str:
    """Measure two steps of a network, and say what they took, or why they were not taken.

    Args:
        model: the rewritten network.
        request: the step that was estimated.
        point: the estimate.
    """
    if reason := _obstacle(request, point):
        return f"Estimated only: {reason}."
    request = replace(request, model=model, estimate=False, step_in_backward=point.step_in_backward)
    measured = measure_isolated(request)
    where = "in a fresh process"
    if isinstance(measured, str):
        where = f"in this process ({measured})"
        try:
            measured = measure_here(request)
        except PocketizeError as error:
            return f"Estimated only: a step on this machine failed: {error}"
    assert isinstance(measured, MemoryProfile)
    text = (
        f"Measured {where}: {bytes_text(measured.peak)} of tensors at the peak of the second step, "
        f"{percent_text(point.peak, measured.peak)} against the estimate"
    )
    if measured.rss is not None:
        text += f"; the process grew by {bytes_text(measured.rss)}"
    if measured.reserved is not None:
        text += f"; the allocator reserved {bytes_text(measured.reserved)}"
    return text + "."


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
