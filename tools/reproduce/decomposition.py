"""Weights carried over into cheaper blocks against blocks drawn anew, on a trained 3D U-Net.

    python tools/reproduce/decomposition.py DATA/Task04_Hippocampus --out runs/decomposition

Trains a small 3D U-Net on two thirds of the hippocampus volumes (Simpson et al., arXiv:1902.09063),
swaps its convolutions for each of the three blocks at three compressions, and gives the Dice score
on the other volumes right after the swap, and after the same short training of both. The blocks are
all that differs: what is not swapped keeps its trained weights in either case.

Everything is kept in the folder of ``--out``, so that an interrupted run goes on where it was. With
one thread it takes about twenty minutes. Needs nibabel.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from pocketize import plan
from pocketize.passes import Bottleneck, CompactBlock, Separable
from pocketize.passes.swaps.base import Swap
from pocketize.passes.swaps.tensors import folded, relative_error
from pocketize.zoo.patchwise import UNet3d

SIZE = (32, 48, 32)
WIDTHS = (16, 32, 64)
CLASSES = 3
BATCH = 2
RATE = 1e-3

#: Label -> pass and the options that set its compression.
COMPRESSIONS: dict[str, tuple[type[Swap], dict[str, Any]]] = {
    "bottleneck, ratio 2": (Bottleneck, {"ratio": 2}),
    "bottleneck, ratio 4": (Bottleneck, {"ratio": 4}),
    "bottleneck, ratio 8": (Bottleneck, {"ratio": 8}),
    "separable, multiplier 4": (Separable, {"multiplier": 4}),
    "separable, multiplier 2": (Separable, {"multiplier": 2}),
    "separable, multiplier 1": (Separable, {"multiplier": 1}),
    "compact block, ratio 1": (CompactBlock, {"ratio": 1}),
    "compact block, ratio 2": (CompactBlock, {"ratio": 2}),
    "compact block, ratio 4": (CompactBlock, {"ratio": 4}),
}


@dataclass(frozen=True)
class Case:
    """One volume.

    Attributes:
        image: [1, D, H, W], zero mean and unit variance.
        label: [D, H, W], classes; what was padded is background.
    """

    image: Tensor
    label: Tensor


def fitted(volume: Any, size: tuple[int, ...]) -> Any:
    """Cut or pad an array with zeros to a size, about its middle."""
    for axis, (have, want) in enumerate(zip(volume.shape, size, strict=True)):
        start = max(0, (have - want) // 2)
        volume = np.take(volume, range(start, min(have, start + want)), axis)
        missing = max(0, want - have)
        pads = [(0, 0)] * len(size)
        pads[axis] = (missing // 2, missing - missing // 2)
        volume = np.pad(volume, pads)
    return volume


def read_cases(folder: Path) -> list[Case]:
    """Read every volume of a folder in the layout of the Medical Segmentation Decathlon."""
    import nibabel

    cases = []
    for path in tqdm(sorted(folder.glob("imagesTr/*.nii.gz")), "reading", disable=None):
        image = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
        label = np.asarray(nibabel.load(folder / "labelsTr" / path.name).dataobj)
        image = fitted((image - image.mean()) / (image.std() + 1e-6), SIZE)
        label = fitted(label, SIZE).astype(np.int64)
        cases.append(Case(torch.from_numpy(image)[None], torch.from_numpy(label)))
    if not cases:
        raise SystemExit(f"{folder} holds no imagesTr/*.nii.gz")
    return cases


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropy plus one minus the soft Dice score of the foreground."""
    soft = logits.softmax(1)[:, 1:]
    hard = F.one_hot(labels, CLASSES).movedim(-1, 1)[:, 1:].to(soft.dtype)
    axes = (0, 2, 3, 4)
    dice = (2 * (soft * hard).sum(axes) + 1) / (soft.sum(axes) + hard.sum(axes) + 1)
    return F.cross_entropy(logits, labels) + 1 - dice.mean()


def train(model: nn.Module, cases: Sequence[Case], steps: int, seed: int, what: str) -> None:
    """Train with Adam on batches in an order that the seed fixes, the rate falling to zero."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = batches(len(cases), seed)
    for _ in tqdm(range(steps), what, disable=None, leave=False):
        chosen = [cases[index] for index in next(order)]
        images = torch.stack([case.image for case in chosen])
        labels = torch.stack([case.label for case in chosen])
        optimizer.zero_grad()
        loss_of(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def batches(count: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def score(model: nn.Module, cases: Sequence[Case]) -> float:
    """Return the mean Dice score of the two foreground classes over volumes, in percent."""
    model.eval()
    scores = []
    with torch.inference_mode():
        for case in cases:
            found = model(case.image[None]).argmax(1)[0]
            for label in range(1, CLASSES):
                a, b = found == label, case.label == label
                both = int(a.sum() + b.sum())
                scores.append(2 * int((a & b).sum()) / both if both else 1.0)
    return 100 * sum(scores) / len(scores)


def error_of(given: Swap, model: nn.Module, paths: Sequence[str]) -> float:
    """Return the relative error of all weights that are swapped, taken together."""
    wrong = whole = 0.0
    for path in paths:
        conv: Any = model.get_submodule(path)
        weight = folded(conv.weight)
        ranks = given.ranks(conv)
        assert not isinstance(ranks, str)
        size = float(weight.square().sum())
        wrong += size * relative_error(weight, given.approximation(weight, ranks)) ** 2
        whole += size
    return (wrong / whole) ** 0.5


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Study:
    """What has been found out, kept in a folder."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, cases: list[Case]) -> None:
        self.folder, self.arguments = folder, arguments
        # every third volume is for testing
        self.training = [case for index, case in enumerate(cases) if index % 3]
        self.testing = cases[::3][: arguments.test]
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "results.json"
        self.results: dict[str, Any] = {}
        if self.file.exists():
            self.results = json.loads(self.file.read_text(encoding="utf-8"))

    def keep(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        self.file.write_text(json.dumps(self.results, indent=1), encoding="utf-8")

    def baseline(self) -> nn.Module:
        """Return the trained network, trained now or in an earlier run."""
        torch.manual_seed(self.arguments.seed)
        model = UNet3d(1, CLASSES, widths=WIDTHS)
        path = self.folder / "baseline.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            start = time.perf_counter()
            train(model, self.training, self.arguments.steps, self.arguments.seed, "baseline")
            seconds = time.perf_counter() - start
            torch.save(model.state_dict(), path)
            dice = score(model, self.testing)
            self.keep("baseline", {"parameters": parameters(model), "dice": dice, "s": seconds})
        return model

    def control(self, model: nn.Module) -> None:
        """The baseline itself, trained on as long as the others are."""
        if "baseline, trained on" not in self.results:
            train(model, self.training, self.arguments.tune, 1, "baseline, trained on")
            dice = score(model, self.testing)
            self.keep("baseline, trained on", {"parameters": parameters(model), "dice": dice})

    def compare(self, label: str, model: nn.Module) -> None:
        """Swap, test, train on, test: with carried weights and with new ones."""
        if label in self.results:
            return
        kind, options = COMPRESSIONS[label]
        found: dict[str, Any] = {}
        for weights in ("decompose", "reset"):
            given = kind(**options, weights=weights, activations="any")
            planned = plan(model, given, inputs=torch.zeros(1, 1, *SIZE), seed=self.arguments.seed)
            swapped = planned.apply()
            paths = [row.path for row in planned.passes[0].changes]
            found[f"{weights} parameters"] = parameters(swapped)
            found[f"{weights} swapped"] = len(paths)
            if weights == "decompose":
                found["error"] = error_of(given, model, paths)
            found[f"{weights} at once"] = score(swapped, self.testing)
            train(swapped, self.training, self.arguments.tune, 1, f"{label}, {weights}")
            found[f"{weights} trained"] = score(swapped, self.testing)
        self.keep(label, found)
        sys.stderr.write(f"{label}: {found}\n")

    def table(self) -> str:
        rows = []
        for label in ("baseline", "baseline, trained on"):
            result = self.results[label]
            rows.append([label, result["parameters"], "", "", "", result["dice"], ""])
        rows[0][3], rows[0][5] = rows[0][5], ""
        for label in COMPRESSIONS:
            if label in self.results:
                r = self.results[label]
                rows.append(
                    [label, r["decompose parameters"], r["error"]]
                    + [r[f"{w} at once"] for w in ("decompose", "reset")]
                    + [r[f"{w} trained"] for w in ("decompose", "reset")]
                )
        headers = ["blocks", "parameters", "relative error", "Dice at once, decomposed", "reset"]
        headers += ["Dice after training, decomposed", "reset"]
        formats = ("", ",", ".2f", ".1f", ".1f", ".1f", ".1f")
        return tabulate(rows, headers, tablefmt="github", floatfmt=formats, intfmt=",")


def main() -> int:
    parser = argparse.ArgumentParser(description="Decomposed against reset blocks.")
    parser.add_argument("data", type=Path, help="the folder Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("runs/decomposition"))
    parser.add_argument("--steps", type=int, default=200, help="of the baseline's training")
    parser.add_argument("--tune", type=int, default=30, help="of each training after a swap")
    parser.add_argument("--test", type=int, default=24, help="volumes to test on, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(COMPRESSIONS), choices=COMPRESSIONS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = Study(arguments.out, arguments, read_cases(arguments.data))
    model = study.baseline()
    for label in arguments.only:
        study.compare(label, model)
    study.control(model)
    sys.stdout.write(study.table() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
