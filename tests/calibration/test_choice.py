"""Channels stay that the layers after them need, whatever the size of their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import Calibration, calibrate, history, pocketize, rewrite
from pocketize.errors import OptionError
from pocketize.passes import Width

from .test_calibrate import HALF, images, trained


def kept(model: nn.Module, tensor: str, axis: int = 0) -> list[int]:
    edits = [edit for record in history(model) for edit in record.edits]
    (found,) = [
        edit["keep"] for edit in edits if edit.get("tensor") == tensor and edit["axis"] == axis
    ]
    return list(found)


class Twins(nn.Module):
    """Channels 0 to 3 are alike and large, 4 and 5 are small, different, and needed."""

    def __init__(self, kind: Any = nn.Conv2d) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.last = nn.ConvTranspose2d(6, 2, 2) if kind is nn.ConvTranspose2d else kind(6, 2, 1)
        with torch.no_grad():
            self.first.bias.zero_()
            self.first.weight.zero_()
            self.first.weight[:4, 0] = 5.0
            self.first.weight[4, 1] = 0.5
            self.first.weight[5, 1] = -0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.last(y.movedim(1, -1)) if isinstance(self.last, nn.Linear) else self.last(y)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_channels_that_others_can_replace_are_dropped(kind: Any) -> None:
    torch.manual_seed(0)
    net = Twins(lambda i, o, _: nn.Linear(i, o) if kind is nn.Linear else kind(i, o, 1)).eval()
    if kind is nn.ConvTranspose2d:
        net = Twins(kind).eval()
    x = [torch.randn(2, 2, 9, 9) for _ in range(3)]
    small = rewrite(net, HALF, inputs=x[0], calibration=x)
    stay = kept(small, "first.weight")
    assert len(stay) == 3
    assert stay[1:] == [4, 5]
    assert kept(small, "last.weight", 0 if kind is nn.ConvTranspose2d else 1) == stay
    with torch.no_grad():
        assert float((small(x[0]) - net(x[0])).norm() / net(x[0]).norm()) < 1e-2
    by_norm = rewrite(net, HALF, inputs=x[0], calibration=Calibration(x, channels="norm"))
    assert kept(by_norm, "first.weight") == [0, 1, 2]


def test_channels_stay_by_energy_or_at_random() -> None:
    net = Twins().eval()
    x = [torch.randn(2, 2, 9, 9, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        net.first.bias[4] = 100.0  # large, but the same everywhere

    def stay(channels: Any, seed: int = 0) -> list[int]:
        given = Calibration(x, channels=channels, seed=seed)
        return kept(rewrite(net, HALF, inputs=x[0], calibration=given), "first.weight")

    assert stay("energy") == [0, 1, 2]
    with torch.no_grad():
        net.first.weight[5] *= 100
    assert stay("energy") == [0, 1, 5]
    drawn = [stay("random", seed) for seed in range(4)]
    assert stay("random") == drawn[0]
    assert len({tuple(each) for each in drawn}) > 1


@pytest.mark.slow
def test_the_outputs_are_nearer_than_with_the_largest_weights() -> None:
    net, x = trained(), images()

    def differs(**options: Any) -> float:
        small = rewrite(net, HALF, inputs=x[0], calibration=Calibration(x, **options))
        with torch.no_grad():
            return float(sum((small.eval()(one) - net(one)).norm() for one in x))

    chosen = differs()
    assert chosen < 0.95 * differs(channels="norm")
    assert differs() == chosen
    pocket = pocketize(net, 4, inputs=x[0], calibration=x)
    assert "calibrated on 3 images" in history(pocket)[-1].notes[-1]
    assert differs(memory="64KiB") < 1.5 * chosen  # one reader at a time, or parts of kernels


@pytest.mark.slow
def test_each_of_several_passes_chooses_on_what_the_one_before_left() -> None:
    net, x = trained(), images()
    small = rewrite(net, HALF, HALF, inputs=x[0], calibration=x)
    assert small.get_submodule("down").weight.shape[:2] == (4, 2)
    assert [record.name for record in history(small)] == ["width", "width"]


def test_options_are_checked() -> None:
    for options in ({"channels": "best"}, {"samples": 0}, {"ridge": 0.0}, {"memory": "much"}):
        with pytest.raises(OptionError):
            Calibration([], **options)  # type: ignore[arg-type]


class Odd(nn.Module):
    """The layer that reads what the first one makes is called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=self.first(x).relu())


@pytest.mark.slow
def test_a_group_without_a_layer_to_ask_keeps_the_largest_weights() -> None:
    torch.manual_seed(0)
    net, x = Odd(), images()
    small = rewrite(net, HALF, inputs=x[0], calibration=x)
    assert kept(small, "first.weight") == kept(rewrite(net, HALF, inputs=x[0]), "first.weight")
    assert history(small)[-1].notes[-1] == (
        "not calibrated: last (it is called with something else than a batch of inputs as its one "
        "argument)"
    )


@pytest.mark.slow
def test_depthwise_layers_follow_the_channels_that_were_chosen() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ConvTranspose2d(8, 8, 3, stride=2, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 3, 1),
    ).eval()
    x = images()
    small = rewrite(net, Width(0.75), inputs=x[0])
    found = calibrate(net, small, x)
    assert not [layer for layer in found.layers if layer.why_not]
    for layer in found.layers[:2]:
        assert layer.after is not None
        assert layer.after < 1e-4  # each channel of these needs one input, which is there
    assert found.after < 0.9 * found.before
