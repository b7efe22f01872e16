"""The largest network that meets a limit, found by halving."""

from __future__ import annotations

__all__ = ["smallest_decline"]

from collections.abc import Callable

_DECADES = 12  # of the multiplier that the steepest level ends at: nothing is left of any width


def smallest_decline(fits: Callable[[float], bool], steepest: float) -> float | None:
    """Return the smallest decline whose network fits; ``None`` if none does.

    Widths are whole numbers, so the networks change at single declines; the interval is halved
    until no number lies within. Where sizes fall with the decline, the answer is exact: no larger
    network of the family fits.

    Args:
        fits: whether the network at a decline meets the limits; it should remember networks.
        steepest: the largest slope of a level.
    """
    if fits(0.0):
        return 0.0
    low, high = 0.0, _DECADES * steepest
    if not fits(high):
        return None
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
