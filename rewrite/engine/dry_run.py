"""Run a converted model and the original on fake tensors, and compare.

Conversions change which operators run, so the check cannot compare operators. It compares what the
caller sees: nesting, shapes and dtypes of the outputs in both modes, and which parameters get
gradients. Where a conversion gives a module new parameters, they must get gradients if the old ones
did.
"""

from __future__ import annotations

__all__ = ["DryRun"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pocketize._torch import FakeTensorMode
from pocketize.engine.surgery import edited_copy
from pocketize.engine.verify import run_backward
from pocketize.errors import brief
from pocketize.graph.capture import quiet_tracing, structure_of
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.graph.settings import settings_text
from pocketize.plugin.edits import Convert, Edit


@dataclass(frozen=True)
class _Outcome:
    """What a caller sees of one forward, and in training of one backward."""

    outputs: Any
    gradients: dict[str, tuple[int, ...]]
    parameters: dict[str, bool]


class DryRun:
    """Tries edits on fake copies of one model."""

    def __init__(self, model: nn.Module, inputs: Inputs, variants: Sequence[Inputs] = ()) -> None:
        self.model, self.calls = model, (inputs, *variants)
        self._originals: dict[tuple[int, bool], _Outcome | Exception] = {}

    def error(self, edits: Sequence[Edit]) -> str:
        """Return what differs once the edits are applied; ``""`` if nothing does.

        A model that itself does not run on fake tensors (a branch depends on values, a backward
        that torch does not support) is not compared in that mode.
        """
        for index, call in enumerate(self.calls):
            for train in (False, True):
                mode = f"{'training' if train else 'evaluation'} mode"
                mode += f" with {settings_text(call.settings)}" if call.settings else ""
                before = self._originals.get((index, train))
                if before is None:
                    before = self._originals[index, train] = self._run((), call, train)
                if isinstance(before, Exception):
                    continue
                after = self._run(edits, call, train)
                if isinstance(after, Exception):
                    return f"in {mode} it raises {brief(after)}"
                if after.outputs != before.outputs:
                    return f"in {mode} the outputs have other shapes, dtypes or nesting"
                if names := _other_gradients(before, after, edits):
                    return f"in {mode} these parameters get other gradients: {names[:3]}"
        return ""

    def errors(self, edits: Sequence[Convert]) -> dict[str, str]:
        """Return which conversions break the model, found by halving.

        Returns:
            For each of them, by the path of its module, what :meth:`error` says.
        """
        failure = self.error(edits) if edits else ""
        if not failure:
            return {}
        if len(edits) == 1:
            return {edits[0].module: failure}
        half = len(edits) // 2
        found = self.errors(edits[:half]) | self.errors(edits[half:])
        rest = [edit for edit in edits if edit.module not in found]
        if rest and (not found or self.error(rest)):
            found |= {edit.module: f"together with others, {failure}" for edit in rest}
        return found

    def _run(self, edits: Sequence[Edit], call: Inputs, train: bool) -> _Outcome | Exception:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.inference_mode(False):
            copy = edited_copy(self.model, edits, fakes)
            set_mode(copy, train)
            try:
                with fakes, quiet_tracing(copy), torch.enable_grad():
                    return _step(copy, call.map(fakes.from_tensor), train)
            except Exception as error:  # a user's forward or backward may raise anything
                return error


def _other_gradients(before: _Outcome, after: _Outcome, edits: Sequence[Edit]) -> list[str]:
    """Return parameters that get a gradient of another shape, or now one and then none."""
    kept = before.parameters.keys() & after.parameters.keys()
    differ = before.gradients.items() ^ after.gradients.items()
    found = {name for name, _ in differ if name in kept}
    for path in {edit.module for edit in edits if isinstance(edit, Convert)}:
        prefix = f"{path}." if path else ""
        gone, made = (
            {name for name in one.parameters.keys() - kept if name.startswith(prefix)}
            for one in (before, after)
        )
        if not gone.isdisjoint(before.gradients):
            wanted = {name for name in made if after.parameters[name]}
            found |= wanted - after.gradients.keys()
    return sorted(found)


def _step(model: nn.Module, inputs: Inputs, train: bool) -> _Outcome:
    with inputs.variant(model):  # also while a part runs again in the backward
        output = inputs.map(lambda t: t.detach().clone()).call(model)
        if train:
            run_backward(output)
    parameters = dict(model.named_parameters())
    gradients = {n: tuple(p.grad.shape) for n, p in parameters.items() if p.grad is not None}
    wanted = {n: p.requires_grad for n, p in parameters.items()}
    return _Outcome(structure_of(output), gradients, wanted)
