"""What cannot be a cascade, and what the error says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import InputError, OptionError, RewriteError
from pocketize.passes import Cascade
from tests.passes.cascade.nets import Small


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": 0.0}, "scale must be above 0 and at most 1, got 0.0"),
        ({"scale": 1.5}, "scale must be above 0 and at most 1, got 1.5"),
        ({"scale": (0.5, -0.1)}, "got -0.1"),
        ({"scale": float("nan")}, "got nan"),
        ({"scale": (0.5, 0.5, 0.5)}, "scale has 3 values for 2 spatial axes"),
        ({"scale": ()}, "scale has 0 values for 2 spatial axes"),
        ({"scale": "0.3"}, "scale must be one or several numbers, one for each axis; got '0.3'"),
        ({"scale": True}, "scale must be one or several numbers, one for each axis; got True"),
        ({"crop": True}, "crop must be one or several whole numbers"),
        ({"multiple": ()}, "multiple has 0 values for 2 spatial axes"),
        ({"multiple": 1.5}, "multiple must be one or several whole numbers"),
        ({"crop": (1, "2")}, "crop must be one or several whole numbers"),
        ({"multiple": 0}, "multiple must be at least 1"),
        ({"multiple": (1, 2, 3)}, "multiple has 3 values for 2 spatial axes"),
        ({"crop": -1}, "a margin cannot be negative"),
        ({"crop": (1, 2, 3)}, "crop has 3 values for 2 spatial axes"),
        ({"guidance": "one-hot"}, "guidance must be 'argmax' or 'softmax', not 'one-hot'"),
        ({"joint": True}, "no gradient passes through an argmax"),
        ({"classes": 0}, "classes must be at least 1"),
        ({"background": 2}, "background must be one of 2 classes"),
        ({"background": -1}, "background must be one of 2 classes"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Cascade(Small(1, 2), Small(1, 2), **options)


@pytest.mark.parametrize(
    ("stage1", "stage2", "says"),
    [
        (Small(1, 2, 3), Small(1, 2, 2), "stage 1 reads 1 channels and 3 spatial axes"),
        (Small(2, 2), Small(1, 2), "stage 1 reads 2 channels .* stage 2 1 channels"),
        (nn.Linear(3, 2), Small(1, 2), "stage 1 reads"),
    ],
)
def test_stages_that_see_different_volumes_are_an_error(
    stage1: nn.Module, stage2: nn.Module, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Cascade(stage1, stage2)


def test_a_second_stage_without_spatial_axes_is_an_error() -> None:
    with pytest.raises(InputError, match=r"both stages take one volume \(N, C, \*spatial\)"):
        Cascade(Small(1, 2), nn.Linear(3, 2))


def test_a_second_stage_that_has_other_channels_than_promised_is_an_error() -> None:
    with pytest.raises(InputError, match="stage 2 2 channels of the volume"):
        Cascade(Small(1, 3), Small(5, 2), widen=False)
    with pytest.raises(InputError, match="stage 2 reads class maps only"):
        Cascade(Small(1, 3), Small(3, 2), widen=False, classes=3)
    with pytest.raises(InputError, match="with widen=False stage 2 must read 4 channels"):
        Cascade(Small(1, 3), Small(5, 2), widen=False, inputs="1x1x16x16")


class Pooled(nn.Module):
    """A classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x).mean((2, 3))
        return y


def test_a_first_stage_that_returns_no_maps_is_an_error() -> None:
    with pytest.raises(InputError, match=r"stage 1 must return class maps .* got \[\(2, 3\)\]"):
        Cascade(Pooled(), Small(1, 2))


class Picky(nn.Module):
    """Runs on volumes of 10 voxels a side only, which is never guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (10, 10):
            raise ValueError("10 x 10, please")
        y: Tensor = self.net(x)
        return y


def test_classes_that_cannot_be_found_out_are_asked_for() -> None:
    with pytest.raises(InputError, match=r"how many classes stage 1 \(Picky\) returns; pass class"):
        Cascade(Picky(), Small(1, 2))
    assert Cascade(Picky(), Small(1, 2), classes=3).classes == 3
    assert Cascade(Picky(), Small(1, 2), scale=0.5, inputs="1x1x20x20").classes == 3
    with pytest.raises(InputError, match="10 x 10, please"):
        Cascade(Picky(), Small(1, 2), scale=0.5, inputs="1x1x24x24")


def test_another_number_of_classes_than_promised_is_an_error() -> None:
    cascade = Cascade(Small(1, 3), Small(1, 2), classes=2)
    with pytest.raises(InputError, match="stage 1 returned 3 classes, expected 2"):
        cascade(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 3, 8, 16), (2, 3, 16, 16), (3, 16, 16)])
def test_guidance_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    cascade = Cascade(Small(1, 3), Small(1, 2))
    with pytest.raises(InputError, match=r"expected \(1, 3, 16, 16\)"):
        cascade.refine(torch.zeros(1, 1, 16, 16), torch.zeros(shape))


def test_a_second_stage_that_cannot_be_widened_says_why() -> None:
    stage2 = nn.Sequential(nn.BatchNorm2d(1), Small(1, 2))
    with pytest.raises(RewriteError, match=r"cannot read 3 more channels: aten\.batch_norm in 0"):
        Cascade(Small(1, 3), stage2)


class Halves(nn.Module):
    """Wants even sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.conv(x), scale_factor=2) + x


def test_a_first_stage_that_the_small_size_does_not_suit_is_told_of_multiples() -> None:
    x = torch.zeros(1, 1, 16, 16)
    with pytest.raises(
        InputError, match=r"classes=\.\.\., inputs=\.\.\., or multiple=\.\.\. for its"
    ):
        Cascade(Halves(), Small(1, 2), scale=0.2, inputs=x)
    assert Cascade(Halves(), Small(1, 2), scale=0.2, multiple=2, inputs=x).classes == 2
