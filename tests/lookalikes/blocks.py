"""Blocks with a habit of their own: Res2Net, Ghost, CBAM, selective kernels, HRNet's fusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.table import net
from tests.models.registry import image

_INPUT = image(2, 3, 32, 32)
_HEAD = {"head": "output"}


class Trunk(nn.Module):
    """stem, one block, head."""

    def __init__(self, block: nn.Module, width: int = 32, out: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block = block
        self.head = nn.Conv2d(out, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class Res2Block(nn.Module):
    """Splits into `scale` parts of `width` channels, each convolved with the sum so far."""

    def __init__(self, channels: int, width: int = 8, scale: int = 4) -> None:
        super().__init__()
        self.width, self.nums = width, scale - 1
        self.conv1 = nn.Conv2d(channels, width * scale, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(self.nums)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(self.nums))
        self.conv3 = nn.Conv2d(width * scale, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        spx = torch.split(self.bn1(self.conv1(x)).relu(), self.width, 1)
        sp, out = spx[0], None
        for i in range(self.nums):
            sp = spx[i] if i == 0 else sp + spx[i]
            sp = F.relu(self.bns[i](self.convs[i](sp)))
            out = sp if out is None else torch.cat((out, sp), 1)
        assert out is not None
        return F.relu(self.conv3(torch.cat((out, spx[self.nums]), 1)) + x)


@net("res2net owner", inputs=_INPUT, movable=["stem.0", "block.conv3"], frozen=_HEAD)
def res2net() -> nn.Module:
    return Trunk(Res2Block(32))


class Ghost(nn.Module):
    """Half the maps by a convolution, half by a cheap depthwise one, cut to size by a slice."""

    def __init__(self, into: int, out: int, ratio: int = 2) -> None:
        super().__init__()
        self.out = out
        first = -(-out // ratio)
        self.primary = nn.Sequential(nn.Conv2d(into, first, 1), nn.BatchNorm2d(first), nn.ReLU())
        self.cheap = nn.Sequential(
            nn.Conv2d(first, first * (ratio - 1), 3, padding=1, groups=first), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], dim=1)[:, : self.out, :, :]


@net("ghost owner", inputs=_INPUT, width=8, movable=["stem.0"], frozen=_HEAD)
def ghostnet() -> nn.Module:
    return Trunk(nn.Sequential(Ghost(32, 48), Ghost(48, 32)))


class Cbam(nn.Module):
    """One MLP for the mean and the maximum over space; a convolution over mean and maximum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, 16), nn.ReLU(), nn.Linear(16, channels)
        )
        self.space = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        total = self.mlp(F.avg_pool2d(x, x.shape[2:])) + self.mlp(F.max_pool2d(x, x.shape[2:]))
        x = x * torch.sigmoid(total).unsqueeze(2).unsqueeze(3).expand_as(x)
        pooled = torch.cat((x.max(1)[0].unsqueeze(1), x.mean(1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.space(pooled))


@net(
    "cbam reuse channel-statistics",
    inputs=_INPUT,
    width=8,
    movable=["stem.0", "block.mlp.1"],
    frozen=_HEAD,
)
def cbam() -> nn.Module:
    return Trunk(Cbam(32))


class SelectiveKernel(nn.Module):
    """Two kernels chosen between by a softmax over branches: stack, view, sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=d, dilation=d, groups=4) for d in (1, 2)
        )
        self.squeeze = nn.Sequential(nn.Conv2d(channels, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.select = nn.Conv2d(16, channels * 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([branch(x) for branch in self.branches], dim=1)
        gate = self.select(self.squeeze(stacked.sum(1).mean((2, 3), keepdim=True)).relu())
        b, c, h, w = gate.shape
        gate = torch.softmax(gate.view(b, 2, c // 2, h, w), dim=1)
        return (stacked * gate).sum(dim=1)


@net(
    "sknet grouped",
    inputs=_INPUT,
    width=8,
    movable=["stem.0", "block.branches.0", "block.squeeze.0"],
    shrinks=["block.select"],
    frozen=_HEAD,
)
def selective_kernels() -> nn.Module:
    return Trunk(SelectiveKernel(32))


class Fuse(nn.Module):
    """HRNet: every resolution receives every other, by strided convolutions and upsampling."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.split = nn.ModuleList(
            nn.Conv2d(32, width, 3, stride=2**i, padding=1) for i, width in enumerate(widths)
        )
        rows = []
        for i, out in enumerate(widths):
            row: list[nn.Module | None] = []
            for j, into in enumerate(widths):
                if j == i:
                    row.append(None)
                elif j > i:
                    row.append(
                        nn.Sequential(
                            nn.Conv2d(into, out, 1, bias=False),
                            nn.BatchNorm2d(out),
                            nn.Upsample(scale_factor=2 ** (j - i), mode="nearest"),
                        )
                    )
                else:
                    downs = [nn.Conv2d(into, into, 3, 2, 1) for _ in range(i - j - 1)]
                    row.append(nn.Sequential(*downs, nn.Conv2d(into, out, 3, 2, 1)))
            rows.append(nn.ModuleList(row))  # type: ignore[arg-type]
        self.fuse_layers = nn.ModuleList(rows)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branches = [split(x) for split in self.split]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            y = branches[0] if i == 0 else row[0](branches[0])
            for j in range(1, len(branches)):
                y = y + (branches[j] if i == j else row[j](branches[j]))
            fused.append(self.relu(y))
        size = fused[0].shape[-2:]
        ups = [fused[0]]
        ups += [F.interpolate(f, size=size, mode="bilinear", align_corners=True) for f in fused[1:]]
        return torch.cat(ups, 1)


@net(
    "hrnet",
    inputs=_INPUT,
    width=8,
    movable=["stem.0", "block.split.0", "block.split.2", "block.fuse_layers.2.0.0"],
    frozen=_HEAD,
)
def hrnet() -> nn.Module:
    return Trunk(Fuse(), out=112)


class LinkDecoder(nn.Module):
    """Recurrent residual unit: the same convolution again and again on its own output plus x."""

    def __init__(self, channels: int, times: int = 2) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for _ in range(self.times):
            y = self.conv(x + y)
        return x + y


@net("r2unet reuse", inputs=_INPUT, width=8, movable=["stem.0", "block.conv.0"], frozen=_HEAD)
def recurrent_residual() -> nn.Module:
    return Trunk(LinkDecoder(32))


class SpaceDepthFocus(nn.Module):
    """YOLO's focus and CSP: strided slices into channels, a split by a remembered width."""

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.c = hidden
        self.focus = nn.Conv2d(4 * channels, 2 * hidden, 1)
        self.m = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(2))
        self.cv2 = nn.Conv2d(4 * hidden, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(
            [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1
        )
        y = list(self.focus(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@net("yolo owner", inputs=_INPUT, width=8, movable=["stem.0", "block.cv2"], frozen=_HEAD)
def focus_csp() -> nn.Module:
    return Trunk(SpaceDepthFocus(32))
