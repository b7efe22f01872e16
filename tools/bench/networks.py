"""The test networks' architectures at the widths their owners publish them with.

The networks of ``tests/foreign.py`` are narrow, so that the suite is quick. How long a rewrite
takes depends on the number of operators, and a pruner's time on the number of channels too: a
comparison needs both sizes.
"""

from __future__ import annotations

from typing import Any

import monai.networks.nets as monai
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from tests.models.registry import Table, image

__all__ = ["published_nets"]

_TABLE = Table()
published_nets = _TABLE.nets

_VOLUME = (1, 1, 32, 32, 32)
_IMAGE = (1, 3, 64, 64)
_THREE_D = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}


def _add(kind: str, shape: tuple[int, ...], **options: Any) -> None:
    # Weights do not matter to the time, and nobody may be made to download any.
    _TABLE.register(
        f"{kind}{_variant(options)}",
        lambda: getattr(monai, kind)(**options),
        inputs=image(*shape),
    )


def _variant(options: dict[str, Any]) -> str:
    return f" ({options['backbone']})" if "backbone" in options else ""


_add("UNet", _VOLUME, **_THREE_D, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2))
_add("BasicUNet", _VOLUME, **_THREE_D)
_add("BasicUNetPlusPlus", _VOLUME, **_THREE_D)
_add("SegResNet", _VOLUME, **_THREE_D, init_filters=32, blocks_down=(1, 2, 2, 4))
_add("SegResNetDS", _VOLUME, **_THREE_D, init_filters=32)
_add("AttentionUnet", _VOLUME, **_THREE_D, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2))
_add("VNet", _VOLUME, in_channels=1, out_channels=2)
_add("HighResNet", _VOLUME, spatial_dims=3, in_channels=1, out_channels=2)
_add("MedNeXt", _VOLUME, **_THREE_D, init_filters=32)
_add("UNETR", (1, 1, 96, 96, 96), in_channels=1, out_channels=2, img_size=(96, 96, 96))
_add("SwinUNETR", (1, 1, 64, 64, 64), in_channels=1, out_channels=2, feature_size=24)
_add("FlexibleUNet", _IMAGE, in_channels=3, out_channels=2, backbone="efficientnet-b4")
_add("FlexibleUNet", _IMAGE, in_channels=3, out_channels=2, backbone="resnet34")
_add("DenseNet121", _IMAGE, spatial_dims=2, in_channels=3, out_channels=2)
_add(
    "DynUNet",
    (1, 1, 64, 64, 64),
    **_THREE_D,
    kernel_size=[3] * 6,
    strides=[1, 2, 2, 2, 2, 2],
    upsample_kernel_size=[2] * 5,
)


def _nnunet(kind: type[nn.Module], blocks: str, encoder: Any) -> nn.Module:
    return kind(
        input_channels=1,
        n_stages=6,
        features_per_stage=(32, 64, 128, 256, 320, 320),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=(1, 2, 2, 2, 2, 2),
        num_classes=3,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
        n_conv_per_stage_decoder=2 if kind is PlainConvUNet else 1,
        **{blocks: encoder},
    )


_TABLE.register(
    "nnU-Net PlainConvUNet",
    lambda: _nnunet(PlainConvUNet, "n_conv_per_stage", 2),
    inputs=image(1, 1, 64, 64, 64),
)
_TABLE.register(
    "nnU-Net ResidualEncoderUNet",
    lambda: _nnunet(ResidualEncoderUNet, "n_blocks_per_stage", (1, 3, 4, 6, 6, 6)),
    inputs=image(1, 1, 64, 64, 64),
)
