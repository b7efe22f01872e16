"""A comparison says in words where the rewritten network does worse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pocketize.report import Comparison
from tests.report.fixed import BEFORE, MEASURED, MIB


def after(mode: str = "train", **changes: Any) -> Comparison:
    """The second side is the first one, but for some figures of a mode."""
    profile = dataclasses.replace(getattr(BEFORE, mode), **changes)
    return Comparison(BEFORE, dataclasses.replace(BEFORE, **{mode: profile}))


def test_nothing_is_said_where_nothing_became_worse() -> None:
    assert MEASURED.remarks == ()
    assert after().remarks == ()


def test_a_slower_step_is_told_with_where_it_was_timed() -> None:
    comparison = after(step_seconds=(1.82, 0.05))
    (remark,) = comparison.remarks
    assert remark == (
        "Slower: a training step takes 1.82 s instead of 1.30 s, 1.40x the time "
        "(on cpu, float32 weights, torch 2.13.0)."
    )
    for drawn in (str(comparison), comparison.to_markdown(), comparison.to_html()):
        assert "1.40x the time" in " ".join(drawn.split())


@pytest.mark.parametrize("seconds", [(1.36, 0.01), (1.6, 0.4)], ids=["small", "within the spread"])
def test_jitter_is_not_called_slower(seconds: tuple[float, float]) -> None:
    assert after(step_seconds=seconds).remarks == ()


def test_times_of_one_side_only_say_nothing() -> None:
    assert after(step_seconds=None).remarks == ()


def test_a_bigger_peak_is_told_in_either_mode() -> None:
    (remark,) = after("infer", peak=850 * MIB).remarks
    assert remark.startswith(
        "Bigger: the peak of a forward pass is 850.0 MiB instead of 425.0 MiB, 2.00x"
    )


def test_scratch_memory_that_no_tensor_stands_for_is_told() -> None:
    (remark,) = after(rss=3000 * MIB).remarks
    assert "during a training step the process grows by 2.93 GiB instead of 1.95 GiB" in remark


def test_operators_without_a_formula_are_named_and_survive_json() -> None:
    comparison = after(not_counted=("aten.lstm",))
    (remark,) = comparison.remarks
    assert remark == "Not counted in the MACs, as no formula is known: aten.lstm."
    assert Comparison.from_json(comparison.to_json()) == comparison
