"""Data movement over the channel axis: splits, slices, shuffles, views, repeats."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.convs import Layers, around
from tests.models.registry import image, net, register

_HEAD = {"head": "output"}


class Apply(nn.Module):
    """A function of one tensor as a module; picklable because the functions below are global."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def glu_chunk(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=1)
    return value * torch.sigmoid(gate)


def glu_functional(x: Tensor) -> Tensor:
    return F.glu(x, dim=1)


def split_by_shape(x: Tensor) -> Tensor:
    a, b = torch.split(x, x.shape[1] // 2, dim=1)
    return a + b


def split_literal(x: Tensor) -> Tensor:
    a, b = x.split(8, dim=1)
    return a + b


def tensor_split(x: Tensor) -> Tensor:
    a, b = torch.tensor_split(x, 2, dim=1)
    return torch.maximum(a, b)


def slices_by_shape(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return x[:, :half] * x[:, half:]


def slices_literal(x: Tensor) -> Tensor:
    return x[:, :8] * x[:, 8:]


def slices_strided(x: Tensor) -> Tensor:
    """Even channels against odd ones."""
    return x[:, ::2] + x[:, 1::2]


def unbind_pairs(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    first, second = x.view(b, 2, c // 2, h, w).unbind(1)
    return first * second


def maxout(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // 2, 2, h, w).amax(2)


def narrow(x: Tensor) -> Tensor:
    half = x.size(1) // 2
    return x.narrow(1, 0, half) + x.narrow(1, half, half)


for _function in (
    glu_chunk,
    glu_functional,
    split_by_shape,
    tensor_split,
    slices_by_shape,
    slices_strided,
    unbind_pairs,
    maxout,
    narrow,
):
    register(
        _function.__name__,
        lambda f=_function: around(Apply(f), 16, 8),  # type: ignore[misc]
        "view halves",
        movable=["tail"],
        shrinks=["stem"],
        frozen=_HEAD,
    )

for _function in (split_literal, slices_literal):
    register(
        _function.__name__,
        lambda f=_function: around(Apply(f), 16, 8),  # type: ignore[misc]
        "view hard-coded",
        movable=["tail"],
        frozen={"stem": "", **_HEAD},
    )


def channel_shuffle(x: Tensor, groups: int = 4) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous()
    return x.view(b, c, h, w)


def flatten_and_back(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens * 2).permute(0, 2, 1).reshape(b, -1, h, w)


def fold_into_batch(x: Tensor) -> Tensor:
    """Every channel alone through a pooling, as an extra batch."""
    b, c, h, w = x.shape
    return F.avg_pool2d(x.reshape(b * c, 1, h, w), 3, 1, 1).view(b, c, h, w)


def unflatten(x: Tensor) -> Tensor:
    return x.unflatten(2, (4, 4)).mean(3).repeat_interleave(4, dim=2)


def stack_and_sum(x: Tensor) -> Tensor:
    return torch.stack([x, x.relu(), -x], dim=1).sum(1)


def roll_space(x: Tensor) -> Tensor:
    return x.roll((1, 2), dims=(2, 3)).flip(-1)


def squeeze_round_trip(x: Tensor) -> Tensor:
    return x[:, None].squeeze(1).unsqueeze(-1)[..., 0].swapaxes(1, 2).transpose(2, 1)


def gather_rows(x: Tensor) -> Tensor:
    return x.index_select(2, torch.tensor([3, 2, 1, 0])) + x[:, :, [0, 1, 2, 3]]


for _function in (
    flatten_and_back,
    fold_into_batch,
    unflatten,
    stack_and_sum,
    roll_space,
    squeeze_round_trip,
    gather_rows,
):
    register(
        _function.__name__,
        lambda f=_function: around(Apply(f)),  # type: ignore[misc]
        "view",
        movable=["stem", "tail"],
        frozen=_HEAD,
    )


@net("view shuffle", movable=["tail"], shrinks=["stem"], frozen=_HEAD)
def channel_shuffle_by_view() -> nn.Module:
    """Position j of every group moves as one: 4 groups of 4 become 4 of 1."""
    return around(Apply(channel_shuffle))


@net("view shuffle", movable=["tail"], shrinks=["stem"], frozen=_HEAD)
def channel_shuffle_module() -> nn.Module:
    return around(nn.ChannelShuffle(4))


@net("view shuffle", width=8, shrinks=["a", "b"], movable=["tail"], frozen=_HEAD)
class ShuffleUnit(nn.Module):
    """ShuffleNet's unit: split, transform one half, concatenate, shuffle; then all over again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.tail = nn.Conv2d(32, 16, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        keep, change = self.a(x).chunk(2, 1)
        x = channel_shuffle(torch.cat([keep, self.b(change).relu()], 1), groups=2)
        return self.head(self.tail(x).relu())


@net("view pixel", movable=["tail"], shrinks=["stem"], frozen=_HEAD)
def pixel_shuffle_module() -> nn.Module:
    return Layers(
        nn.Conv2d(3, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
    )


def pixel_shuffle_twice(x: Tensor) -> Tensor:
    return F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)


@net("view pixel", movable=["stem", "tail"], frozen=_HEAD)
def pixel_shuffle_functional() -> nn.Module:
    return around(Apply(pixel_shuffle_twice))


def other_names(x: Tensor) -> Tensor:
    keep, change = torch.unsafe_chunk(torch.negative(x), 2, 1)
    change = change * torch.greater(change, 0.1)
    return torch.cat([torch.absolute(keep), torch.special.expit(change)], 1)


@net("view", movable=["tail"], shrinks=["stem"], frozen=_HEAD)
def other_names_of_operators() -> nn.Module:
    """torch knows these operators by two names, and tags the other as element-wise only."""
    return around(Apply(other_names))


@net("view pixel", movable=["stem", "tail"], frozen=_HEAD)
def pixel_unshuffle_module() -> nn.Module:
    return Layers(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.PixelUnshuffle(2),
        nn.Conv2d(32, 8, 1),
        nn.Conv2d(8, 2, 1),
    )


@net("view pixel", inputs=image(1, 3, 4, 4, 4), movable=["tail"], shrinks=["stem"], frozen=_HEAD)
class SubpixelUp3d(nn.Module):
    """Pixel shuffle in 3D by view and permute, as MONAI and others write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 64, 1)
        self.tail = nn.Conv3d(8, 8, 1)
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, *size = x.shape
        r = 2
        x = x.reshape(b, c // r**3, r, r, r, *size).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.reshape(b, c // r**3, *(s * r for s in size))
        return self.head(self.tail(x).relu())


@net("view repeat", movable=["stem", "tail"], frozen=_HEAD)
class RepeatChannels(nn.Module):
    """x.repeat over channels: the copies are dropped together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.stem(x).repeat(1, 2, 1, 1)).relu())


@net("view repeat", movable=["stem", "tail"], frozen=_HEAD)
class RepeatInterleaveChannels(RepeatChannels):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.stem(x).repeat_interleave(2, dim=1)).relu())


@net("view repeat", movable=["stem", "tail"], frozen=_HEAD)
class ExpandSingle(nn.Module):
    """A one-channel image repeated by expand meets many channels: expand adapts to none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gray = nn.Conv2d(3, 1, 1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.gray(x).expand(-1, y.shape[1], -1, -1)
        return self.head(self.tail(y).relu())


@net("view hard-coded repeat", movable=["tail"], frozen={"stem": "", **_HEAD})
class ExpandLiteral(ExpandSingle):
    """The same with the width written down: the addition must still fit."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.gray(x).expand(-1, 8, -1, -1)
        return self.head(self.tail(y).relu())


@net("view channel-statistics", movable=["stem", "tail"], frozen=_HEAD)
class SplitByLayerSizes(nn.Module):
    """Uneven split with sizes read from the layers that made the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.side = nn.Conv2d(3, 12, 3, padding=1)
        self.tail = nn.Conv2d(12, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.stem(x), self.side(x)], 1).relu()
        a, b = both.split([self.stem.out_channels, self.side.out_channels], dim=1)
        return self.head(self.tail(b * a.mean(1, keepdim=True)).relu())


@net("view hard-coded", movable=["tail"], frozen={"stem": "", **_HEAD})
class SplitUneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.tail = nn.Conv2d(12, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).split([4, 12], dim=1)
        return self.head(self.tail(b * a.mean(1, keepdim=True)).relu())


@net("view", movable=["stem", "tail"], frozen=_HEAD)
class PutIntoZeros(nn.Module):
    """Writes into a preallocated tensor of the right size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        both = x.new_zeros(b, 2 * c, h, w)
        both[:, :c] = x
        both[:, c:] = x.square()
        return self.head(self.tail(both).relu())
