"""Swaps: blocks with fewer parameters replace convolutions, and start from their weights.

Low to high: ``decompositions`` of a weight, ``intermediate`` (norms and activations inside),
``blocks`` (modules, and how a convolution becomes one), ``sites`` (which convolutions could, and
what that saves), ``base`` (the pass), and one file for each pass.
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
        "bottleneck": "Bottleneck",
        "compact": "CompactBlock",
        "separable": "Separable",
    },
)
