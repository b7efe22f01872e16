"""The network of the life-cycle contract, and the rewrites of it that are tried."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from pocketize.engine.pipeline import rewrite
from pocketize.passes import Checkpoint, InPlaceNorm, Offload, Patchwise, Recompute
from pocketize.plugin.base import Pass

__all__ = ["COMBINATIONS", "PASSES", "LifeNet", "Rewrite", "untouched", "volume"]


class LifeNet(nn.Module):
    """A small U-Net with each kind of norm, a skip connection and a vector as second input.

    Input ``(N, 2, H, W)`` with even H and W, and optionally ``(N, 4)``; output ``(N, 3, H, W)``.

    Args:
        variant: ``"batch norms"`` has no instance norms, which take no batch of none; ``"dropout"``
            draws random numbers.
    """

    def __init__(self, variant: str = "") -> None:
        super().__init__()
        batch = variant == "batch norms"
        norm = nn.BatchNorm2d if batch else partial(nn.InstanceNorm2d, affine=True)
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.LeakyReLU(0.1))
        self.deep = nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
            nn.LeakyReLU(0.1),
        )
        self.up = nn.Upsample(scale_factor=2)
        self.join = nn.Sequential(nn.Conv2d(10, 4, 3, padding=1), norm(4), nn.LeakyReLU(0.1))
        if variant == "dropout":
            self.deep.append(nn.Dropout(0.3))
            self.join.append(nn.Dropout2d(0.3))
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        skip = self.down(x)
        if condition is not None:
            skip = skip + condition[:, :, None, None]
        made: Tensor = self.head(self.join(torch.cat([skip, self.up(self.deep(skip))], dim=1)))
        return made


def untouched(training: bool = True, variant: str = "") -> LifeNet:
    """Return the network in float64, the same each time, with norms that are not at their start."""
    torch.manual_seed(7)
    net = LifeNet(variant).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.train(training)


def volume(n: int = 2) -> Tensor:
    """Return an input ``(n, 2, 16, 16)`` in float64, the same each time."""
    return torch.randn(n, 2, 16, 16, generator=torch.Generator().manual_seed(3)).double()


@dataclass(frozen=True)
class Rewrite:
    """Passes that are tried together.

    Attributes:
        passes: in this order.
    """

    passes: tuple[Pass, ...]

    def fresh(self, training: bool = True, variant: str = "") -> nn.Module:
        """Return a copy of the rewritten network that has never run."""
        return copy.deepcopy(_rewritten(self.passes, training, variant))


@cache
def _rewritten(passes: tuple[Pass, ...], training: bool, variant: str) -> nn.Module:
    return rewrite(untouched(training, variant), *passes, inputs=volume())


_RECOMPUTE = Recompute(keep="level", min_bytes=0)
_CHECKPOINT = Checkpoint(only=("down", "deep", "join"))
_OFFLOAD = Offload(to="disk", min_bytes="64B")
_TRAINED_BY_TILES = Patchwise(size=8, train=True, progress=False)

#: The columns of the table in ``docs/situations.md``.
PASSES: dict[str, Rewrite] = {
    "recompute": Rewrite((_RECOMPUTE,)),
    "in-place-norm": Rewrite((InPlaceNorm(),)),
    "checkpoint": Rewrite((_CHECKPOINT,)),
    "offload": Rewrite((_OFFLOAD,)),
    "patchwise": Rewrite((Patchwise(size=8, progress=False),)),
    "patchwise, train": Rewrite((_TRAINED_BY_TILES,)),
}
COMBINATIONS: dict[str, Rewrite] = {
    "recompute-conv": Rewrite((Recompute(keep="conv", min_bytes=0),)),
    "in-place-norm+offload": Rewrite((InPlaceNorm(), _OFFLOAD)),
    "checkpoint+in-place-norm": Rewrite((Checkpoint(only=("deep",)), InPlaceNorm())),
    "checkpoint+offload": Rewrite((_CHECKPOINT, _OFFLOAD)),
    "recompute+patchwise-train": Rewrite((_RECOMPUTE, _TRAINED_BY_TILES)),
}
