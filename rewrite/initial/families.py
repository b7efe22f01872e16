"""Distributions in standard form: their likelihood, their shape, and how to draw from them."""

from __future__ import annotations

__all__ = [
    "NORMAL",
    "ONE_SIDED",
    "SQRT3",
    "TRUNCATED",
    "TRUNCATED_STD",
    "UNIFORM",
    "Family",
    "gather_family",
]

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SQRT3 = math.sqrt(3.0)
#: Standard deviation of a unit normal cut off at two standard deviations.
TRUNCATED_STD = 0.8796256610342398
_INSIDE_TWO_SIGMA = math.erf(math.sqrt(2.0))


def _draw_uniform(out: Tensor, generator: torch.Generator | None) -> Tensor:
    return out.uniform_(-SQRT3, SQRT3, generator=generator)


def _draw_normal(out: Tensor, generator: torch.Generator | None) -> Tensor:
    return out.normal_(generator=generator)


def _draw_truncated(out: Tensor, generator: torch.Generator | None) -> Tensor:
    # by inversion: the cut normal's distribution function is a stretch of the error function's
    out.uniform_(-_INSIDE_TWO_SIGMA, _INSIDE_TWO_SIGMA, generator=generator)
    return out.erfinv_().mul_(math.sqrt(2.0) / TRUNCATED_STD)


@dataclass(frozen=True)
class Family:
    """The shape of a distribution, at standard deviation 1.

    Its log density at ``x`` is ``-log_norm - curvature * (x - offset)**2 / 2`` as far as ``bound``
    from the ``offset``, which suffices for the likelihood of a whole tensor from its moments.

    Attributes:
        name: For explanations.
        curvature: 1 for the normal, 0 for the uniform distribution.
        log_norm: Logarithm of the normalising factor.
        bound: Largest distance from the mean.
        offset: The mean; not 0 where a distribution's mean grows with its standard deviation.
        kurtosis: Fourth standardised moment.
        kurtosis_variance: ``n`` times the variance of the kurtosis of ``n`` samples.
        draw: Fills a tensor with samples of mean 0, in place.
    """

    name: str
    curvature: float
    log_norm: float
    bound: float
    offset: float
    kurtosis: float
    kurtosis_variance: float
    draw: Callable[[Tensor, torch.Generator | None], Tensor]


_LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
NORMAL = Family("normal", 1.0, _LOG_ROOT_TWO_PI, math.inf, 0.0, 3.0, 24.0, _draw_normal)
# sampling variance of the kurtosis by the delta method: m8 - 4 m4 m6 + 4 m4**3 - m4**2
UNIFORM = Family("uniform", 0.0, math.log(2 * SQRT3), SQRT3, 0.0, 1.8, 1.3166, _draw_uniform)
ONE_SIDED = replace(UNIFORM, name="one-sided uniform", offset=SQRT3)
TRUNCATED = Family(
    "trunc_normal",
    TRUNCATED_STD**2,
    _LOG_ROOT_TWO_PI + math.log(_INSIDE_TWO_SIGMA / TRUNCATED_STD),
    2 / TRUNCATED_STD,
    0.0,
    2.3655,
    3.8482,
    _draw_truncated,
)


def gather_family(sample: npt.NDArray[np.float64]) -> Family:
    """A family that has no formula: samples are drawn from the quantiles of ``sample`` (1d)."""
    points = np.quantile(sample.astype(np.float64), (np.arange(2048) + 0.5) / 2048)
    table = torch.from_numpy((points - points.mean()) / points.std())
    kurtosis = float((table**4).mean())

    def draw(out: Tensor, generator: torch.Generator | None) -> Tensor:
        index = torch.randint(len(table), out.shape, generator=generator, device=out.device)
        return out.copy_(table.to(out.device, out.dtype)[index])

    return Family("resampled", 1.0, 0.0, math.inf, 0.0, kurtosis, math.inf, draw)
