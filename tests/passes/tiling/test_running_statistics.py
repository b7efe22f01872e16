"""Norms that update running statistics train by tiles as they do on the whole volume."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.errors import ExecutionError
from pocketize.passes import Patchwise
from tests.passes.tiling.nets import double
from tests.passes.tiling.test_same_or_refused import by_tiles


class Net(nn.Module):
    """Batch norms on fine and on coarse maps, one that is called twice, one of instances."""

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.fine = nn.BatchNorm2d(4, momentum=momentum)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.coarse = nn.BatchNorm2d(8, momentum=momentum, affine=False)
        self.instance = nn.InstanceNorm2d(8, affine=True, track_running_stats=True, momentum=0.3)
        self.last = nn.Conv2d(8, 8, 3, stride=4, padding=1)
        self.twice = nn.BatchNorm2d(8, momentum=momentum)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.fine(self.first(x)))
        coarse = F.relu(self.instance(self.coarse(self.down(fine))))
        tiny = self.twice(F.relu(self.twice(self.last(coarse))))
        coarse = coarse + tiny.mean((2, 3), keepdim=True)
        made: Tensor = self.head(self.up(coarse) + fine)
        return made


class Unused(nn.Module):
    """A norm on a branch that nothing is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.norm(x)
        return x


class Centred(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).softmax(1)[:, 0].square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def _train_alike(model: nn.Module, tiled: nn.Module, *sizes: int) -> None:
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, tiled)]
    for seed in range(3):
        x = double(*sizes, seed=seed)
        losses = [_step(each, o, x) for each, o in zip((model, tiled), optimizers, strict=True)]
        assert (losses[0] - losses[1]).abs() < 1e-10
    expected, found = model.state_dict(), tiled.state_dict()
    for key, value in expected.items():
        assert (value - found[key]).abs().max() < 1e-9, key


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tile", [(16, 8), (5, 7)])
def test_three_steps_leave_the_same_weights_and_running_statistics(
    momentum: float | None, tile: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = Net(momentum).double().train()
    tiled = rewrite(model, Patchwise(size=tile, train=True), inputs=double(2, 1, 16, 32))
    assert int(tiled.get_buffer("fine.num_batches_tracked")) == 0
    _train_alike(model, tiled, 2, 1, 16, 32)
    assert int(tiled.get_buffer("fine.num_batches_tracked")) == 3
    assert int(tiled.get_buffer("twice.num_batches_tracked")) == 6
    with torch.inference_mode():
        x = double(2, 1, 16, 32, seed=9)
        assert (model.eval()(x) - tiled.eval()(x)).abs().max() < 1e-9


@pytest.mark.slow
def test_a_monai_network_with_batch_norms_trains_by_tiles() -> None:
    torch.manual_seed(0)
    features = (4, 4, 4, 4, 4, 4)
    model = BasicUNet(3, 1, 2, features=features, norm="batch").double().train()
    x = double(1, 1, 16, 16, 32)
    tiled = rewrite(model, Patchwise(size=16, train=True, keep="disk"), inputs=x)
    _train_alike(model, tiled, 1, 1, 16, 16, 32)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["training", "track_running_stats"])
def test_frozen_norms_stay_as_they_are(flag: str) -> None:
    torch.manual_seed(0)
    model = Net(0.1).double().train()
    setattr(model.fine, flag, False)
    before = model.fine.running_mean.clone()  # type: ignore[union-attr]
    tiled = rewrite(model, Patchwise(size=(16, 8), train=True), inputs=double(2, 1, 16, 32))
    _train_alike(model, tiled, 2, 1, 16, 32)
    assert torch.equal(tiled.get_buffer("fine.running_mean"), before)


def test_a_forward_that_fails_updates_nothing() -> None:
    torch.manual_seed(0)
    model = Unused().double().train()
    tiled = by_tiles(model, (16, 8), train=True)
    before = copy.deepcopy(tiled.state_dict())
    with pytest.raises(ExecutionError, match="nothing that is returned depends on it"):
        tiled(double(2, 1, 16, 32))
    assert all(torch.equal(value, before[key]) for key, value in tiled.state_dict().items())


@pytest.mark.slow
def test_a_norm_with_a_forward_of_its_own_is_named_and_may_be_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Centred(4), nn.Conv2d(4, 2, 1)).double()
    x = double(2, 1, 16, 32)
    model.train()[1].eval()
    tiled = rewrite(model, Patchwise(size=8, train=True), inputs=x)
    tiled.train()
    with pytest.raises(ExecutionError, match=r"1 \(Centred\) is in training mode and updates"):
        tiled(x)
    tiled[1].eval()  # type: ignore[index]
    model[1].eval()
    _train_alike(model, tiled, 2, 1, 16, 32)
