"""The passes that come with pocketize, one file each; a pass is imported when it is asked for."""

from __future__ import annotations

__all__ = [
    "Amp",
    "Bottleneck",
    "Cascade",
    "Checkpoint",
    "CompactBlock",
    "ExtendInputs",
    "InPlaceNorm",
    "Offload",
    "Patchwise",
    "Pocket",
    "Recompute",
    "Separable",
    "Width",
]

from typing import TYPE_CHECKING

from pocketize.lazy import attach

if TYPE_CHECKING:
    from pocketize.passes.amp import Amp
    from pocketize.passes.cascade import Cascade
    from pocketize.passes.checkpoint import Checkpoint
    from pocketize.passes.extend_inputs import ExtendInputs
    from pocketize.passes.in_place_norm import InPlaceNorm
    from pocketize.passes.offload import Offload
    from pocketize.passes.patchwise import Patchwise
    from pocketize.passes.pocket import Pocket
    from pocketize.passes.recompute import Recompute
    from pocketize.passes.swaps.bottleneck import Bottleneck
    from pocketize.passes.swaps.compact import CompactBlock
    from pocketize.passes.swaps.separable import Separable
    from pocketize.passes.width import Width

attach(
    __name__,
    {
        "Amp": "amp",
        "Bottleneck": "swaps.bottleneck",
        "Cascade": "cascade",
        "Checkpoint": "checkpoint",
        "CompactBlock": "swaps.compact",
        "ExtendInputs": "extend_inputs",
        "InPlaceNorm": "in_place_norm",
        "Offload": "offload",
        "Patchwise": "patchwise",
        "Pocket": "pocket",
        "Recompute": "recompute",
        "Separable": "swaps.separable",
        "Width": "width",
    },
)
