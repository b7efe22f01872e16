"""Values that meet: concatenation, addition, gates, padding, and the U-Nets made of them."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.convs import around
from tests.models.registry import image, net


class Block(nn.Sequential):
    def __init__(self, into: int, out: int) -> None:
        super().__init__(
            nn.Conv2d(into, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )


_UNET = ["down.0.0", "down.0.1", "down.1.0", "bottom.0", "lift.0", "lift.1", "up.0.0", "up.1.0"]


@net("unet join exact", movable=_UNET, frozen={"head": "output"})
class Unet(nn.Module):
    """Two levels, transposed convolutions, concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 32)
        self.down = nn.ModuleList([Block(3, 8), Block(8, 16)])
        self.bottom = Block(16, 32)
        self.lift = nn.ModuleList(
            [nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths)]
        )
        self.up = nn.ModuleList([Block(16, 8), Block(32, 16)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for level in (1, 0):
            x = torch.cat([skips[level], self.lift[level](x)], dim=1)
            x = self.up[level](x)
        return self.head(x)


@net("unet join", movable=["a", "b", "c"], frozen={"head": "output"})
class UnetAdd(nn.Module):
    """Skips are added, sizes made equal by interpolation to the skip's own size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.c = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.a(x)
        deep = self.c(self.b(skip).relu())
        deep = F.interpolate(deep, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.head(skip + deep)


@net("join", movable=["a", "b", "c", "tail"], frozen={"head": "output"})
class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 16, 1)
        self.c = nn.Conv2d(3, 12, 5, padding=2)
        self.tail = nn.Conv2d(36, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.a(x), self.b(x), self.c(x)), 1).relu()
        return self.head(self.tail(x).relu())


@net("join", movable=["conv", "tail"], frozen={"head": "output"})
class ConcatWithItself(nn.Module):
    """CReLU: the two halves of the concatenation are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.tail(torch.cat([x, -x], 1).relu()).relu())


@net("join", movable=["conv", "tail"], frozen={"head": "output"})
class ConcatWithInput(nn.Module):
    """Part of the concatenation is the input, whose channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(11, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(torch.cat([x, self.conv(x)], 1)).relu())


@net("join", movable=["stem", "grow.0", "grow.1", "grow.2", "mix"], frozen={"head": "output"})
class Dense(nn.Module):
    """Every layer sees all before it, with a norm over the growing concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.ModuleList([nn.BatchNorm2d(8 + 8 * i) for i in range(3)])
        self.grow = nn.ModuleList([nn.Conv2d(8 + 8 * i, 8, 3, padding=1) for i in range(3)])
        self.mix = nn.Conv2d(32, 16, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norm, self.grow, strict=True):
            features.append(conv(norm(torch.cat(features, 1)).relu()))
        return self.head(self.mix(torch.cat(features, 1)).relu())


@net("join", movable=["stem", "a", "b", "project"], frozen={"head": "output"})
class Residual(nn.Module):
    """Identity and projection shortcuts: one group across all that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.project = nn.Conv2d(8, 16, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.a(x)).relu()
        return self.head(torch.add(self.b(x), self.project(x), alpha=0.5).relu())


@net("join frozen", movable=["other"], frozen={"same": "output"})
class ResidualOnInput(nn.Module):
    """What is added to the input has the input's channels, and they are the output's too."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 16, 3, padding=1)
        self.same = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.same(self.other(x).relu())


@net("join gate", movable=["stem", "query", "key", "signal", "tail"], frozen={"head": "output"})
class AttentionGate(nn.Module):
    """A one-channel gate multiplies many channels: broadcasting ties nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.signal = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.query = nn.Conv2d(16, 12, 1)
        self.key = nn.Conv2d(8, 12, 1)
        self.gate = nn.Conv2d(12, 1, 1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x).relu()
        signal = F.interpolate(self.query(self.signal(skip).relu()), scale_factor=2.0)
        gate = torch.sigmoid(self.gate(F.relu(signal + self.key(skip))))
        return self.head(self.tail(skip * gate).relu())


@net("join gate", movable=["stem", "tail", "middle.squeeze"], frozen={"head": "output"})
def squeeze_excite() -> nn.Module:
    return around(SqueezeExcite(16))


class SqueezeExcite(nn.Module):
    """Linear, as in the paper: the sizes b and c are read from the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, 8)
        self.excite = nn.Linear(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = torch.sigmoid(self.excite(F.relu(self.squeeze(y)))).view(b, c, 1, 1)
        return x * y.expand_as(x)


@net("join gate", movable=["stem", "tail", "middle.1", "middle.3"], frozen={"head": "output"})
def squeeze_excite_conv() -> nn.Module:
    return around(
        Gate(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(16, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1),
            nn.Sigmoid(),
        )
    )


class Gate(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


@net("join pad frozen", shrinks=["stem"], frozen={"head": "output"})
class ShortcutByPadding(nn.Module):
    """ResNet's option A: every other pixel, and zeros for the channels that are not there."""

    def __init__(self) -> None:
        super().__init__()
        self.planes = 16
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        side = self.planes // 4
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side), "constant", 0)
        return self.head((self.conv(x) + shortcut).relu())


@net("pad pool", movable=["stem", "tail"], frozen={"head": "output"})
class PadAndCrop(nn.Module):
    """The U-Net's way with odd sizes: pad to the skip by differences, and crop back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.tail = nn.Conv2d(8, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tail(F.pad(self.stem(x), (1, 1, 1, 1), mode="reflect")).relu()
        high, wide = x.shape[-2] - y.shape[-2], x.shape[-1] - y.shape[-1]
        y = F.pad(y, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return self.head(y)[:, :, 1:-1, 1:-1]


@net("pool", movable=["stem", "tail"], frozen={"head": "output"})
class Pools(nn.Module):
    """Every pooling and interpolation, unpooling with indices among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        small, where = self.pool(x)
        x = x + self.unpool(small, where)
        x = x + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        x = x + F.interpolate(F.adaptive_max_pool2d(x, 4), size=x.shape[-2:], mode="bicubic")
        x = x * x.mean((2, 3), keepdim=True) + x.amax((-2, -1), keepdim=True)
        return self.head(self.tail(F.lp_pool2d(x, 2, 2)).relu())


@net("pool", inputs=image(2, 3, 8, 8, 8), movable=["0", "4"], frozen={"6": "output"})
def pools_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.MaxPool3d(2),
        nn.AvgPool3d((1, 2, 2)),
        nn.Upsample(scale_factor=2, mode="trilinear"),
        nn.Conv3d(8, 16, 1),
        nn.AdaptiveAvgPool3d(1),
        nn.Conv3d(16, 2, 1),
    )


@net("join", movable=["a", "b", "tail"], frozen={"head": "output"})
class Arithmetic(nn.Module):
    """maximum, minimum, lerp, where, sub, division, comparison masks between two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        top = torch.maximum(a, b) - torch.minimum(a, b) / 2
        mixed = torch.where(a > b, torch.lerp(a, b, 0.3), top).masked_fill(a.abs() < 1e-3, 0.0)
        mixed = mixed.clamp(-3, 3) + (a * b).addcmul(a, b, value=0.1)
        return self.head(self.tail(mixed).relu())
