"""What every mode takes and returns: several inputs, nests, other layouts, files, autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.graph.capture import find_tensors, structure_of
from pocketize.passes import Patchwise
from tests.passes.tiling.nets import double, unet

MODES = ["exact", "slab", "window"]


class Nested(nn.Module):
    """Two images, a vector by keyword and a switch; a dict with tuples of coarser outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = nn.Conv3d(3, 4, 1), nn.Linear(5, 4)
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, a: Tensor, b: Tensor, *, vector: Tensor, deep: bool = True) -> dict[str, Any]:
        y = self.conv(torch.cat([a, b], 1))
        y = F.relu(y + self.shift(vector)[..., None, None, None])
        coarse = (self.head(F.avg_pool3d(y, 2)), [self.head(F.max_pool3d(y, 4))])
        return {"main": self.head(y), "coarse": coarse if deep else None, "count": 3}


def _nested() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    a, b = double(2, 1, 8, 8, 16), double(2, 2, 8, 8, 16, seed=1)
    return Nested().double().eval(), {"a": a, "b": b, "vector": double(2, 5, seed=2)}


def _agree(found: Any, expected: Any) -> None:
    """Nothing of the network crosses a cut at multiples of 4: all modes give the same."""
    assert structure_of(found) == structure_of(expected)
    for a, b in zip(find_tensors(found), find_tensors(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), (a - b).abs().max()


def _options(mode: Any) -> dict[str, Any]:
    return {"overlap": 0.0} if mode == "window" else {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_several_inputs_and_nested_outputs_at_other_resolutions(mode: Any) -> None:
    model, given = _nested()
    made = rewrite(model, Patchwise(size=4, mode=mode, **_options(mode)), inputs=given)
    with torch.inference_mode():
        _agree(made(**given), model(**given))
        a, b, vector = given.values()
        _agree(made(a, b, vector=vector), model(a, b, vector=vector))
        _agree(made(a, b=b, vector=vector, deep=False), model(a, b, vector=vector, deep=False))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_volume_whose_channels_lie_last(mode: Any) -> None:
    model, given = _nested()
    made = rewrite(model, Patchwise(size=4, mode=mode, **_options(mode)), inputs=given)
    moved = {**given, "b": given["b"].contiguous(memory_format=torch.channels_last_3d)}
    with torch.inference_mode():
        _agree(made(**moved), model(**given))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_volume_in_a_file_that_may_not_be_written(mode: Any, tmp_path: Path) -> None:
    model, given = _nested()
    np.save(tmp_path / "b.npy", given["b"].numpy())
    file = np.lib.format.open_memmap(tmp_path / "b.npy", mode="c")
    made = rewrite(model, Patchwise(size=4, mode=mode, **_options(mode)), inputs=given)
    with torch.inference_mode():
        _agree(made(**{**given, "b": torch.from_numpy(file)}), model(**given))


@pytest.mark.slow
def test_under_autocast_tiles_are_no_further_from_the_whole_than_that_is_from_float32() -> None:
    model, x = unet(3).eval(), double(1, 1, 16, 16, 32).float()
    made = rewrite(model, Patchwise(size=8), inputs=x)
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole, tiled = model(x), made(x)
    assert whole.dtype == tiled.dtype == torch.bfloat16
    assert (tiled - whole).float().abs().max() <= 2 * (whole.float() - exact).abs().max()
    assert (tiled - whole).float().abs().max() < 0.02 * exact.abs().max()
