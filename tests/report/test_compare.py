"""Comparisons of real networks: what is measured, on what, and what is told of the passes."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import MeasureError
from pocketize.plugin.base import Change, PassRecord, Refusal
from pocketize.report import compare, take
from pocketize.report.differences import between


def _net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 3, padding=1)
    )


def _record(name: str, guarantee: str = "retrain") -> PassRecord:
    return PassRecord(
        name=name,
        options={"width": 4},
        guarantee=guarantee,
        version="0.1.0",
        changes=(Change("0", "8 -> 4 channels"),),
        refused=(Refusal("2", "aten.view at /home/me/net.py:88 has no channel rule"),),
        notes=("width 4, as asked",),
    )


def _remember(model: nn.Module, *records: PassRecord) -> nn.Module:
    model.__dict__["_pocketize_history"] = records
    return model


@pytest.mark.slow
def test_an_estimate_takes_every_figure_but_the_times() -> None:
    comparison = compare(_net(8), _net(4), "2x1x16x16", estimate=True)
    before, after = comparison.before.train, comparison.after.train
    assert before is not None
    assert after is not None
    assert (before.parameters, after.parameters) == (8 * 9 + 8 + 16 * 9 + 2, 4 * 9 + 4 + 8 * 9 + 2)
    assert before.weight_bytes == 4 * before.parameters
    assert before.macs == 2 * 256 * (8 * 9 + 16 * 9)
    assert after.peak < before.peak
    assert sum(after.categories.values()) == after.peak
    assert comparison.after.infer is not None
    assert comparison.after.infer.peak < after.peak
    assert before.step_seconds is None
    assert before.estimated
    assert before.input == "2x1x16x16 float32"


@pytest.mark.slow
def test_inputs_are_guessed_once_and_the_same_for_both_sides() -> None:
    # The second net takes any number of channels from the first one's guess, but has no convolution
    # to guess from itself.
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    comparison = compare(_net(8), Plain(), estimate=True)
    assert comparison.before.conditions["input"].startswith("2x1x")
    assert comparison.after.model == "Plain"


@pytest.mark.slow
def test_neither_network_is_changed() -> None:
    before, after = _net(8), _net(4)
    states = copy.deepcopy((before.state_dict(), after.state_dict()))
    compare(before, after, "1x1x8x8", estimate=True)
    for model, state in zip((before, after), states, strict=True):
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.slow
def test_the_largest_ten_of_either_side_are_listed_by_what_they_held_before() -> None:
    deep = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(14)))
    drawn = compare(deep, deep, "1x1x16x16", estimate=True, modes=("train",)).to_markdown()
    table = drawn.partition("Modules that hold most")[2].partition("##")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| `", "| ("))]
    assert len(rows) == 10
    assert all(row.endswith("| 1.00x |") for row in rows)


def test_passes_are_told_with_what_they_changed_and_refused_free_of_paths() -> None:
    after = _remember(_net(4), _record("pocket"))
    comparison = compare(_net(8), after, "1x1x8x8", estimate=True)
    (told,) = between(comparison.before, comparison.after)
    assert (told.name, told.guarantee, told.options) == ("pocket", "RETRAIN", {"width": 4})
    assert told.changed[0].what == "8 -> 4 channels"
    assert told.refused[0].why == "aten.view at net.py:88 has no channel rule"
    assert "RETRAIN" in comparison.verdict


@pytest.mark.slow
def test_passes_that_both_sides_went_through_are_no_difference_between_them() -> None:
    first, second = _record("first"), _record("second", "exact")
    before = take(_remember(_net(8), first), "1x1x8x8", estimate=True)
    after = take(_remember(_net(4), first, second), "1x1x8x8", estimate=True)
    assert [rewrite.name for rewrite in between(before, after)] == ["second"]
    # The other way round there is nothing to subtract.
    other = take(_remember(_net(8), second), "1x1x8x8", estimate=True)
    assert [rewrite.name for rewrite in between(other, after)] == ["first", "second"]


def test_an_error_says_which_side_and_which_mode() -> None:
    def wrong(_: Any) -> Tensor:
        return torch.zeros(2, requires_grad=True)

    with pytest.raises(MeasureError, match=re.escape("compare, before, train: ")):
        compare(_net(8), _net(4), "1x1x8x8", estimate=True, loss=wrong)


@pytest.mark.slow
def test_the_loss_is_named_in_the_environment() -> None:
    def dice(outputs: Tensor) -> Tensor:
        return outputs.mean()

    comparison = compare(_net(8), _net(4), "1x1x8x8", estimate=True, loss=dice)
    assert comparison.after.loss == "dice"


@pytest.mark.slow
def test_each_figure_is_measured_in_a_fresh_process_and_equals_its_estimate() -> None:
    arguments = (_net(8), _net(4), "2x1x32x32")
    measured = compare(*arguments, time_steps=3)
    estimated = compare(*arguments, estimate=True)
    for side in ("before", "after"):
        for mode in ("train", "infer"):
            real = getattr(getattr(measured, side), mode)
            fake = getattr(getattr(estimated, side), mode)
            assert real.isolated
            assert real.step_seconds is not None
            assert not real.estimated
            assert real.peak == fake.peak
            assert real.categories == fake.categories
            assert real.modules == fake.modules
            assert real.moment == fake.moment


@pytest.mark.slow
def test_a_network_that_cannot_be_sent_away_is_measured_here_and_the_report_says_so() -> None:
    class Local(nn.Sequential):
        """Its class is made within a function, so it cannot be pickled."""

    comparison = compare(_net(8), Local(*_net(4)), "1x1x8x8", time_steps=0)
    before, after = comparison.before.train, comparison.after.train
    assert before is not None
    assert after is not None
    assert before.isolated
    assert not after.isolated
    assert after.why_not_isolated
    assert "this one for after training, after inference" in str(comparison)
