"""Comparisons of real networks: what is measured, on what, and what is told of the passes."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import MeasureError
from pocketize.memory import MemoryProfile
from pocketize.plugin.base import Change, PassRecord, Refusal
from pocketize.report import build, compare


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
    document = compare(_net(8), _net(4), "2x1x16x16", estimate=True).document
    before, after = document.before, document.after
    assert (before.parameters, after.parameters) == (8 * 9 + 8 + 16 * 9 + 2, 4 * 9 + 4 + 8 * 9 + 2)
    assert before.weight_bytes == 4 * before.parameters
    assert before.macs == 2 * 256 * (8 * 9 + 16 * 9)
    assert after.training.bytes < before.training.bytes
    assert sum(after.training.categories.values()) == after.training.bytes
    assert after.inference.bytes < after.training.bytes
    assert before.training.step_seconds is None
    assert document.environment.method == "estimated"
    assert document.environment.input == "2x1x16x16 float32"


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

    document = compare(_net(8), Plain(), estimate=True).document
    assert document.environment.input.startswith("2x1x")
    assert document.after.model == "Plain"


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
    rows = compare(deep, deep, "1x1x16x16", estimate=True).document.modules
    assert len(rows) == 10
    assert [row.before for row in rows] == sorted((row.before for row in rows), reverse=True)
    assert all(row.before == row.after for row in rows)


@pytest.mark.slow
def test_passes_are_told_with_what_they_changed_and_refused_free_of_paths() -> None:
    after = _remember(_net(4), _record("pocket"))
    comparison = compare(_net(8), after, "1x1x8x8", estimate=True)
    (told,) = comparison.document.rewrites
    assert (told.name, told.guarantee, told.options) == ("pocket", "RETRAIN", {"width": 4})
    assert told.changed[0].what == "8 -> 4 channels"
    assert told.refused[0].why == "aten.view at net.py:88 has no channel rule"
    assert "RETRAIN" in comparison.verdict


@pytest.mark.slow
def test_passes_that_both_sides_went_through_are_no_difference_between_them() -> None:
    first, second = _record("first"), _record("second", "exact")
    before, after = _remember(_net(8), first), _remember(_net(4), first, second)
    told = compare(before, after, "1x1x8x8", estimate=True).document.rewrites
    assert [rewrite.name for rewrite in told] == ["second"]
    # The other way round there is nothing to subtract.
    told = compare(_remember(_net(8), second), after, "1x1x8x8", estimate=True).document.rewrites
    assert [rewrite.name for rewrite in told] == ["first", "second"]


@pytest.mark.slow
def test_an_error_says_which_side_and_which_mode() -> None:
    def wrong(_: Any) -> Tensor:
        return torch.zeros(2, requires_grad=True)

    with pytest.raises(MeasureError, match=re.escape("compare, before (train): ")):
        compare(_net(8), _net(4), "1x1x8x8", estimate=True, loss=wrong)


@pytest.mark.slow
def test_the_loss_is_named_in_the_environment() -> None:
    def dice(outputs: Tensor) -> Tensor:
        return outputs.mean()

    comparison = compare(_net(8), _net(4), "1x1x8x8", estimate=True, loss=dice)
    assert comparison.document.environment.loss == "dice"


def test_profiles_taken_elsewhere_can_be_compared(
    profile: Callable[..., MemoryProfile],
) -> None:
    cuda = {"device": "cuda (NVIDIA A100)", "reserved": 2**30}
    sides = [(profile(**cuda), profile(mode="infer", **cuda)) for _ in range(2)]
    comparison = build(("UNet", "UNet"), sides[0], sides[1])
    assert comparison.document.before.training.reserved == 2**30
    assert "reserved by the allocator" in str(comparison)
    assert "the allocator's maximum" in str(comparison)


@pytest.fixture
def profile() -> Callable[..., MemoryProfile]:
    def make(**changes: Any) -> MemoryProfile:
        fields: dict[str, Any] = {
            "mode": "train",
            "optimizer": "adam",
            "estimated": False,
            "device": "cpu",
            "dtype": "float32",
            "input": "1x1x8x8 float32",
            "torch": "2.13.0",
            "peak": 100,
            "categories": {"activations": 100},
            "modules": {"": 100},
            "timeline": (("forward", 100),),
            "reserved": None,
            "rss": None,
            "parameters": 3,
            "weight_bytes": 12,
            "macs": 7,
            "step_seconds": None,
            "isolated": True,
        }
        return MemoryProfile(**fields | changes)

    return make


@pytest.mark.slow
def test_each_figure_is_measured_in_a_fresh_process_and_equals_its_estimate() -> None:
    arguments = (_net(8), _net(4), "2x1x32x32")
    measured = compare(*arguments, time_steps=3).document
    estimated = compare(*arguments, estimate=True).document
    for side in ("before", "after"):
        for mode in ("training", "inference"):
            real = getattr(getattr(measured, side), mode)
            fake = getattr(getattr(estimated, side), mode)
            assert real.isolated
            assert real.step_seconds is not None
            assert real.bytes == fake.bytes
            assert real.categories == fake.categories
    assert measured.environment.method == "measured"
    assert measured.modules == estimated.modules


@pytest.mark.slow
def test_a_network_that_cannot_be_sent_away_is_measured_here_and_the_report_says_so() -> None:
    class Local(nn.Sequential):
        """Its class is made within a function, so it cannot be pickled."""

    comparison = compare(_net(8), Local(*_net(4)), "1x1x8x8", time_steps=0)
    after = comparison.document.after.training
    assert comparison.document.before.training.isolated
    assert not after.isolated
    assert after.why_not_isolated
    assert "this one for after training, after inference" in str(comparison)
