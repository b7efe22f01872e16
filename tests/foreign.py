"""Other people's networks that can be installed: MONAI's and nnU-Net's, small but real.

The channel counts double as their owners' do; the spatial sizes are small, and there are no more
levels than it takes to have each kind of level. ``foreign_nets()`` lists them like
``tests.models.nets()`` lists the awkward ones.
"""

from __future__ import annotations

from typing import Any

import monai.networks.nets as monai
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from tests.models.registry import Table, image

__all__ = ["foreign_nets"]

_TABLE = Table()
foreign_nets = _TABLE.nets


def _add(name: str, factory: Any, shape: tuple[int, ...], tags: str, **expects: Any) -> None:
    _TABLE.register(name, factory, f"foreign {tags}", inputs=image(*shape), **expects)


def _monai(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    options: dict[str, Any],
    tags: str = "",
    **more: Any,
) -> None:
    _add(name, lambda: getattr(monai, kind)(**options), shape, f"monai {tags}", **more)


_IMAGE, _VOLUME = (2, 1, 32, 32), (1, 1, 16, 16, 16)

_monai(
    "monai_unet_2d",
    "UNet",
    _IMAGE,
    {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 3,
        "channels": (8, 16, 32, 64),
        "strides": (2, 2, 2),
    },
    width=8,
    movable=["model.1.submodule.0.conv", "model.1.submodule.1.submodule.0.conv"],
    frozen={"model.2.conv": "output"},
)
_monai(
    "monai_unet_3d_residual",
    "UNet",
    _VOLUME,
    {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "channels": (8, 16, 32),
        "strides": (2, 2),
        "num_res_units": 2,
        "norm": "BATCH",
        "dropout": 0.1,
    },
    width=8,
    movable=["model.1.submodule.0.conv.unit0.conv", "model.1.submodule.0.residual"],
)
_monai(
    "monai_basic_unet",
    "BasicUNet",
    (1, 1, 16, 16, 32),
    {"spatial_dims": 3, "features": (8, 8, 16, 32, 64, 8)},
    width=8,
    movable=["down_2.convs.conv_0.conv", "upcat_3.upsample.deconv"],
    frozen={"final_conv": "output"},
)
_monai(
    "monai_basic_unet_plus_plus",
    "BasicUnetPlusPlus",
    _IMAGE,
    {"spatial_dims": 2, "features": (8, 16, 32, 64, 128, 8), "deep_supervision": True},
    width=8,
    movable=["conv_1_0.convs.conv_0.conv", "upcat_1_1.convs.conv_0.conv"],
)
_monai(
    "monai_basic_unet_plus_plus_upsample",
    "BasicUnetPlusPlus",
    _IMAGE,
    {
        "spatial_dims": 2,
        "features": (8, 16, 32, 64, 128, 8),
        "upsample": "pixelshuffle",
        "norm": ("group", {"num_groups": 4}),
    },
    width=8,
    movable=["conv_1_0.convs.conv_0.conv"],
)
_DYNUNET: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
    "filters": [8, 16, 32],
}
_monai(
    "monai_dynunet_residual_deep_supervision",
    "DynUNet",
    (1, 1, 16, 16, 16),
    {**_DYNUNET, "deep_supervision": True, "deep_supr_num": 1, "res_block": True},
    width=8,
    movable=["downsamples.0.conv1.conv", "bottleneck.conv1.conv", "upsamples.0.transp_conv.conv"],
)
_monai(
    "monai_dynunet_plain",
    "DynUNet",
    (1, 1, 16, 16, 16),
    {**_DYNUNET, "dropout": 0.2},
    width=8,
    movable=["downsamples.0.conv1.conv", "bottleneck.conv1.conv"],
)
_monai(
    "monai_segresnet",
    "SegResNet",
    (1, 2, 8, 8, 8),
    {"in_channels": 2, "init_filters": 8, "blocks_down": (1, 2), "blocks_up": (1,)},
    width=8,
    movable=["down_layers.1.0.conv"],
)
_monai(
    "monai_segresnet_deconv_dropout",
    "SegResNet",
    _IMAGE,
    {
        "spatial_dims": 2,
        "init_filters": 16,
        "blocks_down": (1, 1),
        "blocks_up": (1,),
        "dropout_prob": 0.2,
        "upsample_mode": "deconv",
    },
    width=8,
    movable=["convInit.conv"],
)
_monai(
    "monai_segresnet_ds",
    "SegResNetDS",
    (1, 1, 16, 16, 16),
    {"init_filters": 8, "blocks_down": (1, 1, 1), "dsdepth": 2, "norm": "instance"},
    width=8,
    movable=["encoder.layers.1.blocks.0.conv1"],
)
_monai(
    "monai_attention_unet",
    "AttentionUnet",
    _IMAGE,
    {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "channels": (8, 16, 32),
        "strides": (2, 2),
    },
    width=8,
)
_monai(
    "monai_vnet",
    "VNet",
    _IMAGE,
    {"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
    tags="slow",
    width=16,
    movable=["down_tr64.down_conv", "up_tr128.up_conv"],
)
_monai(
    "monai_unetr",
    "UNETR",
    _IMAGE,
    {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": (32, 32),
        "spatial_dims": 2,
        "feature_size": 8,
        "hidden_size": 48,
        "mlp_dim": 96,
        "num_heads": 4,
        "norm_name": "batch",
    },
    tags="slow",
    width=8,
    movable=["decoder4.conv_block.conv1.conv"],
)
_monai(
    "monai_mednext",
    "MedNeXt",
    _IMAGE,
    {
        "init_filters": 8,
        "spatial_dims": 2,
        "kernel_size": 3,
        "blocks_down": (1, 1, 1, 1),
        "blocks_bottleneck": 1,
        "blocks_up": (1, 1, 1, 1),
        "deep_supervision": True,
        "use_residual_connection": True,
        "global_resp_norm": True,
    },
    width=8,
)
_monai(
    "monai_highresnet",
    "HighResNet",
    (2, 1, 8, 8, 8),
    {
        "layer_params": (
            {"name": "conv_0", "n_features": 8, "kernel_size": 3},
            {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
            {"name": "res_2", "n_features": 16, "kernels": (3, 3), "repeat": 2},
            {"name": "conv_1", "n_features": 40, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
        "out_channels": 2,
        "channel_matching": "project",
    },
    width=8,
)
_monai(
    "monai_highresnet_padding",
    "HighResNet",
    (2, 1, 8, 8, 8),
    {
        "layer_params": (
            {"name": "conv_0", "n_features": 8, "kernel_size": 3},
            {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
            {"name": "res_2", "n_features": 16, "kernels": (3, 3), "repeat": 1},
            {"name": "conv_1", "n_features": 40, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
        "channel_matching": "pad",
    },
    width=8,
)
_monai(
    "monai_flexible_unet",
    "FlexibleUNet",
    (2, 3, 32, 32),
    {
        "in_channels": 3,
        "out_channels": 2,
        "backbone": "efficientnet-b0",
        "pretrained": False,
        "decoder_channels": (64, 32, 16, 16, 8),
    },
    tags="slow",
    width=16,
)
_monai(
    "monai_flexible_unet_resnet",
    "FlexibleUNet",
    (2, 1, 32, 32),
    {"in_channels": 1, "out_channels": 2, "backbone": "resnet18", "pretrained": False},
    tags="slow",
    width=64,
)
_monai(
    "monai_swin_unetr",
    "SwinUNETR",
    (1, 1, 64, 64),
    {
        "in_channels": 1,
        "out_channels": 2,
        "spatial_dims": 2,
        "feature_size": 12,
        "window_size": 4,
        "depths": (2, 1, 1, 1),
        "num_heads": (2, 2, 4, 4),
    },
    tags="slow",
    width=12,
)
_monai(
    "monai_densenet",
    "DenseNet",
    (2, 1, 32, 32),
    {
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 3,
        "init_features": 16,
        "growth_rate": 8,
        "block_config": (2, 2, 2),
    },
    width=8,
)


def _nnunet(kind: Any, shape: tuple[int, ...], deep: bool, **more: Any) -> nn.Module:
    three = len(shape) == 5
    features = (8, 16, 32)
    return kind(  # type: ignore[no-any-return]
        input_channels=shape[1],
        n_stages=3,
        features_per_stage=features,
        conv_op=nn.Conv3d if three else nn.Conv2d,
        kernel_sizes=3,
        strides=(1, 2, 2),
        num_classes=3,
        n_conv_per_stage_decoder=(2, 2) if kind is PlainConvUNet else (1, 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if three else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep,
        **more,
    )


for _deep in (False, True):
    _suffix = "_deep_supervision" if _deep else ""
    _add(
        f"nnunet_plain_conv{_suffix}",
        lambda deep=_deep: _nnunet(PlainConvUNet, (1, 1, 16, 16, 16), deep, n_conv_per_stage=2),
        (1, 1, 16, 16, 16),
        "nnunet",
        width=8,
        movable=["encoder.stages.1.0.convs.0.conv", "decoder.transpconvs.0"],
    )
    _add(
        f"nnunet_residual_encoder{_suffix}",
        lambda deep=_deep: _nnunet(
            ResidualEncoderUNet, (2, 2, 32, 32), deep, n_blocks_per_stage=(1, 2, 1)
        ),
        (2, 2, 32, 32),
        "nnunet",
        width=8,
        movable=["encoder.stages.1.blocks.0.conv1.conv", "decoder.transpconvs.0"],
    )
