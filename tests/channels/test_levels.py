"""Levels and sides are read from the graph: whatever the sizes and the names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.networks.nets import BasicUNetPlusPlus, DynUNet, MedNeXt, SwinUNETR, UNet
from torch import Tensor, nn

from pocketize import zoo
from pocketize.channels.analysis import analyse
from pocketize.channels.levels import Level, find_levels, find_sides
from pocketize.graph.capture import capture


def _levels(model: nn.Module, shape: str) -> tuple[Level, ...]:
    return find_levels(analyse(model, shape))


def _shown(levels: tuple[Level, ...]) -> list[tuple[str, int]]:
    return [(str(level), len(level.groups)) for level in levels]


def _dynunet() -> nn.Module:
    return DynUNet(3, 1, 2, [3, 3, 3], [1, (1, 2, 2), 2], [(1, 2, 2), 2], filters=[4, 8, 16])


def _plain() -> nn.Module:
    return PlainConvUNet(
        1,
        3,
        [4, 8, 16],
        nn.Conv2d,
        3,
        [1, 2, 2],
        2,
        2,
        2,
        norm_op=nn.InstanceNorm2d,
        nonlin=nn.LeakyReLU,
    )


FOREIGN: list[tuple[str, Any, str, list[str]]] = [
    ("zoo", lambda: zoo.build("complexity_unet2d"), "1x1x32x32", ["32x32", "16x16", "8x8"]),
    ("DynUNet", _dynunet, "1x1x8x16x16", ["8x16x16", "8x8x8", "4x4x4"]),
    ("PlainConvUNet", _plain, "1x1x16x16", ["16x16", "8x8", "4x4"]),
    ("UNet", lambda: UNet(2, 1, 2, (4, 8, 16), (2, 2)), "1x1x32x32", ["32x32", "16x16", "8x8"]),
    (
        "UNet++ of pixel shuffles",
        lambda: BasicUNetPlusPlus(2, 1, 2, (8, 8, 8, 8, 8, 8), upsample="pixelshuffle"),
        "1x1x32x32",
        ["32x32", "16x16", "8x8"],
    ),
    (
        "transposed convolutions that lose a row",
        lambda: MedNeXt(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1, 1)),
        "1x1x32x32",
        ["32x32", "16x16", "8x8"],
    ),
    (
        "windows and tokens",
        lambda: SwinUNETR(1, 2, feature_size=12, spatial_dims=2, patch_size=2),
        "1x1x64x64",
        ["64x64", "32x32", "16x16", "8x8", "4x4", "2x2"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape", "sizes"), [row[1:] for row in FOREIGN], ids=[row[0] for row in FOREIGN]
)
def test_levels_of_real_nets_are_those_of_their_authors(
    build: Any, shape: str, sizes: list[str]
) -> None:
    found = [str(level) for level in _levels(build(), shape)]
    assert found[: len(sizes)] == sizes
    assert len(found) == len(set(found))


class Valid(nn.Module):
    """The first U-Net's convolutions without padding: every layer has a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.c, self.d = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.e, self.head = nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.b(self.a(x))
        x = self.up(self.d(self.c(F.max_pool2d(skip, 2))))
        crop = (skip.shape[-1] - x.shape[-1]) // 2
        skip = skip[..., crop : crop + x.shape[-2], crop : crop + x.shape[-1]]
        return self.head(self.e(torch.cat([skip, x], 1)))


def test_unpadded_convolutions_stay_at_their_level() -> None:
    assert [level.layers for level in _levels(Valid(), "1x1x24x24")] == [
        ("a", "b", "up", "e", "head"),
        ("c", "d"),
    ]


class Gated(nn.Module):
    """Squeeze and excitation at full resolution, a depthwise layer that halves it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.classify = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True))).sigmoid()
        return self.classify(self.point(self.depthwise(x)).mean((2, 3)))


def test_gates_count_to_the_map_they_pool_and_depthwise_layers_make_no_channels() -> None:
    fine, coarse = _levels(Gated(), "1x1x16x16")
    assert fine.layers == ("stem", "squeeze", "excite")
    assert [group.name for group in fine.groups] == ["stem", "squeeze"]
    assert coarse.layers == ("depthwise", "point", "classify")
    # of the last layer's channels, which reach the output, nothing can be dropped
    assert [(group.name, group.frozen is None) for group in coarse.groups] == [
        ("point", True),
        ("classify", False),
    ]
    assert (str(fine), str(coarse)) == ("16x16", "8x8")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fine(x)
        return self.head(x + F.interpolate(self.coarse(F.avg_pool1d(x, 2)), scale_factor=2.0))


def test_a_group_made_at_two_levels_belongs_to_the_finer_and_is_shared_by_the_other() -> None:
    fine, coarse = _levels(Tied(), "1x1x8")
    assert coarse.groups == ()
    assert coarse.shared == fine.groups[:1]


SIDES: list[tuple[Any, str, set[str], set[str]]] = [
    (Valid(), "1x1x24x24", {"a", "b", "c", "d"}, {"up", "e", "head"}),
    (Tied(), "1x1x8", {"fine", "coarse"}, {"head"}),
    (Gated(), "1x1x16x16", {"stem", "squeeze", "depthwise", "point", "classify"}, set()),
]


@pytest.mark.parametrize(
    ("model", "shape", "encoder", "decoder"), SIDES, ids=["valid", "tied", "gated"]
)
def test_a_decoder_is_what_comes_after_something_is_enlarged(
    model: nn.Module, shape: str, encoder: set[str], decoder: set[str]
) -> None:
    sides = find_sides(capture(model, shape))
    assert {path for path, side in sides.items() if side == "decoder"} == decoder
    assert encoder <= {path for path, side in sides.items() if side == "encoder"}


def test_the_sides_of_a_unet_are_its_encoder_and_its_decoder() -> None:
    model = zoo.build("memory_fcn3d")
    sides = find_sides(capture(model, "1x1x16x16x16"))
    for path, side in sides.items():
        assert side == ("encoder" if path.startswith("encoder.") else "decoder"), path


def test_a_net_without_layers_has_no_levels() -> None:
    assert _shown(_levels(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "1x1x8x8")) == []
