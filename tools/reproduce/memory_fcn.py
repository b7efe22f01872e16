"""Table 1 of the memory-efficient FCN's paper beside ours: parameters and training memory.

    python tools/reproduce/memory_fcn.py --out runs/memory_fcn
    python tools/reproduce/memory_fcn.py --out runs/memory_fcn --size 64

Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN", SPIE
Medical Imaging 2020, trained one volume at a time on a 16 or 32 GB V100. Here every row is made
from the baseline by passes; the zoo's ``MemoryFCN3d`` is the network that fits the paper's counts.
The peak of a training step with Adam (loss: the mean of squares of the output) is measured on this
machine at a cube of ``--size``, and estimated, without memory, at the paper's two sizes.

What is measured, and what is estimated, are bytes of live tensors: the paper's figures are a
graphics card's, with its framework's workspaces. Figures are kept in the folder of ``--out``, so
that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from pocketize import measure, rewrite
from pocketize.passes import Amp, Bottleneck, CompactBlock, InPlaceNorm, Separable
from pocketize.plugin.base import Pass
from pocketize.zoo.memory_fcn import MemoryFCN3d

FULL = "1x1x256x256x152"
LONG = "1x1x256x256x240"
#: The encoder's blocks, as if the network had been built with them.
BLOCKS: dict[str, Any] = {
    "where": ("encoder",),
    "weights": "reset",
    "activations": "any",
    "min_channels": 1,
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: as the paper has it.
        per_level: convolutions in every level of the encoder that is rewritten.
        passes: what makes the row from it.
        paper: parameters, 96^3, 256x256x152, 256x256x(45 to 234), as they are printed.
    """

    name: str
    per_level: int
    passes: tuple[Pass, ...]
    paper: tuple[str, str, str, str]


_COMPACT = CompactBlock(inner_norm=True, **BLOCKS)
# A ReLU cannot be undone, so the paper exchanges it for a leaky one, and so do we.
_IN_PLACE = InPlaceNorm(activation="leaky_relu:0.01")

ROWS = (
    Row("baseline U-Net", 2, (), ("9.5 M", "3.7 GB", "28.4 GB", "> 32 GB")),
    Row(
        "+ bottleneck",
        1,
        (Bottleneck(inner_norm=True, force=("encoder.*",), **BLOCKS),),
        ("3.2 M", "3.1 GB", "28.3 GB", "> 32 GB"),
    ),
    Row("+ separable", 2, (Separable(**BLOCKS),), ("2.7 M", "3.2 GB", "30.1 GB", "> 32 GB")),
    Row("+ compact block", 1, (_COMPACT,), ("2.6 M", "3.0 GB", "27.2 GB", "> 32 GB")),
    Row("+ in-place norm", 1, (_COMPACT, _IN_PLACE), ("2.6 M", "2.3 GB", "20.0 GB", "~ 30.2 GB")),
    Row(
        "+ mixed precision",
        1,
        (_COMPACT, _IN_PLACE, Amp(dtype="bf16")),
        ("2.6 M", "1.6 GB", "11.7 GB", "~ 17.6 GB"),
    ),
)


def built(row: Row) -> nn.Module:
    """Return the network of a row."""
    torch.manual_seed(0)
    model = MemoryFCN3d(per_level=row.per_level).train()
    if not row.passes:
        return model
    return rewrite(model, *row.passes, inputs="1x1x32x32x32", seed=0)


class Figures:
    """What has been found out, kept in a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "figures.json"
        self.known: dict[str, int] = {}
        if self.file.exists():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def find(self, row: Row, what: str) -> None:
        """Find one figure of a row, unless it is known.

        Args:
            row: the row.
            what: "parameters", or "measured" or "estimated" and a shape.
        """
        key = f"{row.name}: {what}"
        if key in self.known:
            return
        model = built(row)
        if what == "parameters":
            self.known[key] = sum(p.numel() for p in model.parameters())
        else:
            how, shape = what.split()
            profile = measure(model, shape, "train", "adam", estimate=how == "estimated")
            self.known[key] = profile.peak
        self.file.write_text(json.dumps(self.known, indent=1), encoding="utf-8")

    def text(self, row: Row, what: str) -> str:
        value = self.known.get(f"{row.name}: {what}")
        if value is None:
            return "-"
        return f"{value:,}" if what == "parameters" else f"{value / 2**30:.2f} GiB"


def table(figures: Figures, cube: str) -> str:
    whats = ("parameters", f"estimated {cube}", f"estimated {FULL}", f"estimated {LONG}")
    titles = (f"{cube[4:]} estimated", "256x256x152 estimated", "256x256x240 estimated")
    headers = ["", "parameters", "paper", f"{cube[4:]} measured"]
    headers += [title for size in titles for title in (size, "paper")]
    rows = []
    for row in ROWS:
        cells = [row.name]
        for what, paper in zip(whats, row.paper, strict=True):
            cells += [figures.text(row, what), paper]
        cells.insert(3, figures.text(row, f"measured {cube}"))
        rows.append(cells)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="The memory-efficient FCN's Table 1.")
    parser.add_argument("--size", type=int, default=96, help="of the cube that is measured")
    parser.add_argument("--estimate-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/memory_fcn"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cube = f"1x1x{arguments.size}x{arguments.size}x{arguments.size}"
    whats = ["parameters", *(f"estimated {shape}" for shape in (cube, FULL, LONG))]
    if not arguments.estimate_only:
        whats.append(f"measured {cube}")
    figures = Figures(arguments.out)
    for what in whats:
        for row in tqdm(ROWS, what, disable=None):
            figures.find(row, what)
    sys.stdout.write(table(figures, cube) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
