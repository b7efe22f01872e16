"""The clamp's check finds layers that are not as wide as the net's author expects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pocketize.passes import Pocket
from pocketize.plugin.base import Refusal
from tests.contract.case import Case, make_case
from tests.contract.clamp import clamped
from tests.contract.test_checks import NET, Victim
from tests.models.registry import Net, image


class TestClamp:
    """The clamp's check, on a net with one movable, one frozen and one unexpectedly kept layer."""

    def case(self, **expects: Any) -> Case:
        net = Net("victim", Victim, image(2, 3, 6, 6), width=4, **expects)
        return make_case(net, Pocket(width=4))

    def test_right_expectations_hold(self) -> None:
        clamped(self.case(movable=("stem", "norm", "a"), frozen={"head": "output"}))

    def test_a_layer_that_did_not_move_is_found(self) -> None:
        with pytest.raises(AssertionError, match=r"head: 2 -> 2, expected 4"):
            clamped(self.case(movable=("head",)))
        with pytest.raises(AssertionError, match=r"head: 2 -> 2, expected fewer"):
            clamped(self.case(shrinks=("head",)))

    def test_a_layer_that_moved_against_expectation_is_found(self) -> None:
        with pytest.raises(AssertionError, match=r"stem: 8 -> 4, expected to stay"):
            clamped(self.case(frozen={"stem": ""}))

    def test_another_reason_is_found(self) -> None:
        with pytest.raises(AssertionError, match=r"head: explain does not say 'the moon'"):
            clamped(self.case(frozen={"head": "the moon"}))

    def test_a_wide_group_without_a_refusal_is_found(self) -> None:
        case = self.case()
        model = NET.build()
        assert case.plan is not None
        silent = replace(case, rewritten=model, original=model)
        with pytest.raises(
            AssertionError, match=r"stem: stays at 8 channels, and the plan says nothing"
        ):
            clamped(silent)
        told = replace(case.plan, refused=(Refusal("stem", "r"), Refusal("a", "r")))
        clamped(replace(silent, plan=told))
