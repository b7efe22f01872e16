"""What mixed precision promises: what autocast does by hand, and weights that stay float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.contract import trees
from tests.contract.case import Case, seeded
from tests.contract.runs import Computed, loss_of

__all__ = ["as_amp_alone", "as_autocast_by_hand"]

OUTPUTS = 0.005
"""Root of the mean square deviation, of the largest value. A bfloat16 is good for 0.004."""
GRADIENTS = 0.1
"""The same of gradients, of the largest of all: they go back through roundings of their own."""


def as_autocast_by_hand(case: Case) -> None:
    """Outputs and gradients are those of the original under autocast, up to its roundings."""
    if not _in_float32(case.original):
        return
    for mode in (False, True):
        expected = _run(case, case.build(), mode, by_hand=True)
        _near(expected, _run(case, case.fresh(), mode), f"train={mode}")


def as_amp_alone(case: Case) -> None:
    """Together with an exact pass: as mixed precision alone, in mixed precision."""
    assert case.reference is not None, "no pass of this combination is exact"
    if not _in_float32(case.original):
        return
    for mode in (False, True):
        expected = _run(case, case.reference(), mode)
        _near(expected, _run(case, case.fresh(), mode), f"train={mode}")


def _in_float32(model: nn.Module) -> bool:
    """Whether mixed precision is for this model at all."""
    return {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}


def _run(case: Case, model: nn.Module, mode: bool, *, by_hand: bool = False) -> Computed:
    model.train(mode)
    for parameter in model.parameters():
        parameter.grad = None
    inputs = case.inputs.map(torch.clone)
    with seeded():
        with torch.autocast("cpu", torch.bfloat16, enabled=by_hand):
            outputs = list(trees.tensors(inputs.call(model)))
        loss = loss_of(outputs)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    named = model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return Computed([t.detach() for t in outputs], loss.detach(), gradients, {})


def _near(expected: Computed, found: Computed, when: str) -> None:
    for index, (a, b) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        if a.is_floating_point():
            error = _distance(a, b, _size(a))
            assert error <= OUTPUTS, f"{when}: output {index} differs by {error:.1e}"
    assert expected.gradients.keys() == found.gradients.keys(), f"{when}: other gradients"
    largest = max((_size(g) for g in expected.gradients.values()), default=1.0)
    for name, a in expected.gradients.items():
        error = _distance(a, found.gradients[name], largest)
        assert error <= GRADIENTS, f"{when}: gradient of {name} differs by {error:.1e}"


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _distance(a: Tensor, b: Tensor, scale: float) -> float:
    """The root of the mean square deviation, over a scale."""
    if not a.numel():
        return 0.0
    deviation = (a - b).abs()  # real, also of complex numbers
    return float(deviation.double().square().mean().sqrt()) / (scale or 1.0)
