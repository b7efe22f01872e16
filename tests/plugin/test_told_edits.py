"""A pass that gives edits and no rows: the plan, the record and the command tell the edits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from pocketize import compare
from pocketize.cli.rewriting import _check_effect
from pocketize.engine.pipeline import history, plan, rewrite
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Target
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import (
    _KINDS,
    Convert,
    Edit,
    Extend,
    Redraw,
    Resize,
    SetArgument,
    SetAttribute,
)
from tests.toys import INPUT, Net


class Viewed(nn.Module):
    """Has a size as a literal in its graph."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.view.default(x, [2, 3, -1])


@conversion("test-same")
def same(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True, kw_only=True)
class Silent(Pass):
    """Give one edit, or several, and the rows that are asked for."""

    name: ClassVar[str] = "silent"
    summary: ClassVar[str] = "Tells nothing"
    kind: str = "redraw"
    rows: tuple[str, ...] = ()

    @property
    def guarantee(self) -> Guarantee:
        return Guarantee.RETRAIN

    def propose(self, target: Target) -> Proposal:
        return Proposal(EDITS[self.kind], tuple(Change(path, "a row") for path in self.rows))


#: What the pass gives, and the rows that are expected.
EDITS: dict[str, tuple[Edit, ...]] = {
    "resize": (
        Resize("deep.weight", 0, tuple(range(4)), 16),
        Resize("deep.bias", 0, tuple(range(4)), 16),
        *(Resize(f"norm.{n}", 0, tuple(range(4)), 16) for n in ("weight", "bias")),
        *(Resize(f"norm.running_{n}", 0, tuple(range(4)), 16) for n in ("mean", "var")),
        Resize("join.weight", 1, tuple(range(8)), 20),
    ),
    "extend": (Extend("stem.weight", 1, (3,), 3),),
    "set-attribute": (SetAttribute("", "note", 1, 2),),
    "set-argument": (SetArgument("", "view_default", "size", (2, 3, -1), (2, 1, -1)),),
    "redraw": (Redraw(),),
    "convert": (Convert("deep", "test-same", {"times": 2}), Redraw("deep")),
}
ROWS = {
    "resize": {
        "deep": "axis 0 of weight: 16 -> 4; axis 0 of bias: 16 -> 4",
        "norm": "axis 0 of weight: 16 -> 4; axis 0 of bias: 16 -> 4; "
        "axis 0 of running_mean: 16 -> 4; axis 0 of running_var: 16 -> 4",
        "join": "axis 1 of weight: 20 -> 8",
    },
    "extend": {"stem": "axis 1 of weight: 3 -> 4"},
    "set-attribute": {"": "note 1 -> 2"},
    "set-argument": {"": "size of view_default: 2, 3, -1 -> 2, 1, -1"},
    "redraw": {"": "all weights drawn anew"},
    "convert": {"deep": "converted by test-same (times=2); its weights drawn anew"},
}


def model_for(kind: str) -> nn.Module:
    if kind == "set-argument":
        return fx.symbolic_trace(Viewed())
    model = Net()
    model.note = 1  # type: ignore[assignment]
    return model


def test_every_kind_of_edit_is_tried_here() -> None:
    assert EDITS.keys() == ROWS.keys() == _KINDS.keys()


@pytest.mark.parametrize("kind", EDITS)
def test_edits_without_rows_are_told_as_what_they_are(kind: str) -> None:
    model, given = model_for(kind), Silent(kind=kind)
    planned = plan(model, given, inputs=INPUT)
    assert {c.path: c.what for c in planned.passes[0].changes} == ROWS[kind]
    for text in (str(planned), planned.to_markdown()):
        assert "nothing to change" not in text
        assert all(what in text for what in ROWS[kind].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = rewrite(model, given, inputs=INPUT, strict=True)
    assert {c.path: c.what for c in history(made)[0].changes} == ROWS[kind]


@pytest.mark.slow
def test_the_report_and_the_command_tell_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    model, given = Net(), Silent(kind="resize")
    text = str(compare(model, rewrite(model, given, inputs=INPUT), inputs=INPUT, estimate=True))
    assert "axis 1 of weight: 20 -> 8" in text
    _check_effect(plan(model, given, inputs=INPUT), None, strict=True)  # type: ignore[arg-type]
    assert "changes nothing" not in capsys.readouterr().err


def test_a_row_of_the_pass_stands_for_the_edits_in_its_module() -> None:
    (step,) = plan(Net(), Silent(kind="convert", rows=("deep",)), inputs=INPUT).passes
    assert [(c.path, c.what) for c in step.changes] == [("deep", "a row")]


def test_rows_of_a_pass_stand_for_the_sizes_that_move_with_them() -> None:
    (step,) = plan(Net(), Silent(kind="resize", rows=("deep",)), inputs=INPUT).passes
    assert [(c.path, c.what) for c in step.changes] == [("deep", "a row")]


def test_a_conversion_elsewhere_than_the_rows_is_told_beside_them() -> None:
    (step,) = plan(Net(), Silent(kind="convert", rows=("stem",)), inputs=INPUT).passes
    assert [(c.path, c.what) for c in step.changes] == [
        ("stem", "a row"),
        ("deep", ROWS["convert"]["deep"]),
    ]
