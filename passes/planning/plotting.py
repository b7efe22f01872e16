"""Draw a fitted degradation; needs matplotlib, which is an optional package."""

from __future__ import annotations

__all__ = ["plot_fit"]

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pocketize.errors import PlanningError

if TYPE_CHECKING:
    from pocketize.passes.planning.fitting import DegradationFit


def plot_fit(fit: DegradationFit, path: str | os.PathLike[str]) -> None:
    """Draw the lines of the data sets beside the line through their slopes.

    No window is opened and no backend is chosen: the figure is drawn straight into the file.

    Args:
        fit: what to draw.
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
    relative = fit.relative()
    for number, line in enumerate(fit.datasets):
        colour = f"C{number}"
        mine = [(math.log10(p.weights), y) for p, y in relative if p.dataset == line.dataset]
        ends = [min(mine)[0], max(mine)[0]]
        label = f"{line.dataset}: slope {line.slope:.4f}, $R^2$ {line.r_squared:.3f}"
        left.scatter(*zip(*mine, strict=True), color=colour, s=18)
        left.plot(ends, [line.intercept + line.slope * x for x in ends], color=colour, label=label)
        right.scatter([line.complexity], [line.slope], color=colour, label=line.dataset)
    left.set(xlabel="log10 of the weights", ylabel="accuracy / accuracy of the uncompressed")
    ends = [fit.datasets[0].complexity, fit.datasets[-1].complexity]
    label = f"$\\lambda$ {fit.lam:.4f}, $\\delta$ {fit.delta:.5f}, $R^2$ {fit.r_squared:.3f}"
    slopes = [fit.degradation.slope(c) for c in ends]
    right.plot(ends, slopes, color="black", linewidth=1, label=label)
    right.set(xlabel="complexity", ylabel="slope")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(Path(path))
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for an unknown ending
        raise PlanningError(f"cannot draw the fit to {path}: {error}") from error
