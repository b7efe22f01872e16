"""What a cascade computes: stage 2 at first, and then what its guidance tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize import history, measure, rewrite
from pocketize.errors import InputError
from pocketize.graph.capture import find_tensors
from pocketize.passes import Cascade
from pocketize.passes.cascade.guidance import prediction_of, shrunken
from pocketize.zoo.patchwise import UNet3d
from tests.examples import examples
from tests.foreign import foreign_nets
from tests.passes.cascade.nets import Small, quiet

NETS = {
    net.name: net
    for net in foreign_nets()
    if net.name
    in {
        "monai_unet_2d",
        "monai_unet_3d_residual",
        "monai_dynunet_residual_deep_supervision",
        "monai_segresnet",
        "monai_swin_unetr",
        "nnunet_plain_conv",
        "nnunet_residual_encoder_deep_supervision",
    }
}


def stage1_of(x: Tensor, classes: int = 3) -> nn.Module:
    return quiet(Small(x.shape[1], classes, x.ndim - 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_before_training_it_is_stage_2_alone(name: str) -> None:
    torch.manual_seed(0)
    stage2, x = NETS[name].build().double().eval(), NETS[name].inputs().double()
    cascade = Cascade(stage1_of(x), stage2, scale=0.3, inputs=x).eval()
    with torch.no_grad():
        expected, found = find_tensors(stage2(x)), find_tensors(cascade(x))
    assert expected
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "classes", "parameters"), [(4, 4, 22_587_364), (1, 3, 22_583_875)]
)
def test_the_second_stages_of_the_thesis_have_its_counts(
    channels: int, classes: int, parameters: int
) -> None:
    stage1 = Small(channels, classes, 3)
    cascade = Cascade(stage1, UNet3d(channels, classes), inputs=f"1x{channels}x64x64x64")
    assert sum(p.numel() for p in cascade.stage2.parameters()) == parameters
    again = UNet3d(channels + classes, classes)
    assert {k: v.shape for k, v in cascade.stage2.state_dict().items()} == {
        k: v.shape for k, v in again.state_dict().items()
    }


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("guidance", ["argmax", "softmax"])
def test_it_is_the_two_networks_with_resizing_between(axes: int, guidance: Any) -> None:
    torch.manual_seed(0)
    sizes = (21, 14, 11)[:axes]
    stage1, stage2 = quiet(Small(2, 3, axes)), quiet(Small(5, 2, axes))
    cascade = Cascade(stage1, stage2, scale=0.3, guidance=guidance, widen=False).eval()
    x = torch.randn(2, 2, *sizes, dtype=torch.float64)
    mode = ("linear", "bilinear", "trilinear")[axes - 1]
    with torch.no_grad():
        small = F.interpolate(x, size=[int(s * 0.3) for s in sizes], mode=mode)
        logits = stage1(small)
        maps = logits.softmax(1)
        if guidance == "argmax":
            maps = F.one_hot(logits.argmax(1), 3).movedim(-1, 1).double()
        maps = F.interpolate(maps, size=sizes, mode=mode)
        expected = stage2(torch.cat([x, maps], 1))
        assert torch.equal(cascade(x), expected)
        assert torch.equal(cascade.guide(x), maps)
        assert torch.equal(cascade.refine(x, maps), expected)
        assert torch.equal(cascade.shrink(x), small)


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    scale=st.floats(0.05, 1.0),
    multiple=st.integers(1, 4),
)
@settings(max_examples=examples(25), deadline=None)
def test_any_size_and_scale_gives_stage_1_multiples_near_them(
    sizes: list[int], scale: float, multiple: int
) -> None:
    axes = len(sizes)
    found = shrunken(sizes, [scale] * axes, [multiple] * axes)
    for size, small in zip(sizes, found, strict=True):
        assert small % multiple == 0
        assert small >= 1
        assert abs(small - size * scale) < max(1, multiple)
    x = torch.zeros(1, 1, *sizes, dtype=torch.float64)
    assert (
        Cascade(
            quiet(Small(1, 2, axes)), quiet(Small(1, 2, axes)), scale=scale, multiple=multiple
        ).guide(x)
    ).shape == (1, 2, *sizes)


def test_sizes_are_rounded_down_but_not_by_an_error_of_floating_point() -> None:
    assert shrunken((240, 240, 155), (0.3,) * 3, (1,) * 3) == (72, 72, 46)
    assert shrunken((512, 512, 450), (0.2,) * 3, (1,) * 3) == (102, 102, 90)
    assert shrunken((100,), (0.29,), (1,)) == (29,)
    assert shrunken((240, 240, 155), (0.3,) * 3, (16,) * 3) == (80, 80, 48)


def test_a_scale_for_each_axis() -> None:
    cascade = Cascade(Small(1, 2, 3), Small(1, 2, 3), scale=(0.5, 0.25, 1.0))
    assert cascade.shrink(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 1, 4, 2, 8)


class Returns(nn.Module):
    """A network that returns what a function makes of its logits."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.net, self.shape = Small(1, 3), shape

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        low = y[..., ::2, ::2] + 1
        return {
            "list": [low, y],
            "tuple": (y, low),
            "dict": {"low": low, "out": y, "label": y.argmax(1)},
            "stacked": torch.stack([y, y + 1], 1),
            "strided": [low, low[..., ::2]],
        }[self.shape]


@pytest.mark.parametrize("shape", ["list", "tuple", "dict", "stacked"])
def test_of_several_outputs_the_one_at_full_resolution_guides(shape: str) -> None:
    stage1 = quiet(Returns(shape))
    cascade = Cascade(stage1, quiet(Small(1, 2)), scale=0.5, guidance="softmax").eval()
    assert cascade.classes == 3
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    plain = Cascade(stage1.net, quiet(Small(1, 2)), scale=0.5, guidance="softmax").eval()
    assert torch.equal(cascade.guide(x), plain.guide(x))


def test_without_full_resolution_the_largest_output_guides() -> None:
    logits = prediction_of(Returns("strided")(torch.randn(2, 1, 16, 16)), (16, 16))
    assert logits.shape == (2, 3, 8, 8)


def test_a_single_class_is_a_foreground() -> None:
    stage1 = quiet(Small(1, 1))
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    maps = {
        kind: Cascade(stage1, quiet(Small(1, 1)), scale=1.0, guidance=kind).eval().guide(x)
        for kind in ("argmax", "softmax")
    }
    logits = stage1(x)
    assert torch.equal(maps["softmax"], logits.sigmoid())
    assert torch.equal(maps["argmax"], (logits > 0).double())


def test_a_second_stage_that_has_its_channels_stays_the_object_it_is() -> None:
    stage1, stage2 = Small(1, 3), Small(4, 2)
    cascade = Cascade(stage1, stage2, widen=False)
    assert cascade.stage2 is stage2
    assert cascade.stage1 is stage1
    assert Cascade(stage1, stage2, widen=False, classes=3).classes == 3


def test_the_given_second_stage_is_unchanged_and_its_copy_tells_what_was_done() -> None:
    stage1, stage2 = Small(1, 3), Small(1, 2)
    stage2.first.weight.requires_grad_(False)
    cascade = Cascade(stage1, stage2)
    assert stage2.first.weight.shape[1] == 1
    assert cascade.stage2.first.in_channels == 4
    assert not cascade.stage2.first.weight.requires_grad
    assert [record.name for record in history(cascade.stage2)] == ["extend-inputs"]
    assert history(stage2) == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cascade = Cascade(Small(1, 3, 3), Small(1, 2, 3), guidance="softmax", scale=0.5).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        cascade.stage2.first.weight[:, 1:].normal_()
        expected = cascade.refine(x, cascade.guide(x))
        with torch.autocast("cpu", dtype=dtype):
            mixed = cascade.refine(x, cascade.guide(x))
        x = x.to(dtype)
        found = cascade.to(dtype).refine(x, cascade.guide(x))
    assert found.dtype == mixed.dtype == cascade.guide(x).dtype == dtype
    assert cascade.guide_by_labels((x[:, 0] > 0).long()).dtype == dtype
    for other in (mixed, found):
        assert torch.allclose(other.float(), expected, atol=0.1, rtol=0.1)


def test_one_network_may_be_both_stages() -> None:
    torch.manual_seed(0)
    net, x = quiet(Small(1, 2)), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    cascade = Cascade(net, net, scale=0.5).eval()
    assert torch.equal(cascade(x), net(x))
    mine = {id(p) for p in net.parameters()}
    assert mine == {id(p) for p in cascade.stage1.parameters()}
    assert mine.isdisjoint(id(p) for p in cascade.stage2.parameters())


@pytest.mark.slow
def test_passes_go_to_the_widened_second_stage() -> None:
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    stage1, stage2 = quiet(Small(1, 3)), quiet(Small(1, 2, width=8))
    cascade = Cascade(stage1, stage2, passes=("pocket:width=4",)).eval()
    assert [record.name for record in history(cascade.stage2)] == ["extend-inputs", "pocket"]
    assert cascade.stage2.first.weight.shape == (4, 4, 3, 3)
    assert cascade(x).shape == (1, 2, 16, 16)
    given = Cascade(stage1, Small(4, 2, width=8), widen=False, passes=("pocket:width=4",))
    assert given.stage2.first.weight.shape == (4, 4, 3, 3)


def leaky() -> nn.Module:
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)
    return quiet(nn.Sequential(*layers, nn.Conv2d(4, 2, 3, padding=1)))


@pytest.mark.slow
def test_passes_work_on_the_whole_cascade() -> None:
    torch.manual_seed(0)
    cascade = Cascade(leaky(), leaky(), guidance="softmax").eval()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    lean = rewrite(cascade, "in-place-norm", inputs=x)
    assert {change.path for change in history(lean)[0].changes} == {"stage2.1", "stage2.2"}
    assert torch.allclose(lean(x), cascade(x), rtol=1e-12, atol=1e-12)
    slim = rewrite(cascade, "pocket:width=2,keep=stage1.*", inputs=x)
    assert slim.get_parameter("stage1.0.weight").shape == (4, 1, 3, 3)
    assert slim.get_parameter("stage2.0.weight").shape == (2, 3, 3, 3)


@pytest.mark.slow
def test_it_is_measured_like_any_network() -> None:
    cascade = Cascade(Small(1, 3, 3), Small(1, 2, 3))
    x = torch.randn(1, 1, 16, 16, 16)
    whole, alone = (
        measure(net, x, mode="infer", estimate=True).peak for net in (cascade, Small(1, 2, 3))
    )
    assert whole > alone


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(1, 1, 8, 8, 8), "with 2 spatial axes, got torch.float32 of shape"),
        (torch.zeros(1, 8, 8), "with 2 spatial axes"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), "expected a floating-point volume"),
    ],
)
def test_a_volume_of_another_kind_is_an_error(x: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Cascade(Small(1, 2), Small(1, 2))(x)


def shapes(outputs: Any) -> Sequence[Sequence[int]]:
    return [tuple(t.shape) for t in find_tensors(outputs)]


def test_outputs_of_stage_2_keep_their_nesting() -> None:
    cascade = Cascade(Small(1, 2), Returns("dict")).eval()
    found = cascade(torch.zeros(1, 1, 8, 8))
    assert list(found) == ["low", "out", "label"]
    assert shapes(found) == [(1, 3, 4, 4), (1, 3, 8, 8), (1, 8, 8)]
