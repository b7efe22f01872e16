from __future__ import annotations

import re

import pytest

from pocketize.errors import ReportError
from pocketize.report import METRICS, Threshold
from tests.report.fixed import MEASURED, MIB, estimated, with_peaks


def test_a_threshold_reads_percent_and_amount_in_either_order() -> None:
    expected = Threshold("peak", percent=2.0, amount=16 * MIB)
    assert Threshold.parse("peak 2% 16MiB") == expected
    assert Threshold.parse("  peak  16MiB 2% ") == expected
    assert Threshold.parse("time 20ms") == Threshold("time", None, 0.02)
    assert Threshold.parse("parameters 1k") == Threshold("parameters", None, 1000.0)


@pytest.mark.parametrize(
    "text",
    ["peak 2% 16MiB", "peak -30%", "peak 1537B", "time 0.5% 20ms", "parameters 0% 1k", "macs 7"],
)
def test_a_threshold_writes_the_text_that_it_is_read_from(text: str) -> None:
    assert str(Threshold.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected one of peak"),
        ("peek 2%", "Did you mean 'peak'?"),
        ("peak", "no allowance given"),
        ("peak 2% 3%", "two percentages"),
        ("peak 2MiB 3MiB", "got '3MiB'"),
        ("peak 2", "got '2'"),
        (f"peak {'9' * 400}%", "too large a number"),
        ("peak 20ms", "(B, KiB, MiB, GiB, TiB, kB, MB, GB, TB) after 'peak', got '20ms'"),
    ],
)
def test_an_unreadable_threshold_says_what_was_expected(text: str, expected: str) -> None:
    with pytest.raises(ReportError, match=re.escape(expected)):
        Threshold.parse(text)


@pytest.mark.parametrize(
    ("before", "after", "fires"),
    [
        (1000 * MIB, 1020 * MIB, False),  # exactly 2 %
        (1000 * MIB, 1021 * MIB, True),  # over both
        (100 * MIB, 110 * MIB, False),  # 10 %, but within 16 MiB
        (100 * MIB, 117 * MIB, True),
        (10_000 * MIB, 10_100 * MIB, False),  # 100 MiB, but within 2 %
        (1000 * MIB, 100 * MIB, False),
    ],
)
def test_a_double_threshold_fires_only_on_what_is_over_both(
    before: int, after: int, fires: bool
) -> None:
    violations = with_peaks(before, after).check(["peak 2% 16MiB"])
    assert bool(violations) == fires


def test_a_negative_threshold_demands_a_decrease() -> None:
    comparison = with_peaks(100 * MIB, 80 * MIB)
    assert comparison.check(["peak -20%"]) == []
    (violation,) = comparison.check("peak -30%")
    assert str(violation) == "peak: expected at most 70.0 MiB, got 80.0 MiB (before: 100.0 MiB)."


def test_figures_that_look_alike_are_told_in_full() -> None:
    (violation,) = with_peaks(2**30, 2**30 + 1).check("peak 0%")
    assert str(violation) == (
        "peak: expected at most 1,073,741,824 B, got 1,073,741,825 B (before: 1,073,741,824 B)."
    )


def test_violations_come_in_the_order_of_the_thresholds() -> None:
    comparison = MEASURED
    demands = ["time -90%", "peak 0%", Threshold("parameters", percent=-99.0)]
    assert [v.threshold.metric for v in comparison.check(demands)] == ["time", "parameters"]


def test_every_metric_can_be_guarded_on_a_full_comparison() -> None:
    comparison = MEASURED
    assert comparison.check(f"{metric} 0%" for metric in METRICS) == []
    assert len(comparison.check(f"{metric} -100%" for metric in METRICS)) == len(METRICS)


def test_a_threshold_on_a_figure_that_was_not_taken_is_an_error() -> None:
    with pytest.raises(ReportError, match=r"no such figure.*time_steps"):
        estimated().check(["time 5%"])
