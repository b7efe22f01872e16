"""One training step of any model, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.graph.inputs import Inputs
from tests.contract import trees
from tests.contract.case import seeded

__all__ = ["Step", "step"]


@dataclass(frozen=True)
class Step:
    """What a training step did.

    Attributes:
        trained: names of the parameters that received a gradient.
        moved: names of the parameters that the optimiser changed.
        misshapen: names of the parameters whose gradient has another shape.
        finite: loss and gradients are finite numbers.
        loss: the loss; zero where no output has a gradient.
        gradients: by name.
    """

    trained: frozenset[str]
    moved: frozenset[str]
    misshapen: list[str]
    finite: bool
    loss: Tensor
    gradients: dict[str, Tensor]


def step(model: nn.Module, inputs: Inputs) -> Step:
    """Forward with the modes as they stand, backward from a weighted sum of all outputs, and SGD.

    The random numbers that the forward draws are the same in every call.
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with seeded():
        outputs = list(trees.tensors(inputs.call(model)))
        differentiable = [t for t in outputs if t.requires_grad]
        wide = any(t.dtype is torch.float64 for t in differentiable)
        kind = torch.float64 if wide else torch.float32
        loss: Any = sum((t * t.detach().cos()).to(kind).sum() for t in differentiable)
        if differentiable:
            loss.backward()
    gradients = {
        name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None
    }
    misshapen = [name for name, g in gradients.items() if g.shape != parameters[name].shape]
    loss = torch.as_tensor(loss).detach()
    finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients.values())
    if gradients and not misshapen:
        torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=1e-2).step()
    moved = {name for name, p in parameters.items() if not torch.equal(p.detach(), before[name])}
    return Step(frozenset(gradients), frozenset(moved), misshapen, finite, loss, gradients)
