"""Conversions: named in edits, registered in code, tried in a dry run before they are applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from pocketize import history, plan, rewrite
from pocketize.engine.pipeline import replay
from pocketize.engine.surgery import apply_edits
from pocketize.errors import ArtifactError, RewriteError, VerifyError
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Target
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import Convert, edit_from_json
from pocketize.plugin.records import PassRecord


class Doubled(nn.Module):
    """Stands where another module stood and doubles what it gave."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        for name, parameter in inner.named_parameters():
            self.register_parameter(name, parameter)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, padding=1) * self.times


@conversion("test-doubled")
def double(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    return Doubled(module, options["times"])


@conversion("test-halved")
def halve(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.AvgPool2d(2))


@conversion("test-rebuilt")
def rebuild(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Other parameters in the old one's place; with "times" 2 the first of them is of no use."""
    assert isinstance(module, nn.Conv2d)
    like = {"dtype": module.weight.dtype, "device": "meta"}
    first = nn.Conv2d(module.in_channels, 3, 1, **like)
    last = nn.Conv2d(3, module.out_channels, 3, padding=1, **like)
    block = Idle(first, last) if options["times"] == 2 else nn.Sequential(first, last)
    for layer in (first, last):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(module.weight.new_zeros(parameter.shape)))
    return block


class Idle(nn.Sequential):
    """Does not use its first layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](x.expand(-1, 3, -1, -1))


@dataclass(frozen=True, kw_only=True)
class Converting(Pass):
    """Convert one module.

    Attributes:
        which: the conversion.
        path: the module.
        times: what it is told.
    """

    name: ClassVar[str] = "converting"
    summary: ClassVar[str] = "Convert one module"
    which: str = "test-doubled"
    path: str = "0"
    times: int = 2

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.RETRAIN

    def propose(self, target: Target) -> Proposal:
        edit = Convert(self.path, self.which, {"times": self.times})
        return Proposal((edit,), (Change(self.path, "converted", "as asked"),))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))


def test_a_conversion_is_carried_out_on_a_copy_and_remembered():
    model = net()
    x = torch.randn(1, 1, 8, 8)
    made = rewrite(model, Converting(), inputs=x)
    assert type(model[0]) is nn.Conv2d
    assert type(made[0]) is Doubled
    assert torch.equal(made[0](x), model[0](x) * 2)
    (record,) = history(made)
    assert record.edits == (
        {
            "edit": "convert",
            "module": "0",
            "conversion": "test-doubled",
            "options": {"times": 2},
        },
    )


def test_a_conversion_goes_through_json():
    edit = Convert("a.b", "test-doubled", {"times": 3, "list": [1, 2]})
    assert edit_from_json(json.loads(json.dumps(edit.to_json()))) == edit
    with pytest.raises(ArtifactError, match="options: expected dict"):
        edit_from_json({"edit": "convert", "module": "", "conversion": "x", "options": [1]})


def test_a_module_under_two_paths_is_replaced_under_both():
    model = nn.ModuleDict({"a": nn.ReLU()})
    model["b"] = model["a"]
    apply_edits(model, [Convert("a", "test-doubled", {"times": 2})])
    assert type(model["a"]) is Doubled
    assert model["a"] is model["b"]


def test_what_the_dry_run_finds_stops_the_plan_and_names_the_mode():
    with pytest.raises(VerifyError, match="in evaluation mode the outputs have other shapes"):
        plan(net(), Converting(which="test-halved"), inputs="1x1x8x8")


def test_a_conversion_may_put_other_parameters_in_place_of_a_modules():
    made = rewrite(net(), Converting(which="test-rebuilt", times=1), inputs="1x1x8x8")
    assert [name for name, _ in made.named_parameters()][:2] == ["0.0.weight", "0.0.bias"]


def test_new_parameters_must_get_gradients_where_the_old_ones_did():
    with pytest.raises(VerifyError, match=r"parameters get other gradients: .'0.0.bias', '0"):
        plan(net(), Converting(which="test-rebuilt"), inputs="1x1x8x8")
    model = net()
    model[0].requires_grad_(False)  # gave no gradients before
    assert plan(model, Converting(which="test-rebuilt"), inputs="1x1x8x8").passes[0].edits


def test_a_module_or_conversion_that_is_not_there_is_named():
    with pytest.raises(RewriteError, match="cannot change '9'"):
        apply_edits(net(), [Convert("9", "test-doubled")])
    with pytest.raises(
        RewriteError, match=r"no conversion is called 'test-doubles'\. Did you mean"
    ):
        apply_edits(net(), [Convert("0", "test-doubles")])


def test_the_model_itself_stays_the_object_it_is():
    with pytest.raises(RewriteError, match="must stay"):
        apply_edits(nn.Conv2d(1, 1, 3), [Convert("", "test-doubled", {"times": 1})])


def test_two_conversions_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="'test-doubled' is registered already"):
        conversion("test-doubled")(halve)


def test_a_record_of_a_pass_that_is_not_installed_is_not_replayed():
    edit = Convert("0", "test-doubled", {"times": 2}).to_json()
    record = PassRecord("nobodys-pass", {}, "exact", "0", (edit,))
    with pytest.raises(ArtifactError, match="nobodys-pass"):
        replay(net(), [record])
