"""Run a converted model on a copy without memory, beside the original, and compare.

Conversions change which operators run, so there is no recording to compare with. What must stay is
what the caller sees: nesting, shapes and dtypes of the outputs in both modes, and which parameters
get gradients.
"""

from __future__ import annotations

__all__ = ["Rehearsal"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pocketize.capture import find_tensors, quiet_recording, structure_of
from pocketize.clone import fake_clone
from pocketize.edits import Edit
from pocketize.inputs import Inputs
from pocketize.surgery import apply_edits


@dataclass(frozen=True)
class _Outcome:
    """What a caller sees of one forward, and in training of one backward.

    Attributes:
        outputs: nesting, dtypes and shapes.
        gradients: shapes of the gradients by parameter.
    """

    outputs: Any
    gradients: dict[str, tuple[int, ...]]


class Rehearsal:
    """Tries edits on copies of one model.

    Args:
        model: the model; never changed.
        inputs: example inputs on its device.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self._originals: dict[bool, _Outcome | Exception] = {}

    def failure(self, edits: Sequence[Edit]) -> str:
        """Say what is not as before once the edits are carried out; ``""`` if all is.

        A model that itself does not run on fake tensors (a branch depends on values, a backward
        that torch does not support) is not compared in that mode.
        """
        for train in (False, True):
            mode = "training" if train else "evaluation"
            before = self._originals.get(train)
            if before is None:
                before = self._originals[train] = self._run((), train)
            if isinstance(before, Exception):
                continue
            after = self._run(edits, train)
            if isinstance(after, Exception):
                text = " ".join(str(after).split())
                return f"in {mode} mode it raises {type(after).__name__}: {text:.300}"
            if after.outputs != before.outputs:
                return f"in {mode} mode the outputs have other shapes, dtypes or nesting"
            if after.gradients != before.gradients:
                differ = before.gradients.items() ^ after.gradients.items()
                names = sorted({name for name, _ in differ})
                return f"in {mode} mode these parameters get other gradients: {names[:3]}"
        return ""

    def _run(self, edits: Sequence[Edit], train: bool) -> _Outcome | Exception:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        copy = fake_clone(self.model, fakes)
        with torch.inference_mode(False):
            apply_edits(copy, [edit for edit in edits if edit.kind != "redraw"])
            copy.train(train)
            try:
                with fakes, quiet_recording(copy), torch.enable_grad():
                    return _step(copy, self.inputs.map(fakes.from_tensor), train)
            except Exception as error:  # a user's forward or backward may raise anything
                return error


def _step(model: nn.Module, inputs: Inputs, train: bool) -> _Outcome:
    output = inputs.map(lambda t: t.detach().clone()).call(model)
    losses = [t.sum() for t in find_tensors(output) if t.requires_grad and t.numel()]
    if losses and train:
        torch.autograd.backward(losses)
    gradients = {n: tuple(p.grad.shape) for n, p in model.named_parameters() if p.grad is not None}
    return _Outcome(structure_of(output), gradients)
