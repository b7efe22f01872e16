"""Measure how much a process grows while ``run_volume`` segments a CT in a file.

    python tools/bench/volume.py 512x512x320 --size 96x96x80

The CT is random and int16, the network a DynUNet with instance norms of a quarter of nnU-Net's
widths. Files are made in the current folder, and removed. Linux only. The process
grows by memory of its own, and by pages of files, which the system takes away when it needs them.
With MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 in the environment, glibc returns
freed tensors to the system at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import DynUNet

from pocketize import run_volume
from pocketize.passes.tiling.volumes import estimate_volume
from pocketize.units import bytes_text

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.bench.fresh import Resident


def window(x: torch.Tensor) -> torch.Tensor:
    return (x.clamp(-1000, 400) + 1000) / 1400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="of the CT, such as 512x512x320")
    parser.add_argument("--size", required=True, help="of a tile, such as 96x96x80")
    args = parser.parse_args()
    shape, size = (tuple(map(int, text.split("x"))) for text in (args.shape, args.size))
    torch.set_num_threads(1)
    filters = [8, 16, 32, 64, 128]
    net = DynUNet(3, 1, 3, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=filters).eval()
    options: dict[str, Any] = {"size": size, "keep": "disk", "reduce": "argmax"}
    print(estimate_volume(net, shape, **options))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = os.path.join(folder, "ct.npy")
        made = np.lib.format.open_memmap(path, "w+", np.int16, shape)
        for z in range(shape[2]):
            made[..., z] = np.random.default_rng(z).normal(-300, 400, shape[:2])
        del made
        ct = np.load(path, mmap_mode="r")
        labels = np.lib.format.open_memmap(f"{folder}/labels.npy", "w+", np.uint8, shape)
        run_volume(net, ct[:64, :64, :64], prepare=window, folder=folder, **options)  # warm up
        start = time.process_time()
        with Resident() as grown:
            run_volume(net, ct, labels, prepare=window, folder=folder, **options)
        seconds = time.process_time() - start
    own, files = (bytes_text(size or 0) for size in (grown.own, grown.files))
    print(f"growth: {own} of its own, {files} of pages of files; {seconds:.0f} s of CPU time")


if __name__ == "__main__":
    main()
