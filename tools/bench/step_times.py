"""How well ``fit`` predicts the time of a step: predicted over taken processor seconds.

    OMP_NUM_THREADS=1 python tools/bench/step_times.py

One thread, Adam, the least of five steps. 1.00 is a perfect prediction.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from pocketize import rewrite, zoo
from pocketize.engine.surgery import apply_edits
from pocketize.memory.meter import measure_here
from pocketize.memory.step import Request
from pocketize.memory.work import Work
from pocketize.passes import Offload, Patchwise, Recompute
from pocketize.passes.fit.time_model import TimeModel
from pocketize.plugin.edits import Convert
from tests.foreign import foreign_nets

NETS = {
    "nnunet_plain_conv": "1x1x48x48x48",
    "monai_segresnet": "1x2x48x48x48",
    "monai_basic_unet": "1x1x48x48x48",
    "monai_dynunet_plain": "1x1x48x48x48",
    "zoo:pocketnet_unet3d": "1x1x16x64x64",
}
WAYS = ("untouched", 'keep="conv"', 'keep="block"', "offload to files", "slabs of a quarter")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("zoo:"):
        return zoo.build(name[4:])
    return next(net for net in foreign_nets() if net.name == name).build()


def ways(model: nn.Module, size: str) -> Iterator[Callable[[], nn.Module]]:
    """Return what makes each of :data:`WAYS`, in their order."""

    def tiles() -> nn.Module:
        quarter, copied = math.ceil(int(size.split("x")[-1]) / 4), copy.deepcopy(model)
        given = Patchwise(size=quarter, train=True, keep="disk", output="disk", progress=False)
        apply_edits(copied, [Convert("", "patchwise", given.conversion_options())])
        return copied

    yield lambda: model
    for given in Recompute(), Recompute(keep="block"), Offload(to="disk", min_bytes="64KiB"):
        yield lambda given=given: rewrite(model, given, inputs=size, strict=True)  # type: ignore[misc]
    yield tiles


def taken(model: nn.Module, size: str) -> float:
    """Return the processor's seconds of the fastest of five steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters())
    x, best = torch.randn([int(n) for n in size.split("x")]), math.inf
    for _ in range(5):
        started = time.process_time()
        made: Any = model(x)
        made = made if isinstance(made, tuple | list) else [made]
        sum(each.square().mean() for each in made).backward()
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    torch.set_num_threads(1)
    times, rows = TimeModel(torch.device("cpu")), []
    for name, size in NETS.items():
        model = build(name).train()
        row = [f"{name}, {size}"]
        for make in ways(model, size):
            try:
                lean, work = make(), Work()
                measure_here(Request(lean, size, estimate=True), work=work)
                row.append(f"{times.seconds(work) / taken(lean, size):.2f}")
            except Exception as error:  # noqa: PERF203  (a pass may refuse a network)
                row.append("-")
                sys.stderr.write(f"{name}: {error}\n")
        rows.append(row)
    print(tabulate(rows, ("network, input", *WAYS), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
