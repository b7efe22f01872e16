"""One measurement in a process of its own; ``memory.py`` starts it and reads the last line."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from pocketize.memory import measure
from pocketize.memory.counters import ProcessMemory
from pocketize.memory.flops import Macs
from pocketize.memory.meter import measure_on
from pocketize.memory.stage import Stage, real_stage
from pocketize.memory.step import MeasuredStep, Request, fixed_surroundings
from tools.bench.fresh import MARK, trim
from tools.bench.memory_nets import NETS
from tools.bench.memory_rows import ROWS, NotApplicableError, Row

__all__ = ["Task", "work"]


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        net: name of the network.
        size: spatial size.
        row: name of the row.
        device: "cpu" or "cuda".
        estimate: on tensors without values.
        threads: of one operator; 0 leaves them as they are.
        steps: timed training steps.
    """

    net: str
    size: tuple[int, ...]
    row: str
    device: str = "cpu"
    estimate: bool = False
    threads: int = 0
    steps: int = 3


def work(task: Task) -> dict[str, Any]:
    """Measure, or say why not.

    Returns:
        ``peak`` and what belongs to it (bytes, seconds), or ``not_applicable`` with the reason.
    """
    net, row = NETS[task.net], ROWS[task.row]
    if task.estimate and not row.fakes:
        return {"not_applicable": "nothing of it runs on tensors without values"}
    torch.manual_seed(0)
    inputs = torch.randn(1, net.channels, *task.size, device=task.device)
    model = net.build().to(task.device).train()
    started = time.perf_counter()
    try:
        model = row.prepare(model, net, inputs)
    except NotApplicableError as why:
        return {"not_applicable": str(why)}
    answer: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "preparing_seconds": time.perf_counter() - started,
    }
    if task.estimate:
        profile = measure(model, inputs, estimate=True)
        return answer | {"peak": profile.peak, "categories": profile.categories}
    with fixed_surroundings():
        stage = real_stage(model, inputs, torch.device(task.device), own=True)
        answer |= _untracked(stage, task)
        if row.seen and task.device == "cpu":
            answer |= _tracked(stage, row)
    return answer


def _untracked(stage: Stage, task: Task) -> dict[str, Any]:
    """The second step and those after it, as the clock and the system see them."""
    step = MeasuredStep(stage.model, stage.inputs, train=True, optimizer="adam")
    step.run()  # Adam's state and, where there is one, the compiler's work
    step.clear()
    trim()
    if task.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = [_timed(step, task.device) for _ in range(max(1, task.steps))]
        free, total = torch.cuda.mem_get_info()
        return _times(seconds) | {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "process": total - free,
        }
    process = ProcessMemory()
    before = process.current()
    process.reset_peak()
    seconds = [_timed(step, task.device) for _ in range(max(1, task.steps))]
    highest = process.peak()
    if before is None or highest is None:
        return _times(seconds)
    return _times(seconds) | {"rss": highest - before + _standing(step)}


def _tracked(stage: Stage, row: Row) -> dict[str, Any]:
    request = Request(model=stage.model, inputs=stage.inputs)
    profile = measure_on(stage, request, Macs(0, 0, 0), None, own=False)
    return {"peak": profile.peak, "categories": profile.categories}


def _timed(step: MeasuredStep, device: str) -> float:
    step.clear()
    _synchronize(device)
    started = time.perf_counter()
    step.run()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _times(seconds: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(seconds), "all_seconds": seconds}


def _standing(step: MeasuredStep) -> int:
    """Bytes that live between steps, which were there when the counting began."""
    held = [*step.model.parameters(), *step.model.buffers(), *step.inputs.tensors()]
    if step.optimizer is not None:
        for state in step.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


def main() -> None:
    data = json.loads(sys.argv[1])
    task = Task(**{**data, "size": tuple(data["size"])})
    if task.threads:
        torch.set_num_threads(task.threads)
    warnings.simplefilter("ignore")  # the networks' own
    answer = work(task)
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
