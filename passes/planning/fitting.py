"""Fit a degree of degradation to trained points: a line per data set, a line through the slopes."""

from __future__ import annotations

__all__ = ["DatasetFit", "DegradationFit", "fit_degradation"]

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from pocketize.errors import OptionError, PlanningError
from pocketize.passes.planning.degradation import Degradation
from pocketize.passes.planning.points import Point, read_points


@dataclass(frozen=True)
class DatasetFit:
    """The line of one data set: relative accuracy against log10 of the weights.

    Attributes:
        dataset: its name.
        complexity: its complexity.
        slope: relative accuracy gained per decade of weights.
        intercept: the line's value at one weight.
        r_squared: share of the variance that the line explains.
        points: number of points.
        base_weights: weights of the uncompressed network: the largest.
        base_accuracy: its accuracy, that all others are divided by.
    """

    dataset: str
    complexity: float
    slope: float
    intercept: float
    r_squared: float
    points: int
    base_weights: int
    base_accuracy: float


@dataclass(frozen=True, repr=False)
class DegradationFit:
    """A fitted degree of degradation, and how well the points bear it out.

    Attributes:
        degradation: lambda and delta.
        r_squared: share of the variance of the data sets' slopes that the line through them
            explains; always 1 for two data sets, which tells nothing.
        datasets: the lines of the data sets, by complexity.
        points: what was fitted.
    """

    degradation: Degradation
    r_squared: float
    datasets: tuple[DatasetFit, ...]
    points: tuple[Point, ...]

    @property
    def lam(self) -> float:
        """Lambda."""
        return self.degradation.lam

    @property
    def delta(self) -> float:
        """Delta."""
        return self.degradation.delta

    def relative(self) -> tuple[tuple[Point, float], ...]:
        """Return every point with its accuracy over that of its uncompressed network."""
        base = {fit.dataset: fit.base_accuracy for fit in self.datasets}
        return tuple((point, point.accuracy / base[point.dataset]) for point in self.points)

    def __str__(self) -> str:
        """Return the lines as a table."""
        rows = [
            (
                fit.dataset,
                f"{fit.complexity:.4f}",
                fit.points,
                f"{fit.base_weights:,}",
                f"{fit.base_accuracy:.4f}",
                f"{fit.slope:.5f}",
                f"{self.degradation.slope(fit.complexity):.5f}",
                f"{fit.r_squared:.3f}",
            )
            for fit in self.datasets
        ]
        headers = (
            *("data set", "complexity", "points", "uncompressed", "its accuracy"),
            *("slope", "lambda C + delta", "R^2"),
        )
        aligned = ("left", *["right"] * 7)
        table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
        trust = (
            "two data sets: the line goes through both, whatever they are"
            if len(self.datasets) == 2
            else f"R^2 {self.r_squared:.3f} over {len(self.datasets)} data sets"
        )
        return f"{self.degradation}; {trust}\n\n{table}"

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Return the fit as what ``json.dumps`` takes: the points, and what came of them."""
        return {
            "degradation": self.degradation.to_json(),
            "r_squared": self.r_squared,
            "slopes": {fit.dataset: fit.slope for fit in self.datasets},
            "points": [point.to_json() for point in self.points],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DegradationFit:
        """Return the fit that :meth:`to_json` was called on, by fitting its points again.

        Raises:
            PlanningError: this is no fit, or the points do not give the degradation in it.
        """
        try:
            stored = Degradation.from_json(data["degradation"])
            points = read_points(data["points"])
        except (KeyError, TypeError, OptionError) as error:
            raise PlanningError(f"not the JSON of a degradation's fit: {error}") from error
        fit = fit_degradation(points, metric=stored.metric, architecture=stored.architecture)
        same = np.allclose([fit.lam, fit.delta], [stored.lam, stored.delta], rtol=1e-6, atol=1e-12)
        if not same:
            raise PlanningError(
                f"the points of this fit give {fit.degradation}, but it says {stored}: "
                "one of the two was changed"
            )
        return fit

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw both fits into a file; the format is that of its ending.

        Raises:
            PlanningError: matplotlib is not installed, or the file cannot be written.
        """
        from pocketize.passes.planning.plotting import plot_fit

        plot_fit(self, path)


def fit_degradation(
    points: Iterable[Point | Sequence[Any]], *, metric: str = "f1", architecture: str = "custom"
) -> DegradationFit:
    """Fit lambda and delta of ``d(accuracy) / d(log10 weights) = lambda C + delta``.

    For each data set, the point with the most weights is the uncompressed network (where several
    have as many, such as repetitions, their mean); all accuracies are divided by its accuracy. A
    least-squares line through (log10 weights, relative accuracy) gives the data set's slope, a
    least-squares line through (complexity, slope) gives lambda and delta.

    Args:
        points: trained points, or tuples (dataset, complexity, weights, accuracy), in any order.
        metric: what the accuracy is: ``"f1"`` or ``"iu"``.
        architecture: what was trained, for the reader.

    Raises:
        PlanningError: fewer than two data sets, one size only of a data set, equal complexities,
            several complexities for one data set, or an uncompressed network of accuracy 0.

    Source: Mishra, Chen, Hu, ACM JETC 2021; it finds that two data sets at the multipliers 1, 0.25
    and 0.0625 do.
    """
    read = read_points(points)
    by_dataset: dict[str, list[Point]] = {}
    for point in read:
        by_dataset.setdefault(point.dataset, []).append(point)
    if len(by_dataset) < 2:
        raise PlanningError(
            f"a degradation takes at least two data sets, got {len(by_dataset)} "
            f"({', '.join(by_dataset) or 'no points'}): one slope does not tell how slopes grow "
            "with complexity"
        )
    fits = [_fit_dataset(name, group) for name, group in by_dataset.items()]
    fits.sort(key=lambda fit: fit.complexity)
    complexities = [fit.complexity for fit in fits]
    if math.isclose(complexities[0], complexities[-1], rel_tol=1e-9):
        raise PlanningError(
            f"all data sets have the complexity {complexities[0]!r}; take data sets that differ, "
            "or another measure of complexity"
        )
    lam, delta, r_squared = _line(complexities, [fit.slope for fit in fits])
    made = Degradation(lam, delta, metric, architecture)
    return DegradationFit(made, r_squared, tuple(fits), read)


def _fit_dataset(name: str, points: Sequence[Point]) -> DatasetFit:
    complexities = sorted({point.complexity for point in points})
    if len(complexities) > 1:
        raise PlanningError(
            f"data set {name!r} has points of different complexities: {complexities}; a data set "
            "has one, the mean over its training images"
        )
    largest = max(point.weights for point in points)
    if min(point.weights for point in points) == largest:
        raise PlanningError(
            f"all points of data set {name!r} have {largest:,} weights; a slope takes at least two "
            "sizes, such as the multipliers 1, 0.25 and 0.0625"
        )
    base = float(np.mean([point.accuracy for point in points if point.weights == largest]))
    if base == 0:
        raise PlanningError(
            f"the uncompressed network of data set {name!r} ({largest:,} weights) has accuracy 0, "
            "so nothing can be told relative to it; did its training fail?"
        )
    slope, intercept, r_squared = _line(
        [math.log10(point.weights) for point in points], [point.accuracy / base for point in points]
    )
    return DatasetFit(
        dataset=name,
        complexity=complexities[0],
        slope=slope,
        intercept=intercept,
        r_squared=r_squared,
        points=len(points),
        base_weights=largest,
        base_accuracy=base,
    )


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least-squares line; the x are not all equal."""
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centred, height = across - across.mean(), up - up.mean()
    slope = float(centred @ height / (centred @ centred))
    left = height - slope * centred
    total = float(height @ height)
    # points on a level line have no variance to explain; the line fits them all the same
    r_squared = 1.0 - float(left @ left) / total if total > 1e-24 else 1.0
    return slope, float(up.mean() - slope * across.mean()), r_squared
