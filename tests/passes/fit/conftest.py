"""A small 3D U-Net for the tests of ``fit``, and times that are kept out of the user's cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

INPUT = "1x1x32x32x32"


class UNet3d(nn.Module):
    """Two levels, two convolutions a block, instance norms: nnU-Net's pattern."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = _block(1, width)
        self.bottom = nn.Sequential(nn.MaxPool3d(2), _block(width, 2 * width))
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.join = _block(2 * width, width)
        self.head = nn.Conv3d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        return self.head(self.join(torch.cat([skip, self.up(self.bottom(skip))], 1)))


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(before, after, 3, padding=1),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv3d(after, after, 3, padding=1),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(0.01),
    )


@pytest.fixture(autouse=True, scope="package")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Estimates are shared by the tests, and kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return UNet3d()
