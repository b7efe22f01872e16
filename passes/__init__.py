"""The passes that come with pocketize, one file each."""

from __future__ import annotations

__all__ = ["Pocket"]

from pocketize.passes.pocket import Pocket
