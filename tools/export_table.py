"""Which exporters take a rewritten network as it is, and which take ``plain`` of it.

    python tools/export_table.py

Prints the table of docs/export.md: for each pass and exporter "works" (the same outputs), "plain
first" (only ``plain(model)`` works) or "refused" (neither). ONNX needs the extra ``onnx``. For
``torch.compile`` a training step runs, and the pass may warn that it then saves no memory.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketize import plain, rewrite
from pocketize.artifact.exports import _WRITERS, _differ
from pocketize.errors import PocketizeWarning
from pocketize.graph.inputs import Inputs

X = Inputs((torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)),))
PASSES = {
    "none": [],
    "pocket, width": ["pocket:width=4"],
    "bottleneck": ["bottleneck:activations=any"],
    "separable": ["separable:activations=any"],
    "compact-block": ["compact-block:activations=any"],
    "recompute": ["recompute:min_bytes=0"],
    "in-place-norm": ["in-place-norm"],
    "checkpoint": ["checkpoint:only=body"],
    "offload": ["offload:to=disk,min_bytes=1B"],
    "amp": ["amp"],
    "patchwise, exact": ["patchwise:size=8"],
    "patchwise, slab": ["patchwise:size=8,mode=slab"],
    "patchwise, window": ["patchwise:size=8,mode=window"],
}


class Net(nn.Module):
    """A convolutional network with norms and activations, in a block that can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [
            layer
            for before in (1, 16)
            for layer in (nn.Conv2d(before, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU())
        ]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def written(suffix: str) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / f"net{suffix}"
            _differ(model, _WRITERS[suffix](model, X, path), X, path)

    return run


def scripted(model: nn.Module) -> None:
    torch.testing.assert_close(torch.jit.script(model)(*X.args), X.call(model))


def compiled(model: nn.Module) -> None:
    model.train()
    torch._dynamo.reset()
    X.call(torch.compile(model, backend="aot_eager")).sum().backward()


EXPORTERS = {
    "torch.export (.pt2)": written(".pt2"),
    "ONNX": written(".onnx"),
    "trace (.ts)": written(".ts"),
    "torch.jit.script": scripted,
    "torch.compile, training": compiled,
}


def outcome(run: Callable[[nn.Module], None], model: nn.Module) -> str:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            run(model)
        except Exception as error:  # exporters raise anything
            logging.info("%s", error)
            return ""
    ours = [w for w in told if issubclass(w.category, PocketizeWarning)]
    return (
        "runs, saves nothing" if any("saves no memory" in str(w.message) for w in ours) else "works"
    )


def cell(name: str, run: Callable[[nn.Module], None]) -> str:
    def model() -> Any:
        made = Net().eval()
        return rewrite(made, passes=PASSES[name], inputs=X).eval() if PASSES[name] else made

    return outcome(run, model()) or ("plain first" if outcome(run, plain(model())) else "refused")


def main() -> None:
    rows = [["pass", *EXPORTERS], ["---"] * (len(EXPORTERS) + 1)]
    silent = io.StringIO()  # exporters print
    for name in PASSES:
        out, sys.stdout = sys.stdout, silent
        try:
            row = [name, *(cell(name, run) for run in EXPORTERS.values())]
        finally:
            sys.stdout = out
        rows.append(row)
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
