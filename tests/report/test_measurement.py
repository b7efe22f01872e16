"""One network: what is taken, kept as JSON, and refused to be compared."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.errors import MeasureError, ReportError
from pocketize.graph.clone import clone
from pocketize.report import Measurement, compare, compare_measurements, take
from pocketize.report.layers import layers_of
from tests.report.fixed import BEFORE


def _net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5)
    )


def test_json_reads_back_to_the_same_measurement() -> None:
    net = nn.Sequential(_net(), nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False))
    taken = take(net, "2x1x8x8", estimate=True)
    read = Measurement.from_json(taken.to_json())
    assert read == taken
    assert (str(read), read.to_markdown(), read.to_html()) == (
        (str(taken), taken.to_markdown(), taken.to_html())
    )


def test_a_mode_that_was_not_taken_is_left_out() -> None:
    taken = take(_net(), "2x1x8x8", modes=["infer"], estimate=True)
    assert taken.train is None
    assert "training" not in str(taken)
    assert "optimizer" not in taken.conditions
    both = take(_net(), "2x1x8x8", estimate=True, optimizer="sgd")
    assert compare_measurements(taken, both).after.train is None
    with pytest.raises(ReportError, match="no such figure"):
        compare_measurements(taken, both).check("peak 0%")
    trained = take(_net(), "2x1x8x8", modes=["train"], estimate=True)
    with pytest.raises(ReportError, match="there is nothing to compare"):
        compare_measurements(taken, trained)
    wrong: Any = ["eval"]
    with pytest.raises(MeasureError, match="modes must be 'train', 'infer' or both, got 'eval'"):
        take(_net(), "2x1x8x8", modes=wrong)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": "1x1x8x8 float32"}, "input is 1x1x96x96x96 float32 before and 1x1x8x8 float32"),
        ({"dtype": "bfloat16"}, "dtype is float32 before and bfloat16 after"),
        ({"device": "cuda (NVIDIA A100)"}, "device is cpu before and cuda (NVIDIA A100) after"),
        ({"optimizer": "sgd"}, "optimizer is adam before and sgd after"),
        ({"step_in_backward": True}, "optimizer is adam before and adam, in the backward pass"),
        ({"estimated": True}, "figures is measured before and estimated after"),
    ],
)
def test_unlike_figures_are_refused(change: dict[str, Any], expected: str) -> None:
    assert BEFORE.train is not None
    other = dataclasses.replace(BEFORE, train=dataclasses.replace(BEFORE.train, **change))
    with pytest.raises(ReportError, match=re.escape(expected)):
        compare_measurements(BEFORE, other)
    (remark,) = compare_measurements(BEFORE, other, anyway=True).remarks
    assert expected in remark


def test_the_machine_matters_only_to_what_was_measured() -> None:
    elsewhere = dataclasses.replace(BEFORE.environment, machine="another", threads=7)
    with pytest.raises(ReportError, match="threads is 2 before and 7 after; machine is "):
        compare_measurements(BEFORE, dataclasses.replace(BEFORE, environment=elsewhere))
    taken = take(_net(), "2x1x8x8", estimate=True)
    other = dataclasses.replace(taken, environment=elsewhere)
    assert compare_measurements(taken, other).remarks == ()


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.first(x)
        return self.second(kept.relu()).relu() + kept


@pytest.mark.slow
def test_an_exported_program_is_not_compared_with_its_module() -> None:
    net = _Residual()
    program = torch.export.export(net, (torch.zeros(2, 1, 8, 8),), strict=False).module()
    with pytest.raises(ReportError, match="form is a module before and an exported program after"):
        compare(net, program, "2x1x8x8", estimate=True)
    alike = compare(program, clone(program), "2x1x8x8", estimate=True)
    assert alike.check(["peak 0%", "inference-peak 0%"]) == []


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1), requires_grad=False)

    def extra_repr(self) -> str:
        return "by=(1, 2), 7, of=<f at 0x7f00aa>"


def test_layers_are_told_in_short() -> None:
    model = nn.Sequential(
        nn.Conv3d(2, 4, (3, 3, 1), stride=2, padding=1, bias=False),
        nn.Linear(4, 5),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _Scale(),
        nn.Sequential(nn.Dropout(0.1)),
    )
    assert {layer.path: str(layer) for layer in layers_of(model)} == {
        "0": "Conv3d 2 -> 4, 3x3x1, bias False, padding 1x1x1, stride 2x2x2",
        "1": "Linear 4 -> 5",
        "2": "GroupNorm 2, 4",
        "4": "MaxPool2d 2, stride 2",
        "5": "_Scale 7, by 1x2, frozen yes, of <f>, weight 3x1",
        "6.0": "Dropout p 0.1",
    }
