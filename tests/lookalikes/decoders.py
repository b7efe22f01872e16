"""A timm-like ResNet that returns its features, under decoders as in segmentation libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.table import net
from tests.models.registry import image

_INPUT = image(2, 3, 64, 64)


def conv3x3(into: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class ResNetEncoder(nn.Module):
    """Features at strides 1 (the image), 2, 4, 8, 16, 32."""

    def __init__(self, widths: Sequence[int] = (16, 16, 32, 64, 128)) -> None:
        super().__init__()
        self.out_channels = (3, *widths)
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes = widths[0]
        for index, width in enumerate(widths[1:], start=1):
            stride = 1 if index == 1 else 2
            layers = [BasicBlock(inplanes, width, stride)]
            if index == 4:
                layers.append(BasicBlock(width, width))
            setattr(self, f"layer{index}", nn.Sequential(*layers))
            inplanes = width

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        x = F.relu(self.bn1(self.conv1(x)))
        features.append(x)
        x = self.maxpool(x)
        for index in range(1, 5):
            x = getattr(self, f"layer{index}")(x)
            features.append(x)
        return features


class ConvBnRelu(nn.Sequential):
    def __init__(self, into: int, out: int, kernel: int = 3, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(
                into, out, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False
            ),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )


class SpatialChannelGate(nn.Module):
    """Concurrent squeeze-excite over channels and over space."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )
        self.space = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channel(x) + x * self.space(x)


class DecoderBlock(nn.Module):
    def __init__(self, into: int, skip: int, out: int) -> None:
        super().__init__()
        self.conv1 = ConvBnRelu(into + skip, out)
        self.attention1 = SpatialChannelGate(into + skip) if skip else nn.Identity()
        self.conv2 = ConvBnRelu(out, out)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if skip is not None:
            x = self.attention1(torch.cat([x, skip], dim=1))
        return self.conv2(self.conv1(x))


class Segmenter(nn.Module):
    """encoder -> decoder(features) -> segmentation_head, and a classifier from the deepest map."""

    def __init__(self, decoder: nn.Module, out: int, upsampling: int = 1) -> None:
        super().__init__()
        self.encoder = ResNetEncoder()
        self.decoder = decoder
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(out, 4, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=upsampling) if upsampling > 1 else nn.Identity(),
        )
        self.classification_head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 5)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high, wide = x.shape[-2:]
        if high % 32 or wide % 32:
            raise RuntimeError(f"sizes must be multiples of 32, got {high}x{wide}")
        features = self.encoder(x)
        masks = self.segmentation_head(self.decoder(features))
        return masks, self.classification_head(features[-1])


class UnetDecoder(nn.Module):
    def __init__(self, widths: Sequence[int] = (64, 32, 16, 16, 8)) -> None:
        super().__init__()
        into = [128, *widths[:-1]]
        skips = [64, 32, 16, 16, 0]
        self.blocks = nn.ModuleList(
            DecoderBlock(i, s, o) for i, s, o in zip(into, skips, widths, strict=True)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        features = features[1:][::-1]
        x, skips = features[0], features[1:]
        for index, block in enumerate(self.blocks):
            x = block(x, skips[index] if index < len(skips) else None)
        return x


_ENCODER = ["encoder.conv1", "encoder.layer1.0.conv2", "encoder.layer2.0.conv1"]
_HEADS = {"segmentation_head.0": "output", "classification_head.3": "output"}


@net(
    "smp resnet",
    inputs=_INPUT,
    width=8,
    movable=[*_ENCODER, "encoder.layer4.1.conv2", "decoder.blocks.0.conv1.0"],
    frozen=_HEADS,
)
def resnet_unet_scse() -> nn.Module:
    return Segmenter(UnetDecoder(), 8)


class PlusPlusDecoder(nn.Module):
    """U-Net++: blocks in a ModuleDict, addressed by made-up names."""

    def __init__(self) -> None:
        super().__init__()
        encoder = [128, 64, 32, 16]
        widths = [64, 32, 16]
        self.depth = len(widths)
        blocks: dict[str, nn.Module] = {}
        for layer in range(self.depth):
            for depth in range(layer + 1):
                skip = encoder[layer + 1] * (layer + 1 - depth)
                if depth:
                    into, out = encoder[layer], encoder[layer + 1]
                else:
                    into, out = ([encoder[0], *widths][layer], widths[layer])
                blocks[f"x_{depth}_{layer}"] = DecoderBlock(into, skip, out)
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, features: list[Tensor]) -> Tensor:
        features = features[1:][::-1]
        dense: dict[str, Tensor] = {}
        for layer in range(self.depth):
            for depth in range(layer, -1, -1):
                skips = [dense[f"x_{d}_{layer}"] for d in range(depth + 1, layer + 1)]
                skip = torch.cat([*skips, features[layer + 1]], dim=1)
                if depth:
                    below = features[layer]
                else:
                    below = dense[f"x_0_{layer - 1}"] if layer else features[0]
                dense[f"x_{depth}_{layer}"] = self.blocks[f"x_{depth}_{layer}"](below, skip)
        return dense[f"x_0_{self.depth - 1}"]


@net("smp resnet", inputs=_INPUT, width=8, movable=_ENCODER, frozen=_HEADS)
def resnet_unet_plus_plus() -> nn.Module:
    return Segmenter(PlusPlusDecoder(), 16, upsampling=4)


class FpnDecoder(nn.Module):
    """Lateral 1x1 convolutions, top-down sums, group-normed heads merged by a sum."""

    def __init__(self, pyramid: int = 32, out: int = 16) -> None:
        super().__init__()
        self.p5 = nn.Conv2d(128, pyramid, 1)
        self.laterals = nn.ModuleList(nn.Conv2d(c, pyramid, 1) for c in (64, 32, 16))
        self.heads = nn.ModuleList(self.head(pyramid, out, n) for n in (3, 2, 1, 0))
        self.dropout = nn.Dropout2d(0.2, inplace=True)

    @staticmethod
    def head(into: int, out: int, upsamples: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for index in range(max(1, upsamples)):
            layers += [
                nn.Conv2d(into if index == 0 else out, out, 3, padding=1, bias=False),
                nn.GroupNorm(8, out),
                nn.ReLU(inplace=True),
            ]
            if upsamples:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
        return nn.Sequential(*layers)

    def forward(self, features: list[Tensor]) -> Tensor:
        c2, c3, c4, c5 = features[-4:]
        levels = [self.p5(c5)]
        for lateral, skip in zip(self.laterals, (c4, c3, c2), strict=True):
            up = F.interpolate(levels[-1], scale_factor=2.0, mode="nearest")
            levels.append(up + lateral(skip))
        maps = [head(level) for head, level in zip(self.heads, levels, strict=True)]
        return self.dropout(sum(maps))


@net(
    "smp resnet channel-statistics",
    inputs=_INPUT,
    width=8,
    movable=[*_ENCODER, "decoder.p5", "decoder.laterals.2", "decoder.heads.0.0"],
    frozen=_HEADS,
)
def resnet_fpn() -> nn.Module:
    return Segmenter(FpnDecoder(), 16, upsampling=4)


class SeparableConv(nn.Sequential):
    def __init__(self, into: int, out: int, dilation: int = 1) -> None:
        super().__init__(
            nn.Conv2d(into, into, 3, padding=dilation, dilation=dilation, groups=into, bias=False),
            nn.Conv2d(into, out, 1, bias=False),
        )


class PoolingBranch(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DeepLabDecoder(nn.Module):
    """Atrous pyramid of separable convolutions and a pooled branch; a high-resolution skip."""

    def __init__(self, out: int = 32) -> None:
        super().__init__()
        branches = [ConvBnRelu(128, out, 1)]
        branches += [
            nn.Sequential(SeparableConv(128, out, rate), nn.BatchNorm2d(out), nn.ReLU())
            for rate in (2, 4)
        ]
        self.convs = nn.ModuleList(branches)
        self.pooling = PoolingBranch(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(128, out, 1, bias=False), nn.ReLU()
        )
        self.project = nn.Sequential(
            nn.Conv2d(4 * out, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Dropout(0.5)
        )
        self.up = nn.UpsamplingBilinear2d(scale_factor=8)
        self.skip = ConvBnRelu(16, 12, 1)
        self.fuse = nn.Sequential(SeparableConv(out + 12, out), nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, features: list[Tensor]) -> Tensor:
        deep, fine = features[-1], features[-4]
        results = [conv(deep) for conv in self.convs]
        results.append(self.pooling(deep))
        x = self.up(self.project(torch.cat(results, dim=1)))
        return self.fuse(torch.cat([x, self.skip(fine)], dim=1))


@net(
    "smp resnet",
    inputs=_INPUT,
    width=8,
    movable=[*_ENCODER, "decoder.convs.1.0.0", "decoder.project.0", "decoder.skip.0"],
    shrinks=["decoder.fuse.0.0"],
    frozen=_HEADS,
)
def resnet_deeplab() -> nn.Module:
    return Segmenter(DeepLabDecoder(), 32, upsampling=4)


class PositionAttention(nn.Module):
    def __init__(self, channels: int, inner: int = 16) -> None:
        super().__init__()
        self.top = nn.Conv2d(channels, inner, 1)
        self.center = nn.Conv2d(channels, inner, 1)
        self.bottom = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.size()
        top = self.top(x).flatten(2)
        center = self.center(x).flatten(2).transpose(1, 2)
        bottom = self.bottom(x).flatten(2).transpose(1, 2)
        weights = torch.matmul(center, top).view(b, -1)
        weights = F.softmax(weights, dim=1).view(b, h * w, h * w)
        return self.out(x + torch.matmul(weights, bottom).reshape(b, -1, h, w))


class FusionAttention(nn.Module):
    """Two squeeze-excites, of the skip and of the deep map, summed into one gate."""

    def __init__(self, into: int, skip: int, out: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(ConvBnRelu(into, into), ConvBnRelu(into, skip, 1))
        self.low, self.high = self.gate(skip), self.gate(skip)
        self.conv = ConvBnRelu(2 * skip, out)

    @staticmethod
    def gate(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, max(1, channels // 8), 1),
            nn.ReLU(),
            nn.Conv2d(max(1, channels // 8), channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.reduce(x), scale_factor=2, mode="nearest")
        gate = self.high(x) + self.low(skip)
        return self.conv(torch.cat([x * gate, skip], dim=1))


class MaDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.center = PositionAttention(128)
        self.blocks = nn.ModuleList(
            [FusionAttention(128, 64, 64), FusionAttention(64, 32, 32), FusionAttention(32, 16, 16)]
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.center(features[-1])
        for block, skip in zip(self.blocks, features[-2:1:-1], strict=True):
            x = block(x, skip)
        return x


@net(
    "smp resnet attention",
    inputs=_INPUT,
    width=8,
    movable=[*_ENCODER, "decoder.center.top", "decoder.blocks.2.conv.0"],
    frozen=_HEADS,
)
def resnet_manet() -> nn.Module:
    return Segmenter(MaDecoder(), 16, upsampling=4)
