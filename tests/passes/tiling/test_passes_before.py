"""Passes before tiles: what works inside of a tile, and what the plan says of what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pocketize import history, measure, plan, rewrite
from pocketize.passes import Amp, Checkpoint, InPlaceNorm, Offload, Patchwise, Recompute
from pocketize.plugin.base import Pass

SIZE = "1x1x16x16"
INERT: dict[str, Pass] = {
    "recompute": Recompute(min_bytes=1),
    "checkpoint": Checkpoint(),
    "offload": Offload(to="disk", min_bytes="1B"),
    "in-place-norm": InPlaceNorm(),
}
TILES = Patchwise(size=8, train=True, progress=False)


def block(i: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.InstanceNorm2d(o), nn.LeakyReLU())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(block(1, 8), block(8, 8), nn.Conv2d(8, 2, 1))


@pytest.fixture(scope="module")
def without() -> nn.Module:
    return rewrite(net(), TILES, inputs=SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", INERT)
def test_a_pass_that_does_nothing_in_training_by_tiles_is_named(
    name: str, without: nn.Module
) -> None:
    x = torch.randn(1, 1, 16, 16)
    with_it = rewrite(net(), INERT[name], TILES, inputs=SIZE)
    text = str([record.to_json() for record in history(with_it)])
    assert f"{name} does nothing in training by tiles" in text
    assert f"Leave {name} out" in text
    assert measure(with_it, SIZE, estimate=True).peak == measure(without, SIZE, estimate=True).peak
    for lean in (with_it, without):
        lean.zero_grad()
        lean(x).square().mean().backward()
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_several_are_named_together_and_amp_works_in_a_tile(without: nn.Module) -> None:
    model = net()
    text = str(plan(model, InPlaceNorm(), INERT["offload"], TILES, inputs=SIZE))
    assert "offload and in-place-norm do nothing in training by tiles" in text
    inference = plan(model, InPlaceNorm(), Patchwise(size=8), inputs=SIZE)
    assert "nothing in training by tiles" not in str(inference)
    low = rewrite(model, Amp(), TILES, inputs=SIZE)
    assert measure(low, SIZE, estimate=True).peak < measure(without, SIZE, estimate=True).peak
