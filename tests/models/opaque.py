"""Operators without a channel rule, and custom autograd: freeze there, move elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.convs import Layers, around
from tests.models.registry import image, net

_HEAD = {"head": "output"}


class Square(torch.autograd.Function):
    """x^2 with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@net("custom", movable=["stem", "tail"], frozen=_HEAD)
def custom_function() -> nn.Module:
    return around(Squared())


@net("opaque", inputs=image(2, 6, 5), movable=["embed", "top"], frozen={"head": "output"})
class RecurrentMiddle(nn.Module):
    """An LSTM reads the features: what touches it stays, what lies beyond moves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.into = nn.Linear(16, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.top = nn.Linear(8, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.into(self.embed(x).relu()))
        return self.head(self.top(y).relu())


@net("opaque", movable=["stem"], frozen={"lstm": "", "head": "output"})
class LstmOverImage(nn.Module):
    """CRNN: columns of an image as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=(2, 2), padding=1)
        self.conv = nn.Conv2d(8, 4, 3, padding=1)
        self.lstm = nn.LSTM(4 * 8, 6, bidirectional=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu())
        b, c, h, w = x.shape
        y, _ = self.lstm(x.permute(3, 0, 1, 2).reshape(w, b, c * h))
        return self.head(y)


@net("opaque", movable=["stem", "tail"], frozen=_HEAD)
def fourier_over_space() -> nn.Module:
    """Complex numbers over the spatial axes: no rule, or a pointwise one; nothing may break."""
    return around(SpectralFilter())


class SpectralFilter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        return torch.fft.irfft2(spectrum * spectrum.abs().reciprocal(), s=x.shape[-2:])


@net("opaque frozen", movable=["tail"], frozen={"stem": "fft", **_HEAD})
def fourier_over_channels() -> nn.Module:
    return around(ChannelFourier())


class ChannelFourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).real


@net("opaque frozen", movable=["tail"], frozen={"stem": "sort", **_HEAD})
def sorted_channels() -> nn.Module:
    return around(SortChannels())


class SortChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=1).values


@net("opaque channel-statistics", movable=["stem", "tail"], frozen=_HEAD)
def cumulative_sum_over_channels() -> nn.Module:
    return around(CumulativeSum())


class CumulativeSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


@net("inplace", movable=["stem", "middle", "tail"], frozen=_HEAD)
class InPlace(nn.Module):
    """+=, relu_, slices written in place: the same storage under several values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        y = self.middle(x)
        y += x
        y *= 0.5
        y[:, :, 0] = 0.0
        y[..., 1:3, 1:3].add_(1.0)
        return self.head(torch.relu_(self.tail(y)))


@net("mask", movable=["stem", "tail"], frozen=_HEAD)
class ThresholdMask(nn.Module):
    """Masks made from the features themselves, top-k over space, comparisons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        limit = x.flatten(2).topk(5, dim=-1).values[..., -1][..., None, None]
        x = torch.where(x >= limit, x, torch.zeros_like(x)) + x * (x > 0)
        return self.head(self.tail(x).relu())


@net("sampling", movable=["stem", "tail", "locate"], frozen=_HEAD)
class SpatialTransformer(nn.Module):
    """affine_grid and grid_sample: the grid's two channels are coordinates and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.locate = nn.Linear(8, 8)
        self.affine = nn.Linear(8, 6)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        theta = self.affine(self.locate(x.mean((2, 3))).relu()).view(-1, 2, 3)
        grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
        x = nn.functional.grid_sample(x, grid, align_corners=False)
        return self.head(self.tail(x).relu())


@net("unfold", movable=["tail"], frozen=_HEAD)
class Unfold(nn.Module):
    """im2col: channels times kernel positions in one axis, folded back after a scaling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        columns = nn.functional.unfold(x, 2, stride=2)
        x = nn.functional.fold(columns * 2, x.shape[-2:], 2, stride=2)
        return self.head(self.tail(x).relu())


@net("embedding", inputs=lambda: torch.randint(0, 11, (2, 7)), movable=["0", "1"], frozen={"3": ""})
def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


@net("opaque gather", movable=["tail"], frozen=_HEAD)
class LearntPermutation(nn.Module):
    """A fixed random permutation of the channels, kept in an index buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.order: Tensor
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 5, 4, 6]))
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x[:, self.order] + x.index_select(1, self.order)
        return self.head(self.tail(x).relu())


@net("matmul", movable=["stem", "weight@1", "tail"], frozen=_HEAD)
class MatmulMixing(nn.Module):
    """Raw matrices and matmul instead of linear layers, over channels-last data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(0.2 * torch.randn(8, 16))
        self.bias = nn.Parameter(torch.zeros(16))
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).movedim(1, -1) @ self.weight + self.bias
        return self.head(self.tail(x.movedim(-1, 1).relu()).relu())


@net("matmul", inputs=image(2, 9, 5), movable=["embed", "channel.0"], frozen={"head": "output"})
class MixerBlock(nn.Module):
    """MLP-Mixer: one linear mixes tokens (whose number is the input's), one mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.token = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 9))
        self.channel = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.token(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.channel(x))


@net("state script", movable=["stem"], frozen=_HEAD)
def frame_with_identity() -> nn.Module:
    return Layers(
        nn.Conv2d(3, 8, 3, padding=1), nn.Identity(), nn.Dropout2d(0.0), nn.Conv2d(8, 2, 1)
    )
