"""The 3D U-Net that a thesis segments whole volumes with, or one slab of them after the other.

Wehen, bachelor's thesis, Hasso Plattner Institute, 2023. Patch-wise, the volume is cut every 16
voxels along its last axis, and every slab goes through the network alone. In a cascade, a first
network segments the shrunken volume and its class maps, resized, join the image as further input
channels of a patch-wise second one (`in_channels` = image channels + classes).
"""

from __future__ import annotations

__all__ = ["UNet3d"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.zoo.registry import register


def double_conv(i: int, o: int) -> nn.Sequential:
    """Return twice a 3x3x3 convolution, batch normalisation and ReLU, from i to o channels."""
    return nn.Sequential(
        nn.Conv3d(i, o, 3, padding=1),
        nn.BatchNorm3d(o),
        nn.ReLU(),
        nn.Conv3d(o, o, 3, padding=1),
        nn.BatchNorm3d(o),
        nn.ReLU(),
    )


def pad_to(x: Tensor, size: torch.Size) -> Tensor:
    """Zero-pad the far side of each spatial axis, by the voxel that floor(n / 2) * 2 lost."""
    missing = [want - have for want, have in zip(size, x.shape[2:], strict=True)]
    if not any(missing):  # F.pad would copy
        return x
    return F.pad(x, [amount for last in missing[::-1] for amount in (0, last)])


@register(
    "patchwise_unet3d",
    summary="U-Net with batch normalisation for whole volumes, slabs and cascades",
    paper="Wehen, bachelor's thesis, Hasso Plattner Institute, 2023",
    input_shape=(1, 4, 240, 240, 155),
    small_shape=(1, 4, 32, 32, 32),
    parameters=22_583_908,
)
class UNet3d(nn.Module):
    """A 3D U-Net for sizes of any kind, so also for slabs: what pooling loses is padded back.

    Shape:
        input (N, in_channels, H, W, D), each spatial size at least 16. In the thesis brain
        (1, 4, 240, 240, 155) and liver (1, 1, 512, 512, about 450), in slabs (..., 16).
        output (N, out_channels, H, W, D): logits; the softmax is left to the loss.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        *,
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
    ) -> None:
        """Build the network.

        Args:
            in_channels: Brain 4, liver 1; in the second stage of a cascade 8 and 4.
            out_channels: Classes, background included: brain 4, liver 3.
            widths: Channels of the five levels, fine to coarse.
        """
        super().__init__()
        *fine, coarsest = widths
        self.pool = nn.MaxPool3d(2)
        self.encoder = nn.ModuleList(
            double_conv(i, o) for i, o in zip([in_channels, *fine], fine, strict=False)
        )
        self.bottom = double_conv(fine[-1], coarsest)
        # coarse to fine, as they run
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(i, o, kernel_size=2, stride=2)
            for i, o in zip(widths[:0:-1], fine[::-1], strict=True)
        )
        self.decoder = nn.ModuleList(double_conv(2 * o, o) for o in fine[::-1])
        self.head = nn.Conv3d(widths[0], out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the input's size."""
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = block(torch.cat([skip, pad_to(up(x), skip.shape[2:])], 1))
        logits: Tensor = self.head(x)
        return logits
