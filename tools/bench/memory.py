"""Memory of a training step: our passes, alone and together, beside what else there is.

    python tools/bench/memory.py --nets dynunet,plainconv --sizes 64 --rows untouched,amp
    python tools/bench/memory.py --sizes 64,96 --estimate 128,256x256x152 --json memory.json
    python tools/bench/memory.py --sizes 256x256x152 --device cuda

Every figure comes from a process of its own. The step is the second one, with Adam, batch 1: the
first makes the optimizer's state and lets compilers compile. *Peak* is live tensors, counted by
``pocketize.memory`` (on a GPU ``max_memory_allocated``); *RSS* is what the process needed at most
during the timed steps, without what was resident before them, and with weights, inputs and
optimizer state; time is the median of the steps. Ratios are to the untouched network.

Finished rows are kept in the JSON file and not measured again; delete it, or name rows with
``--again``, to do so. Failures are tried again. The Markdown tables go to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.fresh import ask
from tools.bench.memory_nets import NETS
from tools.bench.memory_rows import ROWS
from tools.bench.memory_worker import Task

__all__ = ["main", "read_size", "record_key", "render", "run"]

_MIB = 2**20

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    path = Path(options.json)
    records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    session = time.strftime("%Y-%m-%dT%H:%M:%S")
    tasks = [
        Task(net, size, row, options.device, estimate, options.threads, options.steps)
        for estimate, sizes in ((False, options.sizes), (True, options.estimate))
        for size in sizes
        for net in options.nets
        for row in options.rows
    ]
    for task in tasks:
        key = record_key(task)
        held = records.get(key)
        if held is not None and "failed" not in held and task.row not in options.again:
            continue
        sys.stderr.write(f"{key} ... ")
        sys.stderr.flush()
        records[key] = run(task, options.timeout) | {"session": session}
        sys.stderr.write(f"{_brief(records[key])}\n")
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(records, indent=1))
        temporary.replace(path)
    wanted = [(task, records[record_key(task)]) for task in tasks]
    sys.stdout.write(render(wanted) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the memory of training steps.")
    names = ("dynunet", "plainconv", "monai-unet", "memory-fcn", "patchwise")
    parser.add_argument("--nets", type=_names(NETS), default=list(names), help=", ".join(NETS))
    parser.add_argument("--rows", type=_names(ROWS), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--sizes", type=_sizes, default=[], help="to measure: 64,96x96x64")
    parser.add_argument("--estimate", type=_sizes, default=[], help="sizes to estimate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of one operator; 0: torch's choice")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one row")
    parser.add_argument("--json", default="memory.json", help="file with what was measured")
    parser.add_argument("--again", type=_names(ROWS), default=[], help="rows to measure anew")
    return parser


def _names(known: dict[str, Any]) -> Any:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; of {list(known)}")
        return names

    return read


def _sizes(text: str) -> list[tuple[int, ...]]:
    try:
        return [read_size(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_size(text: str) -> tuple[int, ...]:
    """Read ``"64"`` as a cube and ``"256x256x152"`` as it stands.

    Raises:
        ValueError: it is neither.
    """
    parts = text.split("x")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"expected a size such as 64 or 256x256x152, got {text!r}")
    size = tuple(int(part) for part in parts)
    return size * 3 if len(size) == 1 else size


def record_key(task: Task) -> str:
    """Under which a measurement is kept."""
    how = "estimated" if task.estimate else f"{task.device}, {task.threads or 'all'} threads"
    return f"{task.net}, {'x'.join(map(str, task.size))}, {task.row}, {how}"


def run(task: Task, timeout: float) -> Record:
    """Measure in a fresh process; what went wrong is ``failed`` in the record."""
    return ask("memory_worker.py", vars(task), threads=task.threads, timeout=timeout)


def _brief(record: Record) -> str:
    for why in ("failed", "not_applicable"):
        if why in record:
            return f"{why.replace('_', ' ')}: {record[why]}"
    peak = f"{record['peak'] / _MIB:.0f} MiB" if "peak" in record else "-"
    seconds = f", {record['seconds']:.2f} s" if "seconds" in record else ""
    return peak + seconds


def render(results: list[tuple[Task, Record]]) -> str:
    """A Markdown table for every network and size, with ratios to its untouched row."""
    threads = (results[0][0].threads if results else 0) or torch.get_num_threads()
    parts = [f"torch {torch.__version__}, {threads} threads; MiB and seconds"]
    groups: dict[tuple[str, tuple[int, ...], bool], list[tuple[Task, Record]]] = {}
    for task, record in results:
        groups.setdefault((task.net, task.size, task.estimate), []).append((task, record))
    for (net, size, estimate), rows in groups.items():
        kind = "estimated" if estimate else "measured"
        parts.append(f"### {NETS[net].title}, {'x'.join(map(str, size))}, {kind}")
        base = next((record for task, record in rows if task.row == "untouched"), {})
        parts.append(_table(rows, base, gpu=rows[0][0].device == "cuda", estimate=estimate))
    return "\n\n".join(parts)


def _table(rows: list[tuple[Task, Record]], base: Record, *, gpu: bool, estimate: bool) -> str:
    second = ("process", "whole GPU") if gpu else ("rss", "RSS")
    columns = [("peak", "peak"), *([] if estimate else [second, ("seconds", "step")])]
    lines = []
    for task, record in rows:
        cells = [ROWS[task.row].title]
        for key, _ in columns:
            cells += _cells(record, base, key)
        lines.append([*cells, _remark(task, record, base)])
    headers = ["", *(text for _, title in columns for text in (title, "ratio")), "remark"]
    align = ["left", *["right"] * (2 * len(columns)), "left"]
    return tabulate(lines, headers, tablefmt="github", colalign=align, disable_numparse=True)


def _cells(record: Record, base: Record, key: str) -> tuple[str, str]:
    value, whole = record.get(key), base.get(key)
    if value is None:
        return "-", "-"
    text = f"{value:.2f}" if key == "seconds" else f"{value / _MIB:.0f}"
    return text, f"{value / whole:.2f}" if whole else "-"


def _remark(task: Task, record: Record, base: Record) -> str:
    for why in ("failed", "not_applicable"):
        if why in record:
            return f"{why.replace('_', ' ')}: {record[why]}".replace("|", "/")
    remarks = [ROWS[task.row].note]
    if not (ROWS[task.row].seen or "peak" in record):
        remarks.append("compiled code runs outside of the tracker")
    if "seconds" in record and record.get("session") != base.get("session"):
        remarks.append("not timed in the same run as untouched")
    return "; ".join(remark for remark in remarks if remark)


if __name__ == "__main__":
    main()
