"""What was measured of a set of images."""

from __future__ import annotations

__all__ = ["Complexity", "compare_measures"]

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from pocketize.passes.complexity.scales import scale_names


@dataclass(frozen=True, eq=False, repr=False)
class Complexity:
    """The complexity of a set of images; its repr is a table.

    Attributes:
        measure: the name of the measure.
        names: the images.
        values: ``[images, scales]``, the finest scale first.
        settings: how it was measured: the options that were in force.
    """

    measure: str
    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """The mean over the images, ``[scales]``: the complexity of the set."""
        mean: npt.NDArray[np.float64] = self.values.mean(axis=0)
        return mean

    def __repr__(self) -> str:
        return f"{self.title()}\n\n{tabulate(self._rows(), **_LAYOUT)}"

    def title(self) -> str:
        """Say in one line what was measured."""
        count = len(self.names)
        how = ", ".join(f"{name} {_plain(value)}" for name, value in self.settings.items())
        return f"{self.measure} of {count} image{'s' * (count != 1)}" + (f", {how}" if how else "")

    def to_markdown(self) -> str:
        """Return the table as GitHub's Markdown."""
        return f"{self.title()}\n\n{tabulate(self._rows(), **_LAYOUT | {'tablefmt': 'github'})}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can say, values per image included."""
        return {
            "measure": self.measure,
            "settings": dict(self.settings),
            "scales": scale_names(self.values.shape[1]),
            "mean": self.mean.tolist(),
            "images": [
                {"name": name, "values": row}
                for name, row in zip(self.names, self.values.tolist(), strict=True)
            ],
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _rows(self) -> list[list[str]]:
        spread = (self.values.std(axis=0), self.values.min(axis=0), self.values.max(axis=0))
        columns = [[figure(value) for value in column] for column in (self.mean, *spread)]
        return [list(row) for row in zip(scale_names(self.values.shape[1]), *columns, strict=True)]


def compare_measures(results: Sequence[Complexity], *, markdown: bool = False) -> str:
    """Return one table of the means of several measures of the same images."""
    names = scale_names(max(result.values.shape[1] for result in results))
    rows = [[result.measure, *map(figure, result.mean)] for result in results]
    table = tabulate(
        rows,
        headers=("measure", *names),
        colalign=("left", *["right"] * len(names)),
        disable_numparse=True,
        tablefmt="github" if markdown else "simple",
    )
    return "\n".join([*(result.title() for result in results), "", table])


def figure(value: float) -> str:
    """Write a number with four digits that matter."""
    if value == 0:
        return "0"
    return f"{value:#.4g}".rstrip(".") if 1e-4 <= abs(value) < 1e4 else f"{value:.3e}"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_LAYOUT: dict[str, Any] = {
    "headers": ("scale", "mean", "deviation", "min", "max"),
    "colalign": ("left", "right", "right", "right", "right"),
    "disable_numparse": True,
}
