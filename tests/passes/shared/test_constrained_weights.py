"""Networks whose forward constrains its weights, as EEGNet does, under each exact pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.passes import Checkpoint, InPlaceNorm, Offload, Patchwise, Recompute
from pocketize.plugin.base import Pass


def _exchanged(weight: nn.Parameter) -> None:
    weight.data = torch.renorm(weight.data, p=2, dim=0, maxnorm=0.3)


def _written(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.clamp_(-0.1, 0.1)


def _written_as_data(weight: nn.Parameter) -> None:
    weight.data.clamp_(-0.1, 0.1)


class Constrained(nn.Conv2d):
    constrain: Callable[[nn.Parameter], None]

    def forward(self, input: Tensor) -> Tensor:
        self.constrain(self.weight)
        return super().forward(input)


class Afterwards(Constrained):
    def forward(self, input: Tensor) -> Tensor:
        made = nn.Conv2d.forward(self, input)
        self.constrain(self.weight)
        return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
@pytest.mark.parametrize("constrain", [_exchanged, _written, _written_as_data])
@pytest.mark.parametrize(
    "given",
    [
        Recompute(keep=(), min_bytes=0),
        InPlaceNorm(),
        Checkpoint(only=("1",)),
        Offload(to="disk", min_bytes="1B"),
        Patchwise(size=8),
        Patchwise(size=8, train=True),
    ],
    ids=str,
)
def test_they_train_the_same(given: Pass, constrain: Callable[[nn.Parameter], None]) -> None:
    torch.manual_seed(0)
    layers = [Constrained(c, 4, 3, padding=1) for c in (1, 4)]
    for layer in layers:
        layer.constrain = constrain
    first = nn.Sequential(layers[0], nn.BatchNorm2d(4), nn.LeakyReLU())
    second = nn.Sequential(layers[1], nn.BatchNorm2d(4), nn.LeakyReLU())
    model = nn.Sequential(first, second, nn.Conv2d(4, 1, 1)).double()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    found = []
    for net in (copy.deepcopy(model), rewrite(model, given, inputs=x)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            output = net.eval()(x)
        found.append([output, *net.state_dict().values()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("constrain", [_exchanged, _written, _written_as_data])
def test_tiles_do_not_leave_out_what_a_forward_does_last(
    constrain: Callable[[nn.Parameter], None],
) -> None:
    model = nn.Sequential(Afterwards(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1))
    model[0].constrain = constrain
    planned = plan(model, Patchwise(size=8), inputs="1x1x16x16")
    assert "which a forward by tiles would not" in str(planned)
