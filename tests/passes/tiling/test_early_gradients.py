"""Gradients of a backward pass by tiles arrive step by step, and weights are updated in between."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pocketize import measure, rewrite, step_in_backward
from pocketize.errors import ExecutionError
from pocketize.passes import Patchwise
from tests.passes.tiling.nets import double


class Shared(nn.Module):
    """A weight that is read twice, one also without a gradient, one that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True)
        self.tied, self.part = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 3, padding=1)
        self.part.weight = nn.Parameter(self.tied.weight.data[:2])

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm(self.first(x)))
        y = F.instance_norm(F.conv2d(y, self.last.weight.detach(), padding=1))
        y = F.instance_norm(self.tied(torch.cat([y, x], 1)))
        y = F.instance_norm(self.part(F.silu(y)))
        y = F.instance_norm(self.tied(torch.cat([F.silu(y), x], 1)))
        made: Tensor = self.last(F.silu(y))
        return made


def _tiled(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    return rewrite(model, Patchwise(size=4, train=True, progress=False, **options), inputs=x)


@pytest.mark.slow
def test_updates_in_the_backward_pass_are_those_after_it_also_of_weights_read_twice() -> None:
    torch.manual_seed(0)
    model, x = Shared().double(), double(1, 2, 10, 12)
    found = []
    for early in (False, True):
        tiled = _tiled(copy.deepcopy(model), x)
        tiled.part.weight = nn.Parameter(tiled.tied.weight.data[:2])
        optimizer: Any = SGD(tiled.parameters(), lr=0.1, momentum=0.9)
        if early:
            optimizer = step_in_backward(tiled, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            (tiled(x).square().sum() + tiled(x * 2).mean()).backward()
            optimizer.step()
        found.append([*tiled.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_gradients_never_exist_together() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4)) for _ in range(5)]
    model, x = nn.Sequential(*layers), torch.randn(1, 4, 12, 12)
    tiled, held = _tiled(model, x), []

    def drop(parameter: Tensor) -> None:
        held.append(sum(p.grad is not None for p in tiled.parameters()))
        parameter.grad = None

    for parameter in tiled.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    tiled(x).square().sum().backward()
    assert len(held) == 10
    assert max(held) == 1


@pytest.mark.slow
def test_the_peak_with_updates_in_the_backward_pass_is_lower_and_the_estimate_exact() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.InstanceNorm2d(32)) for _ in "abcd"]
    model, x = nn.Sequential(*layers), torch.randn(1, 32, 12, 12)
    tiled = _tiled(model, x)
    peaks = [
        measure(tiled, x, estimate=estimate, step_in_backward=early).peak
        for early in (False, True)
        for estimate in (False, True)
    ]
    assert peaks[0] == peaks[1]
    assert peaks[2] == peaks[3] < peaks[0] - layers[0][0].weight.nbytes  # type: ignore[index]


@pytest.mark.slow
def test_a_weight_written_by_a_hook_that_earlier_steps_read_is_an_error() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)), nn.InstanceNorm2d(2))
    x = torch.randn(1, 2, 8, 8)
    model.insert(1, nn.InstanceNorm2d(2))
    tiled: Any = _tiled(model, x)

    def write(parameter: Tensor) -> None:
        tiled[0].weight.detach().zero_()

    tiled[-2].weight.register_post_accumulate_grad_hook(write)
    with pytest.raises(ExecutionError, match=r"patchwise: 0\.weight was written .* between"):
        tiled(x).square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("retain", [False, True])
def test_gradients_of_late_weights_alone_leave_nothing_behind(retain: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2)), nn.InstanceNorm2d(2))
    model.insert(1, nn.InstanceNorm2d(2, affine=True))
    x = double(1, 2, 8, 9)
    tiled = _tiled(model.double(), x)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    y = tiled(x)
    loss = y.square().sum()
    late = list(tiled.parameters())[-2:]
    for number in range(2 if retain else 1):
        found = torch.autograd.grad(loss, late, retain_graph=retain)
        for a, b in zip(found, expected[-2:], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10), number
    run = loss.grad_fn
    while "Tiled" not in type(run).__name__:
        run = run.next_functions[0][0]  # type: ignore[union-attr]
    assert not run.run._running  # type: ignore[union-attr]
    assert bool(run.run.execution.stored) == retain  # type: ignore[union-attr]
    if not retain:
        with pytest.raises(ExecutionError, match="has run"):
            y.sum().backward()
    gone = weakref.ref(run.run)  # type: ignore[union-attr]
    del y, loss, run
    gc.collect()
    assert gone() is None
