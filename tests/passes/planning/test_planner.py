"""Plans: the paper's table, budgets that hold, and what is refused."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import UNet
from torch import nn

from pocketize import measure, rewrite
from pocketize.errors import BudgetError, OptionError, PatternError, PlanningError
from pocketize.passes import Width
from pocketize.passes.planning import Degradation, WidthPlan, fit_degradation, plan_widths
from pocketize.plugin.recipe import parse_recipe
from pocketize.zoo.complexity import conv_weights
from tests.examples import examples
from tests.passes.planning.nets import (
    LYMPH,
    SMALL,
    Literal,
    paper_unet,
    parameters,
    small_unet,
)

CASE_1: dict[str, Any] = {"max_bytes": "1MB", "bytes_per_weight": 8}
CASE_2: dict[str, Any] = {"max_drop": 0.05}
TABLE_6 = [
    (CASE_1, False, {}, (4, 8, 16, 32, 65), 122_801),
    (CASE_1, True, {}, (20, 19, 25, 29, 33), 123_154),
    (CASE_2, False, {"rounding": "doubling"}, (30, 60, 120, 240, 480), 6_816_900),
    (CASE_2, True, {"rounding": "shared"}, (30, 39, 59, 85, 119), 842_134),
]


@pytest.mark.slow
@pytest.mark.parametrize("count", ["parameters", "conv"])
@pytest.mark.parametrize(("budget", "layerwise", "options", "widths", "theta"), TABLE_6)
def test_the_papers_table_6_comes_out_exactly(
    budget: dict[str, Any],
    layerwise: bool,
    options: dict[str, Any],
    widths: tuple[int, ...],
    theta: int,
    count: Any,
) -> None:
    made = plan_widths(
        paper_unet(),
        inputs="1x1x32x32",
        complexity=LYMPH,
        degradation="unet",
        layerwise=layerwise,
        count=count,
        **budget,
        **options,
    )
    assert made.widths == widths
    assert made.theta == theta
    assert made.before.theta == 31_023_744
    assert made.width_options() == {"levels": list(widths)}


@pytest.mark.slow
def test_the_closed_form_is_near_the_papers_plan_and_says_what_it_misses() -> None:
    closed = plan_widths(
        paper_unet(),
        inputs="1x1x32x32",
        complexity=LYMPH,
        degradation="unet",
        method="closed-form",
        **CASE_1,
    )
    share = 125_000 / closed.before.parameters
    left = sum(
        a**2 * level.theta_before
        for a, level in zip(closed.multipliers, closed.levels, strict=True)
    )
    assert left == pytest.approx(share * closed.before.theta)  # eq. 13
    assert closed.widths != (20, 19, 25, 29, 33)
    assert ("misses the budget by" in str(closed)) == (closed.after.parameters > 125_000)


@pytest.mark.slow
def test_the_uniform_closed_form_is_the_square_root_of_the_share() -> None:
    closed = plan_widths(
        paper_unet(), inputs="1x1x32x32", method="closed-form", count="conv", **CASE_1
    )
    assert closed.multipliers == pytest.approx([math.sqrt(125_000 / 31_023_744)] * 5)  # eq. 6
    assert closed.widths == (4, 8, 16, 32, 65)


@functools.cache
def _unet() -> nn.Module:
    return small_unet()


def _plan(**options: Any) -> WidthPlan:
    return plan_widths(_unet(), inputs=SMALL, **options)


@pytest.mark.slow
@given(
    budget=st.integers(400, 80_000),
    more=st.integers(0, 20_000),
    layerwise=st.booleans(),
    rounding=st.sampled_from(["nearest", "up", "down"]),
    round_to=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=examples(12), deadline=None)
def test_a_plan_is_within_its_budget_and_grows_with_it(
    budget: int, more: int, layerwise: bool, rounding: Any, round_to: int
) -> None:
    options: dict[str, Any] = {
        "complexity": LYMPH,
        "degradation": "unet",
        "layerwise": layerwise,
        "rounding": rounding,
        "round_to": round_to,
    }
    try:
        less = _plan(max_parameters=budget, **options)
    except BudgetError as error:
        smallest = int(str(error).partition("max_parameters=")[2].partition(",")[0])
        assert smallest > budget
        less = _plan(max_parameters=smallest, **options)
        assert less.after.parameters == smallest
        return
    wide = _plan(max_parameters=budget + more, **options)
    assert less.after.parameters <= budget
    assert less.after.parameters <= wide.after.parameters <= budget + more
    assert all(a <= b for a, b in zip(less.widths, wide.widths, strict=True))  # type: ignore[operator]


@pytest.mark.slow
@given(budget=st.integers(1_000, 60_000), lam=st.floats(0.05, 1), delta=st.floats(0.001, 0.05))
@settings(max_examples=examples(8), deadline=None)
def test_levels_lose_equally_before_rounding(budget: int, lam: float, delta: float) -> None:
    made = _plan(max_parameters=budget, complexity=LYMPH, degradation=Degradation(lam, delta))
    losses = [level.slope * math.log10(level.multiplier) for level in made.levels if level.slope]
    assert losses == pytest.approx([losses[0]] * 5)  # eq. 11


@pytest.mark.slow
def test_what_is_planned_is_what_the_rewritten_model_has() -> None:
    made = _plan(max_bytes="40kB", complexity=LYMPH, degradation="unet")
    small = rewrite(_unet(), Width.from_plan(made), inputs=SMALL)
    assert parameters(small) == made.after.parameters
    assert conv_weights(small) == made.theta
    assert made.bytes == 4 * parameters(small) <= 40_000


@pytest.mark.slow
def test_a_dtype_of_half_the_size_allows_twice_the_weights() -> None:
    half = _plan(max_bytes="40kB", dtype="float16")
    assert _plan(max_bytes="80kB").widths == half.widths
    assert half.bytes == 2 * half.after.parameters


@pytest.mark.slow
def test_buffers_count_where_that_is_asked_for() -> None:
    net = small_unet(norm=True)
    made = plan_widths(net, inputs=SMALL, max_bytes="40kB", count="stored")
    small = rewrite(net, Width.from_plan(made), inputs=SMALL)
    held = sum(tensor.numel() for tensor in small.state_dict().values())
    assert made.after.stored == held <= 10_000


@pytest.mark.slow
def test_several_budgets_hold_together() -> None:
    by_bytes = _plan(max_bytes="60kB")
    both = _plan(max_bytes="60kB", max_parameters=10_000)
    assert both.after.parameters <= 10_000 < by_bytes.after.parameters


def test_a_budget_that_is_met_already_changes_nothing() -> None:
    made = _plan(max_parameters="1M")
    assert made.widths == (8, 12, 16, 24, 32)
    assert "meets this as it is" in str(made)
    assert made.width_options() == {"scale": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
def test_an_accuracy_floor_holds_with_the_default_rounding(layerwise: bool) -> None:
    made = _plan(
        min_accuracy=0.76, accuracy=0.8, complexity=LYMPH, degradation="unet", layerwise=layerwise
    )
    assert made.drop is not None
    assert 0 < made.drop <= 0.05
    assert made.after.theta < made.before.theta
    if layerwise:  # eq. 17
        expected = [10 ** (-0.05 / (0.437 * c + 0.0103) / 2) for c in LYMPH]
        assert made.multipliers == pytest.approx(expected)


@pytest.mark.slow
def test_a_floor_and_a_budget_that_exclude_each_other_are_told() -> None:
    known: dict[str, Any] = {"complexity": LYMPH, "degradation": "unet"}
    both = _plan(max_drop=0.2, max_parameters=20_000, **known)
    assert both.after.parameters <= 20_000
    with pytest.raises(BudgetError, match=r"costs a predicted .* Allow max_drop=0\.\d+"):
        _plan(max_drop=0.01, max_parameters=2_000, **known)


@pytest.mark.slow
def test_a_memory_budget_holds_when_the_rewritten_model_is_estimated() -> None:
    net = UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    whole = measure(net, "2x1x32x32", estimate=True).peak
    told: list[str] = []
    options = {"max_peak": 0.6 * whole, "optimizer": "adamw", "progress": told.append}
    made = plan_widths(net, inputs="2x1x32x32", **options)
    small = rewrite(net, Width.from_plan(made), inputs="2x1x32x32")
    peak = measure(small, "2x1x32x32", estimate=True).peak
    assert peak == made.peak_after <= 0.6 * whole
    assert made.peak_before == whole
    assert peak > 0.4 * whole  # as wide as it can be, not as narrow
    assert told[0].startswith("widths 8 16/32")
    assert "peak, estimated (training step, adamw" in str(made)


@pytest.mark.slow
def test_the_papers_guess_of_memory_is_an_option_and_is_told_where_it_misses() -> None:
    whole = measure(_unet(), SMALL, "infer", estimate=True).peak
    guess = _plan(max_peak=0.5 * whole, mode="infer", method="closed-form")
    assert guess.multipliers == pytest.approx([0.5] * 5)  # eq. 7
    known = {"complexity": LYMPH, "degradation": "unet"}
    layers = _plan(max_peak=0.5 * whole, mode="infer", method="closed-form", **known)
    left = sum(level.multiplier * level.theta_before for level in layers.levels)
    assert left == pytest.approx(0.5 * layers.before.theta)  # eq. 14
    for made in (guess, layers):
        assert made.peak_after is not None
        assert ("misses the budget" in str(made)) == (made.peak_after > 0.5 * whole)


@pytest.mark.slow
def test_an_infeasible_budget_tells_the_smallest_that_is_feasible() -> None:
    with pytest.raises(BudgetError, match="with all widths at their minimum") as caught:
        _plan(max_bytes=100)
    smallest = str(caught.value).partition("max_bytes=")[2].partition(")")[0]
    assert _plan(max_bytes=float(smallest)).bytes == float(smallest)
    with pytest.raises(BudgetError, match="no widths bring the peak to 1000 B"):
        _plan(max_peak=1000, mode="infer")
    with pytest.raises(BudgetError, match="no widths bring"):
        _plan(max_bytes=1, method="closed-form")


@pytest.mark.slow
def test_the_minimum_is_kept_and_narrower_layers_stay() -> None:
    made = _plan(max_parameters=19_300, minimum=10)
    assert min(made.widths) == 8  # type: ignore[type-var]
    assert sorted(made.widths)[1] == 10  # type: ignore[type-var]


def test_layers_of_a_level_may_differ_and_the_recipe_names_them() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 20, 3), nn.ReLU(), nn.Conv2d(20, 2, 1)
    )
    made = plan_widths(net, inputs="1x1x16x16", max_parameters=600)
    assert set(made.width_options()) == {"channels"}
    (width,) = parse_recipe(made.recipe())
    small = rewrite(net, width, inputs="1x1x16x16")
    assert parameters(small) == made.after.parameters <= 600


@pytest.mark.slow
def test_what_is_kept_stays_and_the_rest_gives_more() -> None:
    made = _plan(max_parameters=12_000, keep=["encoder.0.*"])
    small = rewrite(_unet(), Width.from_plan(made), inputs=SMALL)
    assert small.encoder[0][0].out_channels == 8  # type: ignore[index, union-attr]
    assert parameters(small) == made.after.parameters <= 12_000
    with pytest.raises(PatternError, match="matches no module"):
        _plan(max_parameters=12_000, keep=["nothing.*"])


@pytest.mark.slow
def test_what_only_the_check_finds_immovable_is_planned_around() -> None:
    net = Literal()
    made = plan_widths(net, inputs="1x1x8x8", max_parameters=400)
    small = rewrite(net, Width.from_plan(made), inputs="1x1x8x8")
    assert small.middle.out_channels == 16
    assert parameters(small) == made.after.parameters <= 400
    assert "the check found that these cannot change: middle" in str(made)


@pytest.mark.slow
def test_a_plan_is_written_as_a_recipe_and_as_json() -> None:
    made = _plan(max_bytes="40kB", complexity=LYMPH, degradation="unet")
    assert parse_recipe(made.recipe()) == [Width.from_plan(made)]
    (reset,) = parse_recipe(made.recipe(weights="reset"))
    assert reset == Width.from_plan(made, weights="reset")
    data = json.loads(json.dumps(made.to_json()))
    assert [level["after"][0] for level in data["levels"]] == list(made.widths)
    assert data["after"]["parameters"] == made.after.parameters
    assert data["degradation"]["architecture"] == "unet"


@pytest.mark.slow
def test_a_plan_reads_as_a_table() -> None:
    text = str(_plan(max_bytes="40kB", complexity=LYMPH, degradation="unet"))
    assert text.startswith("layer-wise widths of UNet2d for at most 40,000 B at float32")
    assert "(eq. 11); sum alpha_i^2 theta_i = theta* (eq. 13), by search" in text
    assert "accuracy, predicted" in text
    assert "| level" in _plan(max_bytes="40kB").to_markdown()


@pytest.mark.slow
def test_a_fit_can_be_planned_with() -> None:
    points = [
        ("a", 0.1, 1000, 0.9),
        ("a", 0.1, 10, 0.8),
        ("b", 0.3, 1000, 0.9),
        ("b", 0.3, 10, 0.5),
    ]
    fit = fit_degradation(points)
    made = _plan(max_parameters=20_000, complexity=LYMPH, degradation=fit)
    assert made.degradation == fit.degradation


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, OptionError, "no budget was given"),
    ({"max_bytes": "1 apple"}, OptionError, "max_bytes: expected a number, or one with a unit"),
    ({"max_bytes": -1}, OptionError, "max_bytes must be positive"),
    ({"max_parameters": "1MB"}, OptionError, "max_parameters: expected a number"),
    ({"max_bytes": 1, "dtype": "flaot16"}, OptionError, "Did you mean 'float16'"),
    ({"max_bytes": 1, "dtype": "int8", "bytes_per_weight": 1}, OptionError, "not both"),
    ({"max_bytes": 9000, "count": "all"}, OptionError, "count must be one of"),
    ({"max_bytes": 9000, "method": "guess"}, OptionError, "method must be"),
    ({"max_bytes": 9000, "rounding": "bankers"}, OptionError, "rounding must be one of"),
    ({"max_bytes": 9000, "round_to": 0}, OptionError, "round_to must be a whole number"),
    ({"max_bytes": 9000, "layerwise": True}, OptionError, "layer-wise plan needs the complexity"),
    ({"max_drop": 0.1}, OptionError, "an accuracy floor needs the complexity of the images"),
    ({"max_drop": 1.5}, OptionError, "above 0 and below 1"),
    ({"max_drop": 0.1, "min_accuracy": 0.9}, OptionError, "not both: they say the same"),
    ({"min_accuracy": 0.9, "accuracy": 0.8}, OptionError, "below the accuracy of the network"),
    ({"max_bytes": 9000, "complexity": LYMPH}, OptionError, "needs a degradation"),
    (
        {"max_bytes": 9000, "complexity": LYMPH[:3], "degradation": "unet"},
        PlanningError,
        "3 complexities are given, and UNet2d has 5 resolution levels: 32x32, 16x16, 8x8, 4x4, 2x2",
    ),
    (
        {"max_bytes": 9000, "complexity": LYMPH, "degradation": Degradation(-1, 0)},
        PlanningError,
        "a smaller network is not worse there",
    ),
    (
        {"max_bytes": 9000, "complexity": LYMPH, "degradation": "unet", "rounding": "doubling"},
        OptionError,
        "is for uniform plans",
    ),
    ({"max_bytes": 9000, "complexity": 0.1, "degradation": 3}, OptionError, "expected a Degradat"),
    ({"max_bytes": 9000, "keep": ["*"]}, PlanningError, "has no width that can change"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=[str(row[0]) for row in BAD])
def test_what_cannot_be_planned_is_told(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _plan(**options)


@pytest.mark.slow
def test_a_peak_is_planned_around_what_cannot_move() -> None:
    net = Literal()
    whole = measure(net, "1x1x32x32", "infer", estimate=True).peak
    made = plan_widths(net, inputs="1x1x32x32", max_peak=0.9 * whole, mode="infer")
    assert made.peak_after is not None
    assert made.peak_after <= 0.9 * whole
    small = rewrite(net, Width.from_plan(made), inputs="1x1x32x32")
    assert small.middle.out_channels == 16
    assert measure(small, "1x1x32x32", "infer", estimate=True).peak == made.peak_after


def test_a_model_whose_widths_only_seem_free_has_no_plan() -> None:
    net = Literal()
    net.first = nn.Identity()
    net.middle = nn.Conv2d(1, 16, 3, padding=1)
    with pytest.raises(BudgetError, match=r"minimum \(1\) \(middle cannot change\) it has 177"):
        plan_widths(net, inputs="1x1x8x8", max_parameters=100)
