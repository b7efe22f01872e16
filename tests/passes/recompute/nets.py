"""Small networks to recompute, and the comparison of two of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.graph.capture import find_tensors
from pocketize.passes.recompute.forward import recomputing_forward

__all__ = ["Net", "gradients", "reference", "same"]

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UPS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Net(nn.Module):
    """A U-Net of two levels whose norm and activation are given.

    Args:
        norm: makes a norm of a number of channels.
        act: the activation, a module or function.
        dims: spatial dimensions.
        dropout: probability between norm and activation.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        act: Callable[[Tensor], Tensor],
        dims: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        conv, up = CONVS[dims], UPS[dims]
        self.act = act
        self.drop = nn.Dropout(dropout)
        self.a1, self.n1 = conv(1, 4, 3, padding=1), norm(4)
        self.a2, self.n2 = conv(4, 4, 3, padding=1), norm(4)
        self.b1, self.m1 = conv(4, 8, 3, stride=2, padding=1), norm(8)
        self.b2, self.m2 = conv(8, 8, 3, padding=1), norm(8)
        self.up = up(8, 4, 2, stride=2)
        self.c1, self.o1 = conv(8, 4, 3, padding=1), norm(4)
        self.c2, self.o2 = conv(4, 4, 3, padding=1), norm(4)
        self.head = conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.drop(self.n1(self.a1(x))))
        skip = self.act(self.n2(self.a2(x)))
        x = self.act(self.m1(self.b1(skip)))
        x = self.act(self.drop(self.m2(self.b2(x))))
        x = torch.cat((self.up(x), skip), 1)
        x = self.act(self.o1(self.c1(x)))
        return self.head(self.act(self.o2(self.c2(x))))


def reference(model: nn.Module) -> nn.Module:
    """A copy of a rewritten model that does not recompute."""
    twin = copy.deepcopy(model)
    assert recomputing_forward(twin) is not None, "the model does not recompute"
    recording = vars(twin)["forward"]
    if recording.inner is None:
        del vars(twin)["forward"]
    else:
        vars(twin)["forward"] = recording.inner
    return twin


def gradients(model: nn.Module, x: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Outputs and gradients of one step, by name, buffers too."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    outputs = find_tensors(model(x))
    sum((t * t.detach().cos()).sum() for t in outputs).backward()
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    return found | {"input": x.grad, "random": torch.rand(1)}


def same(before: dict[str, Any], after: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Fail unless both hold the same, relative to the largest gradient."""
    assert before.keys() == after.keys()
    largest = max(float(t.abs().max()) for t in before.values() if t.is_floating_point())
    for name, expected in before.items():
        error = float((expected.double() - after[name].double()).abs().max()) / largest
        assert error <= tolerance, f"{name} differs by {error:.2e} of the largest"


class Functional(nn.Module):
    """A chain of functional calls with in-place activations and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.n(self.a(x)))
        z = self.m(self.b(y))
        z += y
        return F.silu(z, inplace=True)
