"""What each way of making a U-Net smaller costs in accuracy, once the small network has trained.

    python tools/reproduce/accuracy.py DATA --out runs/accuracy

DATA holds Task04_Hippocampus, DRIVE, CHASEDB1 and ISBI2012, as segmentation.py describes them.
The protocol, written before its first run. Before it, a run of one seed with 120 and 240 steps
and, in 2D, calibration on the middle of images showed that so short trainings do not always arrive,
and that crops must come from anywhere; all its rows are run anew:

* Hippocampus, 3D: data, network (PlainConvUNet, 16 to 64 channels) and rate are those of
  calibration.py; 200 steps, batches of two volumes, under autocast to bfloat16; calibrated on four
  volumes that nothing trains on; Dice is the mean over both foreground classes and 20 test volumes,
  in percent, in float32.
* DRIVE, CHASE_DB1, ISBI2012, 2D: the zoo's complexity_unet2d (16 to 256 channels, batch norm),
  trained as segmentation.py trains, for 400 steps on batches of eight crops of 64x64; calibrated on
  a crop of 128x128 from anywhere in each of eight training images; Dice (F1) is over all test
  pixels, in percent.
* Every student takes as many steps as the full network took, with the same rates and batches:
  "new" has the full network's structure made smaller, and random weights; "calibrated" takes over
  channels and weights of the trained full network by images without labels ("at once" is before
  its training); "distilled" and "new, distilled" train from the same weights on half their own loss
  and half that of the distillation from the full network, at temperature 2.
* "full, calibrated" is the full network trained on for as many steps again, for comparison.
* With in-place norm, LeakyReLU takes the place of the 2D network's ReLU, which has no inverse.
* Seeds draw weights and batches. Nothing is chosen on test images. A student keeps a paper's claim
  here if its mean is at most 1 point below that of the full network over the same seeds:
  PocketNet (Celaya et al., IEEE TMI 2022, within 1 %) for `Pocket()`, new; Wang et al. (SPIE
  Medical Imaging 2020, the same accuracy) for the compact block with in-place norm and amp.

With ``--crops middle`` the 2D networks are calibrated on the middle of the images, to show what
that costs; give another ``--out``.

Peaks are those of a training step with Adam on a batch, times the CPU seconds of such a step
without the optimizer's, median of five. Resumable, as calibration.py; seed by seed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import calibration
import segmentation
import torch
from calibration import CUTS, RATE, SIZE, TRAIN
from findings import Findings
from tabulate import tabulate
from torch import Tensor, nn
from volumes import (
    BATCH,
    amp_step,
    dice_loss,
    dice_scores,
    read_volumes,
    train_volumes,
)

from pocketize import Distillation, Pass, measure, rewrite, zoo
from pocketize.artifact.files import atomic_write
from pocketize.passes import Amp, InPlaceNorm

NEW, NEW_DISTILLED, AT_ONCE, CALIBRATED, DISTILLED = WAYS = (
    "new",
    "new, distilled",
    "at once",
    "calibrated",
    "distilled",
)
FULL, COMPACT = "full", "CompactBlock()"
LEAN = f"{COMPACT} + in-place norm + amp"
#: Applied to the compact block in addition; in 2D the activation takes the place of ReLU.
LEAN_PASSES: tuple[Pass, ...] = (InPlaceNorm(activation="leaky_relu:0.01"), Amp(dtype="bf16"))
TASKS = ("DRIVE", "ISBI2012", "CHASE_DB1", "Hippocampus")
ALL_WAYS = ("Pocket()", "Width(0.5)")
#: What is trained, in this order.
ROWS = (*ALL_WAYS, COMPACT, LEAN, "Bottleneck()", FULL, "Separable()")


class Task(ABC):
    """A data set with its network.

    Attributes:
        name: for the tables.
        images: to calibrate on.
        batch: of the size that trains.
    """

    name: str
    images: list[Tensor]
    batch: Tensor

    @abstractmethod
    def network(self, seed: int) -> nn.Module: ...

    @abstractmethod
    def train(
        self, model: nn.Module, distil: Distillation | None, seed: int, what: str, kept: Path
    ) -> None: ...

    @abstractmethod
    def score(self, model: nn.Module) -> float: ...


class Hippocampus(Task):
    name = TASKS[-1]

    def __init__(self, arguments: argparse.Namespace) -> None:
        cases = read_volumes(arguments.data / "Task04_Hippocampus", SIZE)
        others = [case for index, case in enumerate(cases) if index % 3]
        self.training, self.testing = others[:TRAIN], cases[::3][: arguments.test]
        self.images = [case.image[None] for case in others[TRAIN : TRAIN + 4] or others]
        self.batch = torch.zeros(BATCH, 1, *SIZE)
        self.steps: int = arguments.steps

    def network(self, seed: int) -> nn.Module:
        return calibration.network(seed)

    def train(
        self, model: nn.Module, distil: Distillation | None, seed: int, what: str, kept: Path
    ) -> None:
        def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            if distil is None:
                return amp_step(model, images, labels)
            with torch.autocast("cpu", torch.bfloat16):
                outputs, apart = distil(images)
            loss = 0.5 * dice_loss(outputs.float(), labels) + 0.5 * apart
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        how: dict[str, Any] = {"rate": RATE, "step": step, "kept": kept, "what": what}
        train_volumes(model.train(), self.training, steps=self.steps, seed=seed, **how)
        kept.unlink(missing_ok=True)

    def score(self, model: nn.Module) -> float:
        return float(dice_scores(model.eval(), self.testing).mean())


class Planar(Task):
    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        data = segmentation.read_dataset(name, arguments.data)
        self.data = dataclasses.replace(data, testing=data.testing[: arguments.test])
        draw = torch.Generator().manual_seed(0) if arguments.crops == "spread" else None
        self.images = [_crop(sample.image, draw)[None, None] for sample in data.training[:8]]
        crop = segmentation.CROP
        self.batch = torch.zeros(segmentation.BATCH, 1, crop, crop)
        self.steps: int = 2 * arguments.steps

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return zoo.build("complexity_unet2d", widths=(16, 32, 64, 128, 256))

    def train(
        self, model: nn.Module, distil: Distillation | None, seed: int, what: str, kept: Path
    ) -> None:
        data = dataclasses.replace(self.data, testing=())  # `score` tests
        segmentation.train(model, data, steps=self.steps, seed=seed, distil=distil)

    def score(self, model: nn.Module) -> float:
        return 100 * segmentation.f1(model.eval(), self.data.testing)


def _crop(image: Tensor, draw: torch.Generator | None, size: int = 128) -> Tensor:
    """Return a part of an image: the middle, or one that is drawn."""
    top, left = (
        (n - size) // 2 if draw is None else int(torch.randint(n - size + 1, (), generator=draw))
        for n in image.shape
    )
    return image[top : top + size, left : left + size]


class Study:
    """What has been found out, kept in a folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.findings = Findings(arguments.out, arguments.only, arguments.until)
        self.folder: Path = arguments.out
        self.seeds: list[int] = arguments.seeds
        #: The last calibrated student, which takes a minute: by task, seed and cut.
        self.calibrated: dict[tuple[str, int, str], nn.Module] = {}
        self.tasks: list[Task] = [
            Hippocampus(arguments) if name == Hippocampus.name else Planar(name, arguments)
            for name in arguments.tasks
        ]

    def full(self, task: Task, seed: int) -> nn.Module:
        """Return the trained full network, trained now or in an earlier run."""
        name = f"{task.name}, {seed}, {FULL}"
        file = self.folder / f"{name}.pt"
        net = task.network(seed)
        if not file.exists():
            task.train(net.train(), None, seed, name, file.with_suffix(".part"))
            with atomic_write(file, overwrite=True) as new:
                torch.save(net.state_dict(), new)
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()

    def row(self, task: Task, seed: int, row: str) -> None:
        """Find out the scores of one network in all its ways."""

        def student(way: str) -> nn.Module:
            full, x = self.full(task, seed), task.images[0]
            if row == FULL:
                return full
            name = COMPACT if row == LEAN else row
            cut: Any = CUTS[name]
            if way in (NEW, NEW_DISTILLED):
                return rewrite(full, dataclasses.replace(cut, weights="reset"), inputs=x, seed=seed)
            if (task.name, seed, name) not in self.calibrated:
                small = rewrite(full, cut, inputs=x, calibration=task.images)
                self.calibrated = {(task.name, seed, name): small}
            small = copy.deepcopy(self.calibrated[task.name, seed, name])
            return rewrite(small, *LEAN_PASSES, inputs=x) if row == LEAN else small

        def look(way: str) -> float:
            model = student(way)
            if way != AT_ONCE and (row, way) != (FULL, NEW):
                name = _name(task, seed, row, way)
                taught = way in (DISTILLED, NEW_DISTILLED)
                distil = Distillation(self.full(task, seed), model) if taught else None
                task.train(model.train(), distil, seed, name, self.folder / f"{name}.part")
            return task.score(model)

        for way in _ways(row):
            self.findings.find(_name(task, seed, row, way), partial(look, way))

    def costs(self, task: Task, row: str) -> list[str]:
        """Return parameters, the peak of a training step, and its CPU time."""

        def look() -> list[float]:
            model = task.network(0).train()
            if row != FULL:
                cut = CUTS[COMPACT if row == LEAN else row]
                more = LEAN_PASSES if row == LEAN else ()
                model = rewrite(model, cut, *more, inputs=task.batch)
            peak = measure(model, task.batch, "train").peak
            return [sum(p.numel() for p in model.parameters()), peak, _seconds(model, task.batch)]

        found = self.findings.find(f"{task.name}, costs of {row}", look)
        if found is None:
            return ["", "", ""]
        return [f"{found[0]:,}", f"{found[1] / 2**20:.1f} MiB", f"{found[2]:.3f} s"]

    def run(self) -> None:
        """Find out everything: all of the first seed, then the next."""
        for seed in self.seeds:
            for task in self.tasks:
                self.findings.find(
                    _name(task, seed, FULL, NEW),
                    lambda task=task, seed=seed: task.score(self.full(task, seed)),
                )
                for row in ROWS:
                    self.row(task, seed, row)
        for task in self.tasks:
            for row in ROWS:
                self.costs(task, row)

    def scores(self, task: Task, row: str, way: str) -> dict[int, float]:
        names = {seed: _name(task, seed, row, way) for seed in self.seeds}
        return {s: self.findings.results[n] for s, n in names.items() if n in self.findings.results}

    def table(self, task: Task) -> str:
        lines = []
        for row in (FULL, *(row for row in ROWS if row != FULL)):
            told = [_spread(list(self.scores(task, row, way).values())) for way in WAYS]
            lines.append([f"`{row}`" if row != FULL else row, *self.costs(task, row), *told])
        headers = ["network", "parameters", "peak", "step", *WAYS]
        return tabulate(lines, headers, tablefmt="github", disable_numparse=True)

    def claims(self, task: Task) -> str:
        """Say how far students are from the full network over the seeds that both have."""
        lines = []
        for claim, row, way, base in (
            ("PocketNet", "Pocket()", NEW, NEW),
            ("PocketNet", "Pocket()", CALIBRATED, CALIBRATED),
            ("Wang et al.", LEAN, CALIBRATED, NEW),
            ("Wang et al.", LEAN, CALIBRATED, CALIBRATED),
        ):
            full, found = self.scores(task, FULL, base), self.scores(task, row, way)
            away = [score - full[seed] for seed, score in found.items() if seed in full]
            if away:
                mean = statistics.mean(away)
                kept = "reached" if mean >= -1 else "not reached"
                what = f"{claim}: {row}, {way}, against {FULL}, {base}"
                lines.append(f"{what}: {mean:+.1f} ({len(away)} seeds): {kept}")
        return "\n".join(lines)


def _ways(row: str) -> tuple[str, ...]:
    if row in ALL_WAYS:
        return WAYS
    return (NEW, CALIBRATED) if row == FULL else (AT_ONCE, CALIBRATED)


def _name(task: Task, seed: int, row: str, way: str) -> str:
    return f"{task.name}, {seed}, {row}, {way}"


def _seconds(model: nn.Module, x: Tensor, times: int = 5) -> float:
    """Return the CPU seconds of forward and backward: the median, after one that is not timed."""
    taken = []
    for _ in range(1 + times):
        start = time.process_time()
        model(x).float().square().mean().backward()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def _spread(values: list[float]) -> str:
    """Return mean and standard deviation of what is there, and how many these are."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of the data sets' folders")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--crops", choices=("middle", "spread"), default="spread", help="in 2D")
    parser.add_argument("--steps", type=int, default=200, help="of each training; in 2D twice")
    parser.add_argument("--test", type=int, default=20, help="test images of a data set, at most")
    study = Study(calibration.parsed(parser))
    study.run()
    for task in study.tasks:
        sys.stdout.write(f"{task.name}\n\n{study.table(task)}\n\n{study.claims(task)}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
