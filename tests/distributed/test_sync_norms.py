"""Two processes with half a batch each train as one process with the whole batch does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pocketize.engine.pipeline import rewrite
from pocketize.passes import InPlaceNorm
from tests.distributed.group import PROCESSES, Work, result_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

SIZES = [(3, 2), (5, 0)]
"""Samples of each process: not the same number, and once none at all."""
STEPS = 3


def _net(sync: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ELU(),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.Conv2d(4, 1, 1),
    ).double()
    with torch.no_grad():
        # Two channels that cannot be undone: what is kept must not depend on the process.
        net[1].weight[1] = 0.0  # type: ignore[index]
        net[4].bias[2] = -40.0  # type: ignore[index]
    return nn.SyncBatchNorm.convert_sync_batchnorm(net) if sync else net


def _batch() -> Tensor:
    return torch.randn(5, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _train(net: nn.Module, x: Tensor, share: float) -> list[float]:
    """Train with SGD; return the losses of this share of the batch."""
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = net(x).square().sum() / 5
        # DistributedDataParallel takes the mean of the gradients, the joined batch their sum.
        (loss * share).backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


class _Parallel(DistributedDataParallel):
    """Without the check for SyncBatchNorms on a CPU: torch's own do not work there, ours do."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        pass


def synchronised(sizes: tuple[int, ...]) -> dict[str, Any]:
    net = rewrite(_net(sync=True), InPlaceNorm(), inputs="2x2x9x9:float64")
    x = _batch().split(sizes)[dist.get_rank()]
    losses = _train(_Parallel(net), x, PROCESSES)
    net.train()
    with torch.no_grad():
        quiet = net(x)
    net.eval()
    return {
        "losses": losses,
        "state": net.state_dict(),
        "quiet": quiet,
        "eval": net(x).detach(),
        "gradients": [p.grad for p in net.parameters()],
        "kinds": [type(m).__name__ for m in net.modules()],
    }


def ordinary() -> dict[str, Any]:
    """The states of a net as it is and in place, both trained."""
    plain = _net(sync=False)
    made = rewrite(plain, InPlaceNorm(), inputs="2x2x9x9:float64")
    x = _batch().split(SIZES[0])[dist.get_rank()]
    for net in (plain, made):
        _train(DistributedDataParallel(net), x, PROCESSES)
    return {"plain": plain.state_dict(), "made": made.state_dict()}


WORK: dict[str, Work] = {
    f"sync norms {sizes}": functools.partial(synchronised, sizes) for sizes in SIZES
}
WORK["ordinary norms"] = ordinary


@pytest.mark.parametrize("sizes", SIZES)
def test_sync_batch_norms_in_two_processes_train_as_one_process_does(
    folder: Path, sizes: tuple[int, ...]
) -> None:
    results = result_of(f"sync norms {sizes}", folder)
    assert results[0]["kinds"].count("InPlaceSyncBatchNorm") == 3

    net, x = _net(sync=False), _batch()
    losses = _train(net, x, 1.0)
    gradients = [p.grad for p in net.parameters()]
    with torch.no_grad():
        quiet = net(x)
    net.eval()
    for step, loss in enumerate(losses):
        assert sum(r["losses"][step] for r in results) == pytest.approx(loss, rel=1e-9)
    for key, expected in (("quiet", quiet), ("eval", net(x).detach())):
        assert torch.allclose(torch.cat([r[key] for r in results]), expected, rtol=1e-8)
    for result in results:
        for name, value in net.state_dict().items():
            assert torch.allclose(result["state"][name], value, rtol=1e-8, atol=1e-12), name
        for a, b in zip(result["gradients"], gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-10)


def test_ordinary_norms_train_under_ddp_as_the_original_does(folder: Path) -> None:
    for found in result_of("ordinary norms", folder):
        for name, expected in found["plain"].items():
            assert torch.allclose(found["made"][name], expected, rtol=1e-8, atol=1e-12), name
