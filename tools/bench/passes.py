"""One row for each pass on nnU-Net's U-Net: peak, time and guarantee; the table of the README.

    python tools/bench/passes.py --json passes.json

The network is PlainConvUNet with 32 to 256 channels (``plainconv`` in ``memory_nets.py``), the
step one of Adam. Peaks of training and inference are estimated on fake tensors, which equals the
live tensors of a real step. Times are the processor's seconds of a training step at a smaller size,
one thread, the least of some steps, all rows in turn in one process, relative to untouched.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from pocketize import history, measure, rewrite, step_in_backward
from tools.bench.memory_nets import NETS

#: Passes by label, and whether the optimizer steps in the backward pass.
ROWS: dict[str, tuple[tuple[str, ...], bool]] = {
    "untouched": ((), False),
    "in-place-norm": (("in-place-norm",), False),
    "recompute": (("recompute:keep=conv",), False),
    "recompute:keep=block": (("recompute:keep=block",), False),
    "recompute:keep=level": (("recompute:keep=level",), False),
    "checkpoint": (("checkpoint",), False),
    "offload:to=disk": (("offload:to=disk",), False),
    "patchwise, tiles of 24^3 in files": (
        ("patchwise:size=[24,24,24],train=true,keep=disk,output=disk,progress=false",),
        True,
    ),
    "amp": (("amp",), False),
    "recompute:keep=level and amp": (("recompute:keep=level", "amp"), False),
    "pocket": (("pocket",), False),
    "width:scale=0.5": (("width:scale=0.5",), False),
    "separable": (("separable",), False),
}


def seconds(model: nn.Module, x: torch.Tensor, in_backward: bool) -> float:
    """Return the processor's seconds of a step."""
    optimizer = torch.optim.Adam(model.parameters())
    if in_backward:
        optimizer = step_in_backward(model, optimizer)
    started = time.process_time()
    loss = model(x)
    (loss[0] if isinstance(loss, list | tuple) else loss).square().mean().backward()
    optimizer.step()
    took = time.process_time() - started
    model.zero_grad(set_to_none=True)
    if in_backward:
        optimizer.close()  # type: ignore[attr-defined]
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak, time and guarantee of each pass.")
    parser.add_argument("--size", type=int, default=96, help="edge of the volume for peaks")
    parser.add_argument("--timed", type=int, default=64, help="edge of the volume for times")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", default="passes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = NETS["plainconv"]
    shape, x = f"1x1x{'x'.join([str(options.size)] * 3)}", torch.randn(1, 1, *[options.timed] * 3)
    rows: dict[str, dict[str, Any]] = {}
    models = {}
    for label, (passes, in_backward) in ROWS.items():
        torch.manual_seed(0)
        model = net.build()
        for given in passes:
            model = rewrite(model, given, inputs=shape)
        train = measure(model, shape, estimate=True, step_in_backward=in_backward)
        infer = measure(model, shape, "infer", estimate=True)
        kept = [record.guarantee.upper() for record in history(model)] or ["-"]
        rows[label] = {
            "parameters": train.parameters,
            "train": train.peak,
            "infer": infer.peak,
            "elsewhere": train.elsewhere,
            "guarantee": max(kept, key=["-", "EXACT", "APPROXIMATE", "RETRAIN"].index),
        }
        models[label] = model
    for _ in range(options.steps):
        for label, model in models.items():
            took = seconds(model, x, ROWS[label][1])
            rows[label]["seconds"] = min(took, rows[label].get("seconds", took))
    Path(options.json).write_text(json.dumps(rows, indent=1))
    base = rows["untouched"]
    print(
        tabulate(
            [
                (
                    label,
                    row["guarantee"],
                    f"{row['parameters']:,}",
                    f"{row['train'] / 2**20:,.0f} MiB, {row['train'] / base['train']:.2f}x",
                    f"{row['infer'] / base['infer']:.2f}x",
                    f"{row['seconds'] / base['seconds']:.2f}x",
                )
                for label, row in rows.items()
            ],
            ("passes", "guarantee", "parameters", "training peak", "inference", "time"),
            tablefmt="github",
        )
    )


if __name__ == "__main__":
    main()
