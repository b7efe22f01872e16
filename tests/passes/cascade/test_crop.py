"""Crops to stage 1's foreground: where they lie, what is outside, and when they warn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize.errors import CropWarning, InputError
from pocketize.passes import Cascade
from pocketize.passes.cascade.guidance import Crop, crop_around, paste, touched
from tests.examples import examples
from tests.passes.cascade.nets import Small, Threshold, quiet


def square(size: int = 24, low: int = 8, high: int = 14) -> Tensor:
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    x[:, :, low:high, low:high] = 1.0
    return x


class Seen(nn.Module):
    """Remembers what it was given, and passes it on to a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Any:
        self.shapes.append(tuple(x.shape))
        return self.net(x)


def cropping(stage2: nn.Module, **options: Any) -> Cascade:
    options = {"scale": 0.5, "crop": 2} | options
    return Cascade(quiet(Threshold()), stage2, **options).eval()


def test_stage_2_sees_the_crop_around_stage_1s_foreground_with_its_margin() -> None:
    stage2 = Seen(quiet(Small(1, 2)))
    cascade = cropping(stage2)
    x = square()
    cascade.stage2.shapes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CropWarning)
        found = cascade(x)
    assert cascade.stage2.shapes == [(1, 3, 10, 10)]
    assert found.shape == (1, 2, 24, 24)
    alone = stage2.net(x[:, :, 6:16, 6:16])
    assert torch.equal(found[:, :, 6:16, 6:16], alone)
    outside = torch.ones(24, 24, dtype=torch.bool)
    outside[6:16, 6:16] = False
    assert set(found[0, 0][outside].tolist()) == {0.0}
    assert set(found[0, 1][outside].tolist()) == {-100.0}


def test_a_batch_shares_one_box() -> None:
    x = torch.cat([square(24, 2, 4), square(24, 18, 20)])
    cascade = cropping(Seen(quiet(Threshold())), crop=0)
    cascade.stage2.shapes.clear()
    with pytest.warns(CropWarning):
        cascade(x)
    assert cascade.stage2.shapes == [(2, 3, 18, 18)]


def test_a_margin_and_a_multiple_for_each_axis() -> None:
    cascade = cropping(Seen(quiet(Threshold())), crop=(1, 4), multiple=(1, 4))
    cascade.stage2.shapes.clear()
    cascade(square())
    assert cascade.stage2.shapes == [(1, 3, 8, 16)]


def test_without_foreground_the_whole_volume_is_run() -> None:
    cascade = cropping(Seen(quiet(Threshold())))
    cascade.stage2.shapes.clear()
    assert cascade(torch.zeros(1, 1, 24, 24, dtype=torch.float64)).shape == (1, 2, 24, 24)
    assert cascade.stage2.shapes == [(1, 3, 24, 24)]


def test_a_crop_that_may_have_cut_something_off_warns() -> None:
    cascade = cropping(quiet(Threshold()), scale=0.25)  # stage 1 sees 8 to 12 of 8 to 14
    with pytest.warns(CropWarning, match=r"border of the crop \(6, 6\) to \(14, 14\) along axis 0"):
        cascade(square(24, 8, 14))
    cascade.train()
    cascade(square(24, 8, 14))  # in training there is no telling yet


def test_foreground_within_the_crop_does_not_warn() -> None:
    found = cropping(quiet(Threshold()))(square())
    assert torch.equal(found.argmax(1), square()[:, 0].long())


def test_foreground_at_the_volumes_own_border_does_not_warn() -> None:
    found = cropping(quiet(Threshold()))(square(24, 0, 6))
    assert torch.equal(found.argmax(1), square(24, 0, 6)[:, 0].long())


def test_probabilities_get_values_of_their_own_outside() -> None:
    stage2 = nn.Sequential(Threshold(), nn.Softmax(1)).double()
    found = cropping(stage2, outside=(1.0, 0.0))(square())
    assert torch.allclose(found.sum(1), torch.ones(1, 24, 24, dtype=torch.float64))
    assert found[0, 1, 0, 0] == 0.0
    with pytest.raises(InputError, match="'outside' has 3 values for 2 classes"):
        cropping(stage2, outside=(1.0, 0.0, 0.0))(square())


def test_another_background() -> None:
    found = cropping(quiet(Threshold()), background=1)(1 - square())
    assert found[0, :, 0, 0].tolist() == [-100.0, 0.0]
    assert torch.equal(found.argmax(1), (1 - square())[:, 0].long())


class Pyramid(nn.Module):
    """Outputs at full and at half resolution, and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Threshold()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"full": y, "half": y[..., ::2, ::2], "labels": y.argmax(1, keepdim=True)}


def test_outputs_at_other_resolutions_and_labels_are_put_back_too() -> None:
    found = cropping(quiet(Pyramid()))(square())
    expected = quiet(Pyramid())(square())
    assert torch.equal(found["full"].argmax(1), expected["full"].argmax(1))
    assert torch.equal(found["half"].argmax(1), expected["half"].argmax(1))
    assert torch.equal(found["labels"], expected["labels"])


def test_an_output_that_does_not_fit_between_voxels_is_an_error() -> None:
    with pytest.raises(InputError, match="does not fit into the volume's voxels"):
        cropping(quiet(Pyramid()), crop=1)(square())


def test_gradients_pass_through_a_crop() -> None:
    cascade = cropping(quiet(Small(1, 2))).train()
    cascade(square()).square().mean().backward()
    gradient = cascade.stage2.first.weight.grad
    assert gradient is not None
    assert gradient[:, 1:].abs().max() > 0


@given(
    data=st.data(),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    cells=st.integers(1, 8),
    margin=st.integers(0, 5),
    multiple=st.integers(1, 8),
)
@settings(max_examples=examples(25), deadline=None)
def test_a_box_holds_the_foreground_and_lies_in_the_volume(
    data: st.DataObject, sizes: list[int], cells: int, margin: int, multiple: int
) -> None:
    axes = len(sizes)
    small = [min(cells, size) for size in sizes]
    place = [data.draw(st.integers(0, n - 1)) for n in small]
    mask = torch.zeros(1, *small, dtype=torch.bool)
    mask[(0, *place)] = True
    box = crop_around(mask, sizes, [margin] * axes, [multiple] * axes)
    for axis, (size, n, at) in enumerate(zip(sizes, small, place, strict=True)):
        assert 0 <= box.low[axis] <= max(0, at * size / n - margin)
        assert min(size, (at + 1) * size / n + margin) <= box.high[axis] <= size
        assert box.extent[axis] % multiple == 0 or box.extent[axis] == size


@pytest.mark.parametrize(("place", "axes"), [((0, 3), (0,)), ((4, 4), (0, 1)), ((2, 2), ())])
def test_the_axes_that_are_touched_are_told(place: tuple[int, int], axes: tuple[int, ...]) -> None:
    logits = torch.zeros(1, 2, 5, 5)
    logits[(0, 1, *place)] = 1.0
    assert touched(logits, Crop((1, 1), (6, 6), (9, 9)), 0) == axes
    assert touched(logits[:, 1:], Crop((1, 1), (6, 6), (9, 9)), 0) == axes
    assert touched(logits, Crop((0, 0), (5, 5), (5, 5)), 0) == ()


def test_a_single_class_has_its_value_outside() -> None:
    part = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    found = paste(part, Crop((1, 1), (3, 3), (4, 4)), 0, -100.0)
    assert found.dtype == torch.float16
    assert found.sum() == 4 - 100 * 12
