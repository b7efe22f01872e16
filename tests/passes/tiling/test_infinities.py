"""Inf and NaN in a volume have the fate by tiles that they have in the whole volume."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.graph.clone import clone
from pocketize.passes.tiling.exact import ExactForward
from pocketize.passes.tiling.forward import Tiling
from tests.passes.tiling.nets import double


class Net(nn.Module):
    def __init__(self, told: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.told, self.layers = told, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.told(x, *self.layers)


def _conv(**options: Any) -> nn.Module:
    return nn.Conv2d(2, 2, 3, padding=1, **options)


def _resized(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, **options)


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: Net(lambda x, a, b: b(a(x).sigmoid()), _conv(), _conv(stride=2)),
    "transposed": lambda: Net(lambda x, a: a(x), nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)),
    "largest": lambda: Net(lambda x, a: a(F.max_pool2d(x, 3, 1, 1).tanh()), _conv()),
    "mean": lambda: Net(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "linear": lambda: Net(_resized(scale_factor=2, mode="bilinear")),
    "linear, corners": lambda: Net(_resized(size=(23, 25), mode="bilinear", align_corners=True)),
    "linear, one axis": lambda: Net(_resized(size=(12, 26), mode="bilinear")),
    "linear, shorter": lambda: Net(_resized(size=(6, 13), mode="bilinear")),
    "reflected": lambda: Net(lambda x: F.pad(x, (2, 1, -1, 2), mode="reflect")),
    "instance norm": lambda: Net(lambda x, a, n: n(a(x)), _conv(), nn.InstanceNorm2d(2)),
    "batch norm": lambda: Net(lambda x, n, a: a(n(x)), nn.BatchNorm2d(2), _conv()),
    "one normed": lambda: Net(
        lambda x, n, a: a(torch.cat([n(x)[:, :1], x[:, 1:].tanh()], 1)), nn.GroupNorm(2, 2), _conv()
    ),
    "pooled": lambda: Net(
        lambda x: x.tanh() * x.mean((2, 3), keepdim=True) + x.amax((2, 3))[..., None, None]
    ),
    "replaced": lambda: Net(lambda x, a: a(torch.where(x.isfinite(), x, 0.0)), _conv()),
}


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    loss = y.sigmoid().nan_to_num(0.3).sum()
    found = [y, *torch.autograd.grad(loss, [x, *model.parameters()]), *model.buffers()]
    with torch.no_grad():
        return [*found, model.eval()(x)]


@pytest.mark.each_value
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", NETS)
def test_one_voxel_that_is_no_number_and_a_box_of_them(name: str, value: float) -> None:
    torch.manual_seed(0)
    model = NETS[name]().double().train()
    tiled = clone(model)
    ExactForward(tiled, Tiling(size=(4, 5), train=True, progress=False)).install()
    x = double(1, 2, 12, 13)
    x[0, 0, 3, 5] = x[0, 1, 7:11, 3:9] = value
    for a, b in zip(_step(model, x), _step(tiled, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("place", [(0, 0), (3, 5), (4, 5), (11, 12)])
def test_what_a_tile_cuts_away_makes_no_nan_of_an_infinite_gradient(
    place: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(1, 2, 3, padding=1).double()
    tiled = clone(model)
    ExactForward(tiled, Tiling(size=(4, 5), train=True, progress=False)).install()
    x = double(1, 1, 12, 13)
    x[0, 0, place[0], place[1]] = math.inf
    found = [torch.autograd.grad(net(x).sum(), list(net.parameters())) for net in (model, tiled)]
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, equal_nan=True)
