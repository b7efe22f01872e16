"""The three networks whose widths are planned from the complexity of the images.

Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image Segmentation",
ACM JETC 2021. All three take their `widths` level by level, as the paper's plans give them, and
return logits. Sizes of networks are told as theta: `conv_weights`. The paper's text fixes the U-Net
to the last weight; CUMedVision and UCU-Net it only draws, so these two follow the drawing and are
checked against no number. Batch normalisation, of which theta knows nothing, is an option.
"""

from __future__ import annotations

__all__ = ["CUMedVision2d", "UCUNet2d", "UNet2d", "conv_weights"]

from functools import partial, reduce

import torch
from torch import Tensor, nn

from pocketize.zoo.registry import register

mishra = partial(
    register,
    paper="Mishra, Chen, Hu, Image Complexity Guided Network Compression for Biomedical Image "
    "Segmentation, ACM Journal on Emerging Technologies in Computing Systems, 2021",
    input_shape=(1, 1, 256, 256),
    small_shape=(1, 1, 64, 64),
)

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def conv_weights(model: nn.Module) -> int:
    """Return the paper's theta: the number of weights of all convolutions, transposed ones too.

    Biases and normalisation do not count, and a weight that several layers share counts once.
    """
    weights = {layer.weight for layer in model.modules() if isinstance(layer, CONVOLUTIONS)}
    return sum(weight.numel() for weight in weights)


def conv_block(i: int, o: int, convs: int, norm: bool) -> nn.Sequential:
    """Return some 3x3 convolutions, each with a ReLU behind it, from i to o channels."""
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers.append(nn.Conv2d(i, o, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(o))
        layers.append(nn.ReLU())
        i = o
    return nn.Sequential(*layers)


class Head(nn.Module):
    """Logits at full size from a coarser level: 1x1 convolution, then transposed convolution."""

    def __init__(self, width: int, out_channels: int, stride: int) -> None:
        """Read `width` channels at 1 / `stride` of the full size; the stride is even."""
        super().__init__()
        self.score = nn.Conv2d(width, out_channels, kernel_size=1)
        self.up = nn.ConvTranspose2d(
            out_channels, out_channels, kernel_size=2 * stride, stride=stride, padding=stride // 2
        )

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """Take (N, width, h, w) to (N, out_channels, *size), where h = floor(size / stride)."""
        logits: Tensor = self.up(self.score(x), output_size=size)
        return logits


class _UNetLayers2d(nn.Module):
    """Encoder and decoder of the U-Net, for the two networks that have them."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], norm: bool) -> None:
        super().__init__()
        *fine, coarsest = widths
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(
            conv_block(i, o, 2, norm) for i, o in zip([in_channels, *fine], fine, strict=False)
        )
        self.bottom = conv_block(fine[-1], coarsest, 2, norm)
        # coarse to fine, as they run
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, kernel_size=2, stride=2)
            for i, o in zip(widths[:0:-1], fine[::-1], strict=True)
        )
        self.decoder = nn.ModuleList(conv_block(2 * o, o, 2, norm) for o in fine[::-1])

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the encoder's output at every level, the bottom last."""
        levels = []
        for block in self.encoder:
            levels.append(block(x))
            x = self.pool(levels[-1])
        return [*levels, self.bottom(x)]


@mishra("complexity_unet2d", summary="U-Net whose widths are free, level by level")
class UNet2d(_UNetLayers2d):
    """The U-Net: two 3x3 convolutions per level, transposed convolutions to the level's width.

    Shape:
        input (N, in_channels, H, W), H and W at least 16.
        output (N, out_channels, H, W): logits. Where a pooling lost a row, the transposed
        convolution gives it back, by `output_size`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512, 1024),
        norm: bool = True,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the image.
            out_channels: Maps of logits.
            widths: Channels of the five levels, fine to coarse; the decoder mirrors the encoder.
            norm: Batch normalisation between convolution and ReLU.
        """
        super().__init__(in_channels, widths, norm)
        self.head = nn.Conv2d(widths[0], out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the input's size."""
        *skips, x = self.encode(x)
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = block(torch.cat([skip, up(x, output_size=skip.shape[2:])], 1))
        logits: Tensor = self.head(x)
        return logits


@mishra("complexity_ucunet2d", summary="U-Net whose coarser decoder levels add logits of their own")
class UCUNet2d(_UNetLayers2d):
    """UCU-Net: a U-Net with CUMedVision's heads on the three coarser levels of its decoder.

    Shape:
        input (N, in_channels, H, W), H and W at least 16.
        output (N, out_channels, H, W): logits, the sum of the U-Net's own and the three heads'.
        In train mode a tuple of four such tensors: the sum, and the heads' logits from coarse to
        fine for auxiliary losses.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512, 1024),
        norm: bool = True,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the image.
            out_channels: Maps of logits.
            widths: Channels of the five levels, fine to coarse; the decoder mirrors the encoder.
            norm: Batch normalisation between convolution and ReLU.
        """
        super().__init__(in_channels, widths, norm)
        self.heads = nn.ModuleList(
            Head(width, out_channels, stride)
            for width, stride in zip(widths[3:0:-1], (8, 4, 2), strict=True)
        )
        self.head = nn.Conv2d(widths[0], out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits of the input's size; in train mode the auxiliary ones as well."""
        size = x.shape[2:]
        *skips, x = self.encode(x)
        auxiliary = []
        for level, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            skip = skips.pop()
            x = block(torch.cat([skip, up(x, output_size=skip.shape[2:])], 1))
            if level < len(self.heads):
                auxiliary.append(self.heads[level](x, size))
        logits: Tensor = reduce(torch.add, auxiliary, self.head(x))
        return (logits, *auxiliary) if self.training else logits


@mishra("complexity_cumedvision2d", summary="encoder with summed heads at three scales")
class CUMedVision2d(nn.Module):
    """CUMedVision: no decoder; heads at 1/2, 1/4 and 1/8 of the size, whose logits are summed.

    Shape:
        input (N, in_channels, H, W), H and W at least 8.
        output (N, out_channels, H, W): logits. In train mode a tuple of four such tensors: the
        sum, and the heads' logits from fine to coarse for auxiliary losses.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        norm: bool = True,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the image.
            out_channels: Maps of logits.
            widths: Channels of the four levels, fine to coarse.
            norm: Batch normalisation between convolution and ReLU.
        """
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(
            conv_block(i, o, convs, norm)
            for i, o, convs in zip([in_channels, *widths[:-1]], widths, (2, 2, 3, 3), strict=True)
        )
        self.heads = nn.ModuleList(
            Head(width, out_channels, stride)
            for width, stride in zip(widths[1:], (2, 4, 8), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits of the input's size; in train mode the auxiliary ones as well."""
        size = x.shape[2:]
        first, *others = self.encoder
        x = first(x)
        auxiliary = []
        for block, head in zip(others, self.heads, strict=True):
            x = block(self.pool(x))
            auxiliary.append(head(x, size))
        logits = reduce(torch.add, auxiliary)
        return (logits, *auxiliary) if self.training else logits
