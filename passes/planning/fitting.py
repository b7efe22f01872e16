"""Fit a degree of degradation to trained points: a line per data set, a line through the slopes."""

from __future__ import annotations

__all__ = ["DatasetFit", "DegradationFit", "Point", "fit_degradation", "read_points"]

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from pocketize.errors import OptionError, PlanningError
from pocketize.passes.planning.equations import Degradation


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
            explains; for two data sets it is always 1, whatever the points are.
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
            "two data sets: a line fits them always, so there is no R^2"
            if len(self.datasets) == 2
            else f"R^2 {self.r_squared:.3f} over {len(self.datasets)} data sets"
        )
        return f"{self.degradation}; {trust}\n\n{table}"

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Return the fit as what ``json.dumps`` takes: the points and the results."""
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
        """Draw the lines of the data sets beside the line through their slopes.

        No window is opened and no backend is chosen: the figure is drawn straight into the file.

        Args:
            path: where to; the format is that of its ending: ``.png``, ``.svg``, ``.pdf``.

        Raises:
            PlanningError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise PlanningError(
                "drawing a fit takes matplotlib, which is not installed: "
                "pip install 'pocketize[complexity]'"
            ) from error
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        relative = self.relative()
        for number, line in enumerate(self.datasets):
            colour = f"C{number}"
            mine = [(math.log10(p.weights), y) for p, y in relative if p.dataset == line.dataset]
            ends = [min(mine)[0], max(mine)[0]]
            label = f"{line.dataset}: slope {line.slope:.4f}, $R^2$ {line.r_squared:.3f}"
            left.scatter(*zip(*mine, strict=True), color=colour, s=18)
            left.plot(
                ends, [line.intercept + line.slope * x for x in ends], color=colour, label=label
            )
            right.scatter([line.complexity], [line.slope], color=colour, label=line.dataset)
        left.set(xlabel="log10 of the weights", ylabel="accuracy / accuracy of the uncompressed")
        ends = [self.datasets[0].complexity, self.datasets[-1].complexity]
        label = f"$\\lambda$ {self.lam:.4f}, $\\delta$ {self.delta:.5f}, $R^2$ {self.r_squared:.3f}"
        slopes = [self.degradation.slope(c) for c in ends]
        right.plot(ends, slopes, color="black", linewidth=1, label=label)
        right.set(xlabel="complexity", ylabel="slope")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        try:
            figure.savefig(Path(path))
        except (OSError, ValueError) as error:  # matplotlib raises ValueError for an unknown ending
            raise PlanningError(f"cannot draw the fit to {path}: {error}") from error


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
            f"({', '.join(by_dataset) or 'no points'}): one slope does not show how slopes grow "
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
            "so accuracies cannot be divided by it; did its training fail?"
        )
    slope, intercept, r_squared = _line(
        [math.log10(point.weights) for point in points], [point.accuracy / base for point in points]
    )
    return DatasetFit(
        name, complexities[0], slope, intercept, r_squared, len(points), largest, base
    )


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least-squares line; the x are not all equal."""
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centred, height = across - across.mean(), up - up.mean()
    slope = float(centred @ height / (centred @ centred))
    left = height - slope * centred
    total = float(height @ height)
    # points of equal height have no variance to explain, and the line fits them
    r_squared = 1.0 - float(left @ left) / total if total > 1e-24 else 1.0
    return slope, float(up.mean() - slope * across.mean()), r_squared


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
