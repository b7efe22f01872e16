"""Any choice of the results to keep is exact, its peak is predicted, and a budget is met."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from pocketize import measure, plan, rewrite, zoo
from pocketize.errors import NoEffectWarning, OptionError, PatternError, RewriteError
from pocketize.graph.capture import capture
from pocketize.graph.inputs import as_inputs
from pocketize.passes import Recompute
from pocketize.passes.recompute.curve import Choice, curve, front, movable
from pocketize.passes.recompute.forward import RecomputingForward
from pocketize.passes.recompute.recorded_step import record_step
from pocketize.passes.recompute.weight_uses import chosen, find_uses, freed
from pocketize.plugin.recipe import dump_recipe, parse_recipe
from pocketize.plugin.registry import parse_pass
from tests.foreign import foreign_nets
from tests.passes.recompute.nets import Functional, Net, gradients, same
from tests.passes.recompute.test_plan import dynunet, plainconv

FOREIGN = {net.name: net for net in foreign_nets()}
#: Residual units, dropout, batch norm, gates; the others are dense, supervised deeply, ...
QUICK = ["monai_unet_3d_residual", "monai_attention_unet"]
REST = [name for name in FOREIGN if name not in QUICK]


def small() -> Net:
    return Net(nn.BatchNorm2d, nn.ReLU(inplace=True))


def subsets(names: Any, count: int, seed: int = 0) -> list[frozenset[str]]:
    """Random sets, from sparse to dense, with the one of everything."""
    draw = random.Random(seed)
    shares = [(i + 1) / (count + 1) for i in range(count)]
    found = [frozenset(n for n in sorted(names) if draw.random() < share) for share in shares]
    return [*found, frozenset(names)]


def with_rebuilt(model: nn.Module, rebuilt: frozenset[str], frees: Any, least: int) -> nn.Module:
    twin = copy.deepcopy(model)
    RecomputingForward(twin, rebuilt, frees, least).install()
    return twin


def check_gradients(model: nn.Module, x: Any, count: int) -> None:
    model, x = model.double().train(), x.double()
    uses = find_uses(traced := capture(model, x, train=True))
    frees = freed(traced, uses)
    expected = gradients(copy.deepcopy(model), x)
    for rebuilt in subsets(movable(uses), count):
        # norms over few values enlarge the rounding of a chain as long as that of a whole network
        tolerance = 1e-8 if len(rebuilt) > 64 else 1e-9
        same(expected, gradients(with_rebuilt(model, rebuilt, frees, 0), x), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_choice_has_the_same_gradients_on_small_nets(dropout: float) -> None:
    for norm in (nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d):
        net = Net(norm, nn.LeakyReLU(inplace=True), dropout=dropout)
        check_gradients(net, torch.randn(2, 1, 8, 8), 8)
    check_gradients(Functional(), torch.randn(2, 1, 8, 8), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_any_choice_has_the_same_gradients(name: str) -> None:
    check_gradients(FOREIGN[name].build(), FOREIGN[name].inputs(), 2)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", REST)
def test_any_choice_has_the_same_gradients_on_all_nets(name: str) -> None:
    check_gradients(FOREIGN[name].build(), FOREIGN[name].inputs(), 3)


def check_peaks(model: nn.Module, x: Any, count: int, least: int, within: float) -> None:
    model.train()
    uses = find_uses(traced := capture(model, x, train=True))
    frees, names = freed(traced, uses), movable(uses)
    step = record_step(model, as_inputs(x, model), names, frees, least)
    for rebuilt in [frozenset[str](), *subsets(names, count)]:
        found = measure(with_rebuilt(model, rebuilt, frees, least), x, estimate=True).peak
        assert step.cost(rebuilt).peak == pytest.approx(found, rel=within, abs=0)


@pytest.mark.slow
def test_the_predicted_peak_is_the_estimate_to_the_byte() -> None:
    for least in (0, 2048):
        check_peaks(small(), torch.randn(2, 1, 32, 32), 3, least, within=0)


@pytest.mark.slow
def test_the_predicted_peak_is_the_estimate() -> None:
    net = FOREIGN[QUICK[0]]
    check_peaks(net.build(), net.inputs(), 1, 0, within=1e-3)


@pytest.mark.whole
@pytest.mark.slow
def test_the_predicted_peak_is_the_estimate_of_large_networks() -> None:
    check_peaks(plainconv(), torch.zeros(1, 1, 16, 16, 16), 3, 0, within=0)
    # The peak of this one is in the forward pass if everything is kept.
    check_peaks(zoo.build("memory_fcn3d"), torch.zeros(1, 1, 48, 48, 48), 2, 0, within=1e-4)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", FOREIGN)
def test_the_predicted_peak_is_the_estimate_on_all_nets(name: str) -> None:
    check_peaks(FOREIGN[name].build(), FOREIGN[name].inputs(), 3, 0, within=0.02)


@pytest.mark.slow
def test_the_curve_is_a_front_and_its_points_are_what_they_say() -> None:
    model, x = small(), torch.randn(2, 1, 32, 32)
    points = curve(model, x, min_bytes=0)
    assert [p.peak for p in points] == sorted({p.peak for p in points}, reverse=True)
    assert [p.flops for p in points] == sorted({p.flops for p in points})
    assert points[0].flops == 0
    assert points[0].step == 1.0
    for point in (points[0], points[len(points) // 2], points[-1]):
        made = rewrite(model, Recompute(keep=point.keep, min_bytes=0), inputs=x)
        assert measure(made, x, estimate=True).peak == point.peak


@pytest.mark.slow
def test_the_search_finds_what_trying_everything_finds() -> None:
    x = torch.randn(2, 1, 32, 32)
    uses = find_uses(traced := capture(small(), x, train=True))
    names = movable(uses)
    step = record_step(small(), as_inputs(x, small()), names, freed(traced, uses), 0)
    listed = sorted(step.uses)
    every = [
        step.cost({n for i, n in enumerate(listed) if mask >> i & 1})
        for mask in range(1 << len(listed))
    ]
    found = front(step).values()
    for cost in every:
        assert any(f.peak <= cost.peak and f.flops <= cost.flops for f in found)


@pytest.mark.slow
def test_a_budget_is_met_with_the_least_work() -> None:
    model, x = small(), torch.randn(2, 1, 32, 32)
    before = measure(model, x, estimate=True).peak
    points = curve(model, x, min_bytes=0)
    middle = points[len(points) // 2]
    made = rewrite(model, Recompute(budget=f"{middle.peak}B", min_bytes=0), inputs=x)
    assert measure(made, x, estimate=True).peak == middle.peak
    share = f"{100 * (middle.peak + 1) / before:.3f}%"
    text = str(plan(model, Recompute(budget=share, min_bytes=0), inputs=x))
    assert "the same choice without a search: recompute:keep=" in text
    assert "the budget needs its memory" in text


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    x = torch.randn(2, 1, 32, 32)
    least = curve(small(), x, min_bytes=0)[-1].peak
    with pytest.raises(RewriteError, match="the smallest found is") as caught:
        rewrite(small(), Recompute(budget=f"{least - 1}B", min_bytes=0), inputs=x)
    assert "Ask for that" in str(caught.value)


@pytest.mark.slow
def test_a_budget_that_is_met_already_changes_nothing() -> None:
    with pytest.warns(NoEffectWarning, match="is within the budget"):
        rewrite(small(), Recompute(budget="1GiB", min_bytes=0), inputs=torch.randn(2, 1, 8, 8))


@pytest.mark.slow
def test_what_is_kept_can_be_named() -> None:
    x = torch.randn(2, 1, 8, 8)
    uses = find_uses(capture(small(), x, train=True))
    rebuilt = {use.name for use in chosen(uses, ("a?.weight", "up", "c*"))}
    assert rebuilt == {"b1.weight", "b2.weight", "head.weight"}
    assert {use.name for use in chosen(uses, ())} == movable(uses)
    with pytest.raises(PatternError, match=r"keep='blck' matches .* Did you mean 'block'"):
        rewrite(small(), Recompute(keep="blck"), inputs=x)


def test_a_second_use_of_a_weight_is_kept_by_itself() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    traced = capture(nn.Sequential(conv, nn.ReLU(), conv), torch.randn(1, 2, 4, 4))
    uses = find_uses(traced)
    assert {use.name for use in chosen(uses, ("0.weight",))} == {"0.weight#1"}
    assert chosen(uses, ("0",)) == {}


def test_choices_are_written_and_read() -> None:
    for given in (
        Recompute(keep=("a.weight", "b.*", "c.weight#1")),
        Recompute(keep=()),
        Recompute(budget="4GiB", optimizer=None),
        Recompute(budget="36%"),
        Recompute(keep="level"),
    ):
        assert parse_pass(str(given)) == given
        assert parse_recipe(dump_recipe([given])) == [given]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"budget": "much"}, "expected a size such as '4GiB'"),
        ({"budget": "0%"}, "share of the present peak"),
        ({"budget": "1GiB", "keep": "level"}, "leave keep out"),
        ({"keep": ("block", "a.*")}, "no pattern"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Recompute(**options)


@pytest.mark.slow
def test_a_budget_for_a_model_that_cannot_be_estimated_is_refused() -> None:
    frozen = small().requires_grad_(False)
    with pytest.raises(RewriteError, match="a budget needs an estimate"):
        rewrite(frozen, Recompute(budget="1MiB"), inputs=torch.randn(2, 1, 8, 8))


def reaches(points: list[Choice], peak: float, step: float) -> bool:
    return any(point.peak <= peak and point.step <= step for point in points)


@pytest.mark.slow
@pytest.mark.parametrize("make", [plainconv, pytest.param(dynunet, marks=pytest.mark.whole)])
def test_the_curve_at_96_cubed(make: Any) -> None:
    model, x = make(), torch.zeros(1, 1, 96, 96, 96)
    before = measure(model, x, estimate=True).peak
    points = curve(model, x)
    assert reaches(points, 0.36 * before, 1.2)
    assert reaches(points, 0.31 * before, 1.3)
    uses = find_uses(traced := capture(model, x, train=True))
    step = record_step(model, as_inputs(x, model), movable(uses), freed(traced, uses), 65536)
    for mode in ("conv", "block", "level"):
        cost = step.cost([use.name for use in chosen(uses, mode)])
        assert any(p.peak <= cost.peak and p.flops <= cost.flops for p in points)
