"""The degree of degradation: how fast accuracy falls when a network is made smaller.

Source: Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image
Segmentation", ACM JETC 2021. Trained at several sizes on one data set, a network loses accuracy in
proportion to the logarithm of what is taken away, and the more complex the images, the faster::

    d(accuracy) / d(log10 weights) = lambda C + delta

The accuracy is *relative*: that of the compressed network over that of the uncompressed one. The
logarithm has base 10; weights are those of convolutions, without biases and norms.
"""

from __future__ import annotations

__all__ = ["DEGRADATION", "METRICS", "Degradation", "degradation_of"]

import math
from dataclasses import dataclass
from typing import Any

from pocketize.errors import OptionError, nearest

#: The metrics that a degradation can be of: the F1 score, and intersection over union.
METRICS = ("f1", "iu")


@dataclass(frozen=True)
class Degradation:
    """A straight line through (complexity, slope of the relative accuracy).

    Attributes:
        lam: lambda: what a unit of complexity adds to the slope.
        delta: the slope at complexity 0.
        metric: the accuracy it was fitted to: ``"f1"`` or ``"iu"``.
        architecture: the network it was fitted to, ``"custom"`` for one of your own.

    Raises:
        OptionError: a number is not finite, or the metric is unknown.
    """

    lam: float
    delta: float
    metric: str = "f1"
    architecture: str = "custom"

    def __post_init__(self) -> None:
        """Refuse numbers that no plan can be made with."""
        for name, value in (("lam", self.lam), ("delta", self.delta)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise OptionError(f"degradation: {name} must be a number, not {value!r}")
            if not math.isfinite(value):
                raise OptionError(f"degradation: {name} must be finite, not {value!r}")
        if self.metric not in METRICS:
            raise OptionError(
                f"degradation: metric must be 'f1' or 'iu', not {self.metric!r}."
                f"{nearest(str(self.metric), METRICS)}"
            )

    def slope(self, complexity: float) -> float:
        """Return ``k = lambda C + delta`` (eq. 11): relative accuracy lost per decade of weights.

        Args:
            complexity: that of the data set, or of one of its scales; not negative.

        Raises:
            OptionError: the complexity is negative or not finite.
        """
        if not (math.isfinite(complexity) and complexity >= 0):
            raise OptionError(
                f"a complexity must be a finite number of at least 0, not {complexity!r}"
            )
        return self.lam * complexity + self.delta

    def relative_drop(self, complexity: float, decades: float) -> float:
        """Return the share of the uncompressed network's accuracy that is predicted to be lost.

        Args:
            complexity: that of the data set.
            decades: ``log10(weights before / weights after)``: 1 for a tenth of the weights.

        Raises:
            OptionError: the complexity is out of range.
        """
        return self.slope(complexity) * decades

    def to_json(self) -> dict[str, Any]:
        """Return the degradation as what ``json.dumps`` takes."""
        return {
            "lambda": self.lam,
            "delta": self.delta,
            "metric": self.metric,
            "architecture": self.architecture,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Degradation:
        """Return the degradation that :meth:`to_json` was called on.

        Raises:
            OptionError: fields are missing or unknown, or a value does not fit.
        """
        expected = {"lambda", "delta", "metric", "architecture"}
        if not isinstance(data, dict) or set(data) != expected:
            raise OptionError(f"not a degradation: expected the fields {sorted(expected)}")
        return cls(data["lambda"], data["delta"], data["metric"], data["architecture"])

    def __str__(self) -> str:
        """``"lambda 0.437, delta 0.0103 (unet, f1)"``."""
        return f"lambda {self.lam:.4g}, delta {self.delta:.4g} ({self.architecture}, {self.metric})"


def _row(architecture: str, f1: tuple[float, float], iu: tuple[float, float]) -> list[Degradation]:
    return [
        Degradation(*pair, metric, architecture)
        for pair, metric in zip((f1, iu), METRICS, strict=True)
    ]


#: The paper's table (its Table 3), by architecture and metric: ``DEGRADATION["unet", "f1"]``.
DEGRADATION: dict[tuple[str, str], Degradation] = {
    (made.architecture, made.metric): made
    for made in (
        *_row("unet", (0.437, 0.01030), (0.349, 0.000072)),
        *_row("cumedvision", (0.538, 0.00427), (0.366, 0.000096)),
        *_row("ucunet", (0.241, 0.00956), (0.151, 0.007080)),
    )
}


def degradation_of(architecture: str, metric: str = "f1") -> Degradation:
    """Return the paper's degradation of an architecture.

    Args:
        architecture: ``"unet"``, ``"cumedvision"`` or ``"ucunet"``; case and hyphens do not matter.
        metric: ``"f1"`` or ``"iu"``.

    Raises:
        OptionError: the paper has no such row; the nearest is named.
    """
    name = architecture.lower().replace("-", "").replace("_", "")
    known = list(dict.fromkeys(row for row, _ in DEGRADATION))
    if name not in known:
        raise OptionError(
            f"the paper has no degradation of {architecture!r}, only of {', '.join(known)}."
            f"{nearest(name, known)} Train a few points of your own: see fit_degradation"
        )
    if metric not in METRICS:
        raise OptionError(
            f"metric must be 'f1' or 'iu', not {metric!r}.{nearest(str(metric), METRICS)}"
        )
    return DEGRADATION[name, metric]
