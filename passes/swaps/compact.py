"""Compact blocks: few channels, and there every channel by itself.

Source: Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN",
SPIE Medical Imaging 2020, the compact convolution block (CCBlock): 1x1 to o/K channels, the kernel
depthwise, 1x1 to o.
"""

from __future__ import annotations

__all__ = ["CompactBlock"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pocketize.errors import OptionError
from pocketize.passes.swaps.base import Swap
from pocketize.passes.swaps.blocks import CompactConvBlock
from pocketize.passes.swaps.decompositions import (
    block_terms,
    block_terms_kept,
    relative_error,
)
from pocketize.passes.swaps.ranks import RankTable

#: Multipliers for which fewer channels are looked for than the first decomposition needs.
_TRIED = (1, 2)
#: Sweeps of the improvement while looking; the block itself gets more.
_SWEEPS = 12


@dataclass(frozen=True, kw_only=True)
class CompactBlock(Swap):
    """Replace convolutions by 1x1, the kernel depthwise between few channels, 1x1.

    The weights come from a decomposition of the convolution's in block terms, which with one kernel
    a channel is the canonical polyadic (CP) decomposition.

    Attributes:
        multiplier: kernels for each channel inside; a rule chooses it too.
    """

    name: ClassVar[str] = "compact-block"
    summary: ClassVar[str] = "Convolutions become 1x1, depthwise between few channels, 1x1"
    block = CompactConvBlock

    ratio: int | str = 4
    multiplier: int = 1

    def validate(self) -> None:
        """Refuse a share together with a multiplier."""
        super().validate()
        if isinstance(self.ratio, str) and self.multiplier != 1:
            raise OptionError(
                f"{self.name}: ratio={self.ratio!r} chooses the multiplier, too; leave it out"
            )

    def given_ranks(self, o: int, i: int, taps: int) -> tuple[int, ...]:
        """Return the channels inside and the depth multiplier."""
        assert isinstance(self.ratio, int)
        inside = max(1, o // self.ratio)
        if self.weights == "reset":
            return inside, self.multiplier
        return min(inside, i), min(self.multiplier, o, taps)

    def table(self, weight: Tensor) -> RankTable:
        """Return what channels and multipliers keep before any improvement, and what they cost."""
        o, i, k = weight.shape
        kept = block_terms_kept(weight)
        channels, kernels = (torch.arange(1, n + 1, device=kept.device) for n in kept.shape)
        return RankTable(kept, channels[:, None] * (i + kernels * (k + o)))

    def ranks_by_energy(self, weight: Tensor, share: float, rounding: float) -> tuple[int, ...]:
        """Return the channels inside and the multiplier.

        The decomposition before any improvement tells exactly what it keeps, for all ranks at once.
        From there, fewer channels are tried by bisection, with the improvement.
        """
        o, i, k = weight.shape
        table = self.table(weight)
        kept, cost = table.kept, table.cost
        best = table.cheapest(share, rounding)

        def enough(r: int, m: int) -> bool:
            error = relative_error(weight, block_terms(weight, r, m, _SWEEPS).composed())
            return 1 - error**2 >= share - rounding

        # However many kernels they have, fewer channels cannot keep enough.
        least = 1 + int((kept[:, -1] < share - rounding).sum())
        for m in (m for m in _TRIED if m <= kept.shape[1]):
            cheaper = (cost[:, m - 1] < cost[best[0] - 1, best[1] - 1]).sum()
            low, high = min(least, i), min(int(cheaper), o * i * k // (i + m * (k + o)))
            if high < low or not enough(high, m):
                continue
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if enough(middle, m) else (middle + 1, high)
            best = high, m
        return best

    def describe(self, ranks: Sequence[int]) -> str:
        """Say channels and multiplier."""
        kernels = "" if ranks[1] == 1 else f" with {ranks[1]} kernels each"
        return f"{ranks[0]} channels inside{kernels}"
