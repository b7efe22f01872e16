"""A step whose backward pass updates the parameters: counted by hand, and real against fake."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pocketize import compare, rewrite
from pocketize.errors import MeasureError
from pocketize.memory import MemoryProfile, measure
from pocketize.memory.step import OPTIMIZERS
from pocketize.passes import Checkpoint, InPlaceNorm, Offload, Patchwise, Recompute
from tests.lifecycle.networks import LifeNet

WAYS: dict[str, Any] = {
    "untouched": (),
    "recompute": (Recompute(keep="level", min_bytes=0),),
    "in-place-norm": (InPlaceNorm(),),
    "checkpoint": (Checkpoint(only=("down", "deep", "join")),),
    "offload": (Offload(to="disk", min_bytes="1KiB"),),
    "patchwise": (Patchwise(size=8, train=True, progress=False),),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_estimate_equals_measurement_to_the_byte(way: str) -> None:
    x = torch.ones(2, 2, 16, 16)
    net = rewrite(LifeNet(), *WAYS[way], inputs=x) if WAYS[way] else LifeNet()
    for optimizer in OPTIMIZERS if way == "recompute" else ("adamw",):
        options: Any = {"optimizer": optimizer, "step_in_backward": True}
        real, fake = (measure(net, x, estimate=each, **options) for each in (False, True))
        assert (real.peak, real.categories) == (fake.peak, fake.categories)
        assert real.step_in_backward
        assert f"{optimizer} optimizer in the backward pass" in str(real)


@pytest.mark.slow
def test_only_the_gradients_of_one_layer_are_there_at_a_time() -> None:
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    layer = (64 * 64 + 64) * 4
    ordinary, ours = (
        measure(net, "1x64", "train", "adamw", step_in_backward=each) for each in (False, True)
    )
    assert ordinary.categories["gradients"] == 8 * layer
    assert ours.categories["gradients"] <= layer
    assert ours.categories["optimizer_state"] == ordinary.categories["optimizer_state"]
    assert ordinary.peak - ours.peak > 6 * layer
    assert MemoryProfile.from_json(ours.to_json()) == ours


def test_arguments() -> None:
    with pytest.raises(MeasureError, match="needs an optimizer"):
        measure(nn.Linear(2, 2), "1x2", "train", None, step_in_backward=True)
    with pytest.raises(MeasureError, match=r"'adam', 'adamw', 'sgd' or None"):
        measure(nn.Linear(2, 2), "1x2", "train", "adamW")  # type: ignore[arg-type]
    assert not measure(nn.Linear(2, 2), "1x2", "infer", step_in_backward=True).step_in_backward


@pytest.mark.slow
def test_a_comparison_names_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = compare(
            nn.Linear(2, 2), nn.Linear(2, 2), "1x2", optimizer="adamw", estimate=True,
            step_in_backward=True,
        )  # fmt: skip
    assert made.after.conditions["optimizer"] == "adamw, in the backward pass"
