"""The paper's JPEG complexity beside ours, on the data sets that both have.

    python tools/reproduce/jpeg_complexity.py /path/to/data

The folder holds data sets as their publishers lay them out: ``CHASEDB1/Image_NN[LR].jpg``,
``DRIVE/training/images/NN_training.tif``, ``ISBI2012/image/N.png``,
``Task04_Hippocampus/imagesTr/*.nii.gz``. Those that are not there are passed over. The table is
Markdown. The exit code is 1 where CHASE_DB1 is more than 6 % from the paper at a scale, or DRIVE
does not decay from scale to scale; the absolute values of DRIVE are open, for the paper's depend on
the size of its files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from tabulate import tabulate

from pocketize.passes.complexity import Complexity, measure_dataset

#: Mishra, Chen, Hu, ACM JETC 2021: J at the scales 1, 1/2, 1/4, 1/8, 1/16.
PAPER = {
    "CHASE_DB1": (0.2826, 0.2204, 0.1971, 0.1789, 0.1636),
    "DRIVE": (0.0362, 0.0303, 0.0284, 0.0269, 0.0255),
}
#: Where each data set is, which files, and over what size.
DATA: tuple[tuple[str, str, str, Literal["raw", "file"]], ...] = (
    ("CHASE_DB1", "CHASEDB1", "*.jpg", "file"),
    ("CHASE_DB1", "CHASEDB1", "*.jpg", "raw"),
    ("DRIVE", "DRIVE/training/images", "*.tif", "file"),
    ("DRIVE", "DRIVE/training/images", "*.tif", "raw"),
    ("ISBI2012", "ISBI2012/image", "*.png", "raw"),
    ("Hippocampus, slices", "Task04_Hippocampus/imagesTr", "*.nii.gz", "raw"),
)
SCALES, TOLERANCE = 5, 0.06


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of the data sets")
    root = parser.parse_args().data
    rows: list[list[str]] = []
    wrong: list[str] = []
    for name, folder, pattern, size in DATA:
        if not (root / folder).is_dir():
            print(f"{name}: there is no {root / folder}", file=sys.stderr)
            continue
        result = measure_dataset(root / folder, scales=SCALES, size=size, pattern=pattern)
        rows += [_row(name, size, result), *_beside(name, size, result)]
        wrong += _check(name, size, result)
    headers = ("data set", "images", "over", "1", "1/2", "1/4", "1/8", "1/16")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    for each in wrong:
        print(f"not as in the paper: {each}", file=sys.stderr)
    return 1 if wrong or not rows else 0


def _row(name: str, size: str, result: Complexity) -> list[str]:
    values = [f"{value:.4f}" for value in result.mean]
    return [name, str(len(result.names)), f"{size} size", *values]


def _beside(name: str, size: str, result: Complexity) -> list[list[str]]:
    if name not in PAPER or size != "file":
        return []
    relative = result.mean / PAPER[name] - 1
    return [
        ["the paper's", "", "", *(f"{value:.4f}" for value in PAPER[name])],
        ["ours against it", "", "", *(f"{value:+.1%}" for value in relative)],
    ]


def _check(name: str, size: str, result: Complexity) -> list[str]:
    if name == "CHASE_DB1" and size == "file":
        off = float(np.abs(result.mean / PAPER[name] - 1).max())
        if off > TOLERANCE:
            return [f"{name} is {off:.1%} off"]
    if name == "DRIVE" and (np.diff(result.mean) >= 0).any():
        return [f"{name} does not decay over the {size} size"]
    return []


if __name__ == "__main__":
    sys.exit(main())
