"""Two processes that train together, and the one process that they must agree with.

Every process has half of the batch. A loss that is a mean over samples then has gradients whose
mean over the processes, which is what DistributedDataParallel and fully_shard take, is the gradient
on the joined batch.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "PROCESSES",
    "STEPS",
    "SyncNorm",
    "Unet",
    "Work",
    "batch",
    "result_of",
    "run",
    "train",
]

PROCESSES = 2
STEPS = 3

Work = Callable[[], dict[str, Any]]


class SyncNorm(nn.BatchNorm2d):
    """Batch normalisation over the samples of all processes; torch's own works on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype)
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count[None]])
        # While a net is rewritten it runs on fake tensors, for which nobody else need wait.
        if dist.is_initialized() and not isinstance(sums, FakeTensor):
            sums = _Sum.apply(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * total / (total - 1), 0.1)
        shape = 1, -1, 1, 1
        y = (x - mean.view(shape)) * (var.view(shape) + self.eps).rsqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


class _Sum(torch.autograd.Function):
    """Sum over all processes, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


class Unet(nn.Module):
    """Two resolutions, a concatenation, and whatever norm."""

    def __init__(self, norm: Callable[[int], nn.Module], activation: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = self._block(1, 4, norm, activation)
        self.bottom = self._block(4, 8, norm, activation)
        self.decoder = self._block(12, 4, norm, activation)
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _block(
        before: int, after: int, norm: Callable[[int], nn.Module], activation: type[nn.Module]
    ) -> nn.Sequential:
        first = [nn.Conv2d(before, after, 3, padding=1), norm(after), activation()]
        return nn.Sequential(
            *first, nn.Conv2d(after, after, 3, padding=1), norm(after), activation()
        )

    def forward(self, x: Tensor) -> Tensor:
        fine = self.encoder(x)
        coarse = self.bottom(nn.functional.max_pool2d(fine, 2))
        coarse = nn.functional.interpolate(coarse, scale_factor=2.0)
        return self.head(self.decoder(torch.cat([fine, coarse], 1)))


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    """The joined batch: four samples for each process."""
    generator = torch.Generator().manual_seed(1)
    joined = torch.randn(4 * PROCESSES, 1, 12, 12, generator=generator, dtype=torch.float64).to(
        dtype
    )
    if not dist.is_initialized():
        return joined
    return joined.chunk(PROCESSES)[dist.get_rank()]


def train(step: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Train some steps with SGD.

    Args:
        step: what is called: the model, or a wrapper around it.
        model: the model.
        x: this process' share of the batch.

    Returns:
        ``losses``, the mean over processes of each step; ``gradients`` of the last step and
        ``state``, by name.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = step(x).square().mean()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= PROCESSES
        losses.append(mean)
    gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    state = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
    return {"losses": torch.stack(losses), "gradients": gradients, "state": state}


def _whole(tensor: Any) -> Tensor:
    """Put a sharded tensor together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def run(work: dict[str, Work], folder: Path) -> None:
    """Do work in all processes, one after the other; every piece is a function of a module."""
    arguments = (work, str(folder))
    mp.spawn(_process, args=arguments, nprocs=PROCESSES)  # type: ignore[no-untyped-call]


def result_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """What each process returned of a piece of work."""
    return [torch.load(folder / f"{name}.{rank}") for rank in range(PROCESSES)]


def _process(rank: int, work: dict[str, Work], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    for name, piece in work.items():
        torch.save(piece(), f"{folder}/{name}.{rank}")
    dist.barrier()
    # The results are in files. Taking gloo's threads down has now and then aborted a process that
    # had done its work ("terminate called without an active exception"), so it just ends here.
    os._exit(0)
