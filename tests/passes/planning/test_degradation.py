"""The paper's degradations, and fits to trained points."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketize.errors import OptionError, PlanningError
from pocketize.passes.planning import (
    DEGRADATION,
    Degradation,
    DegradationFit,
    Point,
    degradation_of,
    fit_degradation,
)
from tests.examples import examples

#: The multipliers of the paper, as weights of its U-Net.
SIZES = [31_023_744, 17_452_800, 7_757_568, 1_939_968, 1_091_232, 485_280, 121_440]
LYMPH, DRIVE, CHASE = ("lymph", 0.1518), ("drive", 0.0362), ("chase", 0.2826)


def _points(
    degradation: Degradation, datasets: list[tuple[str, float]], base: float = 0.8
) -> list[Point]:
    """Points that lie on the model's lines exactly."""
    return [
        Point(name, c, size, base * (1 - degradation.relative_drop(c, math.log10(SIZES[0] / size))))
        for name, c in datasets
        for size in SIZES
    ]


def test_the_papers_table_is_built_in() -> None:
    table = {key: (made.lam, made.delta) for key, made in DEGRADATION.items()}
    assert table == {
        ("unet", "f1"): (0.437, 0.01030),
        ("unet", "iu"): (0.349, 0.000072),
        ("cumedvision", "f1"): (0.538, 0.00427),
        ("cumedvision", "iu"): (0.366, 0.000096),
        ("ucunet", "f1"): (0.241, 0.00956),
        ("ucunet", "iu"): (0.151, 0.007080),
    }


def test_an_architecture_is_found_however_it_is_written() -> None:
    assert degradation_of("U-Net") is DEGRADATION["unet", "f1"]
    assert degradation_of("UCU_Net", "iu") is DEGRADATION["ucunet", "iu"]


def test_an_unknown_architecture_or_metric_is_told_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"no degradation of 'unett'.*Did you mean 'unet'"):
        degradation_of("unett")
    with pytest.raises(OptionError, match="metric must be 'f1' or 'iu', not 'dice'"):
        degradation_of("unet", "dice")


def test_the_slope_is_lambda_c_plus_delta_and_the_drop_counts_decades() -> None:
    unet = degradation_of("unet")
    assert unet.slope(0.1518) == pytest.approx(0.437 * 0.1518 + 0.0103)
    assert unet.relative_drop(0.1518, 2.0) == pytest.approx(2 * unet.slope(0.1518))


@pytest.mark.parametrize("complexity", [-0.1, math.nan, math.inf])
def test_a_complexity_out_of_range_is_refused(complexity: float) -> None:
    with pytest.raises(OptionError, match="finite number of at least 0"):
        degradation_of("unet").slope(complexity)


@pytest.mark.parametrize("lam", [math.nan, math.inf, "0.4", True])
def test_a_degradation_of_no_number_is_refused(lam: object) -> None:
    with pytest.raises(OptionError, match="lam must be"):
        Degradation(lam, 0.01)  # type: ignore[arg-type]


def test_a_degradation_survives_json() -> None:
    unet = degradation_of("unet", "iu")
    assert Degradation.from_json(json.loads(json.dumps(unet.to_json()))) == unet
    with pytest.raises(OptionError, match="expected the fields"):
        Degradation.from_json({"lambda": 1.0})


@given(lam=st.floats(0.01, 1), delta=st.floats(0, 0.05), base=st.floats(0.1, 1))
@settings(max_examples=examples(25), deadline=None)
def test_a_fit_recovers_what_the_points_were_made_with(
    lam: float, delta: float, base: float
) -> None:
    made = Degradation(lam, delta)
    fit = fit_degradation(_points(made, [LYMPH, DRIVE, CHASE], base))
    assert fit.lam == pytest.approx(lam, rel=1e-9)
    assert fit.delta == pytest.approx(delta, rel=1e-9, abs=1e-12)
    assert fit.r_squared == pytest.approx(1)
    assert [line.r_squared for line in fit.datasets] == pytest.approx([1, 1, 1])


def test_accuracies_in_percent_give_the_same_line() -> None:
    points = _points(degradation_of("unet"), [LYMPH, DRIVE])
    percent = [Point(p.dataset, p.complexity, p.weights, 100 * p.accuracy) for p in points]
    assert fit_degradation(percent).lam == pytest.approx(fit_degradation(points).lam)


def test_two_data_sets_with_two_sizes_are_enough() -> None:
    points = [("a", 0.1, 1000, 0.9), ("a", 0.1, 10, 0.72), ("b", 0.3, 1000, 0.5), ("b", 0.3, 10, 0)]
    fit = fit_degradation(points)
    assert [line.slope for line in fit.datasets] == pytest.approx([0.1, 0.5])
    assert (fit.lam, fit.delta) == pytest.approx((2.0, -0.1))
    assert "there is no R^2" in str(fit)


def test_the_uncompressed_network_is_the_largest_and_repetitions_are_averaged() -> None:
    points = [
        *[("a", 0.1, 100, 0.45), ("a", 0.1, 1000, 0.8), ("a", 0.1, 1000, 1.0)],
        *[("b", 0.2, 100, 0.3), ("b", 0.2, 1000, 0.6)],
    ]
    first, second = fit_degradation(points).datasets
    assert (first.base_weights, first.base_accuracy) == (1000, pytest.approx(0.9))
    assert first.slope == pytest.approx(0.5)
    assert second.slope == pytest.approx(0.5)


def test_noise_shows_in_r_squared() -> None:
    points = _points(degradation_of("unet"), [LYMPH, DRIVE, CHASE])
    noisy = [
        Point(p.dataset, p.complexity, p.weights, p.accuracy + 0.01 * (-1) ** i)
        for i, p in enumerate(points)
    ]
    fit = fit_degradation(noisy)
    assert all(0 < line.r_squared < 1 for line in fit.datasets)


def test_a_level_line_is_a_fit_and_no_division_by_zero() -> None:
    points = [("a", 0.1, 10, 0.9), ("a", 0.1, 100, 0.9), ("b", 0.2, 10, 0.9), ("b", 0.2, 100, 0.9)]
    fit = fit_degradation(points)
    assert (fit.lam, fit.delta, fit.r_squared) == (0, 0, 1)


GOOD = [("a", 0.1, 1000, 0.9), ("a", 0.1, 10, 0.7), ("b", 0.3, 1000, 0.9), ("b", 0.3, 10, 0.5)]
BAD = [
    ([], "at least two data sets, got 0"),
    (GOOD[:2], r"at least two data sets, got 1 \(a\)"),
    ([*GOOD[:2], GOOD[2]], "all points of data set 'b' have 1,000 weights"),
    ([*GOOD[:2], ("b", 0.1, 1000, 0.9), ("b", 0.1, 10, 0.5)], "all data sets have the complexity"),
    ([*GOOD, ("a", 0.2, 100, 0.8)], r"'a' has points of different complexities: \[0.1, 0.2\]"),
    ([*GOOD[1:], ("a", 0.1, 1000, 0.0)], "accuracy 0, so accuracies cannot be divided by it"),
    ([*GOOD, ("a", 0.1, 0, 0.8)], "weights must be positive, not 0"),
    ([*GOOD, ("a", 0.1, 100, math.nan)], "accuracy must be finite, not nan"),
    ([*GOOD, ("a", 0.1, 100, "0.9")], "accuracy must be a number, not '0.9'"),
    ([*GOOD, ("a", -0.1, 100, 0.9)], "must not be negative"),
    ([*GOOD, ("a", 0.1, 100)], r"expected a Point or \(dataset, complexity, weights, accuracy\)"),
]


@pytest.mark.parametrize(("points", "message"), BAD, ids=[m for _, m in BAD])
def test_points_that_make_no_line_are_refused(points: list[object], message: str) -> None:
    with pytest.raises(PlanningError, match=message):
        fit_degradation(points)  # type: ignore[arg-type]


def test_a_fit_reads_as_a_table() -> None:
    fit = fit_degradation(_points(degradation_of("unet"), [LYMPH, DRIVE, CHASE]))
    text = repr(fit)
    assert text.startswith("lambda 0.437, delta 0.0103 (custom, f1); R^2 1.000 over 3 data sets")
    rows = [line.split() for line in text.splitlines()]
    assert ["drive", "0.0362", "7", "31,023,744", "0.8000", "0.02612", "0.02612", "1.000"] in rows


def test_a_fit_survives_json() -> None:
    fit = fit_degradation(_points(degradation_of("unet"), [LYMPH, DRIVE]), architecture="unet")
    again = DegradationFit.from_json(json.loads(json.dumps(fit.to_json())))
    assert again == fit


def test_json_that_was_changed_or_is_another_thing_is_refused() -> None:
    data = fit_degradation(_points(degradation_of("unet"), [LYMPH, DRIVE])).to_json()
    data["points"][0][3] *= 1.5
    with pytest.raises(PlanningError, match="one of the two was changed"):
        DegradationFit.from_json(data)
    with pytest.raises(PlanningError, match="not the JSON of a degradation's fit"):
        DegradationFit.from_json({"points": []})


@pytest.mark.slow
def test_a_fit_can_be_drawn(tmp_path: Path) -> None:
    fit = fit_degradation(_points(degradation_of("unet"), [LYMPH, DRIVE, CHASE]))
    fit.plot(tmp_path / "fit.svg")
    drawn = (tmp_path / "fit.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn
    assert len(drawn) > 10_000
    with pytest.raises(PlanningError, match="cannot draw the fit to"):
        fit.plot(tmp_path / "missing" / "fit.png")
    with pytest.raises(PlanningError, match="cannot draw the fit to"):
        fit.plot(tmp_path / "fit.nonsense")


def test_without_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fit = fit_degradation(_points(degradation_of("unet"), [LYMPH, DRIVE]))
    with pytest.raises(PlanningError, match=r"pip install 'pocketize\[complexity\]'"):
        fit.plot(tmp_path / "fit.png")
