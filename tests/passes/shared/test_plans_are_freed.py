"""What a plan looked at is freed with it: no pass keeps copies of a model alive."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.plugin.registry import get_pass, list_passes

OPTIONS: dict[str, dict[str, Any]] = {
    "checkpoint": {"only": ("fine", "coarse")},
    "offload": {"to": "disk", "min_bytes": "1KiB"},
    "patchwise": {"size": 8},
    "width": {"scale": 0.5},
    "bottleneck": {"activations": "any"},
    "compact-block": {"activations": "any"},
    "separable": {"activations": "any"},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.head = block(1, 8), block(8, 16), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fine(x)
        z = nn.functional.interpolate(self.coarse(nn.functional.max_pool2d(y, 2)), scale_factor=2.0)
        return self.head(torch.cat([y, z], 1))


def block(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.InstanceNorm2d(after), nn.LeakyReLU(0.01)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pocketize.errors.PocketizeWarning")  # nothing to change
@pytest.mark.parametrize("name", [info.name for info in list_passes()])
def test_tensors_do_not_become_more_with_every_rewrite(name: str):
    model, given = Net(), get_pass(name)(**OPTIONS.get(name, {}))
    counts = []
    for _ in range(3):
        rewrite(model, given, inputs="2x1x16x16")
        gc.collect()
        counts.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert counts[2] == counts[1]
