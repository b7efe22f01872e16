"""Volumes by tiles beside MONAI's sliding windows: memory, time, and what becomes of the answer.

    python tools/bench/tiling.py --size 48x48x192 --tile 48 --threads 1 --cpu --json tiling.json
    python tools/bench/tiling.py --nets plainconv104 --size 512x512x397 --tile 128 --estimate

Each row's memory comes from a process of its own. *Live tensors* are counted by
``pocketize.memory``, with weights and the input, on a second run of the volume; *estimated* is the
same count on tensors without values. *Process* is what anonymous memory of the process grew by
during a second run, with weights and input, which were there before; *file pages* what pages of
mapped files did, which the system takes away when it needs memory. Both are looked at every 2 ms.

Times and errors come from one process in which all rows run the volume in turn, each round
beginning with another one; the least of all rounds counts, as a ratio to the whole volume's. The
networks are trained for a few steps on synthetic balls in noise, so that their logits mean
something. The largest error is in units of the largest logit of the whole volume. The whole
volume's answer is what rows are compared with, and not the truth: a network that was trained on
windows may be as right by windows.

Finished figures are kept in the JSON file and not measured again. The tables go to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.fresh import ask
from tools.bench.memory import read_size
from tools.bench.tiling_rows import SUBJECTS, WAYS, Size
from tools.bench.tiling_worker import Task

__all__ = ["main", "record_key", "render", "tasks_of"]

Record = dict[str, Any]

_MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    path = Path(options.json)
    records: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    parts = [_conditions(options)]
    for net in options.nets:
        tasks = tasks_of(net, options)
        for task in tasks:
            key = record_key(task)
            if "failed" not in records.get(key, {"failed": ""}):
                continue
            sys.stderr.write(f"{key}\n")
            made = ask(
                "tiling_worker.py",
                vars(task),
                threads=task.threads,
                timeout=options.timeout,
                returning=task.kind == "weigh",
            )
            records[key] = made
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(records, indent=1))
            temporary.replace(path)
        found = [(task, records[record_key(task)]) for task in tasks]
        parts += [_title(net, options), render(found, "cpu" if options.cpu else "wall")]
    sys.stdout.write("\n\n".join(parts) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare ways to run a large volume.")
    nets = ["dynunet", "plainconv", "segresnet", "monai-unet"]
    parser.add_argument("--nets", type=_names(SUBJECTS), default=nets, help=", ".join(SUBJECTS))
    parser.add_argument("--rows", type=_names(WAYS), default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--size", type=_size, default=(48, 48, 192), help="such as 48x48x192")
    parser.add_argument("--tile", type=_size, default=(48, 48, 48), help="of windows and tiles")
    parser.add_argument("--estimate", action="store_true", help="estimate memory, run nothing")
    parser.add_argument("--threads", type=int, default=0, help="of one operator; 0: torch's choice")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs; 0: no times or errors")
    parser.add_argument("--steps", type=int, default=30, help="of training before")
    parser.add_argument("--cpu", action="store_true", help="take the processor's seconds")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one figure")
    parser.add_argument("--json", default="tiling.json", help="file with what was measured")
    return parser


def _names(known: dict[str, Any]) -> Any:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; of {list(known)}")
        return names

    return read


def _size(text: str) -> Size:
    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tasks_of(net: str, options: argparse.Namespace) -> list[Task]:
    """What is to be asked about a network: the memory of each row, and a race of all."""
    base = Task(
        "estimate" if options.estimate else "weigh",
        net,
        options.size,
        options.tile,
        (),
        threads=options.threads,
        rounds=options.rounds,
        steps=options.steps,
    )
    tasks = [dataclasses.replace(base, ways=(row,)) for row in options.rows]
    if options.rounds and not options.estimate:
        ways = tuple(row for row in options.rows if not WAYS[row].counted)
        tasks.append(dataclasses.replace(base, kind="race", ways=ways))
    return tasks


def record_key(task: Task) -> str:
    """Under which an answer is kept."""
    size, tile = ("x".join(map(str, sizes)) for sizes in (task.size, task.tile))
    key = f"{task.kind} {task.net} {size} by {tile}: {' '.join(task.ways)}"
    if task.kind != "estimate":
        key += f", {task.threads or 'all'} threads"
    if task.kind == "race":
        key += f", {task.rounds} rounds, {task.steps} steps"
    return key


def _conditions(options: argparse.Namespace) -> str:
    if options.estimate:
        return f"torch {torch.__version__}; MiB; nothing ran"
    threads = options.threads or torch.get_num_threads()
    clock = "processor" if options.cpu else "wall"
    return f"torch {torch.__version__}, {threads} threads; MiB; {clock} time relative to whole"


def _title(net: str, options: argparse.Namespace) -> str:
    size, tile = ("x".join(map(str, sizes)) for sizes in (options.size, options.tile))
    return f"### {SUBJECTS[net].title}, {size} by {tile}"


def render(found: Sequence[tuple[Task, Record]], clock: str) -> str:
    """A Markdown table of one network, and what went wrong below it.

    Args:
        found: what was asked, and the answers.
        clock: "cpu" or "wall".
    """
    answers: dict[tuple[str, str], Record] = {}
    trouble = []
    for task, record in found:
        if "failed" in record:
            trouble.append(f"{task.kind} of {' '.join(task.ways)} failed: {record['failed']}")
        elif task.kind == "race":
            answers |= {("race", way): made for way, made in record["ways"].items()}
        else:
            answers[task.kind, task.ways[0]] = record
    rows = [task.ways[0] for task, _ in found if task.kind != "race"]
    measured = all(task.kind != "estimate" for task, _ in found)
    lines = [_line(row, answers, clock) if measured else _short(row, answers) for row in rows]
    headers = ["", "estimated", "ratio", "kept"]
    if measured:
        memory = ["estimated", "live tensors", "ratio", "process", "ratio", "file pages"]
        headers = ["", *memory, "time", "largest error", "other labels"]
    align = ["left", *["right"] * (len(headers) - 1)]
    table = tabulate(lines, headers, tablefmt="github", colalign=align, disable_numparse=True)
    notes = [f"{WAYS[row].title}: {WAYS[row].note}." for row in rows if WAYS[row].note]
    rights = [f"{record['right']:.3f}" for task, record in found if "right" in record]
    if rights:
        notes.append(f"Part of the voxels that the whole volume labels right: {rights[0]}.")
    return "\n\n".join([table, *notes, *trouble])


def _short(row: str, answers: dict[tuple[str, str], Record]) -> list[str]:
    made, whole = (answers.get(("estimate", each), {}) for each in (row, "whole"))
    return [WAYS[row].title, *_pair(made, whole, "peak"), _mib(made.get("kept"))]


def _line(row: str, answers: dict[tuple[str, str], Record], clock: str) -> list[str]:
    def of(kind: str, name: str = row) -> Record:
        return answers.get((kind, name), {})

    made, whole, ran = of("weigh"), of("weigh", "whole"), of("race")
    time, error, differ = ran.get(clock), ran.get("error"), ran.get("differ")
    base = of("race", "whole").get(clock)
    return [
        WAYS[row].title,
        _mib(made.get("estimated")),
        *_pair(made, whole, "peak"),
        *_pair(made, whole, "own"),
        _mib(made.get("files")),
        f"{time / base:.2f}" if time and base else "-",
        "-" if error is None else f"{error:.1g}" if error else "0",
        "-" if differ is None else f"{100 * differ:.2f} %" if differ else "0",
    ]


def _pair(record: Record, whole: Record, key: str) -> tuple[str, str]:
    value, base = record.get(key), whole.get(key)
    return _mib(value), f"{value / base:.2f}" if value and base else "-"


def _mib(value: int | None) -> str:
    return "-" if value is None else f"{value / _MIB:.0f}"


if __name__ == "__main__":
    main()
