"""Normalisations and channel-wise parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.convs import around
from tests.models.registry import image, net

_MOVES = {"movable": ["stem", "middle", "tail"], "frozen": {"head": "output"}}
_STEM = {"movable": ["stem", "tail"], "frozen": {"head": "output"}}


@net("norm exact", **_MOVES)
def batch_norm() -> nn.Module:
    return around(nn.BatchNorm2d(16))


@net("norm", **_MOVES)
def batch_norm_no_affine() -> nn.Module:
    """No parameters: only num_features and the running statistics tell the width."""
    return around(nn.BatchNorm2d(16, affine=False))


@net("norm", **_MOVES)
def batch_norm_no_statistics() -> nn.Module:
    return around(nn.BatchNorm2d(16, track_running_stats=False))


@net("norm", **_MOVES)
def batch_norm_bare() -> nn.Module:
    """Neither parameters nor buffers: num_features is the only trace of the width."""
    return around(nn.BatchNorm2d(16, affine=False, track_running_stats=False))


@net("norm", **_MOVES)
def batch_norm_cumulative() -> nn.Module:
    return around(nn.BatchNorm2d(16, momentum=None))


@net("norm", inputs=image(6, 5), movable=["0", "1", "3"], frozen={"5": "output"})
def batch_norm_1d() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )


@net("norm exact", **_MOVES)
def instance_norm() -> nn.Module:
    return around(nn.InstanceNorm2d(16, affine=True))


@net("norm", **_MOVES)
def instance_norm_no_affine() -> nn.Module:
    return around(nn.InstanceNorm2d(16))


@net("norm", **_MOVES)
def instance_norm_statistics() -> nn.Module:
    return around(nn.InstanceNorm2d(16, affine=True, track_running_stats=True))


@net("norm channel-statistics", width=8, **{**_MOVES, "movable": ["stem", "middle"]})
def group_norm() -> nn.Module:
    return around(nn.GroupNorm(4, 16))


@net("norm channel-statistics", width=8, **{**_MOVES, "movable": ["stem", "middle"]})
def group_norm_no_affine() -> nn.Module:
    return around(nn.GroupNorm(4, 16, affine=False))


@net("norm", **_MOVES)
def group_norm_per_channel() -> nn.Module:
    """As many groups as channels: an instance norm, whose number of groups shrinks with it."""
    return around(nn.GroupNorm(16, 16))


@net("norm channel-statistics", **_MOVES)
def group_norm_one_group() -> nn.Module:
    return around(nn.GroupNorm(1, 16))


@net("norm channel-statistics", movable=["stem", "norm", "tail"], frozen={"head": "output"})
class LayerNormChannelsLast(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16, bias=bias)
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = self.norm(x).permute(0, 3, 1, 2)
        return self.head(self.tail(x).relu())


@net("norm channel-statistics", movable=["stem", "norm", "tail"], frozen={"head": "output"})
def layer_norm_no_bias() -> nn.Module:
    return LayerNormChannelsLast(bias=False)


class ChannelsFirstNorm(nn.Module):
    """ConvNeXt's layer norm over axis 1, spelled out with mean and power."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


@net("norm channel-statistics", **{**_MOVES, "movable": ["stem", "middle.weight@0", "tail"]})
def layer_norm_channels_first() -> nn.Module:
    return around(ChannelsFirstNorm(16))


@net("norm channel-statistics", width=4, **_STEM)
def layer_norm_channels_and_space() -> nn.Module:
    """normalized_shape is (channels, height, width): the first of three axes moves."""
    return around(nn.LayerNorm([16, 16, 16]))


class ScaledLayerNorm(nn.Module):
    """F.layer_norm with the shape read from the input, and a learnt scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        x = F.layer_norm(x, x.shape[-1:], self.scale)
        return x.movedim(-1, 1)


@net("norm channel-statistics", **{**_MOVES, "movable": ["stem", "middle.scale@0", "tail"]})
def layer_norm_functional() -> nn.Module:
    return around(ScaledLayerNorm(16))


class LastAxis(nn.Module):
    """Runs a module that wants its features last on a channels-first image."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


@net("norm channel-statistics", **_STEM)
def rms_norm() -> nn.Module:
    return around(LastAxis(nn.RMSNorm(16)))


@net("norm frozen", movable=["tail"], frozen={"stem": "avg_pool", "head": "output"})
def local_response_norm() -> nn.Module:
    """A window slides over the channel axis: whose neighbour one is, is part of the function."""
    return around(nn.LocalResponseNorm(3))


@net("activation exact", **{**_MOVES, "movable": ["stem", "tail"]})
def prelu_one() -> nn.Module:
    return around(nn.PReLU())


@net("activation", **{**_MOVES, "movable": ["stem", "middle.weight@0", "tail"]})
def prelu_per_channel() -> nn.Module:
    return around(nn.PReLU(16))


@net("activation", **_STEM)
def activations_of_every_kind() -> nn.Module:
    return around(
        nn.Sequential(
            nn.LeakyReLU(0.1),
            nn.ELU(),
            nn.SiLU(),
            nn.GELU(),
            nn.Hardswish(),
            nn.Mish(),
            nn.Softplus(),
            nn.Tanh(),
            nn.Hardtanh(),
            nn.ReLU6(),
        )
    )


@net("activation channel-statistics", **_STEM)
def softmax_over_channels() -> nn.Module:
    return around(nn.Softmax2d())


class Affine(nn.Module):
    """A raw scale and shift, one broadcast as (1, C, 1, 1), the other through a view."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(1, channels, 1, 1))
        self.shift = nn.Parameter(0.1 * torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift.view(1, -1, 1, 1)


@net(
    "parameter",
    movable=["stem", "middle.scale@1", "middle.shift@0", "tail"],
    frozen={"head": "output"},
)
def raw_affine() -> nn.Module:
    return around(Affine(16))


@net("norm buffer", movable=["stem", "middle.mean@1", "tail"], frozen={"head": "output"})
def raw_buffer() -> nn.Module:
    """A buffer of per-channel constants that the forward subtracts."""

    return around(SubtractMean(16))


class SubtractMean(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


@net("norm channel-statistics", **_STEM)
def standard_deviation_over_channels() -> nn.Module:
    return around(DivideByDeviation())


class DivideByDeviation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.std(dim=1, keepdim=True))


@net("norm channel-statistics", **_STEM)
def unit_length_over_channels() -> nn.Module:
    return around(Normalise())


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class FlatStandardised(nn.Module):
    """A layer of one's own that normalises its weight over a flattened view."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(out, into, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(self.weight.shape[0], -1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, flat.view_as(self.weight), self.bias, padding=1)


@net("norm computed-weight", movable=["stem", "middle.weight@0", "tail"], frozen={"head": "output"})
def weight_standardised_flat() -> nn.Module:
    return around(FlatStandardised(16, 16))
