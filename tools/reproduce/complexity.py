"""Complexity-guided widths on real images: fitted, predicted, trained, and compared.

The narrow 2D U-Net of the zoo is trained on four data sets at three width multipliers. A degree of
degradation is fitted to what it reached. Then a multiplier that the fit has not seen is predicted
and trained, and so is the layer-wise plan of the same size.

    python tools/reproduce/complexity.py --data FOLDER --out FOLDER

takes one to two hours on one core. Every trained network is written down at once, so that the same
command goes on where it was interrupted, and only prints once all are there. Needs the extra
``complexity``.

Source: Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image
Segmentation", ACM JETC 2021, sections 4 and 5.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segmentation import NAMES, Dataset, read_dataset, train
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from pocketize import rewrite, zoo
from pocketize.errors import PlanningError
from pocketize.passes import Width
from pocketize.passes.complexity import complexity_of
from pocketize.passes.planning import (
    DegradationFit,
    Point,
    WidthPlan,
    fit_degradation,
    plan_widths,
)
from pocketize.passes.planning.runner import PointCache, Trained, TrainedKey, train_points
from pocketize.zoo.complexity import conv_weights

#: The paper's smallest multiplier, 1/16, leaves its U-Net four channels at the finest level; here
#: 1/8 does, since this one starts at 32.
FITTED = (1.0, 0.5, 0.125)
UNSEEN = 0.25
#: At the size of this multiplier, uniform and layer-wise widths are compared.
COMPARED = 0.125
INPUT = "1x1x64x64"


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        data: the folder of the data sets.
        out: the folder of the points and the tables.
        width: width of the finest level of the uncompressed U-Net; it doubles level by level.
        steps: optimiser steps of each training.
        seeds: each network is trained once for each; accuracies are their means.
    """

    data: Path
    out: Path
    width: int
    steps: int
    seeds: tuple[int, ...]

    def build(self) -> nn.Module:
        return zoo.build("complexity_unet2d", widths=tuple(self.width * 2**i for i in range(5)))

    @property
    def points(self) -> Path:
        return self.out / f"points-width{self.width}-steps{self.steps}.jsonl"


def complexities_of(dataset: Dataset) -> np.ndarray:
    """JPEG complexity over raw bytes at the scales of the U-Net's levels: sizes of files would
    compare TIFF with JPEG."""
    images = [sample.raw for sample in dataset.training]
    return complexity_of(images, "jpeg", scales=5, size="raw", progress=False)


def reached(
    setup: Setup,
    datasets: Mapping[str, Dataset],
    complexities: Mapping[str, np.ndarray],
    multipliers: Sequence[float],
) -> tuple[Point, ...]:
    """Train what is not trained yet; return one point for each data set and multiplier."""
    means: dict[tuple[str, int], list[Point]] = {}
    for seed in setup.seeds:
        points = train_points(
            setup.build,
            datasets,
            multipliers,
            partial(train, steps=setup.steps, seed=seed),
            complexities={name: float(values[0]) for name, values in complexities.items()},
            cache=setup.points,
            seeds=(seed,),
            inputs=INPUT,
        )
        for point in points:
            means.setdefault((point.dataset, point.weights), []).append(point)
    return tuple(
        Point(name, same[0].complexity, weights, float(np.mean([p.accuracy for p in same])))
        for (name, weights), same in means.items()
    )


def trained_plan(setup: Setup, name: str, dataset: Dataset, plan: WidthPlan) -> float:
    """Train the net of a plan, unless it is in the cache; return its mean F1."""
    cache = PointCache(setup.points)
    given = Width.from_plan(plan, weights="reset")
    scores = []
    for seed in setup.seeds:
        key = TrainedKey(str(given), name, 1.0, seed)
        found = cache.get(key)
        if found is None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                net = setup.build()
            net = rewrite(net, given, inputs=INPUT, seed=seed)
            start = time.perf_counter()
            score = train(net, dataset, steps=setup.steps, seed=seed)
            found = Trained(conv_weights(net), score, round(time.perf_counter() - start, 3))
            cache.add(key, found)
        scores.append(found.accuracy)
    return float(np.mean(scores))


def spread(setup: Setup, name: str, weights: int) -> float:
    """Half the range of what the seeds of a point reached."""
    cache = PointCache(setup.points)
    scores = [
        point.accuracy
        for key, point in cache._points.items()
        if key.dataset == name and point.weights == weights and key.seed in setup.seeds
    ]
    return (max(scores) - min(scores)) / 2


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=".4f")


def report(setup: Setup) -> str:
    datasets = {name: read_dataset(name, setup.data) for name in NAMES}
    complexities = {
        name: complexities_of(dataset)
        for name, dataset in tqdm(datasets.items(), desc="measuring", disable=None)
    }
    points = reached(setup, datasets, complexities, FITTED)
    fit = fit_degradation(points)
    unseen = reached(setup, datasets, complexities, (1.0, UNSEEN))
    full, between = max(p.weights for p in unseen), min(p.weights for p in unseen)
    decades = math.log10(full / between)
    compared = reached(setup, datasets, complexities, (1.0, COMPARED))
    small = min(point.weights for point in compared)

    parts = ["JPEG complexity (quality 25) over raw bytes, of the training images:"]
    scales = ["1", "1/2", "1/4", "1/8", "1/16"]
    parts.append(table([(n, *c) for n, c in complexities.items()], ["data set", *scales]))

    parts.append(
        f"F1 at multiplier 1, 1/2 and 1/8, of {len(setup.seeds)} seed(s): mean (half the range):"
    )
    rows: list[Sequence[object]] = []
    for name in datasets:
        mine = sorted((p for p in points if p.dataset == name), key=lambda p: -p.weights)
        line = next(line for line in fit.datasets if line.dataset == name)
        shown = [f"{p.accuracy:.4f} ({spread(setup, name, p.weights):.4f})" for p in mine]
        rows.append((name, *shown, line.slope, line.r_squared))
    parts.append(
        table(rows, ["data set", *(f"{w:,} weights" for w in _sizes(points)), "slope", "R^2"])
    )
    parts.append(
        f"lambda {fit.lam:.4f}, delta {fit.delta:.5f}, R^2 of the line through the four slopes "
        f"{fit.r_squared:.3f}."
    )

    parts.append(
        f"Multiplier 1/4 ({between:,} weights), which no fit has seen. Share of the F1 that is "
        "lost, predicted by all four data sets, by the other three only, by the data set's own "
        "line, and reached:"
    )
    rows = []
    for name in datasets:
        base, point = _of(unseen, name)
        drop = 1 - point.accuracy / base.accuracy
        own = next(line for line in fit.datasets if line.dataset == name).slope
        rows.append(
            (
                name,
                fit.degradation.slope(base.complexity) * decades,
                _without(points, name).degradation.slope(base.complexity) * decades,
                own * decades,
                drop,
            )
        )
    parts.append(table(rows, ["data set", "all four", "other three", "own line", "reached"]))

    parts.append(
        f"Uniform against layer-wise at the size of multiplier 1/8 ({small:,} convolution "
        "weights), by the slopes fitted here and by the paper's for its U-Net:"
    )
    rows = []
    for name, dataset in datasets.items():
        row: list[object] = [name, _of(compared, name)[1].accuracy]
        for degradation in (fit.degradation, "unet"):
            try:
                plan = plan_widths(
                    setup.build(),
                    inputs=INPUT,
                    complexity=complexities[name].tolist(),
                    degradation=degradation,
                    max_parameters=small,
                    count="conv",
                )
            except PlanningError:
                row += ["no slope > 0", "-"]
                continue
            row.append(trained_plan(setup, name, dataset, plan))
            row.append(" ".join(str(max(level.after)) for level in plan.levels))
        rows.append(row)
    heads = ["data set", "uniform F1", "fitted F1", "widths", "the paper's F1", "widths"]
    parts.append(table(rows, heads))
    fit.plot(setup.out / "degradation.png")
    return "\n\n".join(parts)


def _sizes(points: Sequence[Point]) -> list[int]:
    return sorted({p.weights for p in points}, reverse=True)


def _of(points: Sequence[Point], name: str) -> tuple[Point, Point]:
    mine = sorted((p for p in points if p.dataset == name), key=lambda p: -p.weights)
    return mine[0], mine[1]


def _without(points: Sequence[Point], name: str) -> DegradationFit:
    return fit_degradation([p for p in points if p.dataset != name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for points and tables")
    parser.add_argument("--width", type=int, default=32, help="channels of the finest level")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of a training")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each network")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(args.data, args.out, args.width, args.steps, tuple(range(args.seeds)))
    text = report(setup)
    (args.out / "complexity.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
