"""The width pass: multipliers for all, by pattern, by level and by number; what stays together."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import BasicUNet, SegResNet
from torch import Tensor, nn

from pocketize import artifact, history, plan, rewrite, zoo
from pocketize.channels.analysis import analyse
from pocketize.channels.widths import sizes_after
from pocketize.errors import NoEffectWarning, OptionError, PatternError, RewriteError
from pocketize.passes import Pocket, Width
from pocketize.plugin.recipe import load_recipe
from pocketize.plugin.registry import parse_pass
from pocketize.zoo.complexity import conv_weights
from tests.examples import examples

# Mishra, Chen, Hu, Table 6: widths of the U-Net, level by level, and theta.
MISHRA = [
    ((64, 128, 256, 512, 1024), 31_023_744),
    ((4, 8, 16, 32, 65), 122_801),
    ((20, 19, 25, 29, 33), 123_154),
    ((30, 60, 120, 240, 480), 6_816_900),
    ((30, 39, 59, 85, 119), 842_134),
]


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return zoo.build("complexity_unet2d")


def _net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1))


def _widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]


def _narrowed(model: nn.Module, given: Width, shape: str = "1x1x8x8") -> list[int]:
    return _widths(rewrite(model, given, inputs=shape))


# -- what the options ask for --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("levels", "theta"), MISHRA)
def test_the_papers_widths_give_its_weight_counts(
    unet: nn.Module, levels: tuple[int, ...], theta: int
) -> None:
    given = Width(levels=levels)
    assert conv_weights(plan(unet, given, inputs="1x1x32x32").apply()) == theta
    by_hand = zoo.build("complexity_unet2d", widths=levels)
    small = plan(unet, given, inputs="1x1x32x32").apply()
    by_hand.load_state_dict(small.state_dict(), strict=True)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(by_hand.eval()(x), small.eval()(x))


def test_a_multiplier_holds_for_all_layers_but_the_output() -> None:
    assert _narrowed(_net(8, 16, 32), Width(0.25)) == [2, 4, 8, 2]
    assert Width(0.25) == Width(scale=0.25)


def test_patterns_have_multipliers_of_their_own() -> None:
    given = Width({"0": 0.5, "[24]": 0.25})
    assert _narrowed(_net(8, 16, 32), given) == [4, 4, 8, 2]


@pytest.mark.slow
def test_levels_with_a_fraction_are_multipliers_and_integers_are_channels() -> None:
    model = zoo.build("complexity_unet2d", widths=(8, 16, 24, 32, 48))
    wide, shape = Width(levels=[1, 1, 0.5, 0.5, 0.25]), "1x1x32x32"
    assert _narrowed(model, wide, shape)[:10] == [8, 8, 16, 16, 12, 12, 16, 16, 12, 12]
    assert _narrowed(model, Width(levels=[8, 16, 5, 40, 1]), shape)[:10] == [
        *(8, 8, 16, 16),
        *(5, 5, 32, 32, 1, 1),
    ]


def test_single_layers_have_numbers_of_channels() -> None:
    assert _narrowed(_net(8, 16, 32), Width(channels={"2": 5, "4": 31})) == [8, 5, 31, 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rounding": "nearest"}, [3, 4]),  # 2.5 and 3.5
        ({"rounding": "up"}, [3, 4]),
        ({"rounding": "down"}, [2, 3]),
        ({"round_to": 8}, [8, 8]),  # 0.31 and 0.44 of a step: one is the least
        ({"round_to": 2, "rounding": "down"}, [2, 2]),
        ({"minimum": 4}, [4, 4]),
        ({"minimum": 12}, [10, 12]),
        ({"minimum": 9, "round_to": 4}, [10, 12]),
    ],
)
def test_widths_are_rounded_as_asked(options: dict[str, Any], expected: list[int]) -> None:
    assert _narrowed(_net(10, 14), Width(0.25, **options))[:2] == expected


def test_a_product_that_is_a_whole_number_is_not_rounded_up() -> None:
    assert _narrowed(_net(30, 70), Width(0.1, rounding="up"))[:2] == [3, 7]


def test_what_is_kept_stays_and_is_listed() -> None:
    (step,) = plan(_net(8, 16), Width(0.5, keep=("2",)), inputs="1x1x8x8").passes
    assert [c.path for c in step.changes] == ["0"]
    assert step.refused[0].why == "16 channels: kept by keep='2'"


def test_weights_are_cut_as_by_pocket() -> None:
    torch.manual_seed(0)
    model = _net(8, 16, 16)
    by_width = rewrite(model, Width(channels={"2": 8, "4": 8}), inputs="1x1x8x8")
    by_pocket = rewrite(model, Pocket(width=8), inputs="1x1x8x8")
    for name, value in by_pocket.state_dict().items():
        assert torch.equal(value, by_width.state_dict()[name])


def test_reset_draws_all_weights_anew() -> None:
    model = _net(64, 64)
    drawn = rewrite(model, Width(0.5, weights="reset"), inputs="1x1x8x8", seed=1)
    again = rewrite(model, Width(0.5, weights="reset"), inputs="1x1x8x8", seed=1)
    assert torch.equal(drawn[2].weight, again[2].weight)
    # uniform within 1 / sqrt(fan_in), at the fan that the layer has now
    assert 0.9 / 288**0.5 < drawn[2].weight.abs().max().item() <= 1 / 288**0.5


# -- what stays together -------------------------------------------------------------------------


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.decoder = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        return self.head(y + self.decoder(self.down(y)))


class Interpolated(Added):
    """The skip and what comes from below are added without a layer in between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.decoder = nn.Upsample(scale_factor=2)  # type: ignore[assignment]


def test_conflicting_demands_on_channels_that_are_added_name_both() -> None:
    with pytest.raises(
        RewriteError,
        match=r"'encoder': 0\.5 asks for 4 channels and 'decoder': 0\.25 for 2, of channels that "
        r"stay together \(encoder, decoder\)",
    ):
        rewrite(Added(), Width({"encoder": 0.5, "decoder": 0.25}), inputs="1x1x8x8")


def test_a_demand_on_one_of_them_moves_all() -> None:
    small = rewrite(Added(), Width({"decoder": 0.25}), inputs="1x1x8x8")
    assert (small.encoder.out_channels, small.decoder.out_channels) == (2, 2)


def test_levels_that_are_tied_take_one_value_or_are_an_error() -> None:
    given = Width(levels=[4, 4])
    assert rewrite(Interpolated(), given, inputs="1x1x8x8").down.out_channels == 4
    with pytest.raises(
        RewriteError, match=r"level 8x8 \(4\) asks for 4 channels and level 4x4 \(2\) for 2"
    ):
        rewrite(Interpolated(), Width(levels=[4, 2]), inputs="1x1x8x8")


def test_channels_that_go_in_steps_get_there_in_a_second_round() -> None:
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 2, 1))
    planned = plan(model, Width(0.125), inputs="1x1x8x8")
    assert [str(p.rewrite) for p in planned.passes] == [
        "width:scale=0.125",
        'width:channels={"0":4}',
    ]
    small = planned.apply()
    assert (small[0].out_channels, small[1].num_groups) == (4, 4)
    assert small(torch.randn(1, 1, 8, 8)).shape == (1, 2, 6, 6)


# -- real nets, files, text ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: BasicUNet(3, 1, 2, features=(8, 8, 16, 32, 64, 8)),
        lambda: SegResNet(3, 8, 1, 2),
    ],
    ids=["BasicUNet", "SegResNet"],
)
def test_monai_nets_at_half_width_train_and_survive_a_file(build: Any, tmp_path: Path) -> None:
    model = build()
    small = rewrite(model, Width(0.5), inputs="1x1x32x32x32")
    assert sum(p.numel() for p in small.parameters()) < 0.35 * sum(
        p.numel() for p in model.parameters()
    )
    x = torch.randn(1, 1, 32, 32, 32)
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    artifact.save(small, tmp_path / "small.safetensors")
    loaded = artifact.load(tmp_path / "small.safetensors", build)
    assert torch.equal(loaded.eval()(x), small.eval()(x))
    assert [r.name for r in history(loaded)] == ["width"] * len(history(small))


@pytest.mark.slow
@settings(max_examples=examples(20), deadline=None)
@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 6),
)
def test_sizes_are_told_before_anything_is_rewritten(
    widths: list[int], scale: float, step: int, minimum: int
) -> None:
    model = _net(*widths)
    given = Width(scale, round_to=step, minimum=minimum)
    channels = analyse(model, "1x1x8x8")
    wanted = {
        group: max(1, number // group.step)
        for group, number in given.demands(channels).items()
        if not group.frozen
    }
    same = all(units == group.units for group, units in wanted.items())
    with pytest.warns(NoEffectWarning) if same else contextlib.nullcontext():
        small = rewrite(model, given, inputs="1x1x8x8")
    assert sizes_after(channels, wanted) == {
        name: tuple(p.shape) for name, p in small.named_parameters()
    }


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("width:scale=0.5", Width(0.5)),
        ('width:scale={"encoder.*": 0.5}', Width({"encoder.*": 0.5})),
        ("width:levels=20|19|25", Width(levels=(20, 19, 25))),
        ("width:levels=1.0|0.5", Width(levels=(1.0, 0.5))),
        ('width:channels={"0":4},round_to=8', Width(channels={"0": 4}, round_to=8)),
    ],
)
def test_text_and_recipes_give_the_same_pass(text: str, given: Width, tmp_path: Path) -> None:
    assert parse_pass(text) == given
    assert parse_pass(str(given)) == given
    recipe = tmp_path / "recipe.toml"
    options = "\n".join(f"{key} = {_toml(value)}" for key, value in given.options().items())
    recipe.write_text(f'[[pass]]\nname = "width"\n{options}\n')
    assert load_recipe(recipe) == [given]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {item}' for key, item in value.items()) + "}"
    return str(value)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give one of scale, levels and channels, got none of them"),
        ({"scale": 0.5, "levels": (4,)}, "got scale and levels"),
        ({"scale": {}}, "option 'scale' is empty"),
        ({"scale": 1.5}, r"at most 1, not 1\.5: this pass only makes layers narrower"),
        ({"scale": {"a": 0.5, "b": 0.0}}, r"above 0 and at most 1, not 0\.0"),
        ({"levels": (0.5, 2)}, "at most 1, not 2"),
        ({"levels": (4, 0)}, "at least 1 channel, not 0"),
        ({"channels": {"0": -1}}, "at least 1 channel, not -1"),
        ({"scale": 0.5, "round_to": 0}, "round_to must be at least 1, not 0"),
        ({"scale": "half"}, "option 'scale': expected float, mapping to float or none, got 'half'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Width(**options)


def test_demands_that_the_model_cannot_meet_are_refused() -> None:
    model = _net(8, 16)
    with pytest.raises(OptionError, match=r"2 levels are given, .* Sequential run at 1: 8x8"):
        rewrite(model, Width(levels=[0.5, 0.5]), inputs="1x1x8x8")
    with pytest.raises(OptionError, match="2 has 16 channels and cannot get 17"):
        rewrite(model, Width(channels={"2": 17}), inputs="1x1x8x8")
    with pytest.raises(PatternError, match="'1' is no layer that makes channels"):
        rewrite(model, Width(channels={"1": 4}), inputs="1x1x8x8")
    with pytest.raises(PatternError, match="pattern 'decoder' matches no module"):
        rewrite(model, Width({"decoder": 0.5}), inputs="1x1x8x8")


def test_a_plan_becomes_the_pass() -> None:
    class Planned:
        def width_options(self) -> dict[str, Any]:
            return {"levels": [4, 2]}

    assert Width.from_plan(Planned(), weights="reset") == Width(levels=(4, 2), weights="reset")
