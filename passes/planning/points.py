"""Trained points: what a degradation is fitted to."""

from __future__ import annotations

__all__ = ["Point", "read_points"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pocketize.errors import PlanningError


@dataclass(frozen=True)
class Point:
    """One network, trained once.

    Attributes:
        dataset: name of what it was trained on.
        complexity: the complexity of that data set; the same for all its points.
        weights: the network's convolution weights, without biases and norms.
        accuracy: what it reached; F1 or IU, between 0 and 1 or in percent, the same for all points
            of a data set.

    Raises:
        PlanningError: a number is not finite, the weights are not positive, or the complexity or
            the accuracy is negative.
    """

    dataset: str
    complexity: float
    weights: int
    accuracy: float

    def __post_init__(self) -> None:
        """Refuse what no line can be drawn through."""
        where = f"point of {self.dataset!r}"
        for name in ("complexity", "weights", "accuracy"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise PlanningError(f"{where}: {name} must be a number, not {value!r}")
            if not math.isfinite(value):
                raise PlanningError(f"{where}: {name} must be finite, not {value!r}")
        if self.weights <= 0:
            raise PlanningError(f"{where}: weights must be positive, not {self.weights!r}")
        if self.complexity < 0 or self.accuracy < 0:
            raise PlanningError(
                f"{where}: complexity and accuracy must not be negative, got {self.complexity!r} "
                f"and {self.accuracy!r}"
            )

    def to_json(self) -> list[Any]:
        """Return the point as a list that ``json.dumps`` takes."""
        return [self.dataset, self.complexity, self.weights, self.accuracy]


def read_points(points: Iterable[Point | Sequence[Any]]) -> tuple[Point, ...]:
    """Return points, given as such or as (dataset, complexity, weights, accuracy).

    Raises:
        PlanningError: one is neither, or has a number out of range.
    """
    read = []
    for given in points:
        if isinstance(given, Point):
            read.append(given)
        elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 4:
            read.append(Point(*given))
        else:
            raise PlanningError(
                f"expected a Point or (dataset, complexity, weights, accuracy), got {given!r}"
            )
    return tuple(read)
