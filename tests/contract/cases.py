"""Which options each registered pass is tried with. A pass without a row fails the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pocketize.base import Pass
from pocketize.passes import Pocket
from tests.contract.case import Case
from tests.contract.clamp import clamped
from tests.models.registry import Net

__all__ = ["CASES", "Row"]


@dataclass(frozen=True)
class Row:
    """One way to try a pass.

    Attributes:
        make: the pass for a net; a clamp, for one, depends on the width the net's author states.
        promise: a check of what this pass promises beyond the contract of all.
    """

    make: Callable[[Net], Pass]
    promise: Callable[[Case], None] | None = None


CASES: dict[str, dict[str, Row]] = {
    "pocket": {
        "slice": Row(lambda net: Pocket(width=net.width), clamped),
        "reset": Row(lambda net: Pocket(width=net.width, weights="reset")),
    },
}
"""Name of a pass -> label -> row."""
