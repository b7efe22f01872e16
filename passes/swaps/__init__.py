"""Swaps: convolutions make place for blocks with fewer parameters, which start from their weights.

Low to high: ``tensors``, ``tucker``, ``channelwise`` and ``blockterms`` (decompositions of a
weight), ``layers`` (what a block is made of), ``conversions`` (a convolution becomes a block),
``sites`` (which convolutions could), ``inner`` (what follows them), ``choices`` and ``ratios``
(options), ``pricing`` (what it saves and costs), ``base`` (the pass), and one file for each pass.
"""

from __future__ import annotations

__all__ = ["Bottleneck", "CompactBlock", "Separable"]

from typing import TYPE_CHECKING

from pocketize.lazy import attach

if TYPE_CHECKING:
    from pocketize.passes.swaps.bottleneck import Bottleneck
    from pocketize.passes.swaps.compact import CompactBlock
    from pocketize.passes.swaps.separable import Separable

attach(
    __name__,
    {
        "Bottleneck": "bottleneck",
        "CompactBlock": "compact",
        "Separable": "separable",
    },
)
