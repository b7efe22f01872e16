"""Which options each registered pass is tried with. A pass without a row fails the suite."""

from __future__ import annotations

from collections.abc import Callable

from pocketize.base import Pass
from pocketize.passes import Pocket
from tests.models.registry import Net

__all__ = ["CASES"]

CASES: dict[str, dict[str, Callable[[Net], Pass]]] = {
    "pocket": {
        "slice": lambda net: Pocket(width=net.width),
        "reset": lambda net: Pocket(width=net.width, weights="reset"),
    },
}
"""Name of a pass -> label of a row -> the pass for a net, since a clamp is stated per net."""
