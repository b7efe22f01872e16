"""Estimates of earlier searches, by the operators that a network runs: the next budget is quick."""

from __future__ import annotations

__all__ = ["EstimateCache", "cache_folder", "read_json_file", "write_json_file"]

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pocketize.graph.capture import capture
from pocketize.memory.step import Request
from pocketize.untrusted import read_json


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "pocketize"


def read_json_file(file: Path) -> dict[str, Any]:
    """Return what a cache file holds; nothing where it is missing or broken."""
    try:
        found = read_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json_file(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a cache file as a whole; a folder that cannot be written to is no error."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(content, indent=0), encoding="utf-8")
        unfinished.replace(file)


class EstimateCache:
    """What was estimated for one network and one step.

    Two networks have the same estimates if they run the same operators on tensors of the same
    shapes, with parameters, buffers, modules and versions that are the same. Only then do they
    share a file. It is forgotten when a source file of pocketize changes.

    Attributes:
        known: by the way to run, and ``"curve"``.

    Args:
        request: the network and the step.
        also: what else the figures depend on, such as the machine whose time is predicted.
    """

    def __init__(self, request: Request, also: str) -> None:
        model = request.model
        parts: list[Any] = [
            _code(),
            torch.__version__,
            also,
            request.mode,
            request.optimizer,
            request.device,
        ]
        for train in (False, True):
            traced = capture(model, request.inputs, train=train)
            for node in traced.graph.nodes:
                value = node.meta.get("val")
                parts.append((node.op, str(node.target), str(node.args), _described(value)))
        for path, module in model.named_modules():
            parts.append((path, type(module).__qualname__, module.extra_repr(), module.training))
            parts.append((len(module._forward_hooks), len(module._forward_pre_hooks)))
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            parts.append((name, _described(value), value.requires_grad))
        parts.append(request.inputs.describe())
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        self.file = cache_folder() / f"fit-{digest}.json"
        self.known = read_json_file(self.file)

    def save(self) -> None:
        """Write the file."""
        write_json_file(self.file, self.known)


def _code() -> list[tuple[str, int, int]]:
    """Return names, sizes and times of our source files: a checkout keeps its version for long."""
    packages = (sys.modules["pocketize"], sys.modules["pocketize.passes"])
    folders = [folder for package in packages for folder in package.__path__]
    files = {file for folder in folders for file in Path(folder).rglob("*.py")}
    return sorted((file.name, (it := file.stat()).st_size, it.st_mtime_ns) for file in files)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__
