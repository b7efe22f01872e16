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
        "Amp": "amp.amp",
        "Bottleneck": "swaps.bottleneck",
        "Cascade": "cascade.cascade",
        "Checkpoint": "checkpoint.checkpoint",
        "CompactBlock": "swaps.compact",
        "ExtendInputs": "cascade.extend_inputs",
        "InPlaceNorm": "inplace.in_place_norm",
        "Offload": "offload.offload",
        "Patchwise": "tiling.patchwise",
        "Pocket": "widths.pocket",
        "Recompute": "recompute.recompute",
        "Separable": "swaps.separable",
        "Width": "widths.width",
    },
)
