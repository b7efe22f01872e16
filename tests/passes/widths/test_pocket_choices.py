"""The pocket pass: which width, groups and channels, and what its plan says of the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pocketize import plan, pocketize, zoo
from pocketize.engine.pipeline import PassPlan
from pocketize.errors import OptionError, PatternError
from pocketize.passes import Pocket
from tests.toys import Net

INPUT = "2x3x8x8"


def planned(model: nn.Module, **options: object) -> PassPlan:
    return plan(model, Pocket(**options), inputs=INPUT).passes[0]  # type: ignore[arg-type]


# -- the papers' nets ----------------------------------------------------------------------------


@pytest.mark.slow
def test_brats_resnet_comes_out_as_the_hand_built_pocket_net() -> None:
    name, options = "pocketnet_resnet3d", {"in_channels": 4}
    small = pocketize(
        zoo.build(name, **options), inputs=zoo.example_input(name, small=True, **options)
    )
    assert sum(p.numel() for p in small.parameters()) == 151_362
    zoo.build(name, pocket=True, **options).load_state_dict(small.state_dict(), strict=True)


# -- the width -----------------------------------------------------------------------------------


class Order(nn.Module):
    """What runs first is not what was registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(6, 2, 1)
        self.late = nn.Conv2d(5, 6, 1)
        self.early = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)))


def test_the_first_convolution_is_the_first_that_runs() -> None:
    assert planned(Order()).notes == (
        "width 5: the first features at the finest resolution, of early",
    )


def test_a_net_of_linear_layers_takes_the_width_of_the_first() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 12), nn.Linear(12, 2))
    small = pocketize(model, inputs="2x3")
    assert [small[i].out_features for i in (0, 2, 3)] == [6, 6, 2]


def test_a_strided_stem_that_overlaps_is_no_patch_embedding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=2), nn.Conv2d(6, 9, 1), nn.Conv2d(9, 2, 1))
    assert planned(model).notes[0].startswith("width 6: the first features at the finest")


def test_a_patch_embedding_with_nothing_finer_gives_the_width() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.Conv2d(6, 9, 1), nn.Conv2d(9, 2, 1))
    assert planned(model).notes[0].startswith("width 6: the first features at the finest")


@pytest.mark.slow
def test_a_width_as_given_may_be_wider_or_narrower_than_the_first_convolution() -> None:
    assert pocketize(Net(), 12, inputs=INPUT).widths() == [4, 12, 8, 2]
    assert pocketize(Net(), 1, inputs=INPUT).widths() == [1, 1, 1, 2]
    assert planned(Net(), width=12).notes == ("width 12: as given",)


# -- the groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "widths"),
    [
        (["deep"], [4, 16, 4, 2]),
        (["deep", "join"], [4, 16, 8, 2]),
        (["*"], [4, 16, 8, 2]),
        (["norm"], [4, 16, 4, 2]),
        (["s*"], [4, 4, 4, 2]),
    ],
)
@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
def test_what_matches_keep_keeps_its_channels(keep: list[str], widths: list[int]) -> None:
    assert pocketize(Net(), keep=keep, inputs=INPUT).widths() == widths


def test_every_pattern_of_keep_must_match_something() -> None:
    with pytest.raises(PatternError, match=r"pattern 'dep' matches no module.*Did you mean 'deep'"):
        pocketize(Net(), keep=["stem", "dep"], inputs=INPUT)


def test_a_text_is_one_pattern_not_one_for_each_letter() -> None:
    assert Pocket(keep="deep").keep == ("deep",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"width": 2.5}, "option 'width': expected int or none, got 2.5"),
        ({"width": True}, "option 'width'"),
        ({"keep": 3}, "option 'keep'"),
        ({"weights": "best"}, "option 'weights': expected 'slice' or 'reset', got 'best'"),
    ],
)
def test_options_out_of_range_are_errors(options: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Pocket(**options)  # type: ignore[arg-type]


class Loose(Net):
    """A layer that nothing reads, and a branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(30, 40)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > -1e9 else -y


def test_the_plan_tells_of_parameters_never_read_and_of_branches_on_values() -> None:
    notes = planned(Loose()).notes
    assert notes[1] == (
        "2 parameters are never read by the forward and stay as they are: spare.weight, spare.bias"
    )
    assert notes[2].startswith("a branch of the forward depends on values; only the branch taken")
    small = pocketize(Loose(), inputs=INPUT)
    assert small.spare.weight.shape == (40, 30)
    assert small.widths() == [4, 4, 4, 2]


def test_layers_that_move_with_another_say_with_which() -> None:
    class Residual(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.deep(self.stem(x)))
            return self.head(self.join(torch.cat([self.stem(x), y + self.twin(y)], 1)))

    model = Residual()
    model.twin = nn.Conv2d(16, 16, 1)
    assert [(c.path, c.what, c.why) for c in planned(model).changes] == [
        ("deep", "16 -> 4 channels", ""),
        ("twin", "16 -> 4 channels", "moves with deep"),
        ("join", "8 -> 4 channels", ""),
    ]


# -- the channels --------------------------------------------------------------------------------


def test_the_strongest_channels_stay_over_all_layers_that_make_them() -> None:
    """Two layers that are added choose together."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(x))

    model = Sum()
    with torch.no_grad():
        for conv, strengths in ((model.a, (5, 1, 1, 4, 1, 1)), (model.b, (1, 1, 7, 4, 1, 1))):
            conv.bias.zero_()
            conv.weight.copy_(torch.tensor(strengths).view(6, 1, 1, 1).expand(6, 3, 1, 1))
    small = pocketize(model, 3, inputs=INPUT)
    kept = [0, 2, 3]  # 26, 50 and 32 against 2
    assert torch.equal(small.a.weight, model.a.weight[kept])
    assert torch.equal(small.b.weight, model.b.weight[kept])
    assert torch.equal(small.head.weight, model.head.weight[:, kept])


def test_what_stays_keeps_its_order_and_its_statistics() -> None:
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.arange(16.0))
        model.deep.weight.copy_(torch.linspace(2, 1, 16).view(16, 1, 1, 1).expand(16, 4, 3, 3))
    small = pocketize(model, keep=["join"], inputs=INPUT)
    assert small.norm.running_mean.tolist() == [0, 1, 2, 3]
    assert torch.equal(small.stem.weight, model.stem.weight)
    behind_the_skip = model.join.weight[:, [0, 1, 2, 3, 4, 5, 6, 7]]
    assert torch.equal(small.join.weight, behind_the_skip)


class FixedFilters(nn.Module):
    """A bank of fixed filters kept in buffers, then learnt layers."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: Tensor
        self.mix: Tensor
        self.register_buffer("bank", torch.randn(8, 3, 3, 3))
        self.register_buffer("mix", torch.randn(6, 8, 1, 1))
        self.conv, self.head = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(nn.functional.conv2d(x, self.bank), self.mix)
        return self.head(self.conv(x))


def test_fixed_filters_in_buffers_are_chosen_by_their_strength_too() -> None:
    model = FixedFilters()
    model.bank[[1, 4, 5]] *= 100
    small = pocketize(model, 3, inputs=INPUT)
    assert torch.equal(small.bank, model.bank[[1, 4, 5]])
    assert small.mix.shape == (3, 3, 1, 1)
    assert small.conv.weight.shape == (3, 3, 1, 1)


def test_a_model_without_values_is_planned_and_rewritten_for_its_shapes() -> None:
    with torch.device("meta"):
        model = Net()
    small = pocketize(model, inputs=INPUT)
    assert small.widths() == [4, 4, 4, 2]
    assert {t.device.type for t in small.parameters()} == {"meta"}
