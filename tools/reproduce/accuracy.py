"""What each way of making a 3D U-Net smaller costs in Dice, once it has been trained.

    python tools/reproduce/accuracy.py DATA/Task04_Hippocampus --out runs/accuracy

The protocol, written before the first run. Data, network, sizes, teacher and its training are those
of calibration.py (an ``--out`` of that script may be used again). Every student gets as many steps
as the teacher had, Adam at 3e-3 falling to zero, batches of two, the teacher's order of volumes:

* new: the widths alone are taken over, ``weights="reset"``;
* calibrated: channels and weights from eight other volumes without labels, then trained;
* distilled: as calibrated, and trained on half its own loss and half that of the distillation from
  the teacher, at temperature 2.

Dice is the mean over both foreground classes and all test volumes, in percent, over seeds, which
draw weights and order; the peak is that of a training step with Adam at one whole volume. A student
keeps the claim of its paper if its mean is within 1 % of the teacher's (PocketNet, Celaya et al.,
IEEE TMI 2022; Wang et al., SPIE Medical Imaging 2020). Resumable, as calibration.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import torch
from calibration import CUTS, RATE, SIZE, Study, arguments_of, network
from tabulate import tabulate
from torch import Tensor, nn
from volumes import dice_loss, train_volumes

from pocketize import Distillation, Pass, measure, rewrite
from pocketize.passes import Amp, InPlaceNorm

STUDENTS = ("Pocket()", "Width(0.5)", "Bottleneck()", "Separable()", "CompactBlock()")
NEW, CALIBRATED, DISTILLED = WAYS = ("new", "calibrated", "distilled")
#: Applied to the compact block in addition: exact, and 16 bits.
LEAN: tuple[Pass, ...] = (InPlaceNorm(), Amp(dtype="bf16"))


class Accuracy(Study):
    """What has been found out, kept in a folder."""

    def student(self, seed: int, cut: str, way: str) -> nn.Module:
        teacher = self.trained(seed)
        given: Any = CUTS[cut]
        if way == NEW:
            given = dataclasses.replace(given, weights="reset")
            return rewrite(teacher, given, inputs=self.images[0], seed=seed)
        return rewrite(teacher, given, inputs=self.images[0], calibration=self.images)

    def trained_student(self, seed: int, cut: str, way: str, lean: bool = False) -> float | None:
        """Return the Dice of a student."""
        name = f"{seed}, {cut}{' + in-place norm + amp' if lean else ''}, {way}"

        def look() -> float:
            student = self.student(seed, cut, way)
            if lean:
                student = rewrite(student, *LEAN, inputs=self.images[0])
            distil = Distillation(self.trained(seed), student)

            def step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
                if way == DISTILLED:
                    outputs, apart = distil(images)
                    loss = 0.5 * dice_loss(outputs, labels) + 0.5 * apart
                else:
                    loss = dice_loss(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.detach()

            kept = self.folder / f"{name}.part"
            train_volumes(
                student.train(),
                self.training,
                steps=self.steps,
                seed=seed,
                what=name,
                rate=RATE,
                step=step,
                kept=kept,
            )
            kept.unlink(missing_ok=True)
            return self.dice(student)

        found: float | None = self.find(name, look)
        return found

    def costs(self, cut: str, lean: bool = False) -> list[str]:
        """Return parameters and the peak of a training step."""

        def look() -> list[int]:
            model = network(0)
            if cut:
                model = rewrite(model, CUTS[cut], *(LEAN if lean else ()), inputs=self.images[0])
            peak = measure(model, (torch.zeros(1, 1, *SIZE),), "train").peak
            return [sum(p.numel() for p in model.parameters()), peak]

        found = self.find(f"costs of {cut or 'the teacher'}{', lean' if lean else ''}", look)
        return ["", ""] if found is None else [f"{found[0]:,}", f"{found[1] / 2**20:.1f} MiB"]

    def evidence(self) -> str:
        """Look at everything, seed by seed, and return the table."""
        for seed in self.seeds:
            self.whole(seed)
            for way in WAYS:
                for cut in STUDENTS:
                    self.trained_student(seed, cut, way)
            self.trained_student(seed, "CompactBlock()", CALIBRATED, lean=True)
        lines = [["teacher", *self.costs(""), spread([self.whole(s) for s in self.seeds]), "", ""]]
        for cut in STUDENTS:
            told = [spread([self.trained_student(s, cut, way) for s in self.seeds]) for way in WAYS]
            lines.append([f"`{cut}`", *self.costs(cut), *told])
        cut = "CompactBlock()"
        lean = [self.trained_student(s, cut, CALIBRATED, lean=True) for s in self.seeds]
        more = f"`{cut}` + in-place norm + amp"
        lines.append([more, *self.costs(cut, lean=True), "", spread(lean), ""])
        headers = ["network", "parameters", "peak of a training step", *WAYS]
        return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def spread(values: list[float | None]) -> str:
    """Return mean and standard deviation of what is there, and how many these are."""
    there = torch.tensor([value for value in values if value is not None])
    if not len(there):
        return ""
    deviation = f" ± {float(there.std()):.1f}" if len(there) > 1 else ""
    return f"{float(there.mean()):.1f}{deviation} ({len(there)})"


def main() -> int:
    arguments = arguments_of(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    sys.stdout.write(f"{Accuracy(arguments).evidence()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
