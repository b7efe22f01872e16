"""The paper's equations: how fast accuracy falls with the weights, multipliers, and their rounding.

Trained at several sizes on one data set, a network loses accuracy in proportion to the logarithm of
what is taken away, and the more complex the images, the faster::

    d(accuracy) / d(log10 weights) = lambda C + delta

The accuracy is *relative*: that of the compressed network over that of the uncompressed one. The
logarithm has base 10; weights are those of convolutions, without biases and norms.

The equations for multipliers assume that a layer's weights are proportional to the width squared.
Input and output layers keep one side, and widths are whole numbers, so the planner searches on the
real count by default. The equations give the family of multipliers, and with
``method="closed-form"`` the plan.

Source: Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image
Segmentation", ACM JETC 2021, equations 6, 7, 11, 13, 14, 16 and 17.
"""

from __future__ import annotations

__all__ = [
    "DEGRADATION",
    "METRICS",
    "ROUNDING",
    "Degradation",
    "Rounding",
    "RoundingRule",
    "at_decline",
    "decline_for",
    "degradation_of",
    "smallest_decline",
]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pocketize.errors import OptionError, PlanningError, nearest

if TYPE_CHECKING:
    from pocketize.channels.groups import ChannelGroup


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


#: The paper's table (its Table 3), by architecture and metric: ``DEGRADATION["unet", "f1"]``.
DEGRADATION: dict[tuple[str, str], Degradation] = {
    (architecture, metric): Degradation(lam, delta, metric, architecture)
    for architecture, metric, lam, delta in (
        ("unet", "f1", 0.437, 0.01030),
        ("unet", "iu", 0.349, 0.000072),
        ("cumedvision", "f1", 0.538, 0.00427),
        ("cumedvision", "iu", 0.366, 0.000096),
        ("ucunet", "f1", 0.241, 0.00956),
        ("ucunet", "iu", 0.151, 0.007080),
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


def at_decline(decline: float, slopes: Sequence[float]) -> tuple[float, ...]:
    """Return the multipliers of the levels that lose equally: ``k_i log10 alpha_i = -decline``.

    Eq. 11: the levels degrade alike when every multiplier, weighted by its level's degree of
    degradation, declines alike. With equal slopes all multipliers are equal: the uniform plan.

    Args:
        decline: at least 0; 0 leaves all widths.
        slopes: ``k_i = lambda C_i + delta``, positive.
    """
    return tuple(float(10.0 ** (-decline / slope)) for slope in slopes)


def decline_for(share: float, slopes: Sequence[float], thetas: Sequence[int], power: int) -> float:
    """Return the decline at which the closed form leaves a share of the weights.

    Solves ``sum alpha_i^power theta_i = share sum theta_i`` with :func:`at_decline`: eq. 13 for
    storage (``power=2``), eq. 14 for memory (``power=1``).

    Args:
        share: between 0 and 1.
        slopes: those of the levels, positive.
        thetas: convolution weights of the levels, as they are.
        power: 2 for storage, 1 for memory.

    Raises:
        PlanningError: the share is not between 0 and 1, or there are no weights.
    """
    whole = sum(thetas)
    if not 0 < share <= 1 or whole <= 0:
        raise PlanningError(f"expected a share between 0 and 1 of some weights, got {share!r}")

    def left(decline: float) -> float:
        multipliers = at_decline(decline, slopes)
        return sum(a**power * theta for a, theta in zip(multipliers, thetas, strict=True)) / whole

    # every level is at 10^(-decline / k): at the steepest slope times the digits, all are below
    high = -math.log10(share) * max(slopes) / power
    return _bisect(lambda decline: left(decline) <= share, high)


def _bisect(fits: Callable[[float], bool], high: float) -> float:
    """Return the smallest decline that fits: the interval is halved until no number lies within."""
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


Rounding: TypeAlias = Literal["nearest", "up", "down", "doubling", "shared"]

#: The rules, and what they do.
ROUNDING: dict[str, str] = {
    "nearest": "every width to the nearest whole number",
    "up": "every width up",
    "down": "every width down",
    "doubling": "the finest width to the nearest, the others in its proportion",
    "shared": "the finest width to the nearest, as in a uniform plan; the others up",
}

# what 64 * 10 ** -t may be off by
_NOISE = 1e-9


@dataclass(frozen=True)
class RoundingRule:
    """How multipliers become channels. No width grows when a multiplier falls.

    Attributes:
        rounding: a key of :data:`ROUNDING`.
        round_to: widths become multiples of this, in the rule's direction.
        minimum: no width is made narrower than this; one that is narrower stays.

    Raises:
        OptionError: an option is out of range.
    """

    rounding: Rounding
    round_to: int = 1
    minimum: int = 1

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.rounding not in ROUNDING:
            raise OptionError(
                f"rounding must be one of {', '.join(ROUNDING)}, not {self.rounding!r}."
                f"{nearest(str(self.rounding), ROUNDING)}"
            )
        for name, value in (("round_to", self.round_to), ("minimum", self.minimum)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number of at least 1, not {value!r}")

    def units(
        self, levels: Sequence[Sequence[ChannelGroup]], multipliers: Sequence[float]
    ) -> dict[ChannelGroup, int]:
        """Return the units that every group keeps."""
        first = next((number for number, groups in enumerate(levels) if groups), 0)
        if self.rounding == "doubling" and levels[first:]:
            widest = levels[first][0].channels
            share = self._whole(widest * multipliers[first], "nearest") / widest
            multipliers = [share] * len(levels)
        wanted = {}
        for number, (groups, multiplier) in enumerate(zip(levels, multipliers, strict=True)):
            to = self.rounding
            if to == "doubling" or (to == "shared" and number == first):
                to = "nearest"
            elif to == "shared":
                to = "up"
            for group in groups:
                wanted[group] = self._group(group, multiplier, to)
        return wanted

    def _group(self, group: ChannelGroup, multiplier: float, to: str) -> int:
        if multiplier >= 1:
            return group.units
        channels = max(self.minimum, self._whole(group.channels * multiplier, to))
        # a group that moves in steps keeps to the rule's promise: up is never less than asked for
        exact = channels / group.step
        if to == "up" or channels <= self.minimum:
            units = math.ceil(exact)
        else:
            units = math.floor(exact + (0.5 if to == "nearest" else 0.0))
        return min(group.units, max(1, units))

    def _whole(self, width: float, to: str) -> int:
        """Return the multiple of ``round_to`` for a width; 0 is left to the minimum."""
        parts = width / self.round_to
        if to == "up":
            count = math.ceil(parts - _NOISE)
        elif to == "down":
            count = math.floor(parts + _NOISE)
        else:
            count = math.floor(parts + 0.5 + _NOISE)
        return max(1, count) * self.round_to


_DECADES = 12  # of the multiplier that the steepest level ends at: nothing is left of any width


def smallest_decline(fits: Callable[[float], bool], steepest: float) -> float | None:
    """Return the smallest decline whose network fits; ``None`` if none does.

    Widths are whole numbers, so the networks change at single declines. Where sizes fall with the
    decline, the answer is exact: no larger network of the family fits.

    Args:
        fits: whether the network at a decline meets the limits; it should remember networks.
        steepest: the largest slope of a level.
    """
    if fits(0.0):
        return 0.0
    high = _DECADES * steepest
    return _bisect(fits, high) if fits(high) else None
