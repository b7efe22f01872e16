"""Any layers, sizes, strides, kernels and tiles: the whole volume's answer and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pocketize.graph.clone import clone
from pocketize.passes.tiling.exact import ExactForward
from pocketize.passes.tiling.forward import Tiling
from tests.examples import examples
from tests.passes.tiling.random_nets import RandomNet

_LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def _drawn(data: st.DataObject, rank: int) -> tuple[RandomNet, Tensor, tuple[int, ...]]:
    longest = {1: 40, 2: 15, 3: 8}[rank]
    sizes = [data.draw(st.integers(1, longest)) for _ in range(rank)]
    tile = tuple(data.draw(st.integers(1, size + 2)) for size in sizes)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    net = RandomNet(rank, sizes, lambda options: data.draw(st.sampled_from(list(options))))
    assume(net.steps)
    for tensor in net.parameters():
        nn.init.uniform_(tensor, -1, 1)
    x = torch.randn(data.draw(st.integers(1, 2)), 2, *sizes, dtype=torch.float64)
    if rank > 1 and data.draw(st.booleans()):
        x = x.contiguous(memory_format=_LAYOUTS[rank])
    return net.double().eval(), x, tile


def _tiled(net: nn.Module, tile: tuple[int, ...], **options: Any) -> nn.Module:
    made = clone(net)
    ExactForward(made, Tiling(size=tile, progress=False, **options)).install()
    return made


def _agree(found: Tensor, expected: Tensor, tolerance: float, net: RandomNet) -> None:
    assert found.shape == expected.shape, net.text
    size = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() <= tolerance * size, net.text


def _check_outputs(data: st.DataObject, rank: int) -> None:
    net, x, tile = _drawn(data, rank)
    with torch.no_grad():
        whole = net(x)
        assume(all(y.isfinite().all() for y in whole))  # the largest of padding alone is -inf
        for found, expected in zip(_tiled(net, tile)(x), whole, strict=True):
            _agree(found, expected, 1e-10, net)


@pytest.mark.slow
@settings(max_examples=examples(25), deadline=None, suppress_health_check=_SLOW)
@given(st.data())
def test_any_network_along_one_axis(data: st.DataObject) -> None:
    _check_outputs(data, 1)


@pytest.mark.slow
@settings(max_examples=examples(25), deadline=None, suppress_health_check=_SLOW)
@given(st.data())
def test_any_network_of_images(data: st.DataObject) -> None:
    _check_outputs(data, 2)


@settings(max_examples=examples(15), deadline=None, suppress_health_check=_SLOW)
@given(st.data())
def test_any_network_of_volumes(data: st.DataObject) -> None:
    _check_outputs(data, 3)


@pytest.mark.slow
@settings(max_examples=examples(25), deadline=None, suppress_health_check=_SLOW)
@given(st.data(), st.integers(1, 2))
def test_the_gradients_of_any_network(data: st.DataObject, rank: int) -> None:
    net, x, tile = _drawn(data, rank)
    tiled = _tiled(net, tile, train=True)
    found = []
    for model in (net, tiled):
        leaf = x.clone().requires_grad_()
        outputs = model(leaf)
        assume(all(y.isfinite().all() for y in outputs))
        total = sum((y * y.detach().cos()).sum() + y.square().mean() for y in outputs)
        assert isinstance(total, Tensor)
        wanted = [leaf, *model.parameters()]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        pairs = zip(wanted, gradients, strict=True)
        found.append([torch.zeros_like(w) if g is None else g for w, g in pairs])
    for expected, gradient in zip(*found, strict=True):
        _agree(gradient, expected, 1e-9, net)


def test_windows_of_nothing_but_padding_in_front_of_what_is_computed_for_a_tile() -> None:
    """Kernels of one voxel in padding of one: some tiles read no voxel of the map before."""
    net = nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(2, 2, 1, padding=2, stride=3),
        nn.MaxPool2d(1),
        nn.AvgPool2d((2, 1), padding=(1, 0)),
        nn.Conv2d(2, 2, 3, padding=4),
    )
    net = net.double().eval()
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(_tiled(net, (1, 1))(x), net(x), rtol=1e-10, atol=1e-10)
