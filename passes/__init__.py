"""The passes that come with pocketize, one file each."""

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

from pocketize.passes.amp import Amp
from pocketize.passes.cascade import Cascade
from pocketize.passes.checkpoint import Checkpoint
from pocketize.passes.extend_inputs import ExtendInputs
from pocketize.passes.in_place_norm import InPlaceNorm
from pocketize.passes.offload import Offload
from pocketize.passes.patchwise import Patchwise
from pocketize.passes.pocket import Pocket
from pocketize.passes.recompute import Recompute
from pocketize.passes.swaps import Bottleneck, CompactBlock, Separable
from pocketize.passes.width import Width
