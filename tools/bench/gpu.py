"""Everything that only a graphics card can tell, in parts that can be run alone.

    python tools/bench/gpu.py --out DIR                     # all parts, and DIR/gpu.md
    python tools/bench/gpu.py --out DIR --parts memory-96   # one of them
    python tools/bench/gpu.py --out DIR --device cpu --small   # tries the script without a card

Each part is a process of its own that is stopped after nine minutes. A part writes every finished
row to ``DIR/PART.json`` and begins after them when it is started again. ``gpu.md`` has the device,
the versions, the date and the command of each part; with ``--device cuda`` it belongs into
``docs/results/gpu.md``.

Memory is ``max_memory_allocated``, ``max_memory_reserved`` and what the driver counts for the
process (``mem_get_info``); on the CPU live tensors, and the growth of the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "reproduce"))  # its scripts import each other

from pocketize import fit, measure, rewrite
from pocketize.errors import PocketizeError
from pocketize.passes import Amp, InPlaceNorm, Patchwise, Recompute
from pocketize.units import bytes_text
from tools.bench.memory_nets import NETS
from tools.reproduce import memory_fcn, patchwise

__all__ = ["main"]

_SECONDS = 540
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run what needs a GPU, in parts.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny volumes: tries the script")
    parser.add_argument("--parts", help=f"separated by commas (default: {','.join(_PARTS)})")
    parser.add_argument("--worker", choices=tuple(_PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small tries the script")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        _run_part(options.worker, options)
        return
    names = options.parts.split(",") if options.parts else list(_PARTS)
    if unknown := [name for name in names if name not in _PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; of {', '.join(_PARTS)}")
    for name in names:
        command = [sys.executable, __file__, "--out", str(options.out), "--device", options.device]
        command += ["--worker", name, *(["--small"] if options.small else [])]
        sys.stderr.write(f"{name} ...\n")
        try:
            subprocess.run(command, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"{name} was stopped after {_SECONDS} s; start it again to go on\n")
    (options.out / "gpu.md").write_text(_render(options.out))
    sys.stdout.write(_render(options.out))


def _run_part(name: str, options: argparse.Namespace) -> None:
    file = options.out / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {"rows": []}
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    found |= {
        "device": device or platform.machine(),
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python tools/bench/gpu.py --out DIR --device {options.device} --parts {name}"
        + (" --small" if options.small else ""),
    }
    done = {row["what"] for row in found["rows"]}
    for what, ask in _PARTS[name](options.device, options.small):
        if what in done:
            continue
        try:
            row = ask()
        except (PocketizeError, RuntimeError) as error:  # among them: out of memory
            row = {"failed": str(error).partition("\n")[0][:160]}
        found["rows"].append({"what": what, **row})
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1))
        unfinished.replace(file)


_Rows = Iterator[tuple[str, Callable[[], Row]]]


def _measured(model: torch.nn.Module, inputs: str, device: str, **options: Any) -> Row:
    profile = measure(model.to(device), inputs, isolate=True, **options)
    row: Row = {"peak": bytes_text(profile.peak)}
    if profile.reserved is not None:
        free, whole = torch.cuda.mem_get_info()
        row |= {"reserved": bytes_text(profile.reserved), "driver": bytes_text(whole - free)}
    if profile.rss is not None:
        row["process"] = bytes_text(profile.rss)
    if profile.step_seconds is not None:
        row["seconds"] = f"{profile.step_seconds[0]:.3f}"
    estimated = measure(model, inputs, estimate=True, **_without_time(options))
    return row | {"measured / estimated": f"{profile.peak / estimated.peak:.3f}"}


def _without_time(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "time_steps"}


def _tests(device: str, small: bool) -> _Rows:
    def run() -> Row:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        return {"result": lines[-1] if lines else done.stderr[-160:]}

    yield "tests marked cuda", run


def _memory(size: str) -> Callable[[str, bool], _Rows]:
    def rows(device: str, small: bool) -> _Rows:
        volume = "1x1x32x32x32" if small else f"1x1x{size}"
        for net in ("plainconv", "dynunet"):
            for title, passes in (
                ("untouched", ()),
                ("in-place norms", (InPlaceNorm(),)),
                ("recompute conv", (Recompute(),)),
                ("recompute block", (Recompute(keep="block"),)),
                ("recompute level", (Recompute(keep="level"),)),
                ("recompute block, bfloat16", (Recompute(keep="block"), Amp())),
            ):

                def ask(net: str = net, passes: tuple[Any, ...] = passes) -> Row:
                    model = NETS[net].build()
                    if passes:
                        model = rewrite(model, *passes, inputs=volume)
                    return _measured(model, volume, device, time_steps=3)

                yield f"{NETS[net].title}, {volume}, {title}", ask

    return rows


def _tiles(device: str, small: bool) -> _Rows:
    volume = "1x1x32x32x48" if small else "1x1x128x128x256"
    for mode in ("infer", "train"):
        for place in (None, "device", "host", "disk"):

            def ask(mode: str = mode, place: str | None = place) -> Row:
                model = NETS["plainconv"].build()
                if place is not None:
                    train = {"train": True} if mode == "train" else {}
                    tiles = Patchwise(size=16 if small else 64, keep=place, output=place, **train)
                    model = rewrite(model, tiles, inputs=volume)
                return _measured(model, volume, device, mode=mode, time_steps=3)

            yield f"{mode}, {volume}, {'whole' if place is None else f'tiles on {place}'}", ask


def _fcn(device: str, small: bool) -> _Rows:
    volume = "1x1x32x32x32" if small else memory_fcn.FULL
    for row in memory_fcn.ROWS:

        def ask(row: memory_fcn.Row = row) -> Row:
            return _measured(memory_fcn.built(row), volume, device, time_steps=2)

        yield f"memory-efficient FCN, {volume}, {row.name}", ask


def _thesis(device: str, small: bool) -> _Rows:
    for name, volume in patchwise.VOLUMES.items():
        sizes = (32, 32, 64) if small else volume.sizes
        shape = "x".join(map(str, (1, volume.channels, *sizes)))
        for row, (kept, ours) in patchwise.ROWS.items():
            for how, make in (("graph kept", kept), ("inference_mode", ours)):
                if make is None:
                    continue

                def ask(make: Any = make, volume: Any = volume, shape: str = shape) -> Row:
                    return _measured(make(volume), shape, device, mode="infer", time_steps=3)

                yield f"{name}, {shape}, {row}, {how}", ask


def _fit(device: str, small: bool) -> _Rows:
    volume = "1x1x32x32x32" if small else "1x1x256x256x160"
    for cap in ("80MiB", "110MiB") if small else ("8GiB", "16GiB", "24GiB"):

        def ask(cap: str = cap) -> Row:
            found = fit(NETS["plainconv"].build().to(device), volume, memory=cap, device=device)
            return {
                "way": found.chosen.label,
                "estimated": bytes_text(found.chosen.peak),
                "predicted time": f"{found.chosen.time:.2f}x",
                "proof": found.proof,
            }

        yield f"fit, {volume}, {cap}", ask


_PARTS: dict[str, Callable[[str, bool], _Rows]] = {
    "tests": _tests,
    "memory-96": _memory("96x96x96"),
    "memory-128": _memory("128x128x128"),
    "memory-256": _memory("256x256x152"),
    "tiles": _tiles,
    "fcn": _fcn,
    "thesis": _thesis,
    "fit": _fit,
}


def _render(folder: Path) -> str:
    parts = ["# Figures from a graphics card"]
    for name in _PARTS:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        parts.append(
            f"## {name}\n\n{found['device']}, {found['versions']}, {found['date']}: "
            f"`{found['command']}`"
        )
        parts.append(tabulate(found["rows"], headers="keys", tablefmt="github"))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
