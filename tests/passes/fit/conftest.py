"""A small 3D U-Net for the tests of ``fit``, and times that nobody has to take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pocketize.passes.fit.time_model import TimeModel

INPUT = "1x1x16x16x32"


class UNet3d(nn.Module):
    """Two levels with instance norms: nnU-Net's pattern."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(*_block(1, width), *_block(width, width))
        self.bottom = nn.Sequential(nn.MaxPool3d(2), *_block(width, 2 * width))
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.join = nn.Sequential(*_block(2 * width, width))
        self.head = nn.Conv3d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        return self.head(self.join(torch.cat([skip, self.up(self.bottom(skip))], 1)))


def _block(before: int, after: int) -> list[nn.Module]:
    return [
        nn.Conv3d(before, after, 3, padding=1),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(0.01),
    ]


@pytest.fixture(autouse=True, scope="package")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Estimates are shared by the tests, and kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="package")
def quick_clock() -> Iterator[None]:
    """No operator is timed: timing takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimeModel, "_time", lambda self, key, make: 1e-6 if key == "call" else 1e-3)
        yield


def seeded_net() -> nn.Module:
    torch.manual_seed(0)
    return UNet3d()


@pytest.fixture
def net() -> nn.Module:
    return seeded_net()
