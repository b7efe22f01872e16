"""Convolutions of every kind, alone: chains in which nothing but the conv matters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.registry import image, net, register

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SHAPE = {1: (2, 3, 16), 2: (2, 3, 16, 16), 3: (2, 3, 8, 8, 8)}


def chain(dim: int) -> nn.Sequential:
    conv = _CONV[dim]
    return nn.Sequential(
        conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 16, 3, padding=1), nn.ReLU(), conv(16, 2, 1)
    )


def transposed_chain(dim: int) -> nn.Sequential:
    conv, up = _CONV[dim], _TRANSPOSED[dim]
    return nn.Sequential(
        conv(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        up(8, 16, 2, stride=2),
        nn.ReLU(),
        conv(16, 2, 1),
    )


for _dim in (1, 2, 3):
    register(
        f"conv{_dim}d",
        lambda dim=_dim: chain(dim),  # type: ignore[misc]
        "conv exact",
        inputs=image(*_SHAPE[_dim]),
        movable=["0", "2"],
        frozen={"4": "output"},
    )
    register(
        f"conv_transpose{_dim}d",
        lambda dim=_dim: transposed_chain(dim),  # type: ignore[misc]
        "conv transposed exact",
        inputs=image(*_SHAPE[_dim]),
        movable=["0", "2"],
        frozen={"4": "output"},
    )


class Layers(nn.Module):
    """stem -> middle -> tail -> head with ReLUs: the frame in which one odd layer is tried."""

    def __init__(self, stem: nn.Module, middle: nn.Module, tail: nn.Module, head: nn.Module):
        super().__init__()
        self.stem, self.middle, self.tail, self.head = stem, middle, tail, head

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.middle(x))
        x = F.relu(self.tail(x))
        return self.head(x)


def around(middle: nn.Module, into: int = 16, out: int = 16) -> Layers:
    """A layer that takes ``into`` channels and gives ``out``, between ordinary convolutions."""
    return Layers(
        nn.Conv2d(3, into, 3, padding=1), middle, nn.Conv2d(out, 8, 1), nn.Conv2d(8, 2, 1)
    )


_AROUND = {"movable": ["stem", "middle", "tail"], "frozen": {"head": "output"}}


@net("conv", **_AROUND)
def conv_without_bias() -> nn.Module:
    return around(nn.Conv2d(16, 16, 3, padding=1, bias=False))


@net("conv", **_AROUND)
def conv_dilated_reflect() -> nn.Module:
    return around(nn.Conv2d(16, 16, 3, padding="same", dilation=2, padding_mode="reflect"))


@net("conv grouped", **_AROUND)
def conv_grouped() -> nn.Module:
    return around(nn.Conv2d(16, 8, 3, padding=1, groups=2), 16, 8)


@net("conv grouped", width=6, **{**_AROUND, "movable": ["tail"], "shrinks": ["stem", "middle"]})
def conv_grouped_width_no_multiple() -> nn.Module:
    """Six channels do not spread over four groups: four remain."""
    return around(nn.Conv2d(16, 16, 3, padding=1, groups=4))


@net("conv grouped", **{**_AROUND, "movable": ["tail"], "shrinks": ["stem", "middle"]})
def conv_more_groups_than_width() -> nn.Module:
    """Eight groups keep at least one channel each."""
    return around(nn.Conv2d(16, 16, 3, padding=1, groups=8))


@net("conv depthwise", **_AROUND)
def conv_depthwise() -> nn.Module:
    return around(nn.Conv2d(16, 16, 3, padding=1, groups=16))


@net("conv depthwise", movable=["stem", "tail"], shrinks=["middle"], frozen={"head": "output"})
def conv_depthwise_multiplier() -> nn.Module:
    return around(nn.Conv2d(8, 16, 3, padding=1, groups=8), 8, 16)


@net("conv transposed grouped", **_AROUND)
def conv_transpose_grouped() -> nn.Module:
    return around(nn.ConvTranspose2d(16, 8, 2, stride=2, groups=4), 16, 8)


@net("conv transposed depthwise", **_AROUND)
def conv_transpose_depthwise() -> nn.Module:
    return around(nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16))


@net("conv transposed", **_AROUND)
def conv_transpose_output_padding() -> nn.Module:
    return around(nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1), 16, 8)


@net(
    "conv depthwise concat", movable=["a", "b", "tail"], shrinks=["depthwise"], frozen={"head": ""}
)
class DepthwiseOverConcat(nn.Module):
    """A depthwise convolution is as wide as the concatenation it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.tail = nn.Conv2d(24, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x).relu(), self.b(x).relu()], dim=1)
        return self.head(self.tail(self.depthwise(x)).relu())


@net("linear", movable=["conv", "hidden"], frozen={"out": "output"})
class LinearAfterFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(8 * 2 * 2, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x).relu()).flatten(1)
        return self.out(self.hidden(x).relu())


@net("linear", inputs=image(2, 7, 6), movable=["0", "2"], frozen={"4": "output"})
def linear_only() -> nn.Module:
    """No convolution anywhere: features last, any number of leading axes."""
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))


@net("linear", inputs=lambda: (image(2, 5)(), image(2, 4)()), movable=["mix"], frozen={"out": ""})
class BilinearTop(nn.Module):
    """nn.Bilinear is in nobody's rule table: what reaches it may freeze, the rest moves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(4, 8)
        self.pair = nn.Bilinear(8, 8, 16)
        self.mix = nn.Linear(16, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(self.mix(self.pair(self.left(a), self.right(b))).relu())
