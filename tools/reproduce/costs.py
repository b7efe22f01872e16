"""What one call of a network takes: the peak of its live tensors, and CPU time."""

from __future__ import annotations

__all__ = ["costs"]

import statistics
import time

import torch
from torch import Tensor, nn

from pocketize import measure


def costs(
    model: nn.Module, inputs: tuple[Tensor, ...], *, train: bool = False, times: int = 5
) -> tuple[int, float]:
    """Measure a network.

    Args:
        model: the network; for ``train`` one that returns its loss.
        inputs: its inputs.
        train: measure a training step with Adam; the time is that of the forward alone, so the
            model goes back in there. Otherwise a forward under ``torch.inference_mode()``.
        times: calls that are timed, after one that is not.

    Returns:
        The peak in bytes, and the median of the seconds that all threads computed: on a machine
        that others use, too, the clock on the wall tells more about them.
    """
    if train:
        peak = measure(model, inputs, "train", loss=lambda outputs: outputs).peak
    else:
        peak = measure(model, inputs, "infer").peak
    taken = []
    for _ in range(1 + times):
        start = time.process_time()
        with torch.inference_mode(not train):
            model(*inputs)
        taken.append(time.process_time() - start)
    return peak, statistics.median(taken[1:])
