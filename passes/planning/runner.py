"""Train the points that a degradation is fitted to, with the user's own training."""

from __future__ import annotations

__all__ = ["PointCache", "Trained", "TrainedKey", "train_points"]

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from pocketize.artifact.files import atomic_write
from pocketize.engine.pipeline import rewrite
from pocketize.engine.surgery import apply_edits
from pocketize.errors import PlanningError
from pocketize.graph.capture import capture
from pocketize.graph.clone import clone
from pocketize.passes.planning.fitting import Point
from pocketize.passes.planning.network import conv_weights
from pocketize.passes.widths.width import Width
from pocketize.plugin.edits import Redraw
from pocketize.untrusted import read_json

_D = TypeVar("_D")


def train_points(
    model: nn.Module | Callable[[], nn.Module],
    datasets: Mapping[str, _D],
    multipliers: Sequence[float],
    train: Callable[[nn.Module, _D], float],
    *,
    complexities: Mapping[str, float],
    cache: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (0,),
    inputs: Any = None,
    keep: Sequence[str] = (),
    progress: bool | None = None,
) -> tuple[Point, ...]:
    """Train a network at some multipliers on some data sets.

    Every point starts from new weights: a model is reinitialised by the schemes it was first
    initialised with, at every multiplier also 1; a factory is called. Data sets and seeds are the
    outer loops, so an interrupted run has whole data sets first.

    Args:
        model: the uncompressed network, unchanged; or a function that builds it, which then draws
            from torch's generator, seeded.
        datasets: the second argument of ``train``, by name.
        multipliers: width multipliers above 0 and at most 1, with 1 among them: accuracies are
            relative to it. The paper takes 1, 0.75, 0.5, 0.25, 0.1875, 0.125 and 0.0625, and says
            that 1, 0.25 and 0.0625 do.
        train: trains the network in place on a data set and returns the accuracy it reaches on
            images it was not trained on. It sets seeds of its own, if it needs any.
        complexities: the complexity of each data set, by name.
        cache: a file that each finished point is written to, as JSON lines; points that are in it
            already are not trained again. ``None`` remembers nothing.
        seeds: seeds of the weights; each point is trained once for each, and a fit averages them.
        inputs: example inputs, to rewrite the network; ``None`` guesses.
        keep: patterns of module paths (fnmatch) that keep their channels.
        progress: whether to show a bar on stderr; by default on a terminal only.

    Returns:
        The points, for :func:`~pocketize.passes.planning.fit_degradation`.

    Raises:
        PlanningError: the multipliers, complexities or the cache are no good, or ``train`` returned
            no accuracy. Whatever ``train`` raises passes through; the cache holds all points that
            were finished.
    """
    _check(datasets, multipliers, complexities, seeds)
    stored = PointCache(cache)
    fingerprint = _fingerprint(_fresh(model, 1.0, seeds[0], inputs, keep), keep)
    jobs = list(itertools.product(datasets, seeds, multipliers))
    points = []
    off = None if progress is None else not progress
    with tqdm(total=len(jobs), desc="training", unit="net", disable=off) as bar:
        for name, seed, multiplier in jobs:
            key = TrainedKey(fingerprint, name, float(multiplier), int(seed))
            trained = stored.get(key)
            if trained is None:
                bar.set_postfix_str(f"{name} x{multiplier:g}")
                net = _fresh(model, multiplier, seed, inputs, keep)
                trained = _train(train, net, datasets[name], key, inputs)
                stored.add(key, trained)
            points.append(Point(name, complexities[name], trained.weights, trained.accuracy))
            bar.update()
    return tuple(points)


def _check(
    datasets: Mapping[str, Any],
    multipliers: Sequence[float],
    complexities: Mapping[str, float],
    seeds: Sequence[int],
) -> None:
    if not datasets:
        raise PlanningError("there are no data sets to train on")
    missing = [name for name in datasets if name not in complexities]
    if missing:
        raise PlanningError(
            f"complexities has no entry for {', '.join(map(repr, missing))}; "
            "`pocketize complexity DIR` measures it"
        )
    for value in multipliers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise PlanningError(f"a multiplier is above 0 and at most 1, not {value!r}")
    if 1 not in multipliers or len(set(multipliers)) < 2:
        raise PlanningError(
            f"multipliers must have 1 and others, got {list(multipliers)}: accuracies are relative "
            "to the uncompressed network, and a slope takes two sizes"
        )
    for name, values in (("multipliers", multipliers), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise PlanningError(f"{name} must be some, and different: {list(values)}")


def _fresh(
    model: nn.Module | Callable[[], nn.Module],
    multiplier: float,
    seed: int,
    inputs: Any,
    keep: Sequence[str],
) -> nn.Module:
    """Return the network at a multiplier, with new weights; the caller's random state is kept."""
    if isinstance(model, nn.Module):
        built = clone(model)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = model()
        if not isinstance(built, nn.Module):
            raise PlanningError(f"the factory must return an nn.Module, got {built!r:.100}")
    if multiplier < 1:
        width = Width(float(multiplier), keep=tuple(keep), weights="reset")
        return rewrite(built, width, inputs=inputs, seed=seed, inplace=True)
    if isinstance(model, nn.Module):
        device = next((p.device for p in built.parameters()), torch.device("cpu"))
        apply_edits(built, (Redraw(),), generator=torch.Generator(device).manual_seed(seed))
    return built


def _train(
    train: Callable[[nn.Module, _D], float], net: nn.Module, data: _D, key: TrainedKey, inputs: Any
) -> Trained:
    parameters = dict(net.named_parameters())
    names = conv_weights(capture(net, inputs))
    weights = sum(parameters[name].numel() for name in names if name in parameters)
    started = time.perf_counter()
    returned = train(net, data)
    try:
        accuracy = float(returned)
    except (TypeError, ValueError):
        accuracy = math.nan
    if not (math.isfinite(accuracy) and accuracy >= 0):
        raise PlanningError(
            f"train returned {returned!r} for {key.dataset!r} at multiplier {key.multiplier:g}; "
            "expected the accuracy it reached, a finite number of at least 0"
        )
    return Trained(weights, accuracy, round(time.perf_counter() - started, 3))


def _fingerprint(net: nn.Module, keep: Sequence[str]) -> str:
    shapes = [[name, list(p.shape)] for name, p in net.named_parameters()]
    described = json.dumps([type(net).__qualname__, shapes, sorted(keep)])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


_HEADER = {"pocketize": "trained points", "format": 1}


class TrainedKey(NamedTuple):
    """What was trained: ``model`` is a fingerprint of the class and its parameters' shapes."""

    model: str
    dataset: str
    multiplier: float
    seed: int


class Trained(NamedTuple):
    """What came of it: convolution weights, what ``train`` returned, and how long that took."""

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
        """Return the result of a point, if it is finished."""
        return self._points.get(key)

    def add(self, key: TrainedKey, trained: Trained) -> None:
        """Write a finished point; the file is whole at every moment.

        Raises:
            ArtifactError: the file cannot be written.
        """
        self._points = {**self._read(), **self._points, key: trained}  # others may write too
        if self.path is None:
            return
        rows = [each._asdict() | point._asdict() for each, point in self._points.items()]
        with atomic_write(self.path, overwrite=True) as temporary:
            lines = [json.dumps(row) + "\n" for row in (_HEADER, *rows)]
            temporary.write_text("".join(lines), encoding="utf-8")

    def _read(self) -> dict[TrainedKey, Trained]:
        if self.path is None or not self.path.exists():
            return {}
        advice = "move it away to train all points anew, or name another file"
        try:
            header, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
        except (OSError, UnicodeDecodeError) as error:
            raise PlanningError(
                f"{self.path} cannot be read as a cache of trained points ({error}); {advice}"
            ) from error
        if header != json.dumps(_HEADER):
            raise PlanningError(
                f"{self.path} is no cache of trained points: expected the first line "
                f"{json.dumps(_HEADER)}; {advice}"
            )
        points = {}
        for number, line in enumerate(lines, start=2):
            try:
                data = read_json(line)
                name, dataset = str(data["model"]), str(data["dataset"])
                key = TrainedKey(name, dataset, float(data["multiplier"]), int(data["seed"]))
                accuracy, seconds = float(data["accuracy"]), float(data["seconds"])
                trained = Trained(int(data["weights"]), accuracy, seconds)
                if not (math.isfinite(trained.accuracy) and trained.weights > 0):
                    raise ValueError("accuracy or weights out of range")
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise PlanningError(
                    f"{self.path}, line {number}, is no trained point ({error}); delete the line "
                    f"to train that point anew: {line:.120}"
                ) from error
            points[key] = trained
        return points
