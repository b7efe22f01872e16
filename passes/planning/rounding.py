"""From multipliers to whole channels: the rules that the paper's plans were rounded by."""

from __future__ import annotations

__all__ = ["ROUNDING", "Rounding", "RoundingRule"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pocketize.errors import OptionError, nearest

if TYPE_CHECKING:
    from pocketize.channels.groups import ChannelGroup

Rounding: TypeAlias = Literal["nearest", "up", "down", "doubling", "shared"]

#: The rules, and what they do.
ROUNDING: dict[str, str] = {
    "nearest": "every width to the nearest whole number",
    "up": "every width up",
    "down": "every width down",
    "doubling": "the finest width to the nearest, the others in its proportion",
    "shared": "the finest width to the nearest, as in a uniform plan; the others up",
}

# what 64 * 10 ** -t may be off by
_NOISE = 1e-9


@dataclass(frozen=True)
class RoundingRule:
    """How multipliers become channels. No width grows when a multiplier falls.

    Attributes:
        rounding: a key of :data:`ROUNDING`.
        round_to: widths become multiples of this, in the rule's direction.
        minimum: no width is made narrower than this; one that is narrower stays.

    Raises:
        OptionError: an option is out of range.
    """

    rounding: Rounding
    round_to: int = 1
    minimum: int = 1

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.rounding not in ROUNDING:
            raise OptionError(
                f"rounding must be one of {', '.join(ROUNDING)}, not {self.rounding!r}."
                f"{nearest(str(self.rounding), ROUNDING)}"
            )
        for name, value in (("round_to", self.round_to), ("minimum", self.minimum)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number of at least 1, not {value!r}")

    def units(
        self, levels: Sequence[Sequence[ChannelGroup]], multipliers: Sequence[float]
    ) -> dict[ChannelGroup, int]:
        """Return the units that every group keeps.

        Args:
            levels: the groups that may be resized, finest level first.
            multipliers: one for each level, between 0 and 1.
        """
        first = next((number for number, groups in enumerate(levels) if groups), 0)
        if self.rounding == "doubling" and levels[first:]:
            widest = levels[first][0].channels
            share = self._whole(widest * multipliers[first], "nearest") / widest
            multipliers = [share] * len(levels)
        wanted = {}
        for number, (groups, multiplier) in enumerate(zip(levels, multipliers, strict=True)):
            to = self.rounding
            if to == "doubling" or (to == "shared" and number == first):
                to = "nearest"
            elif to == "shared":
                to = "up"
            for group in groups:
                wanted[group] = self._group(group, multiplier, to)
        return wanted

    def _group(self, group: ChannelGroup, multiplier: float, to: str) -> int:
        if multiplier >= 1:
            return group.units
        channels = max(self.minimum, self._whole(group.channels * multiplier, to))
        # a group that moves in steps keeps to the rule's promise: up is never less than asked for
        exact = channels / group.step
        if to == "up" or channels <= self.minimum:
            units = math.ceil(exact)
        else:
            units = math.floor(exact + (0.5 if to == "nearest" else 0.0))
        return min(group.units, max(1, units))

    def _whole(self, width: float, to: str) -> int:
        """Return the multiple of ``round_to`` for a width; 0 is left to the minimum."""
        parts = width / self.round_to
        if to == "up":
            count = math.ceil(parts - _NOISE)
        elif to == "down":
            count = math.floor(parts + _NOISE)
        else:
            count = math.floor(parts + 0.5 + _NOISE)
        return max(1, count) * self.round_to
