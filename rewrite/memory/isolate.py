"""Measure in a fresh process, and say why where a model cannot be sent there.

The model is pickled into a temporary folder that only this user can read, for this process's own
child. ``multiprocessing`` would import the caller's script a second time; the child here does not.
So classes of the script (or of a notebook) do not exist there, and models made of them are measured
in this process.
"""

from __future__ import annotations

__all__ = ["Settings", "main", "measure_isolated", "run_child"]

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketize import errors
from pocketize.errors import MeasureError, PocketizeError, brief
from pocketize.graph.inputs import Inputs
from pocketize.memory.profile import MemoryProfile
from pocketize.memory.step import OPTIMIZERS, MeasuredStep, Request
from pocketize.plugin.registry import is_installed

#: Large blocks go back to the system when they are freed, so that resident memory follows use.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}

#: The paths first, so that what the payload is made of can be imported. It is run as a file in a
#: private folder: with ``-c``, Python would search the current folder before all others.
_BOOT = """\
import json, os, sys, threading
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
with open(sys.argv[1], encoding="utf-8") as file:
    sys.path[:] = json.load(file)["path"]
from pocketize.memory.isolate import main
main(*sys.argv[1:])
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of this process that affect a measurement, besides the model.

    ``path`` is ``sys.path``, and after it the folders of the model's classes that are not on it.
    """

    path: list[str]
    threads: int
    dtype: str
    matmul_precision: str
    deterministic: bool
    benchmark: bool
    cuda_fractions: tuple[float, ...] = ()

    @classmethod
    def here(cls, request: Request) -> Settings:
        """Return those of this process."""
        path = [os.path.abspath(entry) for entry in sys.path]
        return cls(
            path=[*path, *_folders(request)],
            threads=torch.get_num_threads(),
            dtype=str(torch.get_default_dtype()).removeprefix("torch."),
            matmul_precision=torch.get_float32_matmul_precision(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            benchmark=torch.backends.cudnn.benchmark,
            cuda_fractions=_cuda_fractions(),
        )

    def apply(self) -> None:
        """Make them those of this process."""
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(getattr(torch, self.dtype))
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cudnn.benchmark = self.benchmark
        for device, fraction in enumerate(self.cuda_fractions):
            torch.cuda.set_per_process_memory_fraction(fraction, device)


def _cuda_fractions() -> tuple[float, ...]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    devices = range(torch.cuda.device_count())
    return tuple(torch.cuda.get_per_process_memory_fraction(device) for device in devices)


def measure_isolated(request: Request) -> MemoryProfile | str | MeasureError:
    """Measure in a fresh process.

    Returns:
        The profile, or the reason why the request cannot be sent to another process, or how that
        process died. What killed it must not run in this process.

    Raises:
        MeasureError: the model did not get through the step.
        PocketizeError: as :func:`pocketize.memory.measure`.
    """
    obstacle = _obstacle(request)
    if obstacle is not None:
        return obstacle
    with tempfile.TemporaryDirectory(prefix="pocketize-") as folder:
        settings, payload, answer = (Path(folder, n) for n in ("settings", "payload", "answer"))
        settings.write_text(json.dumps(dataclasses.asdict(Settings.here(request))), "utf-8")
        boot = Path(folder, "boot.py")
        boot.write_text(_BOOT)
        try:
            torch.save(vars(request), payload)
        except Exception as error:  # a user's __reduce__ may raise anything
            return f"it cannot be pickled: {brief(error, 200)}"
        command = [sys.executable, str(boot), str(settings), str(payload), str(answer)]
        try:
            done = run_child(command, env={**os.environ, **_ALLOCATOR})
        except OSError as error:
            return f"no other process could be started: {brief(error, 200)}"
        try:
            reply = json.loads(answer.read_text())
        except (OSError, ValueError):
            return MeasureError(_death(request, done))
    return _read(reply)


def run_child(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python process that reads from stdin only to end with this process, however it ends."""
    watched, held = os.pipe()
    try:
        return subprocess.run(
            command,
            stdin=watched,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            **options,
        )
    finally:
        os.close(watched)
        os.close(held)


def _folders(request: Request) -> list[str]:
    """Return where the classes of a model, and its loss, are, as far as not on ``sys.path``."""
    kinds = {type(module) for module in request.model.modules()}
    names = {kind.__module__ for kind in kinds} | {getattr(request.loss, "__module__", None) or ""}
    folders = set()
    for top in {name.partition(".")[0] for name in names}:
        file = getattr(sys.modules.get(top), "__file__", None)
        if file is not None and not is_installed(top):
            place = Path(file).absolute().parent
            folders.add(str(place.parent if Path(file).stem == "__init__" else place))
    return sorted(folders)


def _obstacle(request: Request) -> str | None:
    """Return why a request must be measured in this process, as far as known without trying."""
    for path, module in request.model.named_modules():
        if type(module).__module__ == "__main__":
            name = f"{path} ({type(module).__qualname__})" if path else type(module).__qualname__
            return f"the class of {name} is defined in __main__, which no other process has"
    if getattr(request.loss, "__module__", None) == "__main__":
        return "loss is defined in __main__, which no other process has"
    devices = ("cpu", "cuda")
    if any(torch.is_autocast_enabled(device) for device in devices):
        return "autocast is on in this process only; a wrapper around forward would carry it along"
    return None


def _read(reply: dict[str, Any]) -> MemoryProfile | str:
    if "profile" in reply:
        return MemoryProfile.from_json(reply["profile"])
    if "unreadable" in reply:
        return f"another process cannot rebuild it: {reply['unreadable']}"
    kind = getattr(errors, reply["error"], PocketizeError)
    raise kind(reply["text"])


def _death(request: Request, done: subprocess.CompletedProcess[str]) -> str:
    name = type(request.model).__name__
    if done.returncode in (-9, 137):
        return (
            f"the process that measured {name} was killed, most likely because the machine has not "
            "enough memory; estimate=True needs none"
        )
    last = " ".join((done.stderr.strip().splitlines() or ["it said nothing"])[-1].split())
    return (
        f"the process that measured {name} ended with status {done.returncode}: {last}. "
        "Try isolate=False to measure in this process"
    )


def main(settings: str, payload: str, answer: str) -> None:
    """Measure what a file says and write what came out; the fresh process runs this.

    Args:
        settings: JSON of :class:`Settings`.
        payload: pickle of the fields of a :class:`~pocketize.memory.step.Request`.
        answer: where to write JSON: ``profile``, or ``unreadable``, or ``error`` and ``text``.
    """
    Settings(**json.loads(Path(settings).read_text())).apply()
    Path(answer).write_text(json.dumps(_answer(payload)))


def _answer(payload: str) -> dict[str, Any]:
    from pocketize.memory.meter import measure_here  # which imports this file

    # Load what torch loads on first use, so that it does not count as the model's memory.
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())
    for optimizer in OPTIMIZERS:
        inputs = Inputs((torch.ones(2, 1, 8, 8),))
        MeasuredStep(net, inputs, train=True, optimizer=optimizer).run()
    try:
        # Our own parent wrote this file a moment ago.
        request = Request(**torch.load(payload, weights_only=False))
    except Exception as error:  # a user's __setstate__ may raise anything; so may their imports
        return {"unreadable": brief(error)}
    try:
        return {"profile": measure_here(request, own=True).to_json()}
    except PocketizeError as error:
        return {"error": type(error).__name__, "text": str(error)}
