"""Norm and activation twice: as torch runs them, and in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pocketize.passes.inplace.in_place_norm import ACTIVATION, NORM
from pocketize.plugin.conversions import convert

__all__ = ["ACTIVATIONS", "NORMS", "Made", "in_place", "pair", "run", "worst"]

#: Label -> the norm of some channels (a multiple of 4), and the shape after the channels.
NORMS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "batch-0d": (nn.BatchNorm1d, ()),
    "batch-1d": (nn.BatchNorm1d, (3,)),
    "batch-2d": (nn.BatchNorm2d, (3, 2)),
    "batch-3d": (nn.BatchNorm3d, (3, 2, 2)),
    "batch-plain": (lambda c: nn.BatchNorm2d(c, affine=False), (3, 2)),
    "batch-untracked": (lambda c: nn.BatchNorm2d(c, track_running_stats=False), (3, 2)),
    "batch-cumulative": (lambda c: nn.BatchNorm2d(c, momentum=None), (3, 2)),
    "sync": (nn.SyncBatchNorm, (3, 2)),
    "instance-1d": (lambda c: nn.InstanceNorm1d(c, affine=True), (5,)),
    "instance-2d": (nn.InstanceNorm2d, (3, 2)),
    "instance-3d": (lambda c: nn.InstanceNorm3d(c, affine=True), (3, 2, 2)),
    "instance-tracked": (
        lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True, momentum=0.3),
        (3, 2),
    ),
    "group-1d": (lambda c: nn.GroupNorm(2, c), (5,)),
    "group-2d": (lambda c: nn.GroupNorm(c // 2, c, affine=False), (3, 2)),
    "group-3d": (lambda c: nn.GroupNorm(1, c), (3, 2, 2)),
}

#: Label -> the activation of some channels.
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "leaky": lambda c: nn.LeakyReLU(0.01, inplace=True),
    "steep": lambda c: nn.LeakyReLU(2.0),
    "flat": lambda c: nn.LeakyReLU(1e-6),
    "elu": lambda c: nn.ELU(alpha=0.7),
    "prelu": lambda c: nn.PReLU(),
    "prelus": nn.PReLU,
    "identity": lambda c: nn.Identity(),
}


class Made(NamedTuple):
    """What a training step gave.

    ``gradients`` are those of the input and of the parameters, ``buffers`` those after it.
    """

    output: Tensor
    gradients: list[Tensor]
    buffers: list[Tensor]


def in_place(net: nn.Module, *, backend: str = "native") -> nn.Module:
    """A copy of Sequential(norm, activation) that works in place."""
    net = copy.deepcopy(net)
    activation = net.get_submodule("1")
    told: dict[str, Any] = {"kind": "identity", "slope": 1.0}
    if isinstance(activation, nn.LeakyReLU):
        told = {"kind": "leaky_relu", "slope": activation.negative_slope}
    elif isinstance(activation, nn.ELU):
        told = {"kind": "elu", "slope": activation.alpha}
    elif isinstance(activation, nn.PReLU):
        told = {"kind": "prelu", "slope": 1.0, "slopes_of": "1"}
    convert(net, "0", NORM, {**told, "backend": backend})
    if told["kind"] != "identity":
        convert(net, "1", ACTIVATION, told)
    return net


def pair(
    norm: str,
    activation: str = "leaky",
    channels: int = 4,
    dtype: torch.dtype = torch.float64,
    gamma: float | None = None,
) -> tuple[nn.Module, nn.Module]:
    """The two, with the same parameters: random ones of either sign, unless gamma is given."""
    net = nn.Sequential(NORMS[norm][0](channels), ACTIVATIONS[activation](channels)).to(dtype)
    generator = torch.Generator().manual_seed(channels)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(drawn.abs() + 0.5 if "var" in name else drawn)
            if name == "1.weight":
                tensor.abs_()  # slopes
            elif name.endswith("weight"):
                tensor.copy_(tensor.sign() * (0.5 + tensor.abs()))
                if gamma is not None:
                    tensor.fill_(gamma)
    return net, in_place(net)


def batch(
    norm: str, channels: int = 4, dtype: torch.dtype = torch.float64, n: int = 3, seed: int = 0
) -> Tensor:
    """A random input for a norm."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, channels, *NORMS[norm][1])
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1).to(dtype)


def run(net: nn.Module, x: Tensor, weight: Tensor) -> Made:
    """One training step with the loss (output * weight).sum()."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    output = net(x * 1)  # not the leaf itself: an activation in place may not write into that
    (output * weight).sum().backward()
    gradients = [cast(Tensor, t.grad) for t in (x, *net.parameters())]
    return Made(output.detach(), gradients, [b.clone() for b in net.buffers()])


def worst(first: Made, second: Made) -> float:
    """The largest difference, of outputs, gradients and buffers, relative to the largest value."""
    differences = [0.0]
    for a, b in zip(
        (first.output, *first.gradients, *first.buffers),
        (second.output, *second.gradients, *second.buffers),
        strict=True,
    ):
        scale = float(a.double().abs().max()) or 1.0
        differences.append(float((a.double() - b.double()).abs().max()) / max(scale, 1e-3))
    return max(differences)
