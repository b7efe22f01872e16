from __future__ import annotations

import pytest
import torch
from torch import nn

from pocketize import plan
from pocketize.artifact.kept import lost_steps
from pocketize.graph.inputs import as_inputs
from pocketize.passes.checkpoint import checkpoint
from pocketize.plugin.edits import Convert, Redraw, SetAttribute

INPUT = "2x1x8x8"


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.01)]
    more = [nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers, *more, nn.Conv2d(16, 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "state", "program"),
    [
        (["pocket"], [], []),
        (["pocket", "recompute"], [1], [1]),
        (["in-place-norm"], [0], [0]),
        (["patchwise:size=4"], [0], [0]),
        # these change the function, which a program holds and weights alone do not
        (["patchwise:mode=slab,size=4"], [0], []),
        (["amp"], [0], []),
    ],
)
def test_what_leaves_nothing_in_a_file_is_found(
    passes: list[str], state: list[int], program: list[int]
) -> None:
    planned = plan(net(), *passes, inputs=INPUT)
    steps = [each.edits for each in planned.passes]
    assert all(steps)
    assert lost_steps(planned.model, steps) == state
    assert lost_steps(planned.model, steps, as_inputs(INPUT)) == program


def test_edits_of_any_pass_are_tried() -> None:
    steps = [
        (Redraw(),),
        (Convert("3", checkpoint.Checkpoint.name),),
        (SetAttribute("2", "negative_slope", 0.01, 0.02),),
        (),
    ]
    assert lost_steps(net(), steps) == [1, 2]
    assert lost_steps(net(), steps, as_inputs(INPUT)) == [1]
