"""Trained points on disk: a run that was interrupted goes on where it stopped."""

from __future__ import annotations

__all__ = ["PointCache", "Trained", "TrainedKey"]

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketize.artifact.files import atomic_write
from pocketize.errors import PlanningError
from pocketize.untrusted import read_json

_HEADER = {"pocketize": "trained points", "format": 1}


@dataclass(frozen=True)
class TrainedKey:
    """What was trained.

    Attributes:
        model: fingerprint of the uncompressed network: its class, and names and shapes of its
            parameters.
        dataset: name of the data set.
        multiplier: width multiplier.
        seed: seed of the weights it started from.
    """

    model: str
    dataset: str
    multiplier: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        weights: convolution weights.
        accuracy: what ``train`` returned.
        seconds: how long that took.
    """

    weights: int
    accuracy: float
    seconds: float


class PointCache:
    """A file of JSON lines, one for each finished point; written anew and renamed for each.

    Points of other models are kept, so that several runs can share a file.

    Args:
        path: the file, or ``None`` to remember nothing.

    Raises:
        PlanningError: there is a file, and it is no cache, or damaged; the text says where.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._points = self._read()

    def get(self, key: TrainedKey) -> Trained | None:
        """Return what came of a point, if it is finished."""
        return self._points.get(key)

    def add(self, key: TrainedKey, trained: Trained) -> None:
        """Write a finished point; the file is whole at every moment.

        Raises:
            ArtifactError: the file cannot be written.
        """
        self._points = {**self._read(), **self._points, key: trained}  # others may write too
        if self.path is None:
            return
        lines = [json.dumps(_HEADER)]
        for each, point in self._points.items():
            lines.append(json.dumps(dataclasses.asdict(each) | dataclasses.asdict(point)))
        with atomic_write(self.path, overwrite=True) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _read(self) -> dict[TrainedKey, Trained]:
        if self.path is None or not self.path.exists():
            return {}
        advice = "move it away to train all points anew, or name another file"
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanningError(
                f"{self.path} cannot be read as a cache of trained points ({error}); {advice}"
            ) from error
        if not lines or _parsed(lines[0]) != _HEADER:
            raise PlanningError(
                f"{self.path} is no cache of trained points: expected the first line "
                f"{json.dumps(_HEADER)}; {advice}"
            )
        points = {}
        for number, line in enumerate(lines[1:], start=2):
            try:
                key, trained = _point(_parsed(line))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise PlanningError(
                    f"{self.path}, line {number}, is no trained point ({error}); delete the line "
                    f"to train that point anew: {line:.120}"
                ) from error
            points[key] = trained
        return points


def _parsed(line: str) -> Any:
    try:
        return read_json(line)
    except ValueError:
        return None


def _point(data: Any) -> tuple[TrainedKey, Trained]:
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    key = TrainedKey(
        str(data["model"]), str(data["dataset"]), float(data["multiplier"]), int(data["seed"])
    )
    trained = Trained(int(data["weights"]), float(data["accuracy"]), float(data["seconds"]))
    if not (math.isfinite(trained.accuracy) and trained.weights > 0):
        raise ValueError("accuracy or weights out of range")
    return key, trained
