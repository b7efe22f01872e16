"""Small networks for volumes by tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DeepSupervision", "Outputs", "SmallUNet", "TwoInputs", "double", "unet"]


class SmallUNet(nn.Module):
    """Two levels, instance norm, a skip that is cropped or padded to fit any size."""

    def __init__(self, rank: int = 2, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        up: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        norm: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
        self.first = conv(channels, 4, 3, padding=1)
        self.norm = norm(4, affine=True)
        self.down = conv(4, 8, 3, stride=2, padding=1)
        self.up = up(8, 4, 2, stride=2)
        self.head = conv(8, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.leaky_relu(self.norm(self.first(x)))
        up = self.up(F.leaky_relu(self.down(skip)))
        pads: list[int] = []
        for a, b in zip(skip.shape[2:], up.shape[2:], strict=True):
            pads = [0, a - b, *pads]
        made: Tensor = self.head(torch.cat([skip, F.pad(up, pads)], 1))
        return made


@dataclass
class Outputs:
    """What a network with deep supervision returns."""

    main: Tensor
    coarse: list[Tensor]
    name: str = "both"


class DeepSupervision(nn.Module):
    """A dataclass with outputs at two resolutions, the second of which can be switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.supervised = True

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv(x))
        if not self.supervised:
            return {"main": self.head(x)}
        return Outputs(self.head(x), [self.head(F.avg_pool2d(x, 2))])


class TwoInputs(nn.Module):
    """An image, a mask and a vector that shifts every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 5, padding=2)
        self.shift = nn.Linear(3, 4)

    def forward(self, image: Tensor, *, mask: Tensor, vector: Tensor) -> Tensor:
        x = self.conv(torch.cat([image, mask], 1))
        return x * self.shift(vector)[:, :, None, None]


def unet(rank: int = 2, **options: int) -> SmallUNet:
    torch.manual_seed(0)
    return SmallUNet(rank, **options).eval()


def double(*sizes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, dtype=torch.float64, generator=generator)
