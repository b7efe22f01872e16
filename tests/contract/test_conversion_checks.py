"""The checks find what a conversion may not do: touch hooks, convert twice, keep silent."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pocketize.engine.pipeline import PassPlan
from pocketize.errors import NoEffectWarning
from pocketize.passes import Pocket
from pocketize.plugin.base import Change
from pocketize.plugin.edits import Convert
from tests.contract.everything import failures
from tests.contract.hooks import RUNTIME
from tests.contract.test_checks import add_hook, drop_hook, fake_case, forge_history, scale


class RuntimeHook:
    """Of the kind that passes put into rewritten nets."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        return None


RuntimeHook.__module__ = f"{RUNTIME}.fake"


def add_runtime_hook(model: Any) -> None:
    model.stem.register_forward_hook(RuntimeHook(), prepend=True)


def drop_hook_and_add_ours(model: Any) -> None:
    drop_hook(model)
    add_runtime_hook(model)


def swap_hooks(model: Any) -> None:
    add_runtime_hook(model)
    model.stem._forward_hooks.move_to_end(next(iter(model.stem._forward_hooks)))
    model.stem.register_forward_hook(scale, prepend=True)


def test_hooks_survive_lets_only_a_conversion_add_hooks_and_only_of_the_runtime() -> None:
    def plan(path: str) -> PassPlan:
        return PassPlan((Convert(path, "fake"),), rewrite=Pocket())

    ours = fake_case(add_runtime_hook)
    assert failures(ours, ["hooks_survive"])
    assert failures(replace(ours, plan=plan("head")), ["hooks_survive"])
    assert failures(replace(ours, plan=plan("stem")), ["hooks_survive"]) == []
    assert failures(replace(ours, plan=plan("")), ["hooks_survive"]) == []
    for fault in (add_hook, drop_hook_and_add_ours, swap_hooks):
        assert failures(replace(fake_case(fault), plan=plan("")), ["hooks_survive"]), fault


def test_idempotent_sees_a_second_conversion() -> None:
    def wrap(model: Any) -> None:
        model.head.__class__ = type("Wrapped", (nn.Conv2d,), {})

    for convert, found in (
        (wrap, "a second run made Conv2d of head into Wrapped"),
        (add_runtime_hook, "a second run changed stem._forward_hooks"),
        (forge_history, "a second run changed the history"),
    ):

        def convert_again(model: nn.Module, convert: Any = convert) -> nn.Module:
            warnings.warn("fake changed nothing", NoEffectWarning, stacklevel=2)
            model = copy.deepcopy(model)
            convert(model)
            return model

        case = replace(fake_case(), again=convert_again)
        assert found in failures(case, ["idempotent"])[0]


def test_idempotent_wants_a_warning_of_every_pass() -> None:
    case = replace(fake_case(), passes=2)
    assert "no NoEffectWarning for 1 of 2 passes" in failures(case, ["idempotent"])[0]


def test_a_module_made_anew_may_have_other_parameters_only_where_the_plan_converts_it() -> None:
    def rebuild(model: Any) -> None:
        block = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 2, 1))
        model.head = block.to(memory_format=torch.channels_last)

    def plan(path: str) -> PassPlan:
        rows = (Change("head", "another layer"),)
        return PassPlan((Convert(path, "fake"),), rows, rewrite=Pocket())

    told = ["same_keys", "trains", "finite", "ties_survive", "same_classes"]
    assert failures(replace(fake_case(rebuild), plan=plan("head")), told) == []
    for elsewhere in ("stem", ""):
        found = failures(replace(fake_case(rebuild), plan=plan(elsewhere)), told)
        assert any(text.startswith("same_keys") for text in found)
        assert any(text.startswith("trains") for text in found)


def test_parameters_of_a_module_made_anew_must_be_finite_and_get_gradients() -> None:
    def rebuild(model: Any) -> None:
        model.head = nn.Sequential(nn.Conv2d(8, 2, 1))
        nn.init.constant_(model.head[0].weight, float("inf"))

    def freeze(model: Any) -> None:
        model.head = nn.Sequential(nn.Conv2d(8, 2, 1)).requires_grad_(False)

    rows = (Change("head", "another layer"),)
    plan = PassPlan((Convert("head", "fake"),), rows, rewrite=Pocket())
    assert failures(replace(fake_case(rebuild), plan=plan), ["finite"])
    assert failures(replace(fake_case(freeze), plan=plan), ["trains"])
