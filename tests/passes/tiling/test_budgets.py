"""``max_peak``: what is asked for bounds what is measured, or the least that can be had is told."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pocketize import history, measure, plan, rewrite
from pocketize.errors import OptionError
from pocketize.graph.inputs import as_inputs
from pocketize.passes import Patchwise
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.tiling.exact import ExactForward, prepare
from pocketize.passes.tiling.figures import estimated_peak, measured_peak
from pocketize.passes.tiling.forward import SampledTiling, Tiling
from tests.passes.tiling.nets import unet

MIB = 1 << 20
SLACK = 1 / 256


def block(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.InstanceNorm2d(o), nn.LeakyReLU())


def chain() -> nn.Module:
    return nn.Sequential(block(1, 16), block(16, 16), block(16, 16))


def headed() -> nn.Module:
    """One channel comes out, so that the peak of a step is in the tiles and not in the loss."""
    return nn.Sequential(chain(), nn.Conv2d(16, 1, 1))


def forward_of(model: nn.Module) -> ExactForward:
    found = wrapping(model, ExactForward)
    assert found is not None
    return found


class Grouped(nn.Module):
    """Strides, a batch norm, a group norm, a pooled gate and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 12, 3, stride=3, padding=1)
        self.norm, self.groups = nn.BatchNorm2d(8), nn.GroupNorm(3, 12)
        self.gate, self.head = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 2, 1)
        self.up = nn.Upsample(scale_factor=3, mode="bilinear")

    def forward(self, x: torch.Tensor) -> Any:
        skip = self.norm(self.a(x)).relu()
        y = self.groups(self.b(skip))
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.up(self.head(y)), skip.amax(1, keepdim=True)


NETS = {
    "chain": (chain, "1x1x16x24"),
    "grouped": (Grouped, "1x1x15x24"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "tile", "keep"),
    [
        ("chain", (5, 8), "device"),
        ("grouped", (5, 8), "disk"),
    ],
)
def test_some_tiles_have_the_peak_of_all(net: str, tile: tuple[int, int], keep: str) -> None:
    make, size = NETS[net]
    given = Patchwise(size=tile, train=True, keep=keep, progress=False)  # type: ignore[arg-type]
    made, inputs = rewrite(make(), given, inputs=size), as_inputs(size)
    tiling = forward_of(made).tiling
    some = measured_peak(made, inputs, SampledTiling(**vars(tiling)))
    assert some == pytest.approx(measure(made, size, estimate=True).peak, rel=SLACK)
    prepared = prepare(made, inputs, tiling)
    sampled = replace(prepared.program, sampled=True)
    every = estimated_peak(prepared.trace, prepared.program, tiling)
    assert estimated_peak(prepared.trace, sampled, tiling) == pytest.approx(every, rel=SLACK)


@pytest.mark.slow
def test_a_training_step_stays_within_the_target_with_the_largest_tiles_that_do() -> None:
    keep: Any = "disk"
    size = "1x1x16x32"
    whole = measure(headed(), size, estimate=True).peak
    some = rewrite(headed(), Patchwise(size=16, train=True, keep=keep), inputs=size)
    by = {
        tile: measured_peak(some, as_inputs(size), Tiling(size=tile, train=True, keep=keep))
        for tile in ((16, 16), (8, 8))
    }
    limit = (by[16, 16] + by[8, 8]) // 2
    assert by[8, 8] < limit < by[16, 16] < whole
    given = Patchwise(train=True, keep=keep, max_peak=f"{limit}B", progress=False)
    made = rewrite(headed(), given, inputs=size)
    x = torch.randn(1, 1, 16, 32)
    for estimate in (True, False):
        assert measure(made, x, estimate=estimate).peak <= limit
        assert measure(made, x, "infer", estimate=estimate).peak <= limit
    assert measure(made, x).peak == measure(made, x, estimate=True).peak
    made(x).sum().backward()
    (trained,) = forward_of(made)._prepared.values()
    assert trained.program.tile in ((16, 8), (8, 16))
    text = str([record.to_json() for record in history(made)])
    assert f"trains by tiles of {'x'.join(map(str, trained.program.tile))}" in text
    assert "live tensors of a training step with Adam peak at" in text


@pytest.mark.slow
def test_inference_stays_within_the_target_too() -> None:
    size = "1x1x32x128"
    whole = measure(unet(), size, "infer", estimate=True).peak
    limit = int(whole * 0.8)
    made = rewrite(unet(), Patchwise(max_peak=f"{limit}B"), inputs=size)
    assert measure(made, size, "infer").peak <= limit
    assert measure(made, size, "infer", estimate=True).peak <= limit


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_a_target_that_no_tile_meets_is_an_error_that_tells_the_least(train: bool) -> None:
    size = "1x1x32x64"
    given = {"train": train, "keep": "disk", "output": "disk"}
    with pytest.raises(OptionError) as caught:
        rewrite(unet(), Patchwise(max_peak="1KiB", **given), inputs=size)  # type: ignore[arg-type]
    text = str(caught.value)
    what = "a training step with Adam" if train else "a forward"
    assert text.startswith("patchwise: option 'max_peak': no tile keeps")
    assert f"of {what} within 1.0 KiB; with tiles of (8, 8) they take" in text
    found = re.search(r"they take ([\d.]+) (KiB|MiB)", text)
    assert found is not None
    least = float(found[1]) * (MIB if found[2] == "MiB" else 1024)
    mode: Any = "train" if train else "infer"
    smallest = rewrite(unet(), Patchwise(size=(8, 8), **given), inputs=size)  # type: ignore[arg-type]
    assert measure(smallest, size, mode).peak == pytest.approx(least, rel=0.05)


@pytest.mark.slow
def test_a_larger_volume_is_cut_anew_or_told_that_it_cannot_be() -> None:
    size = "1x1x32x64"
    limit = int(measure(unet(), size, estimate=True).peak * 0.9)
    given = Patchwise(train=True, keep="disk", output="disk", max_peak=f"{limit}B")
    made = rewrite(unet(), given, inputs=size)
    made(torch.randn(1, 1, 32, 80)).sum().backward()
    with pytest.raises(OptionError, match="no tile keeps the live tensors of a training step"):
        made(torch.randn(1, 1, 256, 256))


@pytest.mark.slow
def test_the_plan_says_where_tiles_do_not_help() -> None:
    (step,) = plan(chain(), Patchwise(size=4, train=True), inputs="1x1x8x8").passes
    assert "no lower than that of the whole" in step.changes[0].why
    (step,) = plan(chain(), Patchwise(size=16, train=True), inputs="1x1x16x64").passes
    assert step.changes[0].why == "each fits where the whole does not"
