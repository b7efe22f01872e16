"""PocketNet: a network's width need never pass that of its finest resolution.

Celaya et al., "PocketNet: A Smaller Neural Network for Medical Image Analysis", IEEE TMI 2022.
Each network comes in its usual form, where every pooling doubles the number of channels, and as
its pocket net, where none does (``pocket=True``). With C convolutions of k^n weights a level and D
poolings, the first has C k^n c_in c_out (4^(D+1) - 1) / 3 weights, the second
C k^n c_in c_out (D + 1). (The paper sums D + 1 levels, but writes D in its equations 2 and 3.)

There is no normalisation, every convolution has a bias, and all networks return *logits*: the
paper's softmax or sigmoid is left to the loss.
"""

from __future__ import annotations

__all__ = ["PocketEncoder2d", "PocketNet2d", "PocketNet3d"]

from functools import partial

import torch
from torch import Tensor, nn

from pocketize.zoo.registry import ModelOptionError, register

PAPER = (
    "Celaya et al., PocketNet: A Smaller Neural Network for Medical Image Analysis, "
    "IEEE Transactions on Medical Imaging, 2022"
)


def conv_relu(dims: int, i: int, o: int, kernel: int = 3) -> nn.Sequential:
    """Return a size-preserving convolution with bias from i to o channels, and a ReLU."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    return nn.Sequential(conv(i, o, kernel, padding=kernel // 2), nn.ReLU())


def unet_block(dims: int, i: int, o: int) -> nn.Sequential:
    """Return the U-Net block of all the paper's networks: twice a 3x3 convolution and a ReLU."""
    return nn.Sequential(conv_relu(dims, i, o), conv_relu(dims, o, o))


# --- 3D: NFBS and BraTS ---------------------------------------------------------------------------


class ResNetBlock3d(nn.Module):
    """a = relu(conv(x)); return a + relu(conv(a)). The sum starts after the change of width."""

    def __init__(self, i: int, o: int) -> None:
        """Take i channels to o."""
        super().__init__()
        self.conv1 = conv_relu(3, i, o)
        self.conv2 = conv_relu(3, o, o)

    def forward(self, x: Tensor) -> Tensor:
        """Take (N, i, D, H, W) to (N, o, D, H, W)."""
        a = self.conv1(x)
        total: Tensor = a + self.conv2(a)
        return total


class DenseBlock3d(nn.Module):
    """Each convolution sees all that came before it; a 1x1x1 convolution brings them together."""

    def __init__(self, i: int, o: int) -> None:
        """Take i channels to o."""
        super().__init__()
        self.conv1 = conv_relu(3, i, o)
        self.conv2 = conv_relu(3, i + o, o)
        self.merge = conv_relu(3, i + 2 * o, o, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Take (N, i, D, H, W) to (N, o, D, H, W)."""
        seen = torch.cat([x, self.conv1(x)], 1)
        seen = torch.cat([seen, self.conv2(seen)], 1)
        merged: Tensor = self.merge(seen)
        return merged


def block3d(kind: str, i: int, o: int) -> nn.Module:
    """Return the 3D block called "unet", "resnet" or "dense", from i to o channels."""
    if kind == "unet":
        return unet_block(3, i, o)
    if kind == "resnet":
        return ResNetBlock3d(i, o)
    if kind == "dense":
        return DenseBlock3d(i, o)
    raise ModelOptionError(f"PocketNet: block is 'unet', 'resnet' or 'dense'; got {kind!r}.")


nfbs = partial(
    register, paper=PAPER, input_shape=(1, 1, 5, 240, 240), small_shape=(1, 1, 5, 64, 64)
)


@nfbs(
    "pocketnet_unet3d",
    summary="U-Net for NFBS and BraTS volumes, full or pocket",
    parameters=5_470_850,
    fixed={"block": "unet"},
)
@nfbs(
    "pocketnet_resnet3d",
    summary="U-Net of residual blocks for NFBS and BraTS volumes, full or pocket",
    parameters=5_470_850,
    fixed={"block": "resnet"},
)
@nfbs(
    "pocketnet_densenet3d",
    summary="U-Net of dense blocks for NFBS and BraTS volumes, full or pocket",
    parameters=8_127_266,
    fixed={"block": "dense"},
)
class PocketNet3d(nn.Module):
    """The 3D U-Net for NFBS and BraTS, which keeps the resolution of its first spatial axis.

    Full and pocket form have the same state_dict keys; only shapes differ.

    Shape:
        input (N, in_channels, D, H, W), e.g. (1, 4, 5, 240, 240): D is any, H and W are at least
        2^depth. The paper's sizes are multiples of 2^depth; for others the transposed convolutions
        give the size of the skip connection, as `output_size` makes them.
        output (N, out_channels, D, H, W): logits.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        block: str = "unet",
        *,
        pocket: bool = False,
        width: int = 16,
        depth: int = 4,
    ) -> None:
        """Build the network.

        Args:
            in_channels: 1 for NFBS, 4 for BraTS.
            out_channels: Classes, background included.
            block: "unet", "resnet" or "dense".
            pocket: Keep `width` channels at every level, instead of doubling them.
            width: Channels of the finest level.
            depth: Number of poolings.

        Raises:
            ModelOptionError: There is no such block.
        """
        super().__init__()
        widths = [width if pocket else width * 2**level for level in range(depth + 1)]
        *fine, coarsest = widths
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.encoder = nn.ModuleList(
            block3d(block, i, o) for i, o in zip([in_channels, *fine], fine, strict=False)
        )
        self.bottom = block3d(block, fine[-1], coarsest)
        # coarse to fine, as they run
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(i, o, kernel_size=(1, 2, 2), stride=(1, 2, 2))
            for i, o in zip(widths[:0:-1], fine[::-1], strict=True)
        )
        self.decoder = nn.ModuleList(block3d(block, 2 * o, o) for o in fine[::-1])
        self.head = nn.Conv3d(width, out_channels, kernel_size=1)

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
            x = block(torch.cat([skip, up(x, output_size=skip.shape[2:])], 1))
        logits: Tensor = self.head(x)
        return logits


# --- 2D: LiTS -------------------------------------------------------------------------------------


class ResNetBlock2d(nn.Module):
    """x = x + relu(conv(x)), twice."""

    def __init__(self, width: int) -> None:
        """Keep the number of channels."""
        super().__init__()
        self.conv1 = conv_relu(2, width, width)
        self.conv2 = conv_relu(2, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Take (N, width, H, W) to the same shape."""
        x = x + self.conv1(x)
        x = x + self.conv2(x)
        return x  # noqa: RET504  (the paper's line, twice)


class DenseBlock2d(nn.Module):
    """A chain of two convolutions whose links are brought together by a 1x1 convolution.

    Unlike the 3D block, the second convolution sees the first only.
    """

    def __init__(self, width: int) -> None:
        """Keep the number of channels."""
        super().__init__()
        self.conv1 = conv_relu(2, width, width)
        self.conv2 = conv_relu(2, width, width)
        self.merge = conv_relu(2, 3 * width, width, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Take (N, width, H, W) to the same shape."""
        m1 = self.conv1(x)
        m2 = self.conv2(m1)
        merged: Tensor = self.merge(torch.cat([x, m1, m2], 1))
        return merged


def block2d(kind: str, width: int) -> nn.Module:
    """Return the 2D block called "unet", "resnet" or "dense", which keeps its width."""
    if kind == "unet":
        return unet_block(2, width, width)
    if kind == "resnet":
        return ResNetBlock2d(width)
    if kind == "dense":
        return DenseBlock2d(width)
    raise ModelOptionError(f"PocketNet: block is 'unet', 'resnet' or 'dense'; got {kind!r}.")


class Level2d(nn.Module):
    """level(d, f): block, widen, pool, level(d - 1), transposed convolution back to f, block."""

    def __init__(self, depth: int, width: int, block: str, pocket: bool) -> None:
        """Nest `depth` levels around a bottom of one block."""
        super().__init__()
        deeper = width if pocket else 2 * width
        self.encode = block2d(block, width)
        self.widen = nn.Identity() if pocket else nn.Conv2d(width, deeper, kernel_size=1)
        self.pool = nn.MaxPool2d(2)
        self.inner = (
            Level2d(depth - 1, deeper, block, pocket) if depth > 1 else block2d(block, deeper)
        )
        self.up = nn.ConvTranspose2d(deeper, width, kernel_size=2, stride=2)
        self.decode = block2d(block, width)

    def forward(self, x: Tensor) -> Tensor:
        """Take (N, width, H, W) to the same shape."""
        x = self.encode(x)
        deep = self.inner(self.pool(self.widen(x)))
        decoded: Tensor = self.decode(self.up(deep, output_size=x.shape[2:]))
        return decoded


lits = partial(register, paper=PAPER, input_shape=(1, 1, 256, 256), small_shape=(1, 1, 64, 64))


@lits(
    "pocketnet_unet2d",
    summary="hourglass for LiTS slices, full or pocket",
    parameters=544_081,
    fixed={"block": "unet"},
)
@lits(
    "pocketnet_resnet2d",
    summary="hourglass of residual blocks for LiTS slices, full or pocket",
    parameters=544_081,
    fixed={"block": "resnet"},
)
@lits(
    "pocketnet_densenet2d",
    summary="hourglass of densely merged blocks for LiTS slices, full or pocket",
    parameters=625_841,
    fixed={"block": "dense"},
)
class PocketNet2d(nn.Module):
    """The 2D network for LiTS: an hourglass without skips between its levels.

    Only the stem's output is brought to the end. The full form widens by a linear 1x1 convolution
    before each pooling, which the pocket form has no use for: here the state_dict keys differ.

    Shape:
        input (N, in_channels, H, W), in the paper (N, 1, 256, 256); H and W at least 2^depth.
        output (N, out_channels, H, W): logits, in the paper one map under a sigmoid.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block: str = "unet",
        *,
        pocket: bool = False,
        width: int = 16,
        depth: int = 3,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the image.
            out_channels: Maps of logits.
            block: "unet", "resnet" or "dense".
            pocket: Keep `width` channels at every level, instead of doubling them.
            width: Channels of the finest level.
            depth: Number of poolings.

        Raises:
            ModelOptionError: There is no such block.
        """
        super().__init__()
        self.stem = conv_relu(2, in_channels, width, kernel=7)
        self.levels = Level2d(depth, width, block, pocket)
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Conv2d(2 * width, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the input's size."""
        stem = self.stem(x)
        features = torch.cat([stem, self.levels(stem)], 1)
        logits: Tensor = self.head(self.dropout(features))
        return logits


# --- 2D: COVIDx8B ---------------------------------------------------------------------------------


@register(
    "pocketnet_encoder2d",
    summary="classifier for COVIDx8B radiographs: a U-Net's encoder, full or pocket",
    paper=PAPER,
    input_shape=(1, 1, 256, 256),
    small_shape=(1, 1, 64, 64),
    parameters=1_178_994,
)
class PocketEncoder2d(nn.Module):
    """The classifier for COVIDx8B: a U-Net's encoder, global max pooling, one linear layer.

    Full and pocket form have the same state_dict keys; only shapes differ.

    Shape:
        input (N, in_channels, H, W), H and W at least 2^depth.
        output (N, classes): logits.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        *,
        pocket: bool = False,
        width: int = 16,
        depth: int = 4,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the image.
            classes: Number of classes.
            pocket: Keep `width` channels at every level, instead of doubling them.
            width: Channels of the finest level.
            depth: Number of poolings.
        """
        super().__init__()
        widths = [width if pocket else width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            unet_block(2, i, o) for i, o in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.global_pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return one row of logits per image."""
        first, *others = self.encoder
        x = first(x)
        for block in others:
            x = block(self.pool(x))
        logits: Tensor = self.head(self.global_pool(x).flatten(1))
        return logits
