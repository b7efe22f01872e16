"""What passes save under ``torch.compile``: peaks of a training step, as it is and compiled.

    python tools/bench/compiled.py --size 64 --backend aot_eager

Prints the table of docs/memory.md. Each figure comes from a fresh process: the largest sum of
tensors that torch's allocator had given out since the step began (the second one), so gradients
count and weights do not. ``torch.profiler`` counts them, as a dispatch mode would switch the
compiler off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import torch
from monai.networks.nets import DynUNet
from torch.profiler import ProfilerActivity, profile

from pocketize import rewrite
from pocketize.units import bytes_text

PASSES = (
    "none",
    "recompute",
    "recompute:keep=block",
    "recompute:keep=level",
    "in-place-norm",
    "checkpoint",
)


def peak(given: str, backend: str, size: int) -> int:
    torch.manual_seed(0)
    model: Any = DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[16, 32, 64, 128])
    x = torch.randn(1, 1, size, size, size)
    if given != "none":
        model = rewrite(model, given, inputs=x)
    call = model if backend == "none" else torch.compile(model, backend=backend)

    def step() -> None:
        model.zero_grad()
        call(x).square().mean().backward()

    step()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="of the cube")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    parser.add_argument("--one", nargs=2, metavar=("PASS", "BACKEND"), help="one figure, in bytes")
    options = parser.parse_args()
    if options.one:
        print("peak", peak(*options.one, options.size))
        return
    print(
        f"| pass | as it is | compiled |\n| --- | ---: | ---: |\n| torch {torch.__version__} | | |"
    )
    first: dict[str, int] = {}
    for given in PASSES:
        row = [given]
        for backend in ("none", options.backend):
            command = [sys.executable, "-W", "ignore", __file__, "--size", str(options.size)]
            done = subprocess.run(
                [*command, "--one", given, backend], capture_output=True, text=True, check=True
            )
            found = int(done.stdout.rpartition("peak ")[2])
            share = found / first.setdefault(backend, found)
            row.append(f"{bytes_text(found)} ({share:.2f}x)")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
