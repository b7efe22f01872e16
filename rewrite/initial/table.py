"""A population of tensors, and how well candidate laws explain each of them."""

from __future__ import annotations

__all__ = ["FAMILIES", "OUTLIER", "Candidates", "Table"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pocketize.initial.families import NORMAL, ONE_SIDED, SQRT3, TRUNCATED, UNIFORM, Family
from pocketize.initial.laws import FANS, Geometry, Random
from pocketize.initial.moments import JUDGED, UNEVEN, Array, Moments

#: Nats by which a law may miss one tensor's own best fit before it no longer explains it.
OUTLIER = 14.0
FAMILIES = (NORMAL, UNIFORM, TRUNCATED, ONE_SIDED)


@dataclass(frozen=True)
class Candidates:
    """Fully specified laws as parallel lists.

    Attributes:
        family: The distributions.
        fan: Indices into :attr:`Table.fans`.
        gain: Standard deviations where the fan is 1.
        location: Means.
        price: Prices in nats.
    """

    family: list[Family]
    fan: list[int]
    gain: list[float]
    location: list[float]
    price: list[float]

    @staticmethod
    def of(rows: Sequence[tuple[Family, int, float, float, float]]) -> Candidates:
        """Turn rows of (family, fan, gain, location, price) into columns."""
        columns = zip(*rows, strict=True) if rows else ([], [], [], [], [])
        return Candidates(*map(list, columns))

    def row(self, index: int, fans: Sequence[str]) -> Random:
        """One of them as a law."""
        fan = fans[self.fan[index]]
        return Random(self.family[index], fan, self.gain[index], self.location[index])


class Table:
    """The moments and fans of a population, as arrays over its tensors."""

    def __init__(
        self, moments: Sequence[Moments], geometries: Sequence[Geometry], likeliest: str = "fan_in"
    ) -> None:
        def column(name: str) -> Array:
            return np.array([getattr(row, name) for row in moments], dtype=np.float64)

        self.count, self.mean, self.variance = column("count"), column("mean"), column("variance")
        self.low, self.high, self.rounding = column("low"), column("high"), column("rounding")
        self.kurtosis, self.uneven = column("kurtosis"), column("uneven")
        self.judged = self.count >= JUDGED
        units: dict[str, Array] = {}
        # of fans that cannot be told apart here only the first is kept
        for name in dict.fromkeys((likeliest, *FANS)):
            fan = FANS[name]
            unit = np.array([fan(geometry) for geometry in geometries], dtype=np.float64) ** -0.5
            same = any(
                np.allclose(unit, other, rtol=1e-9, equal_nan=True) for other in units.values()
            )
            if not same and not np.isnan(unit).all():
                units[name] = unit
        self.fans = list(units)
        self.units = np.stack(list(units.values()))

    @cached_property
    def even(self) -> npt.NDArray[np.bool_]:
        """Whether the channels' variances agree, as those of fresh weights do."""
        return ~self.judged | (self.uneven < UNEVEN)

    def shaped(self, family: Family) -> npt.NDArray[np.bool_]:
        """Whether tensors may come from this family: kurtosis, and channels alike."""
        error = np.sqrt(family.kurtosis_variance / self.count)
        distance = (self.kurtosis - family.kurtosis) / error
        # a kurtosis scatters further up than down, the more so in small samples
        close = (distance > -6) & (distance < 6 + 96 / np.sqrt(self.count))
        return self.even & (~self.judged | close)

    def own_std(self, family: Family) -> Array:
        """Standard deviation of each tensor's best fit of this family with mean 0 or its offset."""
        if family is ONE_SIDED:
            return self.high / (2 * SQRT3)
        reach = np.maximum(self.high, -self.low)
        if family is UNIFORM:
            return reach / SQRT3
        std = np.sqrt(self.variance + self.mean**2)
        return np.maximum(std, reach / family.bound)

    def log_likelihood(self, family: Family, centre: Array, std: Array) -> Array:
        """Log likelihood of every tensor, broadcast over leading axes of candidates."""
        spread = self.variance + (self.mean - centre) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.log(std)
            value = -self.count * (
                scale + family.log_norm + 0.5 * family.curvature * spread / std**2
            )
            if math.isfinite(family.bound):
                least = np.maximum(self.high - centre, centre - self.low) / family.bound
                if not family.curvature:
                    # a bound that rounding moved by half a bit must not count once per element
                    slack = np.clip(scale - np.log(least), 0, self.rounding)
                    value = value + self.count * slack
                value = np.where(least <= std * (1 + self.rounding), value, -np.inf)
        return np.where(np.isnan(value), -np.inf, value)

    @cached_property
    def background(self) -> Array:
        """Log likelihood of each tensor's own best fit among all families, with a free mean."""
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        std = np.sqrt(self.variance)
        reach = np.maximum(self.high - self.mean, self.mean - self.low)
        cut = np.maximum(std, reach / TRUNCATED.bound)
        fits = [
            np.where(self.shaped(NORMAL), self.log_likelihood(NORMAL, self.mean, std), -np.inf),
            np.where(
                self.shaped(UNIFORM), self.log_likelihood(UNIFORM, middle, half / SQRT3), -np.inf
            ),
            np.where(
                self.shaped(TRUNCATED), self.log_likelihood(TRUNCATED, self.mean, cut), -np.inf
            ),
        ]
        best: Array = np.max(fits, axis=0)
        return best

    def deviance(self, candidates: Candidates) -> Array:
        """How far each candidate stays behind the background, ``[candidates, tensors]``, in nats.

        Between ``-OUTLIER`` (does not explain the tensor) and 0.
        """
        std = np.array(candidates.gain)[:, None] * self.units[candidates.fan]
        location = np.array(candidates.location)[:, None]
        result = np.full(std.shape, -OUTLIER)
        names = np.array([family.name for family in candidates.family])
        for family in FAMILIES:
            rows = np.flatnonzero(names == family.name)
            if len(rows):
                centre = location[rows] + family.offset * std[rows]
                value = self.log_likelihood(family, centre, std[rows])
                value = value - np.where(np.isfinite(self.background), self.background, np.inf)
                value = np.where(self.shaped(family) & np.isfinite(value), value, -OUTLIER)
                result[rows] = np.clip(value, -OUTLIER, 0.0)
        return result
