"""Numbers that a constructor derived from a width: they follow where weights are drawn anew, stay
with weights that are kept, and are named where following would be a guess."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize import load, plan, pocketize, save
from pocketize.engine.pipeline import PassPlan
from pocketize.passes import Width


class Equalised(nn.Module):
    """A convolution whose weights are normal and scaled in the forward, as StyleGAN's are."""

    def __init__(self, before: int, after: int, gain: float = 2**0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before, 3, 3))
        self.gain, self.fan_in = gain, 9 * before
        self.scale = gain / math.sqrt(self.fan_in)
        self.channels = before

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, padding=1)


class ByFan(Equalised):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (self.gain / math.sqrt(self.fan_in)), padding=1)


class ByChannels(Equalised):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (self.gain / math.sqrt(9 * self.channels)), padding=1)


class OfConv2d(nn.Conv2d):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 3, padding=1, bias=False)
        nn.init.normal_(self.weight)
        self.scale = (2 / (9 * before)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def _net(layer: type[nn.Module], width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        layer(16, width),
        nn.ReLU(),
        layer(width, width),
        nn.ReLU(),
        nn.Conv2d(width, 2, 1),
    )


@pytest.mark.parametrize("layer", [Equalised, ByFan, ByChannels, OfConv2d])
def test_a_net_that_is_drawn_anew_is_as_loud_as_one_built_at_that_width(
    layer: type[nn.Module],
) -> None:
    small = pocketize(_net(layer), weights="reset", seed=0, inputs="1x1x16x16")
    built = _net(layer, 16)
    x = torch.randn(8, 1, 16, 16)
    got, want = (float(net[:5](x).std().detach()) for net in (small, built))
    assert 0.75 < got / want < 1.33  # it was half
    for name, value in vars(built[4]).items():
        if isinstance(value, int | float):
            assert getattr(small[4], name) == pytest.approx(value), name


@pytest.mark.parametrize("layer", [Equalised, OfConv2d])
def test_weights_that_are_kept_keep_their_scale(layer: type[nn.Module]) -> None:
    """They were trained with it."""
    model = _net(layer)
    small = pocketize(model, inputs="1x1x16x16")
    assert small[4].scale == model[4].scale
    assert not any("scale" in c.what for p in _plan(model, "slice") for c in p.changes)


def _plan(model: nn.Module, weights: str) -> tuple[PassPlan, ...]:
    return plan(model, f"pocket:weights={weights}", inputs="1x1x16x16").passes


def test_the_plan_states_what_follows() -> None:
    (step,) = _plan(_net(Equalised), "reset")
    rows = [(c.path, c.what, c.why) for c in step.changes if "equals" in c.why]
    assert rows == [
        ("4", "fan_in 576 -> 144", "it equals a width that changes"),
        ("4", "scale 0.0589256 -> 0.117851", "it equals gain * 576 ** -0.5"),
        ("4", "channels 64 -> 16", "it equals a width that changes"),
    ]
    assert len(step.notes) == 1


def test_a_saved_net_has_its_numbers_again(tmp_path: Path) -> None:
    small = pocketize(_net(Equalised), weights="reset", inputs="1x1x16x16").eval()
    save(small, tmp_path / "x.safetensors")
    again = load(tmp_path / "x.safetensors", lambda: _net(Equalised)).eval()
    assert again[4].scale == small[4].scale != _net(Equalised)[4].scale
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(again(x), small(x))


class Attention(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.attend, self.head = nn.Linear(5, dim), Attention(dim), nn.Linear(dim, 3)
        self.loud = math.sqrt(dim)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attend(x)) * self.loud * self.temperature)


@pytest.mark.slow
def test_the_scale_of_an_attention_follows_its_heads_and_guesses_are_named() -> None:
    (step,) = plan(Transformer(), Width(0.25, weights="reset"), inputs="2x9x5").passes
    rows = {(c.path, c.what) for c in step.changes if "equals" in c.why}
    assert rows == {("attend", f"scale {32**-0.5:.6g} -> {8**-0.5:.6g}")}
    (note,) = [note for note in step.notes if "may derive" in note]
    assert "attend holds dim=64, which equals a width that changes" in note
    assert "the model holds loud=8, which equals 64 ** 0.5" in note
    assert "the model holds temperature=0.125, which equals 64 ** -0.5" in note
    kept = plan(Transformer(), Width(0.25), inputs="2x9x5").passes[0]
    assert not any("scale" in c.what for c in kept.changes)


class Ambiguous(Equalised):
    """As many channels come in as go out, and as there are pixels on a side."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.side, self.slope = 64, 1 / 64
        del self.channels

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.interpolate(F.leaky_relu(y, self.slope), [self.side, self.side])


def test_what_follows_must_leave_the_net_running_as_predicted() -> None:
    model = _net(Ambiguous)
    narrow = plan(model, "pocket:width=16,weights=reset", inputs="1x1x16x16")
    (step,) = narrow.passes
    assert not any("side" in c.what for c in step.changes)
    (note,) = step.notes[1:]
    assert "4 holds side=64, which equals a width that changes" in note
    assert "4 holds slope=0.015625, which equals 1 / 64" in note
    assert narrow.apply()(torch.randn(1, 1, 16, 16)).shape == (1, 2, 64, 64)


def test_a_number_that_two_widths_explain_is_named_and_not_changed() -> None:
    model = _net(Equalised)
    width = Width(channels={"2": 8, "4": 32}, weights="reset")
    (step,) = plan(model, width, inputs="1x1x16x16").passes
    assert not any(c.path == "4" and "equals" in c.why for c in step.changes)
    (note,) = [note for note in step.notes if "may derive" in note]
    assert "4 holds fan_in=576" in note
    assert "4 holds scale=0.0589256, which equals gain * 576 ** -0.5" in note
