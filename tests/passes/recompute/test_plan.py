"""What the plan of a recomputation says, and that it comes true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from pocketize import history, measure, plan, rewrite
from pocketize.errors import NoEffectWarning, OptionError, OrderError
from pocketize.graph.capture import capture
from pocketize.passes import InPlaceNorm, Recompute
from pocketize.passes.recompute.weight_uses import chosen, find_uses, freed
from tests.passes.recompute.nets import Net

WIDTHS = (32, 64, 128, 256)


def dynunet() -> nn.Module:
    return DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=WIDTHS)


def plainconv() -> nn.Module:
    return PlainConvUNet(
        1, 4, WIDTHS, nn.Conv3d, 3, [1, 2, 2, 2], 2, 2, 2,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 1, 8, 8)


def net() -> Net:
    return Net(nn.BatchNorm2d, nn.ReLU())


def names(keep: str, x: Tensor) -> set[str]:
    sites = find_uses(capture(net(), x, train=True))
    return {site.name.removesuffix(".weight") for site in chosen(sites, keep)}


def test_what_is_kept_of_a_unet(x: Tensor) -> None:
    assert names("conv", x) == set()
    # The last of each level is kept; the one that makes the level smaller is not.
    assert names("block", x) == {"a1", "b1", "up", "c1", "c2"}
    # Kept: the strided b1 (smaller than its input), b2 (the upsampling makes more of it), the head.
    assert names("level", x) == {"a1", "a2", "up", "c1", "c2"}


def test_what_nobody_reads_again(x: Tensor) -> None:
    traced = capture(net(), x, train=True)
    frees = freed(traced, find_uses(traced))
    assert frees["a2.weight"] == (-1,)
    assert "b1.weight" not in frees  # the skip connection is still to come
    assert frees["c1.weight"] == (-1, 0, 1)  # the concatenation, the upsampled part and the skip


def test_a_weight_used_twice_has_two_sites() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    traced = capture(nn.Sequential(conv, nn.ReLU(), conv), torch.randn(1, 2, 4, 4))
    assert [site.name for site in find_uses(traced)] == ["0.weight", "0.weight#1"]


@pytest.mark.slow
def test_the_plan_shows_the_price_of_every_choice(x: Tensor) -> None:
    text = str(plan(net(), Recompute(keep="block", min_bytes=0), inputs=x))
    for keep in ("conv", "block", "level"):
        assert f"keep='{keep}': " in text
    assert "of a training step)" in text
    assert "read by c2 only" in text
    (only,) = plan(net(), Recompute(min_bytes=0), inputs=x).passes
    assert only.changes[0].what.startswith("stored for the backward pass: ")


@pytest.mark.slow
def test_what_was_planned_is_remembered(x: Tensor) -> None:
    made = rewrite(net(), Recompute(keep="level", min_bytes=0), inputs=x)
    (record,) = history(made)
    (edit,) = record.edits
    assert edit["conversion"] == "recompute"
    assert edit["options"]["rebuilt"] == [f"{n}.weight" for n in ("a1", "a2", "c1", "c2", "up")]


@pytest.mark.slow
def test_a_second_time_has_no_effect(x: Tensor) -> None:
    made = rewrite(net(), Recompute(min_bytes=0), inputs=x)
    with pytest.warns(NoEffectWarning, match="recomputes already"):
        rewrite(made, Recompute(min_bytes=0), inputs=x)


@pytest.mark.slow
def test_a_net_that_stores_no_more_than_it_must_is_left_alone(x: Tensor) -> None:
    with pytest.warns(NoEffectWarning, match="nothing to gain"):
        rewrite(nn.Sequential(nn.Conv2d(1, 2, 3)), Recompute(), inputs=x)


def test_torchscript_is_refused(x: Tensor) -> None:
    with pytest.warns() as caught:  # torch deprecates TorchScript
        rewrite(
            torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())), "recompute", inputs=x
        )
    assert any("it is TorchScript" in str(w.message) for w in caught)


def test_what_excludes_it_and_wrong_options(x: Tensor) -> None:
    with pytest.raises(OrderError, match="recompute"):
        rewrite(net(), InPlaceNorm(), Recompute(), inputs=x)
    with pytest.raises(OptionError, match="min_bytes must not be negative"):
        Recompute(min_bytes=-1)
    with pytest.raises(OptionError, match="keep"):
        Recompute(keep=3)  # type: ignore[arg-type]


PEAKS = {
    ("recompute:keep=conv",): 0.54,
    ("recompute:keep=block",): 0.38,
    ("recompute:keep=level",): 0.32,
    ("recompute:keep=block", "amp"): 0.21,
    ("recompute:keep=level", "amp"): 0.18,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (dynunet, list(PEAKS)[1::3]),
        pytest.param(plainconv, list(PEAKS)[::2], marks=pytest.mark.whole),
    ],
)
def test_the_peak_of_a_training_step_at_96_cubed(make: Any, rows: list[tuple[str, ...]]) -> None:
    model, inputs = make(), torch.randn(1, 1, 96, 96, 96)
    before = measure(model, inputs, estimate=True).peak
    for passes in rows:
        after = measure(rewrite(model, *passes, inputs=inputs), inputs, estimate=True).peak
        assert after <= PEAKS[passes] * before, passes


@pytest.mark.slow
def test_the_estimate_is_what_happens() -> None:
    model, inputs = dynunet(), torch.randn(1, 1, 16, 16, 16)
    made = rewrite(model, Recompute(keep="level", min_bytes=0), inputs=inputs)
    expected, found = (measure(made, inputs, estimate=e).peak for e in (True, False))
    assert found == pytest.approx(expected, rel=0.01)
