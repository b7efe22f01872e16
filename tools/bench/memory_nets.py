"""The networks whose training memory is compared, and what their owners would call a block."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import monai.networks.nets as monai
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from pocketize import zoo

__all__ = ["NETS", "BenchNet"]


@dataclass(frozen=True)
class BenchNet:
    """One network.

    Attributes:
        title: what the table calls it.
        build: makes it.
        blocks: patterns (fnmatch) of the paths that one would checkpoint by hand, each on its own.
        channels: of the input.
    """

    title: str
    build: Callable[[], nn.Module]
    blocks: tuple[str, ...]
    channels: int = 1

    def block_paths(self, model: nn.Module) -> list[str]:
        """Paths of the blocks; a pattern's ``*`` stands for one name.

        Raises:
            ValueError: a pattern matches no module.
        """
        paths = [path for path, _ in model.named_modules()]
        found = []
        for pattern in self.blocks:
            depth = pattern.count(".")
            matching = [p for p in fnmatch.filter(paths, pattern) if p.count(".") == depth]
            if not matching:
                raise ValueError(f"{self.title}: no module matches {pattern!r}")
            found += matching
        return found


def _dynunet(levels: int, widths: tuple[int, ...]) -> nn.Module:
    return monai.DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=widths[:levels],
    )


def _plainconv(levels: int, widths: tuple[int, ...]) -> nn.Module:
    return PlainConvUNet(
        input_channels=1,
        n_stages=levels,
        features_per_stage=widths[:levels],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (levels - 1),
        n_conv_per_stage=2,
        num_classes=2,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )


def _monai_unet() -> nn.Module:
    return monai.UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
        num_res_units=2,
    )


_WIDTHS = (32, 64, 128, 256, 320, 320)
_DYNUNET = ("input_block", "downsamples.*", "bottleneck", "upsamples.*")
_PLAINCONV = ("encoder.stages.*", "decoder.stages.*")
_MONAI_UNET = tuple(
    f"model.{'1.submodule.' * level}{part}" for level in range(4) for part in ("0", "2")
)

NETS = {
    # Four levels hold nearly all of the activations, and little else: 5.6 M parameters.
    "dynunet": BenchNet("DynUNet", lambda: _dynunet(4, _WIDTHS), _DYNUNET),
    "plainconv": BenchNet("PlainConvUNet", lambda: _plainconv(4, _WIDTHS), _PLAINCONV),
    # As nnU-Net configures them for patches of 128^3: 31 M parameters.
    "dynunet6": BenchNet("DynUNet, 6 levels", lambda: _dynunet(6, _WIDTHS), _DYNUNET),
    "plainconv6": BenchNet("PlainConvUNet, 6 levels", lambda: _plainconv(6, _WIDTHS), _PLAINCONV),
    "monai-unet": BenchNet("MONAI UNet", _monai_unet, _MONAI_UNET),
    "memory-fcn": BenchNet(
        "zoo memory_fcn3d", lambda: zoo.build("memory_fcn3d"), ("encoder.*", "decoder.*")
    ),
    "patchwise": BenchNet(
        "zoo patchwise_unet3d",
        lambda: zoo.build("patchwise_unet3d"),
        ("encoder.*", "bottom", "decoder.*"),
        channels=4,
    ),
}
"""By the name that the command line takes."""
