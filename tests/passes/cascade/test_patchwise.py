"""Cascades whose second stage runs tile by tile, as in the thesis, or exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import history, measure, rewrite
from pocketize.passes import Cascade, Patchwise
from pocketize.zoo.patchwise import UNet3d
from tests.passes.cascade.nets import Small, quiet

X = torch.randn(2, 1, 12, 16, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def learnt(cascade: Cascade) -> Cascade:
    """With guidance that stage 2 listens to."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = cascade.stage2.get_parameter("first.weight")
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return cascade.eval()


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return quiet(Small(1, 3, 3)), quiet(Small(1, 2, 3))


def patchwise(**options: Any) -> Cascade:
    tiles = Patchwise(**{"size": 8, "progress": False} | options)
    return Cascade(*nets(), passes=(tiles,), inputs=X)


@pytest.mark.slow
@torch.no_grad()
def test_an_exact_second_stage_gives_the_answer_of_the_whole() -> None:
    whole, tiled = learnt(Cascade(*nets())), learnt(patchwise(mode="exact"))
    assert [record.name for record in history(tiled.stage2)] == ["extend-inputs", "patchwise"]
    assert torch.allclose(tiled(X), whole(X), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@torch.no_grad()
def test_a_slab_sees_its_own_part_of_volume_and_guidance() -> None:
    whole, tiled = learnt(Cascade(*nets())), learnt(patchwise(mode="slab"))
    padded = torch.nn.functional.pad(torch.cat([X, whole.guide(X)], 1), (0, 3))
    parts: list[Tensor] = [whole.stage2(part) for part in padded.split(8, -1)]
    expected = torch.cat(parts, -1)[..., :21]
    assert torch.allclose(tiled(X), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(tiled(X), whole(X), rtol=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_windows_overlap_in_volume_and_guidance_alike() -> None:
    whole, tiled = learnt(Cascade(*nets())), learnt(patchwise(mode="window", overlap=0.5))
    found = tiled(X)
    assert found.shape == (2, 2, 12, 16, 21)
    assert not torch.allclose(found, whole(X), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "slab", "window"])
@torch.no_grad()
def test_before_training_it_is_stage_2_alone_patch_wise(mode: str) -> None:
    tiles = Patchwise(mode=mode, size=8, progress=False)
    alone = rewrite(nets()[1], tiles, inputs=X).eval()
    assert torch.equal(patchwise(mode=mode).eval()(X), alone(X))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pocketize.errors.CropWarning")
@torch.no_grad()
def test_the_crop_is_cut_into_tiles_too() -> None:
    stages = nets()
    tiles = Patchwise(mode="exact", size=8, progress=False)
    plain, tiled = (
        learnt(Cascade(*stages, crop=1, outside=0.0, passes=given, inputs=X))
        for given in ((), (tiles,))
    )
    x = torch.full_like(X, -1.0)
    x[..., 2:9, 3:9, 4:15] = 3.0
    assert torch.allclose(tiled(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_the_thesis_cascade_takes_less_memory_than_the_whole() -> None:
    x = torch.randn(1, 4, 48, 48, 128)
    stage1, stage2 = (UNet3d(4, 4, widths=(16, 16, 16, 16, 16)) for _ in range(2))
    tiles = Patchwise(mode="slab", size=16, progress=False)
    cascade = Cascade(stage1, stage2, scale=0.34, passes=(tiles,), inputs=x)
    whole, cascaded = (
        measure(net, x, mode="infer", estimate=True).peak for net in (stage2, cascade)
    )
    assert cascaded < 0.6 * whole
