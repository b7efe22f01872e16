"""The swaps as passes: which convolutions, at what cost, and what the plan says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pocketize import history, plan, rewrite
from pocketize.errors import NoEffectWarning, OptionError, PatternError
from pocketize.passes import Bottleneck, CompactBlock, Separable
from pocketize.passes.swaps.blocks import BottleneckBlock, ConvBlock, SeparableBlock
from pocketize.passes.swaps.decompositions import BlockTerms, Channelwise, Tucker
from pocketize.plugin.base import Guarantee
from pocketize.plugin.edits import Convert, Redraw

IMAGE = "1x16x8x8"
SWAPS = (Bottleneck, Separable, CompactBlock)


class Small(nn.Module):
    """Down, a convolution at the bottom, up, and a transposed, a grouped and a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(32, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.late = nn.Conv2d(16, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.bottom(self.down(x).relu()).relu())
        return self.head(self.grouped(self.late(y).relu()).relu())


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def blocks(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, ConvBlock)]


def refusals(model: nn.Module, given: Any, inputs: Any = IMAGE) -> dict[str, str]:
    (planned,) = plan(model, given, inputs=inputs).passes
    return {row.path: row.why for row in planned.refused}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWAPS)
def test_convolutions_with_a_kernel_become_blocks_and_others_stay(kind: Any) -> None:
    model = small()
    made = rewrite(model, kind(activations="any"), inputs=IMAGE)
    assert blocks(made) == ["down", "bottom", "late"]
    assert blocks(model) == []
    before = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    assert torch.equal(list(made.late)[-1].bias, model.late.bias)
    why = refusals(model, kind(activations="any"))
    assert "transposed" in why["up"]
    assert "4 groups" in why["grouped"]
    assert "head" not in why


@pytest.mark.parametrize("kind", SWAPS)
def test_a_second_run_changes_nothing(kind: Any) -> None:
    once = rewrite(small(), kind(activations="any"), inputs=IMAGE)
    with pytest.warns(NoEffectWarning, match="it is a block already"):
        twice = rewrite(once, kind(activations="any"), inputs=IMAGE)
    assert history(twice) == history(once)
    others = [other for other in SWAPS if other is not kind]
    with pytest.warns(NoEffectWarning):
        rewrite(once, others[0](activations="any", min_channels=1), inputs=IMAGE)


def test_guarantees_follow_from_what_is_carried_over() -> None:
    for kind in SWAPS:
        assert kind().guarantee is Guarantee.APPROXIMATE
        assert kind(inner_norm=True).guarantee is Guarantee.RETRAIN
        assert kind(weights="reset").guarantee is Guarantee.RETRAIN


# -- which convolutions --------------------------------------------------------------------------


@pytest.mark.slow
def test_sides_and_patterns_choose_and_both_may_be_given() -> None:
    for where, expected in {
        ("all",): ["down", "bottom", "late"],
        "encoder": ["down", "bottom"],
        "decoder": ["late"],
        ("b*", "l*"): ["bottom", "late"],
        ("decoder", "down"): ["down", "late"],
    }.items():
        given = Separable(where=where, activations="any")  # type: ignore[arg-type]
        assert blocks(rewrite(small(), given, inputs=IMAGE)) == expected
    why = refusals(small(), Separable(where="encoder", activations="any"))  # type: ignore[arg-type]
    assert why["late"] == "where=encoder leaves it out"


@pytest.mark.slow
def test_two_swaps_on_two_sides_follow_each_other() -> None:
    made = rewrite(
        small(),
        Bottleneck(where=("encoder",), activations="any"),
        Separable(where=("decoder",), activations="any"),
        inputs=IMAGE,
    )
    assert [type(made.get_submodule(p)) for p in blocks(made)] == [
        BottleneckBlock,
        BottleneckBlock,
        SeparableBlock,
    ]
    assert [record.name for record in history(made)] == ["bottleneck", "separable"]


def test_what_is_kept_stays_with_all_that_is_inside() -> None:
    model = nn.Sequential(nn.Sequential(small()), nn.Conv2d(2, 2, 3))
    why = refusals(model, Separable(keep=("0",), activations="any"))
    assert why["0.0.late"] == "kept by keep='0'"
    for option in ("keep", "where", "force"):
        with pytest.raises(
            PatternError, match=rf"separable: {option}='lat' matches no module.*late"
        ):
            plan(small(), Separable(**{option: ("lat",)}), inputs=IMAGE)


def test_narrow_convolutions_stay_unless_forced() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3))
    why = refusals(model, Separable(activations="any"), "1x1x9x9")
    assert why == {"0": "channels in or out: 1, fewer than min_channels=8"}
    made = rewrite(model, Separable(activations="any", min_channels=1), inputs="1x1x9x9")
    assert blocks(made) == ["0", "1"]
    made = rewrite(model, Separable(force=("0",), keep=("1",)), inputs="1x1x9x9")
    assert blocks(made) == ["0"]


def test_a_swap_that_saves_no_parameters_is_not_made_unless_forced() -> None:
    model = nn.Sequential(nn.Conv2d(8, 64, 3))
    given = {"weights": "reset", "ratio": 1, "activations": "any"}
    why = refusals(model, Bottleneck(**given), "1x8x9x9")
    assert why == {"0": "no parameters saved: 4,672 -> 41,536"}
    assert blocks(rewrite(model, Bottleneck(**given, force=("*",)), inputs="1x8x9x9")) == ["0"]


def test_activations_are_weighed_against_weights_gradients_and_moments() -> None:
    """A block of 16 -> 16 keeps 16 channels more, of 4 bytes a pixel, and saves 4 x 4 bytes a
    parameter: 2,320 - 416 of them.
    """
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    for side, swapped in ((21, True), (22, False)):
        (planned,) = plan(model, Separable(), inputs=f"1x16x{side}x{side}").passes
        assert bool(planned.edits) is swapped
        assert 16 * side * side * 4 <= 16 * (2320 - 416) or not swapped
    assert planned.refused[0].why == (
        "30.2 KiB more activations, 29.8 KiB less of weights, gradients and Adam's moments; "
        "activations='any' swaps it"
    )
    assert plan(model, Separable(activations="any"), inputs="1x16x22x22").passes[0].edits


def test_a_layer_that_is_called_twice_costs_activations_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)
            self.alias = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.conv(x).relu())

    model = Twice()
    (planned,) = plan(model, Separable(), inputs="1x16x8x8").passes
    assert "activations +8.0 KiB" in planned.changes[0].why
    assert [row.path for row in planned.changes] == ["conv", "alias"]
    made = rewrite(model, Separable(), inputs="1x16x8x8")
    assert made.conv is made.alias


# -- weights -------------------------------------------------------------------------------------


def low_rank(kind: str, dtype: torch.dtype) -> nn.Sequential:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    torch.manual_seed(0)
    weight = {
        "bottleneck": lambda: Tucker(random(24, 3), random(3, 4, 9), random(16, 4)),
        "separable": lambda: Channelwise(random(16, 2, 9), random(16, 24, 2)),
        "compact-block": lambda: BlockTerms(random(16, 3), random(3, 1, 9), random(24, 3, 1)),
    }[kind]()
    conv = nn.Conv2d(16, 24, 3, padding=1, dtype=dtype)
    with torch.no_grad():
        conv.weight.copy_(weight.composed().reshape(24, 16, 3, 3))
    return nn.Sequential(conv)


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        (Bottleneck(ratio="energy:1"), [3, 4]),
        (Separable(ratio="energy:1"), [2]),
        (CompactBlock(ratio="energy:0.999999"), [3, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_low_rank_is_carried_over_as_it_is(
    given: Any, ranks: list[int], dtype: torch.dtype
) -> None:
    model = low_rank(given.name, dtype)
    x = torch.randn(1, 16, 8, 8, dtype=dtype)
    planned = plan(model, given, inputs=x)
    (edit,) = planned.passes[0].edits
    assert isinstance(edit, Convert)
    assert edit.options["ranks"] == ranks
    made = planned.apply()
    expected = model(x)
    error = (made(x) - expected).norm() / expected.norm()
    assert float(error.detach()) < (2e-3 if given.name == "compact-block" else 1e-5)


@pytest.mark.slow
def test_more_energy_takes_more_parameters_and_errs_less() -> None:
    model = small()
    for kind in SWAPS:
        errors, sizes = [], []
        for share in (0.2, 0.4, 0.6):
            given = kind(ratio=f"energy:{share}", activations="any", where=("bottom",))
            (planned,) = plan(model, given, inputs=IMAGE).passes
            (row,) = planned.changes
            errors.append(float(row.why.split(";")[0].removeprefix("relative error ")))
            assert 1 - errors[-1] ** 2 >= share - 1e-3
            made = rewrite(model, given, inputs=IMAGE)
            sizes.append(sum(p.numel() for p in made.parameters()))
        assert errors == sorted(errors, reverse=True)
        assert sizes == sorted(sizes)


def test_ratios_give_the_papers_widths() -> None:
    conv = nn.Conv2d(16, 64, 3)
    assert Bottleneck(ratio=4).ranks(conv) == (16, 16)
    assert Bottleneck(ratio=2).ranks(conv) == (32, 16)  # more than 16 in would carry nothing
    assert Bottleneck(ratio=2, weights="reset").ranks(conv) == (32, 32)
    assert Bottleneck(ratio=100).ranks(conv) == (1, 1)
    assert CompactBlock(ratio=4).ranks(conv) == (16, 1)
    assert CompactBlock(ratio=1, multiplier=3).ranks(conv) == (16, 3)
    assert CompactBlock(ratio=1, weights="reset").ranks(conv) == (64, 1)
    assert Separable(multiplier=20).ranks(conv) == (9,)


@pytest.mark.slow
def test_reset_draws_the_blocks_alone_by_the_owners_law() -> None:
    model = small()
    for layer in (model.down, model.bottom, model.late, model.up, model.grouped):
        nn.init.normal_(layer.weight, std=0.3)
    given = Bottleneck(weights="reset", activations="any")
    (planned,) = plan(model, given, inputs=IMAGE).passes
    assert planned.edits[-1] == Redraw("late")
    one, same, other = (rewrite(model, given, inputs=IMAGE, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.late.spatial.weight, same.late.spatial.weight)
    assert not torch.equal(one.late.spatial.weight, other.late.spatial.weight)
    assert float(one.bottom.spatial.weight.detach().std()) == pytest.approx(0.3, rel=0.15)
    assert torch.equal(one.grouped.weight, model.grouped.weight)
    assert torch.equal(one.head.weight, model.head.weight)


def test_the_plan_tells_parameters_ranks_error_and_bytes() -> None:
    (planned,) = plan(small(), Bottleneck(where=("bottom",)), inputs=IMAGE).passes
    (row,) = planned.changes
    assert row.what == ("Conv2d 32 -> 32, 3x3: 9,248 -> 1,120 parameters, 8 and 8 channels inside")
    assert row.why.startswith("relative error 0.")
    assert row.why.endswith(
        "activations +1.0 KiB, weights, gradients and Adam's moments -127.0 KiB"
    )
    assert planned.notes[0] == "1 convolutions of 9,248 parameters become blocks of 1,120"


# -- what stays with a reason --------------------------------------------------------------------


class Reads(nn.Module):
    """A forward that looks into its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(16, 16, 3, padding=1)
        self.read = nn.Conv2d(16, 16, 3, padding=1)
        self.shape = nn.Conv2d(16, 16, 3, padding=1)
        self.idle = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.shape.weight.shape[0] == 16
        return self.plain(x) + self.read(x) * self.read.weight.mean() + self.shape(x)


def test_convolutions_that_the_forward_looks_into_stay_and_the_rest_is_swapped() -> None:
    model = Reads()
    why = refusals(model, Separable())
    assert why["read"] == "the forward reads its weight elsewhere too"
    assert "does not run as before" in why["shape"]
    assert "has no attribute 'weight'" in why["shape"]
    assert why["idle"] == "the forward never calls it"
    assert blocks(rewrite(model, Separable(), inputs=IMAGE)) == ["plain"]


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Renamed(nn.Conv2d):
    """A convolution by another name."""


def test_layers_that_compute_otherwise_stay() -> None:
    tied = nn.Conv2d(16, 16, 3, padding=1)
    other = nn.Conv2d(16, 16, 3, padding=1)
    other.weight = tied.weight
    patched = nn.Conv2d(16, 16, 3, padding=1)
    patched.forward = patched.forward  # type: ignore[method-assign]
    broken = nn.Conv2d(16, 16, 3, padding=1)
    nn.init.constant_(broken.weight, float("nan"))
    layers = {
        "own": OwnForward(16, 16, 3, padding=1),
        "renamed": Renamed(16, 16, 3, padding=1),
        "normed": parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)),
        "spectral": parametrizations.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)),
        "older": nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)),
        "tied": tied,
        "other": other,
        "patched": patched,
        "broken": broken,
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    why = refusals(model, Separable())
    assert why.keys() == layers.keys() - {"renamed"}
    assert why["own"] == "OwnForward has a forward of its own"
    assert all("computed from other tensors" in why[n] for n in ("normed", "spectral", "older"))
    assert why["tied"] == why["other"] == "its weight is shared with another module"
    assert why["patched"] == "its forward was replaced on the instance"
    assert why["broken"] == "its weight is not finite"


def test_the_model_itself_and_scripted_parts_stay() -> None:
    conv = nn.Conv2d(16, 16, 3)
    assert "wrap it in nn.Sequential" in refusals(conv, Separable())[""]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        traced = torch.jit.trace(nn.Sequential(conv), torch.rand(1, 16, 8, 8))
    why = refusals(nn.Sequential(traced), Separable())
    assert "TorchScript" in why["0.0"]


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Bottleneck, {"ratio": 0}, "'energy:SHARE' or 'params:SHARE' with a share above 0"),
        (Bottleneck, {"ratio": "params:0"}, "got 'params:0'"),
        (Bottleneck, {"ratio": "energy:1.5"}, "got 'energy:1.5'"),
        (Bottleneck, {"ratio": "energy:half"}, "got 'energy:half'"),
        (CompactBlock, {"ratio": "half"}, "got 'half'"),
        (CompactBlock, {"multiplier": 0}, "'multiplier' must be at least 1, not 0"),
        (CompactBlock, {"ratio": "energy:0.5", "multiplier": 2}, "chooses the multiplier, too"),
        (Separable, {"multiplier": 0}, "'multiplier' must be at least 1, not 0"),
        (Separable, {"ratio": "energy:0.5", "multiplier": 2}, "give one of them"),
        (Separable, {"min_channels": 0}, "'min_channels' must be at least 1, not 0"),
        (Separable, {"where": ()}, "'where' must name 'all', 'encoder', 'decoder' or patterns"),
    ],
)
def test_options_out_of_range_are_named(kind: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        kind(**options)
