"""Sizes that a forward reads from somewhere else than its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.convs import Layers, around
from tests.models.registry import net

_HEAD = {"head": "output"}


class Frame(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.middle(self.stem(x))).relu())


@net("hard-coded", movable=["tail"], frozen={"stem": "", **_HEAD})
class ViewLiteral(Frame):
    """x.view(b, 16, -1): runs at other widths too, and is silently wrong there."""

    def middle(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return x.view(b, 16, -1).cumsum(-1).view(b, -1, h, w)


@net("hard-coded", movable=["tail"], frozen={"stem": "", **_HEAD})
class ViewLiteralSpatial(Frame):
    """The channel count hides in the arithmetic of a flattened size."""

    def middle(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return x.reshape(b, 16 * h * w).relu().reshape(b, 16, h, w)


@net("hard-coded", movable=["tail"], frozen={"stem": "", **_HEAD})
class NewTensorLiteral(Frame):
    def middle(self, x: Tensor) -> Tensor:
        return x + torch.full((1, 16, 1, 1), 0.5)


@net("owner", movable=["stem", "tail"], frozen=_HEAD)
class OwnerView(Frame):
    """The owner's own attribute, read in forward."""

    def __init__(self) -> None:
        super().__init__(16)
        self.channels = 16

    def middle(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return x.view(b, self.channels, h * w).relu().view(b, self.channels, h, w)


@net("owner", movable=["stem", "tail", "kernel@0"], frozen=_HEAD)
class OwnerGroups(Frame):
    """A functional depthwise convolution whose groups are the owner's attribute."""

    def __init__(self) -> None:
        super().__init__(16)
        self.dim = 16
        self.kernel = nn.Parameter(0.3 * torch.randn(16, 1, 3, 3))

    def middle(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=self.dim)


@net("owner buffer", movable=["stem", "tail"], frozen=_HEAD)
class BlurPool(Frame):
    """A fixed blur kernel, repeated for every channel: the buffer has a channel axis."""

    def __init__(self) -> None:
        super().__init__(16)
        self.blur: Tensor
        line = torch.tensor([1.0, 2.0, 1.0])
        kernel = (line[:, None] * line[None]) / 16
        self.register_buffer("blur", kernel[None, None].repeat(16, 1, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.blur, stride=2, padding=1, groups=x.shape[1])


@net("owner", movable=["stem", "tail"], frozen=_HEAD)
class LayerAttributes(Frame):
    """Sizes read from the layers themselves: weight.shape and out_channels."""

    def middle(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        flat = x.reshape(b * self.stem.out_channels, -1).relu()
        return flat.reshape(b, self.stem.weight.shape[0], h, w)


@net("owner", width=8, movable=["stem"], frozen=_HEAD)
class OwnerHeads(Frame):
    """head_dim and heads kept by the owner: the product of two attributes is the width."""

    def __init__(self) -> None:
        super().__init__(16)
        self.num_heads, self.head_dim = 2, 8

    def middle(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = x.view(b, self.num_heads, self.head_dim, h * w).softmax(-1)
        return y.reshape(b, self.num_heads * self.head_dim, h, w)


class Config:
    """A plain configuration object, no module."""

    def __init__(self, width: int) -> None:
        self.width = width


@net("owner hard-coded", movable=["tail"], frozen={"stem": "", **_HEAD})
class SizeInConfig(Frame):
    """The size lives in an object that no rewrite may touch: it may be the caller's."""

    def __init__(self) -> None:
        super().__init__(16)
        self.config = Config(16)

    def middle(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return x.view(b, self.config.width, h * w).relu().view(b, -1, h, w)


@net("owner hard-coded", movable=["stem", "tail"], frozen=_HEAD)
class LevelAttributeOfSameValue(Frame):
    """An attribute that equals the width by chance: it counts bins, and must stay."""

    def __init__(self) -> None:
        super().__init__(16)
        self.bins = 16

    def middle(self, x: Tensor) -> Tensor:
        edges = torch.linspace(-1, 1, self.bins)
        return x + (x.unsqueeze(-1) > edges).float().mean(-1)


@net("owner", movable=["stem", "tail", "middle_weight@0"], frozen=_HEAD)
class FunctionalWeights(nn.Module):
    """Convolution and norm by torch.nn.functional with the owner's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle_weight = nn.Parameter(0.1 * torch.randn(16, 8, 3, 3))
        self.gamma, self.beta = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x).relu(), self.middle_weight, padding=1)
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)
        return self.head(self.tail(x.relu()).relu())


@net("parameter unused", movable=["stem", "tail"], frozen={"spare": "", **_HEAD})
class UnusedParameters(Frame):
    """Layers and parameters that the forward never reaches are left alone."""

    def __init__(self) -> None:
        super().__init__(8)
        self.spare = nn.Conv2d(8, 16, 3)
        self.orphan = nn.Parameter(torch.ones(8))

    def middle(self, x: Tensor) -> Tensor:
        return x.relu()


@net("bottleneck", movable=["stem", "tail.linear"], frozen=_HEAD)
def spatial_collapse() -> nn.Module:
    """The deepest map is 1x1, where channel and space constraints look the same."""
    return Layers(nn.Conv2d(3, 8, 16, stride=16), nn.Flatten(), LinearToMap(8), nn.Conv2d(8, 2, 1))


class LinearToMap(nn.Module):
    """A linear layer in the middle of a convolutional net, back to a 1x1 map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, :, None, None]


@net("owner concat", movable=["a", "b", "tail"], frozen=_HEAD)
def sum_of_widths() -> nn.Module:
    return SumOfWidths()


class SumOfWidths(nn.Module):
    """reshape to a width that is the sum of two layers'."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 3, padding=1)
        self.tail = nn.Conv2d(24, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1)
        b, _, h, w = y.shape
        width = self.a.out_channels + self.b.out_channels
        y = y.view(b, width, h * w).tanh().view(b, width, h, w)
        return self.head(self.tail(y).relu())


@net("owner", movable=["stem", "tail"], frozen=_HEAD)
def scaled_by_width() -> nn.Module:
    """Divides by the square root of a width kept as a float: function may change, shapes do not."""
    return around(ScaleByRoot(16))


class ScaleByRoot(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@net("sizes", movable=["stem", "valid", "tail"], frozen=_HEAD)
class CropByTensor(Frame):
    """Sizes to crop by, computed with tensors and read as a list: no branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.valid = nn.Conv2d(16, 16, 3)

    def middle(self, x: Tensor) -> Tensor:
        y = self.valid(x)
        top, left = ((torch.tensor(x.shape[2:]) - torch.tensor(y.shape[2:])) // 2).tolist()
        return x[:, :, top : top + y.shape[2], left : left + y.shape[3]] * y
