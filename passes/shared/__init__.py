"""What several passes use when a model runs, and the order in which passes are given."""

from __future__ import annotations

__all__ = ["REBUILDING", "RESIZING"]

#: Passes that change how wide layers are.
RESIZING = ("pocket", "width")
#: Passes that change which layers there are, or how wide. What saves memory looks at the result.
REBUILDING = (*RESIZING, "bottleneck", "separable", "compact-block")
