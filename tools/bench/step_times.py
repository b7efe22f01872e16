"""How well ``fit`` predicts the time of a step: predicted over taken processor seconds.

    OMP_NUM_THREADS=1 python tools/bench/step_times.py [--nets monai_unetr,monai_segresnet]

One thread, Adam, the least of five steps (of three forward passes under ``inference_mode``). 1.00
is a perfect prediction. The time relative to the untouched network's step follows in parentheses.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
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
    "monai_unetr": "2x1x32x32",
}
WAYS = (
    "untouched",
    'keep="conv"',
    'keep="block"',
    "offload to files",
    "slabs of a quarter",
    "blocks of a third",
    "inference by slabs",
)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("zoo:"):
        return zoo.build(name[4:])
    return next(net for net in foreign_nets() if net.name == name).build()


def ways(model: nn.Module, size: str) -> Iterator[tuple[Callable[[], nn.Module], str]]:
    """Return what makes each of :data:`WAYS`, in their order, and the mode in which it runs."""
    volume = [int(n) for n in size.split("x")[2:]]

    def tiles(size: int | tuple[int, ...], *, train: bool) -> nn.Module:
        copied = copy.deepcopy(model)
        given = Patchwise(size=size, train=train, keep="disk", output="disk", progress=False)
        apply_edits(copied, [Convert("", "patchwise", given.conversion_options())])
        return copied

    yield lambda: model, "train"
    for given in Recompute(), Recompute(keep="block"), Offload(to="disk", min_bytes="64KiB"):
        yield partial(rewrite, model, given, inputs=size, strict=True), "train"
    quarter, third = math.ceil(volume[-1] / 4), tuple(math.ceil(n / 3) for n in volume)
    yield partial(tiles, quarter, train=True), "train"
    yield partial(tiles, third, train=True), "train"
    yield partial(tiles, quarter, train=False), "infer"


def taken(model: nn.Module, size: str, mode: str) -> float:
    """Return the processor's seconds of the fastest of some steps."""
    model = copy.deepcopy(model)
    x, best = torch.randn([int(n) for n in size.split("x")]), math.inf
    if mode == "infer":
        model.eval()
        for _ in range(3):
            started = time.process_time()
            with torch.inference_mode():
                model(x)
            best = min(best, time.process_time() - started)
        return best
    optimizer = torch.optim.Adam(model.train().parameters())
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", default=",".join(NETS))
    for name in parser.parse_args().nets.split(","):
        size = NETS[name]
        model = build(name).train()
        row, first = [f"{name}, {size}"], 0.0
        for make, mode in ways(model, size):
            try:
                lean, work = make(), Work()
                measure_here(Request(lean, size, mode, estimate=True), work=work)
                took = taken(lean, size, mode)
                first = first or took
                row.append(f"{times.seconds(work) / took:.2f} ({took / first:.2f}x)")
                times.save()
                sys.stderr.write(f"{name}, {WAYS[len(row) - 2]}: {row[-1]}\n")
            except Exception as error:  # noqa: PERF203  (a pass may refuse a network)
                row.append("-")
                sys.stderr.write(f"{name}: {error}\n")
        rows.append(row)
    print(tabulate(rows, ("network, input", *WAYS), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
