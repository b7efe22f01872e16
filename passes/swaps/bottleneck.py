"""Bottlenecks: fewer channels where the kernel is.

Source: Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN",
SPIE Medical Imaging 2020: 1x1 to o/K channels, the kernel, 1x1 to o.
"""

from __future__ import annotations

__all__ = ["Bottleneck"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pocketize.passes.swaps.base import Swap
from pocketize.passes.swaps.blocks import BottleneckBlock
from pocketize.passes.swaps.decompositions import tucker_kept
from pocketize.passes.swaps.ranks import RankTable


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Swap):
    """Replace convolutions by 1x1, the same kernel between few channels, 1x1.

    The weights come from the Tucker-2 decomposition of the convolution's, so that without a norm
    inside the block is one linear map near to the convolution.
    """

    name: ClassVar[str] = "bottleneck"
    summary: ClassVar[str] = "Convolutions become 1x1, kernel between few channels, 1x1"
    block = BottleneckBlock

    ratio: int | str = 4

    def given_ranks(self, o: int, i: int, taps: int) -> tuple[int, ...]:
        """Return r_o and r_i."""
        assert isinstance(self.ratio, int)
        inside = max(1, o // self.ratio)
        if self.weights == "reset":
            return inside, inside
        # More channels than the other side can fill would carry nothing.
        inner = min(inside, i)
        return min(inside, inner * taps), inner

    def table(self, weight: Tensor) -> RankTable:
        """Return what r_o and r_i keep and cost."""
        o, i, taps = weight.shape
        rows, columns = (torch.arange(1, n + 1, device=weight.device) for n in (o, i))
        cost = columns * i + rows[:, None] * (columns * taps + o)
        return RankTable(tucker_kept(weight), cost)

    def describe(self, ranks: Sequence[int]) -> str:
        """Say the channels inside, in the order in which they come."""
        return f"{ranks[1]} and {ranks[0]} channels inside"
