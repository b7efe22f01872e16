"""Stages that were rewritten before they became a cascade."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from pocketize import Pass, history, rewrite
from pocketize.passes import (
    Amp,
    Cascade,
    CompactBlock,
    InPlaceNorm,
    Offload,
    Patchwise,
    Pocket,
    Recompute,
)
from tests.passes.cascade.nets import Small

PASSES: dict[str, Pass] = {
    "amp": Amp(),
    "compact-block": CompactBlock(activations="any"),
    "in-place-norm": InPlaceNorm(),
    "offload": Offload(min_bytes="1KiB", to="disk"),
    "pocket": Pocket(width=8),
    "recompute": Recompute(),
    "exact": Patchwise(mode="exact", size=8, progress=False),
    "slab": Patchwise(mode="slab", size=8, progress=False),
    "window": Patchwise(mode="window", size=8, progress=False),
}


class Leaky(nn.Module):
    """Two levels of convolution, batch norm and leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.LeakyReLU(0.1))
            for i, o in [(1, 16), (16, 32)]
        )
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_a_rewritten_second_stage_is_widened_and_stays_rewritten(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 24, 24)
    stage2 = rewrite(Leaky(), PASSES[name], inputs=x, strict=True).eval()
    cascade = Cascade(Small(1, 3), stage2, inputs=x).eval()
    assert [r.name for r in history(cascade.stage2)] == [PASSES[name].name, "extend-inputs"]
    with torch.no_grad():
        assert torch.equal(cascade(x), stage2(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a forward by tiles says that it runs whole for gradients
        cascade.train()(x).square().mean().backward()
    gradient = next(p.grad for p in cascade.stage2.parameters() if p.ndim == 4)
    assert gradient is not None
    assert gradient.shape[1] == 4
    assert gradient[:, 1:].abs().max() > 0
