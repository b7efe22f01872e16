"""A norm in place whose gradient is differentiated again, or whose weights change meanwhile."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.errors import ExecutionError, PocketizeWarning
from pocketize.passes import InPlaceNorm
from pocketize.passes.shared import forwards
from tests.passes.inplace.pairs import ACTIVATIONS, NORMS, batch, pair


def _second(net: nn.Module, x: Tensor) -> list[Tensor]:
    """First derivatives, and those of a function of them."""
    x = x.clone().requires_grad_()
    given = [x, *net.parameters()]
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    loss = (net(x * 1) * weight).sum()
    first = torch.autograd.grad(loss, given, create_graph=True)
    penalty = 0 * x.sum() + sum((t * t.detach().cos()).sum() for t in first)
    second = torch.autograd.grad(penalty, given, allow_unused=True)
    found = [torch.zeros_like(t) if s is None else s for s, t in zip(second, given, strict=True)]
    return [t.detach() for t in (*first, *found)]


def _same(expected: list[Tensor], found: list[Tensor]) -> None:
    for a, b in zip(expected, found, strict=True):
        assert float((a - b).abs().max()) <= 1e-9 * max(1e-3, float(a.abs().max()))


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_are_those_of_the_pair(norm: str) -> None:
    for activation, train in itertools.product(ACTIVATIONS, (True, False)):
        _same(*(_second(net.train(train), batch(norm)) for net in pair(norm, activation)))


@pytest.mark.parametrize("norm", ["batch-2d", "instance-1d", "group-1d"])
def test_second_derivatives_where_the_input_is_kept(norm: str) -> None:
    _same(*(_second(net, batch(norm)) for net in pair(norm, "elu", gamma=0.0)))


def test_second_derivatives_where_some_channels_are_kept() -> None:
    nets = pair("batch-2d", channels=8)
    with torch.no_grad():
        for net in nets:
            cast(nn.BatchNorm2d, net.get_submodule("0")).weight[2] = 0
    _same(*(_second(net, batch("batch-2d", 8)) for net in nets))


def test_second_derivatives_of_a_norm_whose_weight_made_its_input() -> None:
    """Its gradient by the weight must not take in the way through the input."""

    class Woven(nn.Module):
        def __init__(self, pair: nn.Module) -> None:
            super().__init__()
            self.pair = pair

        def forward(self, x: Tensor) -> Tensor:
            first = self.pair(x * self.pair.get_submodule("0").weight.view(-1, 1, 1).exp())
            made: Tensor = self.pair(first.sin())
            return made

    _same(*(_second(Woven(net), batch("batch-2d")) for net in pair("batch-2d")))


def test_third_derivatives_are_those_of_the_pair() -> None:
    found = []
    for net in pair("group-2d", "elu"):  # torch's own for a batch norm are wrong
        x = batch("group-2d").requires_grad_()
        made = net(x).sin().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(made, x, create_graph=True)
            made = slope.square().sum()
        found.append([slope.detach()])
    _same(*found)


def test_many_gradients_at_once_are_those_of_the_pair() -> None:
    found = []
    for net in pair("batch-1d", channels=4):
        x = batch("batch-1d", n=2).requires_grad_()
        made = net(x * 1).flatten()[:5]
        many = torch.eye(5, dtype=x.dtype)
        found.append(list(torch.autograd.grad(made, x, many, is_grads_batched=True)))
    _same(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # torch's own use of it
@pytest.mark.parametrize("level", ["forward", "transform"])
def test_forward_mode_takes_the_ordinary_functions(level: str) -> None:
    found = []
    for net in pair("instance-2d"):
        x = batch("instance-2d")
        if level == "transform":
            found.append([torch.func.jvp(lambda x, m=net: m(x * 1), (x,), (x.cos(),))[1].detach()])
            continue
        with forward_ad.dual_level():
            made = net(forward_ad.make_dual(x, x.cos()) * 1)
            found.append([forward_ad.unpack_dual(made).tangent.detach()])
    _same(*found)


def _multiply(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def _exchange(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("change", [_multiply, _exchange])
@pytest.mark.parametrize("which", ["0.weight", "0.bias", "1.weight"])
def test_parameters_changed_between_the_passes_are_refused(
    which: str, change: Callable[[nn.Parameter], None]
) -> None:
    _, net = pair("batch-2d", "prelu")
    loss = net(batch("batch-2d").requires_grad_()).square().sum()
    change(net.get_parameter(which))
    with pytest.raises(ExecutionError, match=r"^in-place-norm: "):
        loss.backward()


def test_weights_that_were_moved_and_are_the_same_are_no_error() -> None:
    plain, net = pair("batch-2d")
    x = batch("batch-2d")
    loss = net(x).square().sum()
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    loss.backward()
    plain(x).square().sum().backward()
    _same(*([cast(Tensor, p.grad) for p in m.parameters()] for m in (plain, net)))


def test_an_output_that_is_written_to_is_refused() -> None:
    _, net = pair("batch-2d")
    made = net(batch("batch-2d"))
    with pytest.raises(ExecutionError, match=r"^in-place-norm: .*modified by an inplace operation"):
        made.sigmoid_().sum().backward()


def test_running_statistics_written_in_between_change_nothing() -> None:
    plain, net = (m.eval() for m in pair("batch-2d"))
    x, expected = batch("batch-2d"), []
    plain(x).square().sum().backward()
    loss = net(x).square().sum()
    net.train()
    net(x)  # writes to them
    loss.backward()
    expected = [cast(Tensor, p.grad) for p in plain.parameters()]
    _same(expected, [cast(Tensor, p.grad) for p in net.parameters()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at inputs
def test_compiled_it_says_once_that_it_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "_compiled", set())
    block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 2, 1))
    net = rewrite(block, InPlaceNorm(), inputs=(x := torch.randn(2, 1, 8, 8)))
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(net), backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)  # where there is nothing to save there is nothing to say
    with pytest.warns(PocketizeWarning, match=r"^in-place-norm: torch.compile traces") as caught:
        (compiled(x).sum() + compiled(x[..., :6, :6]).sum()).backward()  # compiled once more
    assert len(caught) == 1
