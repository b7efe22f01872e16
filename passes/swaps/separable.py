"""Depthwise separable convolutions: every channel by itself, then all of them at every point.

Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017; in
segmentation of volumes, Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using
Memory-Efficient FCN", SPIE Medical Imaging 2020.
"""

from __future__ import annotations

__all__ = ["Separable"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pocketize.errors import OptionError
from pocketize.passes.swaps.base import Swap
from pocketize.passes.swaps.blocks import SeparableBlock
from pocketize.passes.swaps.decompositions import channelwise_kept
from pocketize.passes.swaps.ranks import RankTable


@dataclass(frozen=True, kw_only=True)
class Separable(Swap):
    """Replace convolutions by a depthwise one and a pointwise one.

    The weights come from the singular value decomposition of every input channel's filters, so that
    without a norm inside the block is the best approximation of the convolution that there is.

    Attributes:
        multiplier: kernels for each input channel.
        ratio: a rule that chooses the multiplier: "energy:0.95" or "params:0.25", as in bottleneck.
    """

    name: ClassVar[str] = "separable"
    summary: ClassVar[str] = "Convolutions become depthwise, then pointwise"
    block = SeparableBlock

    multiplier: int = 1
    ratio: str | None = None

    def validate(self) -> None:
        """Refuse a ratio together with a multiplier."""
        super().validate()
        if self.ratio is not None and self.multiplier != 1:
            raise OptionError(
                f"{self.name}: options 'ratio' and 'multiplier' both say how many kernels a channel"
                " gets; give one of them"
            )

    def given_ranks(self, o: int, i: int, taps: int) -> tuple[int, ...]:
        """Return the depth multiplier."""
        reset = self.weights == "reset"
        return (self.multiplier if reset else min(self.multiplier, o, taps),)

    def table(self, weight: Tensor) -> RankTable:
        """Return what multipliers keep and cost."""
        o, i, taps = weight.shape
        kept = channelwise_kept(weight)
        return RankTable(kept, torch.arange(1, len(kept) + 1, device=kept.device) * i * (taps + o))

    def describe(self, ranks: Sequence[int]) -> str:
        """Say the multiplier."""
        return f"{ranks[0]} kernel{'s' if ranks[0] > 1 else ''} a channel"
