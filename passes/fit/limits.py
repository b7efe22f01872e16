"""Limits that a user sets: the memory budget and the longest step."""

from __future__ import annotations

__all__ = ["read_budget", "read_max_time"]

from typing import Any

from pocketize.errors import FitError
from pocketize.units import UNITS, quantity


def read_budget(memory: Any) -> int:
    """Return a budget in bytes; raise a :class:`FitError` if it is no size."""
    found: Any = quantity(memory, "bytes") if isinstance(memory, str) else memory
    if type(found) not in (int, float) or type(memory) is float or found <= 0:
        advice = "write a text with a unit, such as '8GiB' or '700MB', or a whole number of bytes"
        if isinstance(memory, str):
            advice = f"write a number above 0 and a unit ({', '.join(UNITS['bytes'])}): '8GiB'"
        raise FitError(f"memory {memory!r:.60} is no size; {advice}")
    return int(found)


def read_max_time(max_time: Any) -> None:
    """Check the longest step, relative to the untouched network's; ``None`` is no limit.

    Raises:
        FitError: it is no number above 0.
    """
    if max_time is not None and (not isinstance(max_time, int | float) or not max_time > 0):
        raise FitError(f"max_time must be a number above 0, such as 1.5, not {max_time!r:.60}")
