"""A memory-efficient FCN: a 3D U-Net whose encoder is thinned out, block by block.

Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN", SPIE
Medical Imaging 2020. The paper's figures do not give the widths. This is the network that fits its
counts (to 0.1 M) and its memory best. Only the encoder's blocks differ between the variants; the
paper's in-place batch normalisation and mixed precision are rewrites, not networks.
"""

from __future__ import annotations

__all__ = ["MemoryFCN3d"]

from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from pocketize.zoo.patchwise import pad_to
from pocketize.zoo.registry import ModelOptionError, register


def conv_norm_relu(i: int, o: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias, batch normalisation and ReLU, from i to o channels."""
    return nn.Sequential(
        nn.Conv3d(i, o, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm3d(o),
        nn.ReLU(),
    )


def bottleneck(i: int, o: int, reduction: int) -> nn.Sequential:
    """1x1x1 down to o/K, 3x3x3, 1x1x1 up to o."""
    inner = max(1, o // reduction)
    return nn.Sequential(
        conv_norm_relu(i, inner, kernel=1),
        conv_norm_relu(inner, inner),
        conv_norm_relu(inner, o, kernel=1),
    )


def separable(i: int, o: int) -> nn.Sequential:
    """Depthwise 3x3x3, then pointwise; one normalisation, at the end."""
    return nn.Sequential(
        nn.Conv3d(i, i, 3, padding=1, groups=i, bias=False),
        conv_norm_relu(i, o, kernel=1),
    )


def compact(i: int, o: int, reduction: int) -> nn.Sequential:
    """The compact conv block (CCBlock): 1x1x1 down to o/K, depthwise 3x3x3, 1x1x1 up to o."""
    inner = max(1, o // reduction)
    return nn.Sequential(
        conv_norm_relu(i, inner, kernel=1),
        conv_norm_relu(inner, inner, groups=inner),
        conv_norm_relu(inner, o, kernel=1),
    )


def encoder_block(kind: str, i: int, o: int, reduction: int) -> nn.Sequential:
    """Return the block called "conv", "bottleneck", "separable" or "compact"."""
    if kind == "conv":
        return conv_norm_relu(i, o)
    if kind == "bottleneck":
        return bottleneck(i, o, reduction)
    if kind == "separable":
        return separable(i, o)
    if kind == "compact":
        return compact(i, o, reduction)
    raise ModelOptionError(
        f"MemoryFCN3d: block is 'conv', 'bottleneck', 'separable' or 'compact'; got {kind!r}."
    )


fcn = partial(
    register,
    paper="Wang, Oda, Mori, Organ Segmentation From Full-size CT Images Using Memory-Efficient "
    "FCN, SPIE Medical Imaging, 2020",
    input_shape=(1, 1, 256, 256, 152),
    small_shape=(1, 1, 32, 32, 32),
)


@fcn(
    "memory_fcn3d",
    summary="baseline: additive U-Net with two convolutions per encoder level",
    parameters=9_522_339,
    fixed={"block": "conv", "per_level": 2, "reduction": 1},
)
@fcn(
    "memory_fcn3d_bottleneck",
    summary="the baseline with one bottleneck per encoder level",
    parameters=3_216_467,
    fixed={"block": "bottleneck", "per_level": 1},
)
@fcn(
    "memory_fcn3d_separable",
    summary="the baseline with depthwise separable convolutions in the encoder",
    parameters=2_784_094,
    fixed={"block": "separable", "reduction": 1},
)
@fcn(
    "memory_fcn3d_compact",
    summary="the baseline with one compact conv block (CCBlock) per encoder level",
    parameters=2_635_427,
    fixed={"block": "compact", "per_level": 1},
)
class MemoryFCN3d(nn.Module):
    """A 3D U-Net that adds its skip connections, with a choice of encoder blocks.

    Shape:
        input (N, in_channels, H, W, D), each spatial size at least 8; the paper trains on
        (1, 1, 256, 256, 45 to 234). How it brings odd sizes back is not said; here zeros take the
        place of the voxel that pooling lost.
        output (N, out_channels, H, W, D): logits; the softmax is left to the loss.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 3,
        block: str = "conv",
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        per_level: int = 2,
        reduction: int = 4,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the image.
            out_channels: Classes, background included.
            block: "conv", "bottleneck", "separable" or "compact", in the encoder.
            widths: Channels of the four levels, fine to coarse.
            per_level: Encoder blocks per level: 2, the first of which goes to
                max(width / 2, channels so far), or 1.
            reduction: K, by which bottleneck and compact block divide their width inside.

        Raises:
            ModelOptionError: There is no such block, or `per_level` is neither 1 nor 2.
        """
        super().__init__()
        if per_level not in (1, 2):
            raise ModelOptionError(f"MemoryFCN3d: per_level is 1 or 2; got {per_level!r}.")
        self.pool = nn.MaxPool3d(2)
        self.encoder = nn.ModuleList()
        i = in_channels
        for o in widths:
            # half of the width at the first level only: from then on i is o / 2
            steps = [i, max(o // 2, i), o] if per_level == 2 else [i, o]
            blocks = [encoder_block(block, a, b, reduction) for a, b in pairwise(steps)]
            self.encoder.append(nn.Sequential(*blocks))
            i = o
        # coarse to fine, as they run; a 1x1x1 kernel at stride 2 fills every eighth voxel
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(i, o, kernel_size=1, stride=2, output_padding=1)
            for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.decoder = nn.ModuleList(conv_norm_relu(o, o) for o in widths[-2::-1])
        self.head = nn.Conv3d(widths[0], out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the input's size."""
        skips = []
        *fine, coarsest = self.encoder
        for level in fine:
            x = level(x)
            skips.append(x)
            x = self.pool(x)
        x = coarsest(x)
        for up, conv in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            x = conv(pad_to(up(x), skip.shape[2:]) + skip)
        logits: Tensor = self.head(x)
        return logits
