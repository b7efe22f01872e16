"""What calibration allocates besides the networks stays below its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pocketize import history, rewrite
from pocketize.calibration.choice import choose_channels
from pocketize.calibration.options import evaluated
from pocketize.calibration.solver import LayerSolver, WantedOutputs
from pocketize.graph.inputs import Inputs
from pocketize.memory.tracker import LiveTracker
from pocketize.passes import Width
from pocketize.plugin.edits import edit_from_json

MIB = 1 << 20


def peak(run: Callable[[], Any]) -> int:
    tracker = LiveTracker(torch.device("cpu"), str)
    tracker.enter("forward")
    with tracker:
        run()
    return tracker.finish().peak


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4 * MIB, 16 * MIB])
def test_the_limit_is_kept(limit: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 128, 1), nn.ReLU(), nn.Conv2d(128, 8, 3)).eval()
    images = [Inputs((torch.randn(1, 1, 24, 24),)) for _ in range(2)]
    fixed = sum(x.tensors()[0].nelement() * 4 * (1 + 128 + 128 + 8) for x in images)  # activations
    with evaluated(net, images):
        inputs = [net[:2](x.args[0]) for x in images]
        # the whole normal matrix alone would have 1,152 * 1,152 * 8 bytes, 10.1 MiB
        large = nn.Sequential(*net[:2], nn.Conv2d(128, 8, 3))
        wanted = {"2": WantedOutputs("2")}
        solver = LayerSolver(large, net, images, wanted, 10**6, 1e-3, limit, seed=0)
        assert peak(lambda: solver.solve("2", inputs)) < limit + fixed
    cut = rewrite(net, Width(0.5), inputs=images[0])
    edits = [edit_from_json(dict(edit)) for record in history(cut) for edit in record.edits]

    def choose() -> None:
        options = {"by": "reconstruction", "samples": 10**6, "memory": limit, "seed": 0}
        assert choose_channels(net, edits, images[0], images, **options) != tuple(edits)

    with evaluated(net, images):
        assert peak(choose) < limit + 4 * fixed  # without it: 40 MiB more
