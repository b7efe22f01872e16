"""One answer about volumes by tiles in a process of its own; ``tiling.py`` asks and reads it."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from pocketize import measure
from pocketize.graph.inputs import as_inputs
from pocketize.memory.flops import Macs
from pocketize.memory.meter import measure_on
from pocketize.memory.stage import real_stage
from pocketize.memory.step import Request, fixed_surroundings
from pocketize.passes.tiling.exact import prepare
from pocketize.passes.tiling.figures import estimated_peak, kept_bytes
from pocketize.passes.tiling.forward import Tiling
from tools.bench.fresh import MARK, Resident
from tools.bench.tiling_rows import SUBJECTS, WAYS, Size, Subject, Way

__all__ = ["Task", "estimate", "race", "synthetic", "weigh"]

#: Spatial size of what a network is trained on.
_CROP = 32


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        kind: "weigh" (memory of one way), "estimate" (the same, nothing runs), or "race" (times and
            errors of several ways).
        net: name of the network.
        size: of the volume.
        tile: of windows and tiles.
        ways: names of the ways; one, where memory is asked for.
        threads: of one operator; 0 leaves them as they are.
        rounds: how often each way is timed.
        steps: of training before a race.
    """

    kind: str
    net: str
    size: Size
    tile: Size
    ways: tuple[str, ...]
    threads: int = 0
    rounds: int = 3
    steps: int = 30


def weigh(task: Task) -> dict[str, Any]:
    """Run a volume once and again, and take its memory.

    Returns:
        ``peak`` of the live tensors, ``estimated``, what :func:`estimate` says of it, and ``own``
        and ``files``: what the process grew by, with weights and input, which were there before;
        all in bytes.
    """
    way = WAYS[task.ways[0]]
    torch.manual_seed(0)
    runs = way.prepare(SUBJECTS[task.net], task.size, way.tile(task.tile))
    x = torch.randn(1, 1, *task.size)
    answer: dict[str, Any] = {}
    if not way.counted:
        with torch.inference_mode():
            runs(x)  # what is recorded or compiled on a first call
            with Resident() as resident:
                out = runs(x)
            del out
        if resident.own is not None and resident.files is not None:
            answer |= {"own": resident.own + _standing(runs, x), "files": resident.files}
    with fixed_surroundings():
        stage = real_stage(runs, x, None, own=True)
        request = Request(model=stage.model, inputs=stage.inputs, mode="infer")
        answer["peak"] = measure_on(stage, request, Macs(0, 0, 0), None, own=False).peak
    return answer | {"estimated": estimate(task)["peak"]}


def _standing(runs: nn.Module, x: Tensor) -> int:
    held = [*runs.parameters(), *runs.buffers(), x]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


def estimate(task: Task) -> dict[str, Any]:
    """Count the live tensors of the same on tensors without values.

    Returns:
        ``peak``, and of exact tiles ``kept``, the most that waits between sweeps; in bytes.
    """
    way, subject = WAYS[task.ways[0]], SUBJECTS[task.net]
    if not way.exact:
        example = tuple(-(-size // subject.multiple) * subject.multiple for size in task.tile)
        runs = way.prepare(subject, task.size if way.title == "whole" else example, task.tile)
        shape = "x".join(map(str, (1, 1, *task.size)))
        return {"peak": measure(runs, shape, "infer", estimate=True).peak}
    tiling = Tiling(size=way.tile(task.tile), progress=False, **way.exact)
    net = subject.whole(task.size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 1, *task.size)
    prepared = prepare(net, as_inputs(x, net), tiling)
    peak = estimated_peak(prepared.trace, prepared.program, tiling)
    return {"peak": peak, "kept": kept_bytes(prepared.program, tiling.stored_dtype)}


def race(task: Task) -> dict[str, Any]:
    """Let several ways run the same volume in turn, and compare what comes out.

    The network is trained for a few steps first, so that its logits mean something.

    Returns:
        For each way ``cpu`` and ``wall``, the least seconds of all rounds; ``error``, the largest
        difference to the whole volume's logits in units of the largest of them; and ``differ``, the
        part of the voxels that get another label.
    """
    torch.manual_seed(0)
    subject = _trained(SUBJECTS[task.net], task.steps)
    x, truth = synthetic(task.size, torch.Generator().manual_seed(1))
    runners = {
        name: WAYS[name].prepare(subject, task.size, WAYS[name].tile(task.tile))
        for name in task.ways
    }
    found: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        whole = subject.whole(task.size)(x)
        right = float((whole.argmax(1) == truth).float().mean())
        for name, runs in runners.items():
            found[name] = _compared(runs(x), whole, WAYS[name])
        del whole
        for turn in range(task.rounds):
            start = turn * len(runners) // max(1, task.rounds)
            names = list(runners)
            for name in names[start:] + names[:start]:
                for clock, seconds in _timed(runners[name], x).items():
                    found[name][clock] = min(seconds, found[name].get(clock, seconds))
    return {"ways": found, "right": right}


def _trained(subject: Subject, steps: int) -> Subject:
    """Return the subject with weights after some steps of Adam on synthetic volumes."""
    net = subject.build().train()
    draw = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    # six levels leave one voxel of a crop, and norms refuse that
    crop = max(_CROP, 2 * subject.multiple)
    for _ in range(steps):
        x, labels = synthetic((crop,) * 3, draw)
        adam.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), labels).backward()  # type: ignore[no-untyped-call]
        adam.step()
    net.eval()
    return dataclasses.replace(subject, build=lambda: copy.deepcopy(net))


def synthetic(size: Size, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a volume with bright balls in noise, and where they are.

    Args:
        size: of the volume.
        draw: from where places and noise are drawn.

    Returns:
        (1, 1, *size) float32 and (1, *size) int64 of 0 and 1.
    """
    labels = torch.zeros(size, dtype=torch.int64)
    axes = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    voxels = labels.numel()
    for _ in range(max(1, voxels // 8192)):
        middle = [int(torch.randint(length, (), generator=draw)) for length in size]
        radius = int(torch.randint(4, 10, (), generator=draw))
        distance = sum((axis - at).square() for axis, at in zip(axes, middle, strict=True))
        labels[torch.as_tensor(distance) < radius**2] = 1
    noise = torch.randn(size, generator=draw)
    return (noise + labels)[None, None], labels[None]


def _compared(found: Tensor, whole: Tensor, way: Way) -> dict[str, Any]:
    labels = found[:, 0].long() if way.labels else found.argmax(1)
    answer: dict[str, Any] = {"differ": float((labels != whole.argmax(1)).float().mean())}
    if not way.labels:
        answer["error"] = float((found - whole).abs().max() / whole.abs().max())
    return answer


def _timed(runs: nn.Module, x: Tensor) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = runs(x)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    del out
    return seconds


_KINDS = {"weigh": weigh, "estimate": estimate, "race": race}


def main() -> None:
    data = json.loads(sys.argv[1])
    for key in ("size", "tile", "ways"):
        data[key] = tuple(data[key])
    task = Task(**data)
    if task.threads:
        torch.set_num_threads(task.threads)
    warnings.simplefilter("ignore")  # the networks' own
    sys.stdout.write(f"\n{MARK}{json.dumps(_KINDS[task.kind](task))}\n")


if __name__ == "__main__":
    main()
