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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from findings import Findings
from tabulate import tabulate
from torch import nn
from volumes import CLASSES, Case, dice_scores, read_volumes, train_volumes

from pocketize import plan
from pocketize.artifact.files import atomic_write
from pocketize.passes import Bottleneck, CompactBlock, Separable
from pocketize.passes.swaps.base import Swap
from pocketize.passes.swaps.decompositions import folded, relative_error
from pocketize.zoo.patchwise import UNet3d

SIZE = (32, 48, 32)
WIDTHS = (16, 32, 64)

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


def train(model: nn.Module, cases: Sequence[Case], steps: int, seed: int, what: str) -> None:
    """Train from the present weights."""
    train_volumes(model.train(), cases, steps=steps, seed=seed, what=what)


def score(model: nn.Module, cases: Sequence[Case]) -> float:
    """Return the mean Dice score of the two foreground classes over volumes, in percent."""
    return float(dice_scores(model.eval(), cases).mean())


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
        findings = Findings(folder)
        self.results, self.keep = findings.results, findings.keep

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
            with atomic_write(path, overwrite=True) as new:
                torch.save(model.state_dict(), new)
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
    study = Study(arguments.out, arguments, read_volumes(arguments.data, SIZE))
    model = study.baseline()
    for label in arguments.only:
        study.compare(label, model)
    study.control(model)
    sys.stdout.write(study.table() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
