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
    from pocketize.passes.amp.amp import Amp
    from pocketize.passes.cascade.cascade import Cascade
    from pocketize.passes.cascade.extend_inputs import ExtendInputs
    from pocketize.passes.checkpoint.checkpoint import Checkpoint
    from pocketize.passes.inplace.in_place_norm import InPlaceNorm
    from pocketize.passes.offload.offload import Offload
    from pocketize.passes.recompute.recompute import Recompute
    from pocketize.passes.swaps.bottleneck import Bottleneck
    from pocketize.passes.swaps.compact import CompactBlock
    from pocketize.passes.swaps.separable import Separable
    from pocketize.passes.tiling.patchwise import Patchwise
    from pocketize.passes.widths.pocket import Pocket
    from pocketize.passes.widths.width import Width

attach(
    __name__,
    {
        "amp.amp": "Amp",
        "swaps.bottleneck": "Bottleneck",
        "cascade.cascade": "Cascade",
        "checkpoint.checkpoint": "Checkpoint",
        "swaps.compact": "CompactBlock",
        "cascade.extend_inputs": "ExtendInputs",
        "inplace.in_place_norm": "InPlaceNorm",
        "offload.offload": "Offload",
        "tiling.patchwise": "Patchwise",
        "widths.pocket": "Pocket",
        "recompute.recompute": "Recompute",
        "swaps.separable": "Separable",
        "widths.width": "Width",
    },
)
