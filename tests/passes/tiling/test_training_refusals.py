"""Gradients that are not those of the operators: refused by name, wherever the others are exact."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketize import plan, rewrite
from pocketize.errors import ExecutionError
from pocketize.passes import Amp, InPlaceNorm, Patchwise, Recompute
from tests.passes.tiling.nets import double, unet


class Rounded(torch.autograd.Function):
    """Straight through: the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reversed(torch.autograd.Function):
    """The input itself, and its gradient with the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Two(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.told = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.told(self, x)


def _quiet_features(net: Two, x: Tensor) -> Tensor:
    with torch.no_grad():
        features = net.a(x)
    return net.b(features)


def _quietly_rounded(x: Tensor) -> Tensor:
    with torch.no_grad():
        rounded: Tensor = Rounded.apply(x)
    return rounded


def _quiet_mean(net: Two, x: Tensor) -> Tensor:
    y = net.a(x)
    with torch.no_grad():
        mean = y.mean((2, 3), keepdim=True)
    return net.b(y - mean)


def _quiet_weight(net: Two, x: Tensor) -> Tensor:
    with torch.inference_mode():
        weight = net.b.weight.mT.contiguous()
    return F.conv2d(net.a(x), weight.clone(), padding=1)


def _hooked(net: Two, x: Tensor) -> Tensor:
    y = net.a(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 0.1)
    return net.b(y)


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _tiled(model: nn.Module, x: Tensor, *before: Any) -> nn.Module:
    return rewrite(model, *before, Patchwise(size=6, train=True, progress=False), inputs=x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (_quiet_mean, r"the model at test_training_refusals.*computes mean under torch\.no_grad"),
        (_quiet_features, r"computes conv2d under torch\.no_grad"),
        (_quiet_weight, r"computes mT under torch\.no_grad"),
        (lambda net, x: net.b(Rounded.apply(net.a(x))), "Rounded has a backward of its own"),
        (lambda net, x: net.b(Reversed.apply(net.a(x))), "Reversed has a backward of its own"),
        (lambda net, x: net.b(net.a(x) * _quietly_rounded(net.a(x))), "computes round in"),
        (lambda net, x: net.b(checkpoint(net.a, x, use_reentrant=True)), "use_reentrant=False"),
        (_hooked, "calls register_hook on a tensor"),
        (lambda net, x: net.b(F.dropout(net.a(x), 0.1, net.training)), "draws random numbers"),
    ],
    ids=[
        *(
            "mean",
            "features",
            "weight",
            "straight through",
            "reversed",
            "function without gradients",
        ),
        *("reentrant checkpoint", "hook", "dropout"),
    ],
)
def test_gradients_that_operators_do_not_have_are_refused_by_the_plan(
    forward: Callable[..., Tensor], words: str
) -> None:
    model, x = Two(forward).double(), double(2, 1, 12, 12)
    for mode in (True, False):  # a model in evaluation mode is tried in training mode
        made = plan(model.train(mode), Patchwise(size=6, train=True), inputs=x)
        (refusal,) = made.passes[-1].refused
        assert re.search(rf"in training \(train=True\), .*{words}", refusal.why)
    tiled = rewrite(model, Patchwise(size=6), inputs=x)
    with torch.inference_mode():
        tiled.eval()(x)  # without gradients there is nothing to refuse


@pytest.mark.slow
def test_what_the_modes_of_the_model_switch_off_is_not_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.3), nn.Conv2d(4, 2, 1))
    model = model.double().train()
    model[1].eval()
    x = double(2, 1, 12, 12)
    tiled = _tiled(model, x)
    tiled(x).square().sum().backward()
    tiled.train()
    with pytest.raises(ExecutionError, match=r"^patchwise: aten\.dropout.* in 1 draws random"):
        tiled(x)


@pytest.mark.slow
def test_a_hook_on_the_gradients_of_a_module_is_named() -> None:
    x = double(1, 1, 12, 12)
    tiled: Any = _tiled(unet().double(), x)
    tiled.down.register_full_backward_hook(lambda module, inner, outer: None)
    with pytest.raises(ExecutionError, match="down has a backward hook"):
        tiled(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.a(x)) - net.a(x).detach().mean(),
        lambda net, x: net.b(net.a(x) * (net.a(x).data > 0)),
        lambda net, x: net.b(checkpoint(net.a, x, use_reentrant=False)),
        lambda net, x: net.b(net.a(x)) * net.a(x).argmax(1, keepdim=True),
    ],
    ids=["detached", "data", "checkpointed", "labels"],
)
def test_what_says_itself_that_no_gradient_follows_is_exact(
    forward: Callable[..., Tensor],
) -> None:
    x = double(2, 1, 12, 12)
    model = Two(forward).double()
    expected, found = _gradients(model, x), _gradients(_tiled(model, x), x)
    for name, gradient in expected.items():
        other = found[name]
        assert gradient is not None
        assert other is not None
        assert torch.allclose(other, gradient, rtol=1e-9, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("other", [InPlaceNorm(), Recompute(min_bytes=0), Amp()])
def test_functions_of_the_passes_before_have_the_gradients_of_their_operators(other: Any) -> None:
    torch.manual_seed(0)
    model = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16]).train()
    x = double(1, 1, 16, 16).float()
    expected = _gradients(rewrite(model, other, inputs=x), x)
    found = _gradients(_tiled(model, x, other), x)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        held = found[name]
        assert gradient is not None
        assert held is not None
        size = max(1.0, float(gradient.abs().max()))
        rough = 0.1 if isinstance(other, Amp) else 1e-3
        assert (held - gradient).abs().max() < rough * size, name
