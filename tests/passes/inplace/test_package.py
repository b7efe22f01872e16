"""The backend inplace_abn: exact where it is used, native where it would be another function.

Where the package is not installed each test checks what the user is told instead.
"""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from pocketize.engine.pipeline import plan, rewrite
from pocketize.errors import RewriteError
from pocketize.passes import InPlaceNorm
from pocketize.passes.inplace import inplace_abn as inplace_package
from pocketize.passes.inplace.inplace_abn import package_installed

INPUT = "2x3x8x8"
PACKAGE = InPlaceNorm(backend="inplace_abn")


def _net(activation: nn.Module | None = None, norm: nn.Module | None = None) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        norm or nn.BatchNorm2d(8),
        activation or nn.LeakyReLU(0.1),
        nn.Conv2d(8, 2, 3),
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name == "1.weight":
                parameter.copy_(0.5 + torch.rand(8, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def _missing(model: nn.Module) -> bool:
    """Without the package, check the refusal; the caller then has nothing else to check."""
    if package_installed():
        return False
    with pytest.raises(RewriteError, match=r"pip install --no-build-isolation inplace-abn==1.1.0"):
        plan(model, PACKAGE, inputs=INPUT)
    return True


def _differences(net: nn.Module, made: nn.Module) -> float:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for module in (net, made):
        module.zero_grad()
        module(x).square().sum().backward()
    pairs = [
        (cast(Tensor, a.grad), cast(Tensor, b.grad))
        for a, b in zip(net.parameters(), made.parameters(), strict=True)
    ]
    pairs += list(zip(net.buffers(), made.buffers(), strict=True))
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1.0)) for a, b in pairs)


def _saved_by(made: nn.Module) -> str:
    x = torch.randn(4, 3, 8, 8)
    output = made.get_submodule("1")(made.get_submodule("0")(x))
    return output.grad_fn.name() if output.grad_fn is not None else ""


def test_without_the_package_it_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pocketize.passes.inplace.in_place_norm.package_installed", lambda: False)
    with pytest.raises(RewriteError, match=r"pip install --no-build-isolation inplace-abn==1.1.0"):
        plan(_net(), PACKAGE, inputs=INPUT)
    assert plan(_net(), "in-place-norm:backend=auto", inputs=INPUT).passes[0].edits


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.1, inplace=True), nn.ELU()], ids=["leaky", "elu"]
)
def test_gradients_and_running_statistics_are_the_users(activation: nn.Module, train: bool) -> None:
    net = _net(activation)
    if _missing(net):
        return
    made = rewrite(net, PACKAGE, inputs=INPUT)
    assert "InPlaceABN" in _saved_by(copy.deepcopy(made))
    net.train(train)
    made.train(train)
    for _ in range(2):
        assert _differences(net, made) < 1e-4


def test_it_works_for_norms_without_parameters_or_statistics() -> None:
    for norm in (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False)):
        net = _net(norm=norm)
        if _missing(net):
            return
        made = rewrite(net, PACKAGE, inputs=INPUT)
        assert "InPlaceABN" in _saved_by(copy.deepcopy(made))
        assert _differences(net, made) < 1e-4


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 1e-5])
def test_gammas_that_the_package_would_change_are_refused(gamma: float) -> None:
    net = _net()
    if _missing(net):
        return
    with torch.no_grad():
        cast(Tensor, net.get_submodule("1").weight)[2] = gamma
    (refusal,) = plan(net, PACKAGE, inputs=INPUT).passes[0].refused
    assert refusal.path == "1"
    assert "1 of 8 gammas are negative or not above twice eps" in refusal.why
    assert "backend='native'" in refusal.why


def test_a_gamma_that_turns_negative_in_training_runs_natively_and_right() -> None:
    net = _net()
    if _missing(net):
        return
    made = rewrite(net, PACKAGE, inputs=INPUT)
    for gamma in (1.0, -1.0, 1.0, 1e-7):
        for module in (net, made):
            with torch.no_grad():
                cast(Tensor, module.get_submodule("1").weight)[2] = gamma
        twin = copy.deepcopy(made)
        assert ("InPlaceABN" in _saved_by(twin)) == (gamma == 1.0)
        assert _differences(net, made) < 1e-4


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (_net(norm=nn.InstanceNorm2d(8)), "knows batch norms only"),
        (_net().double(), "works in float32, not torch.float64"),
        (_net(nn.PReLU()), "knows no PReLU"),
    ],
    ids=["instance", "double", "prelu"],
)
def test_layers_that_the_package_does_not_know_are_refused(net: nn.Module, why: str) -> None:
    if _missing(net):
        return
    (refusal,) = plan(net, PACKAGE, inputs=INPUT).passes[0].refused
    assert why in refusal.why


class _Shared(nn.Module):
    """The norm's input is read by something else, which overwriting it would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: Tensor) -> Tensor:
        first = self.net.get_submodule("0")(x)
        y = self.net.get_submodule("2")(self.net.get_submodule("1")(first))
        return cast(Tensor, self.net.get_submodule("3")(y + first))


def test_an_input_that_others_read_is_not_overwritten() -> None:
    net = _Shared()
    if _missing(net):
        return
    (refusal,) = plan(net, PACKAGE, inputs=INPUT).passes[0].refused
    assert "its input is read by add too" in refusal.why


def test_a_missing_package_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace_package.importlib.util, "find_spec", lambda name: None)
    assert not inplace_package.package_installed()
