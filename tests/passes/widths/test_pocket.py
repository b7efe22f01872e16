"""The pocket pass: the papers' counts, the width rule, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pocketize import history, plan, pocketize, rewrite, zoo
from pocketize.errors import OptionError, PatternError, RewriteError
from pocketize.passes import Pocket


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


EXACT = [
    ("pocketnet_unet3d", {}, 150_066),
    ("pocketnet_resnet3d", {}, 150_066),
    ("pocketnet_densenet3d", {}, 241_282),
    ("pocketnet_unet3d", {"in_channels": 4}, 151_362),
    ("pocketnet_densenet3d", {"in_channels": 4}, 243_922),
    ("pocketnet_encoder2d", {}, 21_074),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "count"), EXACT)
def test_the_papers_nets_come_out_as_their_hand_built_pocket_nets(
    name: str, options: dict[str, int], count: int
) -> None:
    full = zoo.build(name, **options)
    small = pocketize(full, inputs=zoo.example_input(name, small=True, **options))
    assert _parameters(small) == count
    by_hand = zoo.build(name, pocket=True, **options)
    assert _parameters(by_hand) == count
    by_hand.load_state_dict(small.state_dict(), strict=True)
    x = zoo.example_input(name, small=True, **options)
    assert torch.equal(by_hand.eval()(x), small.eval()(x))


def _net(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 2, 1))


def test_without_a_width_it_takes_that_of_the_finest_features() -> None:
    (step,) = plan(_net(6, 12, 24), "pocket", inputs="1x1x8x8").passes
    assert step.notes[0] == "width 6: the first features at the finest resolution, of 0"
    assert [c.what for c in step.changes] == ["12 -> 6 channels", "24 -> 6 channels"]


def test_a_patch_embedding_does_not_give_the_width_where_a_finer_convolution_runs() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 32, 4, stride=4)
            self.fine = nn.Conv2d(1, 8, 3, padding=1)
            self.up = nn.ConvTranspose2d(32, 16, 4, stride=4)
            self.head = nn.Conv2d(24, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            deep = self.up(self.embed(x))
            return self.head(torch.cat([deep, self.fine(x)], 1))

    (step,) = plan(Hybrid(), "pocket", inputs="1x1x16x16").passes
    assert step.notes[0] == (
        "width 16: the first features at the finest resolution, of up "
        "(not of embed, which works at a coarser resolution)"
    )


def test_groups_that_are_narrower_keep_what_they_have() -> None:
    small = pocketize(_net(8, 4, 16), width=8, inputs="1x1x8x8")
    assert [m.out_channels for m in small if isinstance(m, nn.Conv2d)] == [8, 4, 8, 2]


def test_what_is_kept_stays_and_is_listed() -> None:
    (step,) = plan(_net(4, 16, 16), Pocket(keep=("2",)), inputs="1x1x8x8").passes
    assert [c.path for c in step.changes] == ["4"]
    assert ("2", "16 channels: kept by keep='2'") in {(r.path, r.why) for r in step.refused}


def test_frozen_groups_are_listed_with_their_reasons() -> None:
    (step,) = plan(_net(4, 16), "pocket", inputs="1x1x8x8").passes
    assert [(r.path, r.why) for r in step.refused] == [
        ("4", "2 channels: it reaches the model's output")
    ]


def test_groups_of_one_channel_are_dropped_in_a_second_round() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Conv2d(4, 32, 1), nn.GroupNorm(8, 32), nn.Conv2d(32, 2, 1)
    )
    first, second = plan(net, "pocket", inputs="1x1x4x4").passes
    assert [c.what for c in first.changes] == ["32 -> 8 channels"]
    assert any("8 channels instead of 4" in r.why and "steps of 8" in r.why for r in first.refused)
    assert [c.what for c in second.changes] == ["8 -> 4 channels"]
    small = rewrite(net, "pocket", inputs="1x1x4x4")
    assert (small[1].out_channels, small[2].num_groups, small[2].num_channels) == (4, 4, 4)
    assert [record.name for record in history(small)] == ["pocket", "pocket"]
    assert not plan(small, "pocket:width=4", inputs="1x1x4x4").passes[0].edits


@pytest.mark.parametrize("width", [0, -3])
def test_a_width_below_one_is_an_error(width: int) -> None:
    with pytest.raises(OptionError, match=f"width must be at least 1, not {width}"):
        Pocket(width=width)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PatternError, match=r"pattern 'enc\.\*' matches no module of Sequential"):
        pocketize(_net(4, 8), keep=["enc.*"], inputs="1x1x8x8")


def test_a_model_without_any_width_is_an_error() -> None:
    with pytest.raises(RewriteError, match="there is no width to clamp to; pass width="):
        pocketize(nn.Sequential(nn.BatchNorm2d(3)), inputs="2x3x4x4")


def test_slicing_keeps_the_channels_with_the_largest_weights() -> None:
    net = _net(2, 6)
    with torch.no_grad():
        net[2].weight.copy_(torch.ones_like(net[2].weight))
        net[2].weight[[1, 4]] *= 3.0
    small = pocketize(net, inputs="1x1x8x8")
    assert torch.equal(small[2].weight, net[2].weight[[1, 4]])
    assert torch.equal(small[4].weight, net[4].weight[:, [1, 4]])


def test_a_reset_net_starts_like_one_built_at_that_width() -> None:
    torch.manual_seed(0)
    trained_like = _net(16, 64, 256)
    small = pocketize(trained_like, weights="reset", seed=1, inputs="1x1x8x8")
    by_hand = _net(16, 16, 16)
    for index in (2, 4):
        drawn, expected = small[index].weight.detach(), by_hand[index].weight.detach()
        std, count = expected.std().item(), drawn.numel()
        assert drawn.shape == expected.shape
        # uniform: the std of n draws has a relative error of about 0.45 / sqrt(n)
        assert drawn.std().item() == pytest.approx(std, rel=5 * 0.64 / count**0.5)
        assert abs(drawn.mean().item()) < 5 * std / count**0.5
    again = pocketize(trained_like, weights="reset", seed=1, inputs="1x1x8x8")
    assert torch.equal(again[2].weight, small[2].weight)
