"""Channel groups: what moves together, in which steps, what is frozen, and how that is told."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pocketize import ChannelGroup, ChannelGroups, analyse
from pocketize.errors import InputError, PatternError
from pocketize.plugin.edits import Resize, SetAttribute
from tests.contract.snapshot import Snapshot
from tests.models.registry import get

INPUT = "2x3x8x8"


class Branches(nn.Module):
    """Two branches that are added, one concatenated, a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(14, 2, 1)
        self.unused = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.norm(self.left(y))
        return self.head(torch.cat([y, self.side(x)], 1))


def group_of(channels: ChannelGroups, path: str) -> ChannelGroup:
    (group,) = channels.matching(path)
    return group


# -- groups --------------------------------------------------------------------------------------


def test_a_group_lists_every_axis_that_moves_with_it() -> None:
    group = group_of(analyse(Branches(), INPUT), "stem")
    assert group.layers == ("stem", "left")
    assert group.name == "stem"
    assert (group.units, group.step, group.channels, group.frozen) == (8, 1, 8, None)
    assert {(m.tensor, m.axis) for m in group.members} == {
        *(("stem.weight", 0), ("stem.bias", 0), ("left.weight", 0), ("left.bias", 0)),
        *(("left.weight", 1), ("norm.weight", 0), ("norm.bias", 0)),
        *(("norm.running_mean", 0), ("norm.running_var", 0), ("head.weight", 1)),
    }


def test_positions_in_a_concatenation_are_those_of_its_parts() -> None:
    channels = analyse(Branches(), INPUT)
    parts = {}
    for path in ("stem", "side"):
        (member,) = (m for m in group_of(channels, path).members if m.tensor == "head.weight")
        parts[path] = member.positions.reshape(-1).tolist()
    assert parts == {"stem": list(range(8)), "side": list(range(8, 14))}


def test_groups_come_in_the_order_in_which_their_layers_run() -> None:
    channels = analyse(Branches(), INPUT)
    assert [g.layers for g in channels.groups if g.layers] == [
        ("stem", "left"),
        ("side",),
        ("head",),
    ]


def test_inputs_and_outputs_freeze() -> None:
    channels = analyse(Branches(), INPUT)
    assert group_of(channels, "head").frozen == "it reaches the model's output"
    frozen = {(m.tensor, m.axis) for g in channels.groups if g.frozen for m in g.members}
    assert frozen == {("stem.weight", 1), ("side.weight", 1), ("head.weight", 0), ("head.bias", 0)}


def test_parameters_that_the_forward_never_reads_are_listed_and_in_no_group() -> None:
    channels = analyse(Branches(), INPUT)
    assert channels.unreached == ("unused.weight", "unused.bias")
    assert not any(m.tensor.startswith("unused") for g in channels.groups for m in g.members)


def test_a_model_without_parameters_has_no_groups() -> None:
    channels = analyse(nn.ReLU(), INPUT)
    assert channels.groups == ()
    assert channels.unreached == ()


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 2, 1))


def normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))


def shuffled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.Conv2d(4, 2, 1))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1))


@pytest.mark.parametrize(
    ("make", "path", "units", "step"),
    [
        (grouped, "0", 2, 4),
        (grouped, "1", 3, 4),
        (normed, "0", 2, 4),
        (shuffled, "0", 4, 1),
        (depthwise, "0", 8, 1),
    ],
    ids=["grouped in", "grouped out", "group norm", "pixel shuffle", "depthwise multiplier"],
)
def test_what_ties_channels_sets_the_step(make: Any, path: str, units: int, step: int) -> None:
    group = group_of(analyse(make(), INPUT), path)
    assert (group.units, group.step, group.frozen) == (units, step, None)
    assert group.channels == units * step


def test_members_give_the_positions_of_each_unit() -> None:
    group = group_of(analyse(grouped(), INPUT), "0")
    weight = next(m for m in group.members if (m.tensor, m.axis) == ("0.weight", 0))
    assert weight.positions.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    reader = next(m for m in group.members if (m.tensor, m.axis) == ("1.weight", 1))
    assert reader.positions.tolist() == [[0], [1]]


def test_the_analysis_changes_nothing() -> None:
    model = Branches()
    before = Snapshot(model)
    analyse(model, INPUT).explain("stem")
    assert list(before.differences(Snapshot(model))) == []


def test_constraints_of_both_modes_hold() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.head(y + self.b(x) if self.training else y)

    assert group_of(analyse(Modes(), INPUT), "a").layers == ("a", "b")


def test_constraints_that_hide_at_the_given_size_are_found_at_a_larger_one() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.mean = nn.Parameter(torch.zeros(1))
            self.tail = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if x.shape[-1] > 1:
                x = x.sort(1).values
            return self.tail(x)

    frozen = group_of(analyse(Bottleneck(), "2x3x1x1"), "stem").frozen
    assert frozen is not None
    assert "aten.sort" in frozen


class Spectral(nn.Module):
    """Mixes channels by complex weights in the frequency domain, as Fourier neural operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.mix = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bixy,io->boxy", torch.fft.rfft2(self.stem(x)), self.mix)
        return self.head(torch.fft.irfft2(y, s=x.shape[-2:]))


def test_complex_parameters_have_channels_too() -> None:
    channels = analyse(Spectral(), INPUT)
    places = {(m.tensor, m.axis) for m in group_of(channels, "stem").members}
    assert places == {("stem.weight", 0), ("stem.bias", 0), ("mix", 0)}
    (out,) = (g for g in channels.groups if ("mix", 1) in {(m.tensor, m.axis) for m in g.members})
    assert out.frozen is None


# -- selections ----------------------------------------------------------------------------------


def test_resizing_gives_the_edits_of_all_members_and_counts() -> None:
    channels = analyse(Branches(), INPUT)
    edits = channels.resize({group_of(channels, "stem"): np.array([1, 6])})
    by_place = {(e.tensor, e.axis): (e.keep, e.size) for e in edits if isinstance(e, Resize)}
    assert by_place["stem.weight", 0] == ((1, 6), 8)
    assert by_place["head.weight", 1] == ((1, 6, *range(8, 14)), 14)
    assert len(by_place) == 10
    assert [e for e in edits if isinstance(e, SetAttribute)] == [
        SetAttribute("norm", "num_features", 8, 2)
    ]


def test_the_edits_of_a_selection_give_the_selection_back() -> None:
    channels = analyse(get("conv_grouped").build(), get("conv_grouped").inputs())
    selection = {g: np.arange(1, g.units) for g in channels.groups if g.frozen is None}
    stays = channels.survivors(selection)
    found = channels.survivors_of(channels.edits(stays))
    ours = channels.fresh_from
    assert np.array_equal(found[1:ours], stays[1:ours])


def test_selecting_everything_gives_no_edit() -> None:
    channels = analyse(Branches(), INPUT)
    assert channels.resize({}) == ()
    assert channels.resize({g: np.arange(g.units) for g in channels.groups}) == ()


# -- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("stem", [("stem", "left")]),
        ("l*t", [("stem", "left")]),
        ("s*", [("stem", "left"), ("side",)]),
        ("norm", [("stem", "left")]),
        ("unused", []),
        ("*", [("stem", "left"), ("side",), ("head",)]),
    ],
)
def test_a_pattern_gives_the_groups_of_what_it_matches(pattern: str, layers: list[Any]) -> None:
    found = analyse(Branches(), INPUT).matching(pattern)
    assert [group.layers for group in found] == layers


def test_a_pattern_on_a_container_reaches_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 2, 1))
    found = analyse(model, INPUT).matching("0")
    assert [group.layers for group in found] == [("0.0",), ("0.1",)]


@pytest.mark.parametrize("pattern", ["stam", "Stem", "ste", ""])
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_path(pattern: str) -> None:
    with pytest.raises(
        PatternError, match=f"pattern '{pattern}' matches no module of Branches"
    ) as e:
        analyse(Branches(), INPUT).matching(pattern)
    assert not pattern or "Did you mean 'stem'?" in str(e.value)


# -- explanations --------------------------------------------------------------------------------


def test_explain_tells_what_moves_with_a_layer() -> None:
    text = re.sub(r"at [\w.]+:\d+", "at LINE", analyse(Branches(), INPUT).explain("side"))
    assert text.splitlines() == [
        "side.weight axis 0 (6): free",
        "    moves with side.bias[0], head.weight[1]",
        "side.weight axis 1 (3): frozen: aten.conv2d at LINE joins it with an axis that cannot "
        "change, such as the input's",
        "side.bias axis 0 (6): free",
        "    moves with side.weight[0], head.weight[1]",
    ]


def test_explain_tells_steps_and_the_output() -> None:
    assert "0.weight axis 0 (8): free in steps of 4" in analyse(normed(), INPUT).explain("0")
    text = analyse(Branches(), INPUT).explain("head")
    assert "head.weight axis 0 (2): frozen: it reaches the model's output" in text


def test_explain_tells_each_group_on_a_concatenated_axis() -> None:
    lines = analyse(Branches(), INPUT).explain("head.weight").splitlines()
    assert [line for line in lines if line.startswith("head.weight axis 1")] == [
        "head.weight axis 1 (14): free",
        "head.weight axis 1 (14): free",
    ]


def test_explain_names_the_operator_that_has_no_rule() -> None:
    net = get("sorted_channels")
    assert "frozen: aten.sort at opaque.py:" in analyse(net.build(), net.inputs()).explain("stem")


def test_explain_says_that_a_layer_is_never_read() -> None:
    text = analyse(Branches(), INPUT).explain("unused")
    assert text.splitlines()[0] == (
        "unused.weight axis 0 (7): left alone, the forward never reads it"
    )


def test_a_long_list_of_members_is_cut() -> None:
    layers = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) for _ in range(6)]

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return x.mean(1, keepdim=True) * 0 + x.amax(1, keepdim=True)

    lines = analyse(Residual(), INPUT).explain("stem.bias").splitlines()
    assert lines[1].startswith("    moves with stem.weight[0], blocks.0.0.weight[0], ")
    assert lines[1].endswith(" and 31 more")
    assert lines[1].count("[") == 12


@pytest.mark.parametrize(("path", "near"), [("stom", "'stem'"), ("side.wait", "'side.weight'")])
def test_explain_of_an_unknown_path_suggests_the_nearest(path: str, near: str) -> None:
    with pytest.raises(PatternError, match=f"names no layer with channels.*Did you mean {near}"):
        analyse(Branches(), INPUT).explain(path)


# -- errors --------------------------------------------------------------------------------------


def test_a_model_that_does_not_run_is_told() -> None:
    with pytest.raises(InputError, match=r"Branches did not run .* It runs on 2x3x8x8 float32"):
        analyse(Branches(), "2x4x8x8")
    with pytest.raises(InputError, match="cannot read input shape"):
        analyse(Branches(), "2×3")


def test_a_script_module_is_frozen_with_the_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate it
        scripted = torch.jit.trace(nn.Conv2d(8, 8, 1), torch.rand(1, 8, 4, 4))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), scripted, nn.Conv2d(8, 2, 1))
    assert group_of(analyse(model, INPUT), "1").frozen == "it belongs to a TorchScript module"


def test_attention_has_one_width() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    channels = analyse(nn.Sequential(nn.Linear(5, 8), model, nn.Linear(8, 2)), "2x4x5")
    group = group_of(channels, "1.self_attn")
    assert ("1.self_attn.in_proj_weight", 1) in {(m.tensor, m.axis) for m in group.members}
    assert ("1.self_attn.in_proj_weight", 0) in {(m.tensor, m.axis) for m in group.members}
    assert (group.units, group.step) == (4, 2)
