"""The curve of peak against work: which results ``Recompute`` keeps, beside its fixed choices.

    python tools/bench/recompute_curve.py --nets plainconv,dynunet --sizes 96 > curve.md

One step of every network is recorded on fake tensors and searched (``recompute.curve``); nothing
runs. *Peak* is that of the second step with Adam, batch 1, relative to the untouched network's;
*operations* are those of convolutions and products, relative to the untouched step's. Of each curve
about ``--points`` are shown and ``--confirm`` are estimated once more by ``pocketize.measure``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[2]))

from pocketize import measure, rewrite
from pocketize.graph.capture import capture
from pocketize.graph.inputs import as_inputs
from pocketize.passes import Recompute
from pocketize.passes.recompute.curve import Choice, curve, movable
from pocketize.passes.recompute.recorded_step import record_step
from pocketize.passes.recompute.replay import Cost
from pocketize.passes.recompute.weight_uses import chosen, find_uses, freed
from tools.bench.memory import read_size
from tools.bench.memory_nets import NETS, BenchNet

__all__ = ["fixed_choices", "main", "table"]

_MIB = 2**20
_MODES = ("conv", "block", "level")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Peak against work of recomputation.")
    parser.add_argument("--nets", default="plainconv,plainconv6,dynunet,monai-unet,memory-fcn")
    parser.add_argument("--sizes", default="96")
    parser.add_argument("--points", type=int, default=14, help="of each curve that are shown")
    parser.add_argument("--confirm", type=int, default=3, help="of each curve that are estimated")
    options = parser.parse_args(arguments)
    for size in map(read_size, options.sizes.split(",")):
        for name in options.nets.split(","):
            text = table(NETS[name], size, options.points, options.confirm)
            sys.stdout.write(f"### {NETS[name].title}, {'x'.join(map(str, size))}\n\n{text}\n\n")
            sys.stdout.flush()


def table(net: BenchNet, size: tuple[int, ...], points: int, confirm: int) -> str:
    """The curve of one network, in Markdown."""
    model, text = net.build(), "x".join(map(str, (1, net.channels, *size)))
    before = measure(model, text, estimate=True).peak
    start = time.process_time()
    found = curve(model, text)
    seconds = time.process_time() - start
    rows = [
        [f"`keep={mode!r}`", *_figures(cost.peak, before, step), *_beside(found, cost.peak)]
        for mode, (cost, step) in fixed_choices(model, text).items()
    ]
    shown = found[:: max(1, len(found) // points)]
    rows += [["", "", "", "", *_beside(found, p.peak)] for p in dict.fromkeys([*shown, found[-1]])]
    for row in rows:
        row[4] = f"{int(row[4]) / before:.3f}"
    headers = ["fixed", "MiB", "peak", "operations", "curve: peak", "operations", "results kept"]
    lines = [
        f"Untouched {before / _MIB:.0f} MiB; {len(found)} choices on the curve, found in "
        f"{seconds:.1f} s of CPU time.",
        "",
        tabulate(rows, headers, tablefmt="github", disable_numparse=True),
    ]
    for choice in found[:: max(1, len(found) // max(1, confirm))][:confirm]:
        made = rewrite(model, Recompute(keep=choice.keep), inputs=text) if choice.flops else model
        if choice.flops:
            peak = measure(made, text, estimate=True).peak
            lines += ["", f"Predicted {choice.peak} bytes, estimated {peak}."]
    return "\n".join(lines)


def fixed_choices(model: torch.nn.Module, text: str) -> dict[str, tuple[Cost, float]]:
    """What conv, block and level take, with the operations of the step."""
    inputs = as_inputs(text, model)
    uses = find_uses(traced := capture(model, inputs, train=True))
    step = record_step(model, inputs, movable(uses), freed(traced, uses), Recompute().min_bytes)
    costs = {mode: step.cost([use.name for use in chosen(uses, mode)]) for mode in _MODES}
    return {mode: (c, 1 + c.flops / (3 * step.forward_flops)) for mode, c in costs.items()}


def _figures(peak: int, before: int, step: float) -> list[str]:
    return [f"{peak / _MIB:.0f}", f"{peak / before:.3f}", f"{step:.3f}"]


def _beside(found: list[Choice], peak: int) -> list[str]:
    """The cheapest choice that needs no more memory."""
    best = next(choice for choice in found if choice.peak <= peak)
    return [str(best.peak), f"{best.step:.3f}", str(len(best.keep))]


if __name__ == "__main__":
    main()
