"""Train the points that a degradation is fitted to, with the user's own training."""

from __future__ import annotations

__all__ = ["train_points"]

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from pocketize.engine.pipeline import rewrite
from pocketize.engine.surgery import apply_edits
from pocketize.errors import PlanningError
from pocketize.graph.capture import capture
from pocketize.graph.clone import clone
from pocketize.passes.planning.cache import PointCache, Trained, TrainedKey
from pocketize.passes.planning.counting import conv_weights
from pocketize.passes.planning.points import Point
from pocketize.passes.widths.width import Width
from pocketize.plugin.edits import Redraw

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

    Every point starts from new weights: a model is drawn anew from the distribution it was
    initialised with, at every multiplier also 1; a factory is called. Data sets and seeds are the
    outer loops, so an interrupted run has whole data sets first.

    Args:
        model: the uncompressed network, unchanged; or a function that builds it, which then draws
            from torch's generator, seeded.
        datasets: whatever ``train`` takes, by name.
        multipliers: width multipliers above 0 and at most 1, with 1 among them: accuracies are
            relative to it. The paper takes 1, 0.75, 0.5, 0.25, 0.1875, 0.125 and 0.0625, and says
            that 1, 0.25 and 0.0625 do.
        train: trains the network in place on a data set and returns the accuracy it reaches on
            images it was not trained on. Seeds of its own are its business.
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
