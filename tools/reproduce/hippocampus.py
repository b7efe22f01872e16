"""Dice of one small 3D U-Net that trains and runs whole, in slabs, by exact tiles, in a cascade.

    python tools/reproduce/hippocampus.py DATA/Task04_Hippocampus --out runs/hippocampus

The hippocampus volumes of the Medical Segmentation Decathlon (Simpson et al., arXiv:1902.09063) are
padded to one size, so that nothing is cut off. MONAI's DynUNet with instance norm trains on the
same volumes in the same order for the same number of steps, from the same weights, in each of these
ways: whole; in slabs along the last axis, a backward pass for each; by exact tiles, to the whole
volume's gradients; and as the two stages of a cascade (Wehen, bachelor's thesis, HPI 2023), the
second whole and in slabs, guided by labels as in the thesis and by the first stage's own maps. Each
then segments other volumes, whole or by parts.

Everything is kept in the folder of ``--out``, so that an interrupted run goes on where it was. One
thread takes about twenty minutes a seed. Needs monai and nibabel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from costs import costs
from findings import Findings
from monai.networks.nets import DynUNet
from tabulate import tabulate
from torch import Tensor, nn
from volumes import (
    CLASSES,
    Case,
    dice_loss,
    dice_scores,
    read_volumes,
    train_volumes,
    whole_step,
)

from pocketize import rewrite
from pocketize.artifact.files import atomic_write
from pocketize.passes import Cascade, Patchwise
from pocketize.passes.tiling.patchwise import slab_backward

SIZE = "48x64x48"
FILTERS = (8, 16, 32, 32)
RATE = 1e-2
SLAB = 16
SCALE = 0.5
#: Steps in which losses are compared closely.
FEW = 5

SLABS = Patchwise(mode="slab", size=SLAB, progress=False)
TILES = Patchwise(mode="exact", size=SLAB, progress=False)
TRAINED_BY_TILES = Patchwise(mode="exact", size=SLAB, train=True, progress=False)
KEPT_ON_DISK = Patchwise(mode="exact", size=SLAB, train=True, keep="disk", progress=False)
WINDOWS = Patchwise(mode="window", size=32, overlap=0.5, weights="gaussian", progress=False)


@dataclass(frozen=True)
class Training:
    """A way to train.

    Attributes:
        tiles: what the network goes through parts with; None runs it whole.
        guided: who makes the class maps of a cascade's second stage; "" is no second stage.
        small: train on the shrunken volume, as the first stage of a cascade.
    """

    tiles: Patchwise | None = None
    guided: str = ""
    small: bool = False


TRAININGS = {
    "whole": Training(),
    "slabs": Training(SLABS),
    "exact tiles": Training(TRAINED_BY_TILES),
    "stage 1": Training(small=True),
    "stage 2, whole": Training(guided="labels"),
    "stage 2, slabs": Training(SLABS, guided="labels"),
    "stage 2, slabs, guided by stage 1": Training(SLABS, guided="stage 1"),
}
#: Costs of a further one, which trains as "exact tiles" do.
ONLY_MEASURED = {"exact tiles, kept on disk": Training(KEPT_ON_DISK)}
#: How it was trained, how it runs, and the pass.
RUNS: tuple[tuple[str, str, Patchwise | None], ...] = (
    ("whole", "whole", None),
    ("whole", "exact tiles", TILES),
    ("whole", "windows", WINDOWS),
    ("whole", "slabs", SLABS),
    ("slabs", "slabs", SLABS),
    ("slabs", "whole", None),
    ("exact tiles", "whole", None),
    ("stage 1", "whole, its maps resized", None),
    ("stage 2, whole", "cascade, whole", None),
    ("stage 2, whole", "cascade, slabs", SLABS),
    ("stage 2, slabs", "cascade, slabs", SLABS),
    ("stage 2, slabs, guided by stage 1", "cascade, slabs", SLABS),
)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    levels = len(FILTERS)
    strides, up = [1] + [2] * (levels - 1), [2] * (levels - 1)
    made = DynUNet(3, 1, CLASSES, [3] * levels, strides, up, filters=list(FILTERS))
    # begins by saying background, which most voxels are; else the steps go into learning that
    with torch.no_grad():
        made.output_block.conv.conv.bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    return made


class Way(nn.Module):
    """A network with what belongs to its way of training; its forward is how it segments.

    Attributes:
        net: what is trained: the network, or the cascade whose stage is.
    """

    def __init__(
        self, training: Training, tiles: Patchwise | None, seed: int, size: Sequence[int]
    ) -> None:
        super().__init__()
        self.how = training
        x = torch.zeros(1, 1, *size)
        passes = [] if tiles is None else [tiles]
        self.net: Any
        if training.guided or training.small:
            stages = network(seed), network(seed)
            self.net = Cascade(*stages, scale=SCALE, passes=passes, inputs=x)
            (self.net.stage2 if training.small else self.net.stage1).requires_grad_(False)
        else:
            self.net = rewrite(network(seed), *passes, inputs=x) if passes else network(seed)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net.guide(x) if self.how.small else self.net(x)
        return y

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add up gradients and return the loss."""
        how, net = self.how, self.net
        if how.small:
            images, labels = net.shrink(images), net.shrink_labels(labels)
            net = net.stage1
        elif how.guided:
            own = how.guided == "stage 1"
            guidance = net.guide(images) if own else net.guide_by_labels(labels)
            images, net = torch.cat([images, guidance], 1), net.stage2
        if how.tiles == SLABS:
            return slab_backward(net, images, labels, dice_loss)
        return whole_step(net, images, labels)


def take_step(way: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(way, Way)
    return way.step(images, labels)


class Step(nn.Module):
    """A training step up to its gradients as a forward, to be measured."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.way = way

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # multiplications are counted in a forward pass
            return self.way(images)
        loss = self.way.step(images, labels)
        # what measures goes back from the result; all is done, so that this adds zeros to one bias
        last = [p for p in self.way.parameters() if p.requires_grad][-1]
        return loss + 0 * last.sum()


class Study:
    """What has been found out, kept in a folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.out
        self.findings = Findings(self.folder)
        self.find = self.findings.find
        self.steps: int = arguments.steps
        self.seeds: list[int] = arguments.seeds
        self.size = tuple(map(int, arguments.size.split("x")))
        cases = read_volumes(arguments.data, self.size)
        # every third volume is for testing
        self.training = [case for index, case in enumerate(cases) if index % 3][: arguments.train]
        self.testing = cases[::3][: arguments.test]

    def way(self, seed: int, trained: str, tiles: Patchwise | None) -> Way:
        """Return a way to segment with trained weights; it is trained if it has not been."""
        file = self.folder / f"{seed}, {trained}.pt"
        if not file.exists():
            made = self.untrained(seed, trained)
            partly = file.with_suffix(".part")
            losses = train_volumes(
                made.train(),
                self.training,
                steps=self.steps,
                seed=seed,
                what=f"{seed}, {trained}",
                rate=RATE,
                step=take_step,
                kept=partly,
            )
            with atomic_write(file, overwrite=True) as new:
                torch.save(made.state_dict(), new)
            self.find(f"{seed}, {trained}, losses", lambda: losses)
            partly.unlink(missing_ok=True)
        way = Way(TRAININGS[trained], tiles, seed, self.size)
        way.load_state_dict(torch.load(file, weights_only=True))
        return way.eval()

    def untrained(self, seed: int, trained: str) -> Way:
        training = TRAININGS[trained]
        way = Way(training, training.tiles, seed, self.size)
        if training.guided:
            first = self.way(seed, "stage 1", None)
            way.net.stage1.load_state_dict(first.net.stage1.state_dict())
        return way

    def dice(self, seed: int, trained: str, run: str, tiles: Patchwise | None) -> list[Any]:
        def look() -> list[Any]:
            found: list[Any] = dice_scores(self.way(seed, trained, tiles), self.testing).tolist()
            return found

        return list(self.find(f"{seed}, {trained}, {run}, dice", look))

    def accuracy(self) -> str:
        """The table of Dice scores: means over volumes and seeds."""
        lines = []
        for trained, run, tiles in RUNS:
            each = [torch.tensor(self.dice(seed, trained, run, tiles)) for seed in self.seeds]
            both = torch.stack(each)
            spread = both.mean(2).std(1).mean() if both.shape[1] > 1 else torch.zeros(())
            parts = [f"{float(part):.1f}" for part in both.mean((0, 1))]
            seeds = ", ".join(f"{float(one.mean()):.1f}" for one in each)
            lines.append(
                [trained, run, *parts, f"{float(both.mean()):.1f} ± {float(spread):.1f}", seeds]
            )
        headers = ["trained", "run", "anterior", "posterior", "mean ± over volumes", "by seed"]
        return tabulate(lines, headers, tablefmt="github", disable_numparse=True)

    def exactness(self) -> str:
        """How far exact tiles are from the whole, in inference and in training."""
        lines = []
        for seed in self.seeds:
            far = self.find(f"{seed}, logits", partial(self.logits, seed))
            lines.append(f"seed {seed}: logits of exact tiles differ by at most {far}")
            whole, tiles = (
                torch.tensor(self.findings.results[f"{seed}, {name}, losses"])
                for name in ("whole", "exact tiles")
            )
            apart = (whole - tiles).abs()
            told = ", ".join(
                f"{float(apart[:n].max()):.1e} in the first {n}"
                for n in (1, FEW, 50, self.steps)
                if n <= self.steps
            )
            lines.append(f"seed {seed}: losses of the same steps differ by {told}")
        double = self.find("float64", self.double)
        return "\n".join([*lines, f"in float64, in the first {min(FEW, self.steps)}: {double:.1e}"])

    def logits(self, seed: int) -> str:
        whole, tiles = self.way(seed, "whole", None), self.way(seed, "whole", TILES)
        far, top, others = 0.0, 0.0, 0
        with torch.inference_mode():
            for case in self.testing:
                a, b = whole(case.image[None]), tiles(case.image[None])
                far = max(far, float((a - b).abs().max()))
                top = max(top, float(a.abs().max()))
                others += int((a.argmax(1) != b.argmax(1)).sum())
        return f"{far:.1e}, the largest is {top:.0f}; {others} voxels of another class"

    def double(self) -> float:
        """The largest difference of the first losses in float64, which rounds less."""
        cases = [Case(case.image.double(), case.label) for case in self.training]
        curves = []
        for name in ("whole", "exact tiles"):
            way = self.untrained(self.seeds[0], name).double().train()
            seed, steps = self.seeds[0], min(FEW, self.steps)
            curves.append(
                train_volumes(
                    way, cases, steps=steps, seed=seed, what="float64", rate=RATE, step=take_step
                )
            )
        return max(abs(a - b) for a, b in zip(*curves, strict=True))

    def costs(self) -> str:
        """The table of what a training step, and a forward pass, takes."""
        found: dict[str, dict[str, tuple[int, float]]] = {"training": {}, "inference": {}}
        for name, training in {**TRAININGS, **ONLY_MEASURED}.items():
            look = partial(self.step_costs, training)
            found["training"][name] = self.find(f"training {name}", look)
        for trained, run, tiles in RUNS:
            look = partial(self.run_costs, TRAININGS[trained], tiles)
            found["inference"][run] = self.find(f"running {run}", look)
        lines = []
        for what, ways in found.items():
            first = ways["whole"]
            for name, (peak, seconds) in ways.items():
                ratios = [peak / first[0], seconds / first[1]]
                told = [f"{peak / 2**20:.1f} MiB, {ratios[0]:.2f}x"]
                told += [f"{seconds:.2f} s, {ratios[1]:.2f}x"]
                lines.append([what, name, *told])
        headers = ["", "way", "peak", "CPU time"]
        return tabulate(lines, headers, tablefmt="github", disable_numparse=True)

    def step_costs(self, training: Training) -> tuple[int, float]:
        batch = self.training[:2]
        images = torch.stack([case.image for case in batch])
        labels = torch.stack([case.label for case in batch])
        step = Step(Way(training, training.tiles, 0, self.size)).train()
        return costs(step, (images, labels), train=True)

    def run_costs(self, training: Training, tiles: Patchwise | None) -> tuple[int, float]:
        way = Way(training, tiles, 0, self.size).eval()
        return costs(way, (self.training[0].image[None],))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("runs/hippocampus"))
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--train", type=int, default=60, help="volumes to train on, at most")
    parser.add_argument("--test", type=int, default=40, help="volumes to test on, at most")
    parser.add_argument("--size", default=SIZE, metavar="HxWxD", help="what volumes are padded to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = Study(arguments)
    for tell in (study.costs, study.accuracy, study.exactness):
        sys.stdout.write(tell() + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
