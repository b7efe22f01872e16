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

from pocketize._torch import ConvNd
from pocketize.errors import OptionError
from pocketize.initial.parameters import has_values
from pocketize.passes.swaps.base import Swap, kept_share, no_values
from pocketize.passes.swaps.conversions import SEPARABLE
from pocketize.passes.swaps.decompositions import (
    channelwise,
    channelwise_kept,
    cheapest,
    folded,
    rounding_of,
)


@dataclass(frozen=True, kw_only=True)
class Separable(Swap):
    """Replace convolutions by a depthwise one and a pointwise one.

    The weights come from the singular value decomposition of every input channel's filters, so that
    without a norm inside the block is the best approximation of the convolution that there is.

    Attributes:
        multiplier: kernels for each input channel.
        ratio: "energy:0.95" takes as many kernels as keep that share of the squared norm of each
            weight, instead of the multiplier.
    """

    name: ClassVar[str] = "separable"
    summary: ClassVar[str] = "Convolutions become depthwise, then pointwise"
    conversion: ClassVar[str] = SEPARABLE

    multiplier: int = 1
    ratio: str | None = None

    def validate(self) -> None:
        """Refuse multipliers below one and ratios that are no share."""
        super().validate()
        kept_share(self.ratio, self.name)
        if self.multiplier < 1:
            raise OptionError(
                f"{self.name}: option 'multiplier' must be at least 1, not {self.multiplier}"
            )
        if self.ratio is not None and self.multiplier != 1:
            raise OptionError(
                f"{self.name}: options 'ratio' and 'multiplier' both say how many kernels a channel"
                " gets; give one of them"
            )

    def ranks(self, conv: ConvNd) -> tuple[int, ...] | str:
        """Return the depth multiplier."""
        o, _, *kernel = conv.weight.shape
        share = kept_share(self.ratio, self.name)
        if share is None:
            full = min(o, torch.Size(kernel).numel())
            return (self.multiplier if self.weights == "reset" else min(self.multiplier, full),)
        if not has_values(conv.weight):
            return no_values(self.ratio)
        kept = channelwise_kept(folded(conv.weight))
        cost = torch.arange(1, len(kept) + 1, device=kept.device)
        return cheapest(kept, cost, share, rounding_of(conv.weight.dtype))

    def approximation(self, weight: Tensor, ranks: Sequence[int]) -> Tensor:
        """Return the weight with so many kernels a channel."""
        return channelwise(weight, ranks[0]).composed()

    def describe(self, ranks: Sequence[int]) -> str:
        """Say the multiplier."""
        return f"{ranks[0]} kernel{'s' if ranks[0] > 1 else ''} a channel"
