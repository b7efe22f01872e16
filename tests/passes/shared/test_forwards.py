"""A forward that stands in place of another is one to whoever looks at it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.passes import Amp, Checkpoint, Offload
from pocketize.passes.shared.forwards import Forward, wrapping
from pocketize.plugin.base import Pass

PASSES = [
    pytest.param(Amp(), id="amp"),
    pytest.param(Checkpoint(only=("part",)), id="checkpoint"),
    pytest.param(Offload(to="disk", min_bytes="1B"), id="offload"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU())

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.part(x) * scale


X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def made(given: Pass) -> nn.Module:
    torch.manual_seed(0)
    return rewrite(Net(), given, inputs=X)


@pytest.mark.parametrize("given", PASSES)
def test_a_rewritten_network_can_be_exported(given: Pass):
    model = made(given).eval()
    program = torch.export.export(model, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("given", PASSES)
def test_a_rewritten_network_can_be_traced(given: Pass):
    model = made(given).eval().requires_grad_(False)
    traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X), model(X))


@pytest.mark.parametrize("given", PASSES)
def test_arguments_by_name_reach_the_forward(given: Pass):
    model = made(given).eval()
    assert inspect.signature(model.forward) == inspect.signature(Net().forward)
    torch.testing.assert_close(model(x=X, scale=2.0), 2 * model(X))


def test_one_forward_may_stand_on_another_and_each_is_found():
    class First(Forward):
        pass

    class Second(Forward):
        pass

    model = Net().eval()
    expected = model(X)
    first, second = First(model), None
    first.install()
    second = Second(model)
    second.install()
    assert wrapping(model, First) is first
    assert wrapping(model, Second) is second
    assert wrapping(model.part, Forward) is None
    assert torch.equal(model(X), expected)


def test_a_class_that_is_exchanged_later_gives_its_forward():
    class Twice(Net):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, scale) * 2

    model: Any = Net().eval()
    expected = model(X)
    Forward(model).install()
    model.__class__ = Twice
    assert torch.equal(model(X), 2 * expected)


class Named(Tensor):
    """A subclass such as MONAI's MetaTensor."""


@pytest.mark.parametrize("given", PASSES)
def test_inputs_of_a_class_of_their_own_give_outputs_of_that_class(given: Pass):
    model, plain = made(given), made(given)
    out = model(X.as_subclass(Named))
    assert type(out) is Named
    out.square().sum().backward()
    plain(X).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(torch.as_tensor(a.grad), torch.as_tensor(b.grad))
