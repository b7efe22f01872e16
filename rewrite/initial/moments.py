"""Statistics of one tensor, from a sample of it, so that large tensors cost no more than others."""

from __future__ import annotations

__all__ = ["JUDGED", "UNEVEN", "Array", "Moments", "measure", "sample"]

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

#: Elements that statistics are taken from, at most, per tensor.
SAMPLE = 2**18
#: Elements from which the shape of a tensor's distribution can be judged.
JUDGED = 512
#: Standard errors beyond which channels of differing variance are no accident.
UNEVEN = 6.0


@dataclass(frozen=True)
class Moments:
    """What the fit knows of one tensor.

    Attributes:
        count: Elements looked at.
        mean: Their mean.
        variance: Their variance.
        low: The smallest.
        high: The largest.
        kurtosis: Fourth standardised moment.
        rounding: Relative rounding error of the dtype.
        uneven: How many standard errors the channels' variances differ by more than those of
            independent, identically distributed elements would. Training makes channels differ.
    """

    count: int
    mean: float
    variance: float
    low: float
    high: float
    kurtosis: float
    rounding: float
    uneven: float


def sample(values: Tensor) -> Array:
    """At most :data:`SAMPLE` elements of a tensor, evenly spread and the same in every call."""
    flat = values.detach().reshape(-1)
    if len(flat) > SAMPLE:
        # runs of 64 keep memory access cheap; an odd stride does not lock in with channel counts
        runs = flat[: len(flat) // 64 * 64].view(-1, 64)
        flat = runs[:: (-(-len(runs) * 64 // SAMPLE)) | 1].reshape(-1)
    array: Array = flat.cpu().double().numpy()
    return array


def _unevenness(values: Tensor) -> float:
    """See :attr:`Moments.uneven`; the larger of the first two axes'."""
    if values.dim() < 2 or values.numel() < JUDGED:
        return 0.0
    side = max(8, math.isqrt(2**16 // max(1, math.prod(values.shape[2:]))))
    block = values.detach()[
        :: -(-values.shape[0] // side),
        :: -(-values.shape[1] // side),
    ]
    data = block.cpu().double().numpy()
    square = (data - data.mean()) ** 2
    variance = max(float(square.mean()), 1e-150)
    excess = float((square * square).mean()) / variance**2 - 1
    worst = 0.0
    for axis in (0, 1):
        count, length = data.shape[axis], data.size // data.shape[axis]
        if count < 8 or length < 8:
            continue
        others = tuple(other for other in range(data.ndim) if other != axis)
        observed = float(square.mean(axis=others).var(ddof=1)) / variance**2
        expected = max(excess, 0.1) / length
        # a sample variance is about chi-square distributed; its cube root is about normal
        # (Wilson and Hilferty, 1931), which keeps rare large values from passing for a sign
        error = (2 / (count - 1) + 12 / (length * count)) / 9
        worst = max(worst, ((observed / expected) ** (1 / 3) - (1 - error)) / math.sqrt(error))
    return worst


def measure(values: Tensor, data: Array) -> Moments:
    """Moments of a real tensor, of which ``data`` is a :func:`sample`."""
    mean = float(data.mean())
    square = (data - mean) ** 2
    variance = float(square.mean())
    return Moments(
        count=len(data),
        mean=mean,
        variance=variance,
        low=float(data.min()),
        high=float(data.max()),
        kurtosis=float((square * square).mean()) / max(variance**2, 1e-300),
        rounding=max(torch.finfo(values.dtype).eps, 1e-7),
        uneven=_unevenness(values),
    )
