"""Convolutional backbones: DenseNet, EfficientNet, MobileNet, ResNeXt, ConvNeXt."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.table import net
from tests.models.registry import image

_INPUT = image(2, 3, 32, 32)


class DenseLayer(nn.Module):
    """Takes the list of all features before it; torchvision's names."""

    def __init__(self, into: int, growth: int, bottleneck: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(into)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(into, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)
        self.drop = drop

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        previous = [features] if isinstance(features, Tensor) else features
        x = self.conv1(self.relu1(self.norm1(torch.cat(previous, 1))))
        x = self.conv2(self.relu2(self.norm2(x)))
        return F.dropout(x, p=self.drop, training=self.training) if self.drop > 0 else x


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, into: int, growth: int) -> None:
        super().__init__()
        for index in range(layers):
            self.add_module(
                f"denselayer{index + 1}", DenseLayer(into + index * growth, growth, 4, 0.1)
            )

    def forward(self, first: Tensor) -> Tensor:
        features = [first]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, growth: int = 12, blocks: tuple[int, ...] = (3, 3), init: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, init, 7, stride=2, padding=3, bias=False),
                norm0=nn.BatchNorm2d(init),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        width = init
        for index, layers in enumerate(blocks, start=1):
            self.features.add_module(f"denseblock{index}", DenseBlock(layers, width, growth))
            width += layers * growth
            if index < len(blocks):
                transition = nn.Sequential(
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(width, width // 2, 1, bias=False),
                    nn.AvgPool2d(2, stride=2),
                )
                self.features.add_module(f"transition{index}", transition)
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        x = F.adaptive_avg_pool2d(features, (1, 1))
        return self.classifier(torch.flatten(x, 1))


@net(
    "torchvision densenet",
    inputs=_INPUT,
    width=8,
    movable=[
        "features.conv0",
        "features.denseblock1.denselayer1.conv1",
        "features.denseblock1.denselayer2.conv2",
        "features.transition1.2",
    ],
    shrinks=["features.norm5"],
    frozen={"classifier": "output"},
)
def densenet() -> nn.Module:
    return DenseNet()


def make_divisible(value: float, divisor: int = 8) -> int:
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeeze: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation, self.gate = nn.SiLU(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project; a shortcut where shapes allow."""

    def __init__(
        self, into: int, out: int, expand: int, kernel: int, stride: int, drop: float = 0.1
    ) -> None:
        super().__init__()
        hidden = make_divisible(into * expand)
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()]
        layers += [
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(inplace=True),
            SqueezeExcitation(hidden, max(1, into // 2), nn.Hardsigmoid),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.block = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and into == out
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if not self.use_res_connect:
            return y
        if self.training and self.drop:
            keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)
            y = y.div(1 - self.drop) * (keep + (1 - self.drop)).floor_()
        return x + y


@net(
    "torchvision efficientnet",
    inputs=_INPUT,
    width=8,
    movable=["0", "3.block.0", "3.block.3", "3.block.3", "4.block.7", "5.block.7", "7"],
    frozen={"12": "output"},
)
def efficientnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        InvertedResidual(16, 16, 1, 3, 1),
        InvertedResidual(16, 24, 4, 3, 2),
        InvertedResidual(24, 24, 4, 5, 1),
        InvertedResidual(24, 40, 6, 5, 2),
        InvertedResidual(40, 40, 6, 3, 1),
        nn.Conv2d(40, 96, 1, bias=False),
        nn.BatchNorm2d(96),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, 10),
    )


class ResNeXtBottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 2 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inplanes != 2 * planes:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(inplanes, 2 * planes, 1, bias=False),
                nn.BatchNorm2d(2 * planes),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


@net(
    "torchvision resnext grouped",
    inputs=_INPUT,
    width=16,
    movable=["0", "2.conv1", "2.conv2", "2.conv3", "3.conv2", "4.conv3", "4.downsample.1"],
    frozen={"7": "output"},
)
def resnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        ResNeXtBottleneck(32, 32, 8),
        ResNeXtBottleneck(64, 32, 8),
        ResNeXtBottleneck(64, 64, 8, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over axis 1 by permuting there and back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(0.1 * torch.ones(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (
            self.gamma * (x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x
        )


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, channels-last MLP, layer scale, stochastic depth per sample."""

    def __init__(self, channels: int, drop: float = 0.1, response: bool = False) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels) if response else nn.Identity()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(0.5 * torch.ones(channels)) if not response else None
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(self.norm(y)))))
        if self.gamma is not None:
            y = self.gamma * y
        y = y.permute(0, 3, 1, 2)
        if self.training:
            y = y * torch.empty(y.shape[0], 1, 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)
        return x + y


class ConvNeXt(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (24, 48), response: bool = False) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), LayerNorm2d(widths[0]))]
        )
        self.stages = nn.ModuleList()
        for index, width in enumerate(widths):
            if index:
                self.downsample_layers.append(
                    nn.Sequential(
                        LayerNorm2d(widths[index - 1]), nn.Conv2d(widths[index - 1], width, 2, 2)
                    )
                )
            self.stages.append(
                nn.Sequential(*(ConvNeXtBlock(width, response=response) for _ in range(2)))
            )
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean([-2, -1])))


_CONVNEXT = [
    "downsample_layers.0.0",
    "downsample_layers.1.1",
    "stages.0.0.dwconv",
    "stages.0.0.pwconv1",
    "stages.1.1.pwconv2",
]


@net(
    "convnext channel-statistics",
    inputs=_INPUT,
    width=8,
    movable=[*_CONVNEXT, "stages.0.1.gamma@0"],
    frozen={"head": "output"},
)
def convnext() -> nn.Module:
    return ConvNeXt()


@net(
    "convnext channel-statistics",
    inputs=_INPUT,
    width=8,
    movable=[*_CONVNEXT, "stages.0.1.grn.gamma@3"],
    frozen={"head": "output"},
)
def convnext_v2() -> nn.Module:
    return ConvNeXt(response=True)
