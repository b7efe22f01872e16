"""The passes that come with pocketize, one file each."""

from __future__ import annotations

__all__ = ["Amp", "InPlaceNorm", "Pocket"]

from pocketize.passes.amp import Amp
from pocketize.passes.in_place_norm import InPlaceNorm
from pocketize.passes.pocket import Pocket
