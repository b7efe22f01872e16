"""Every number that the papers (or their reproduction) give for the size of a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pocketize import zoo
from pocketize.zoo.complexity import conv_weights

PARAMETERS: list[tuple[str, dict[str, Any], int]] = [
    # LiTS, 1 in, 1 out
    ("pocketnet_unet2d", {}, 544_081),
    ("pocketnet_unet2d", {"pocket": True}, 36_433),
    ("pocketnet_resnet2d", {}, 544_081),
    ("pocketnet_resnet2d", {"pocket": True}, 36_433),
    ("pocketnet_densenet2d", {}, 625_841),
    ("pocketnet_densenet2d", {"pocket": True}, 41_921),
    # NFBS, 1 in, 2 out
    ("pocketnet_unet3d", {}, 5_470_850),
    ("pocketnet_unet3d", {"pocket": True}, 150_066),
    ("pocketnet_resnet3d", {}, 5_470_850),
    ("pocketnet_resnet3d", {"pocket": True}, 150_066),
    ("pocketnet_densenet3d", {}, 8_127_266),
    ("pocketnet_densenet3d", {"pocket": True}, 241_282),
    # BraTS, 4 in, 2 out
    ("pocketnet_unet3d", {"in_channels": 4}, 5_472_146),
    ("pocketnet_unet3d", {"in_channels": 4, "pocket": True}, 151_362),
    ("pocketnet_resnet3d", {"in_channels": 4}, 5_472_146),
    ("pocketnet_resnet3d", {"in_channels": 4, "pocket": True}, 151_362),
    ("pocketnet_densenet3d", {"in_channels": 4}, 8_129_906),
    ("pocketnet_densenet3d", {"in_channels": 4, "pocket": True}, 243_922),
    # COVIDx8B, 1 in, 2 classes
    ("pocketnet_encoder2d", {}, 1_178_994),
    ("pocketnet_encoder2d", {"pocket": True}, 21_074),
    # brain, its second stage, liver, its second stage
    ("patchwise_unet3d", {}, 22_583_908),
    ("patchwise_unet3d", {"in_channels": 8}, 22_587_364),
    ("patchwise_unet3d", {"in_channels": 1, "out_channels": 3}, 22_581_283),
    ("patchwise_unet3d", {"in_channels": 4, "out_channels": 3}, 22_583_875),
    # memory-efficient FCN
    ("memory_fcn3d", {}, 9_522_339),
    ("memory_fcn3d_bottleneck", {}, 3_216_467),
    ("memory_fcn3d_separable", {}, 2_784_094),
    ("memory_fcn3d_separable", {"per_level": 1}, 2_682_142),
    ("memory_fcn3d_compact", {}, 2_635_427),
]


@pytest.mark.parametrize(("name", "options", "expected"), PARAMETERS)
def test_parameters_are_exactly_the_papers(
    name: str, options: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):  # sizes only
        model = zoo.build(name, **options)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_described_count_is_the_count_at_default_options() -> None:
    described = {name: zoo.describe(name).parameters for name in zoo.list_models()}
    at_defaults = {name: expected for name, options, expected in PARAMETERS if not options}
    assert {name: n for name, n in described.items() if n is not None} == at_defaults


@pytest.mark.parametrize(
    ("widths", "theta"),
    [
        ((64, 128, 256, 512, 1024), 31_023_744),
        ((4, 8, 16, 32, 65), 122_801),
        ((20, 19, 25, 29, 33), 123_154),
        ((30, 60, 120, 240, 480), 6_816_900),
        ((30, 39, 59, 85, 119), 842_134),
    ],
)
@pytest.mark.parametrize("norm", [True, False])
def test_theta_of_every_planned_unet(widths: tuple[int, ...], theta: int, norm: bool) -> None:
    assert conv_weights(zoo.build("complexity_unet2d", widths=widths, norm=norm)) == theta


def test_theta_counts_shared_weights_once_and_nothing_but_convolutions() -> None:
    conv = nn.Conv2d(2, 3, 3)
    twin = nn.Conv2d(2, 3, 3)
    twin.weight = conv.weight
    model = nn.Sequential(
        conv, twin, nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 5, 2), nn.Linear(5, 7)
    )
    assert conv_weights(model) == 2 * 3 * 9 + 3 * 5 * 4
