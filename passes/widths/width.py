"""Width multipliers: fewer channels per layer, by one factor, by patterns, by level or by number.

Source: Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image
Segmentation", ACM JETC 2021, whose plans (:mod:`pocketize.passes.planning`) end in this pass. The
weights of a convolution between two layers grow with the product of their multipliers, activations
with the multiplier itself.
"""

from __future__ import annotations

__all__ = ["Width"]

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.channels.levels import find_levels
from pocketize.channels.widths import fit_units, resize_groups
from pocketize.errors import OptionError, PatternError, RewriteError, nearest
from pocketize.plugin.base import Guarantee, Pass, Proposal, Refusal, Target

_Demands: TypeAlias = "dict[ChannelGroup, tuple[int, str]]"


@dataclass(frozen=True, kw_only=True)
class Width(Pass):
    """Make layers narrower, by a multiplier or to a number of channels.

    Give one of ``scale``, ``levels`` and ``channels``. Channels that have to stay together (through
    additions, say) take one width; where two demands on them differ, it is an error that names
    both. What reaches an input or an output of the model keeps its size. Nothing becomes wider.

    Attributes:
        scale: a multiplier for all layers, or one for each pattern of module paths (fnmatch).
        levels: one entry for each resolution level, finest first: multipliers, or, if all of them
            are integers, the most channels that a layer at the level may have.
        channels: the number of channels of single layers, by their paths.
        round_to: widths that follow from multipliers become multiples of this, at least one.
        minimum: no width that follows from a multiplier is below this.
        rounding: of widths that follow from multipliers: "nearest", "up" or "down".
        keep: patterns of module paths (fnmatch) whose channels stay.
        weights: "slice" keeps the channels with the largest weights, "reset" reinitialises all.
    """

    name: ClassVar[str] = "width"
    summary: ClassVar[str] = "Scale widths by multipliers: all, by pattern, by level or by number"
    positional: ClassVar[str] = "scale"

    scale: float | dict[str, float] | None = field(default=None, kw_only=False)
    levels: tuple[int | float, ...] | None = None
    channels: dict[str, int] | None = None
    round_to: int = 1
    minimum: int = 1
    rounding: Literal["nearest", "up", "down"] = "nearest"
    keep: tuple[str, ...] = ()
    weights: Literal["slice", "reset"] = "slice"

    def validate(self) -> None:
        """Refuse multipliers outside (0, 1], and demands in two ways at once."""
        given = {
            name: value
            for name in ("scale", "levels", "channels")
            if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise OptionError(f"width: give one of scale, levels and channels, got {got}")
        ((name, value),) = given.items()
        if value in ({}, ()):
            raise OptionError(f"width: option {name!r} is empty; leave the pass out")
        numbers = value if isinstance(value, tuple) else [value]
        numbers = list(value.values()) if isinstance(value, dict) else numbers
        if name == "channels" or (name == "levels" and self._absolute):
            if bad := [n for n in numbers if n < 1]:
                raise OptionError(f"width: a layer has at least 1 channel, not {bad[0]}")
        elif bad := [n for n in numbers if not 0 < n <= 1]:
            raise OptionError(
                f"width: a multiplier is above 0 and at most 1, not {bad[0]}: this pass only "
                "makes layers narrower. To say numbers of channels, give levels as integers "
                "only, or channels={path: number}"
            )
        for option in ("round_to", "minimum"):
            if getattr(self, option) < 1:
                raise OptionError(
                    f"width: {option} must be at least 1, not {getattr(self, option)}"
                )

    @property
    def guarantee(self) -> Guarantee:
        """Sliced nets approximate the original, redrawn ones have to be trained."""
        return Guarantee.APPROXIMATE if self.weights == "slice" else Guarantee.RETRAIN

    @property
    def _absolute(self) -> bool:
        """Whether the levels are numbers of channels."""
        return all(isinstance(entry, int) for entry in self.levels or ())

    @classmethod
    def from_plan(cls, plan: Any, **options: Any) -> Width:
        """Make the pass from a :class:`~pocketize.passes.planning.WidthPlan`.

        Args:
            plan: the plan; anything with a method ``width_options()`` that returns options.
            options: further options of the pass, such as ``weights="reset"``.
        """
        return cls(**{**plan.width_options(), **options})

    def propose(self, target: Target) -> Proposal:
        """Resize every free group that the options narrow."""
        channels = target.channels()
        demands = self._demands(channels)
        kept = {
            group: f"kept by keep={pattern!r}"
            for pattern in self.keep
            for group in channels.matching(pattern)
        }
        wanted: dict[ChannelGroup, int] = {}
        refused: list[Refusal] = []
        left: dict[str, int] = {}
        for group, (number, _) in demands.items():
            if number >= group.channels:
                continue
            reason = group.frozen or kept.get(group)
            if reason is not None:
                refused.append(Refusal(group.name, f"{group.channels} channels: {reason}"))
                continue
            units, short = fit_units(group, number)
            if short is not None:
                refused.append(short)
                left |= {group.name: number} if group.layers else {}
            if units < group.units:
                wanted[group] = units
        resized = resize_groups(channels, wanted, weights=self.weights)
        # a second look may drop what goes in steps now; multipliers speak of the model as it was
        again = replace(self, scale=None, levels=None, channels=left) if left else False
        return Proposal(
            resized.edits, resized.changes, tuple(refused), tuple(self._notes(channels)), again
        )

    def demands(self, channels: ChannelGroups) -> dict[ChannelGroup, int]:
        """Return the channels that the options ask of each group, at most those it has.

        Frozen groups and groups that ``keep`` names have entries too; they are refused later.

        Args:
            channels: the analysis of the model.

        Raises:
            OptionError: there are not as many levels as the option says.
            PatternError: a pattern or a path is not in the model.
            RewriteError: two demands on channels that stay together differ.
        """
        return {group: number for group, (number, _) in self._demands(channels).items()}

    def _demands(self, channels: ChannelGroups) -> _Demands:
        demands: _Demands = {}
        for group, number, who in self._asked(channels):
            number = min(number, group.channels)
            held = demands.setdefault(group, (number, who))
            if held[0] != number and not group.frozen:
                shown = ", ".join(group.layers[:4]) + (", ..." if len(group.layers) > 4 else "")
                raise RewriteError(
                    f"width: {held[1]} asks for {held[0]} channels and {who} for {number}, of "
                    f"channels that stay together ({shown}). Ask the same of both, or leave one out"
                )
        return demands

    def _asked(self, channels: ChannelGroups) -> Iterator[tuple[ChannelGroup, int, str]]:
        """Yield groups with the channels asked of them, and who asks."""
        if isinstance(self.scale, dict):
            for pattern, scale in self.scale.items():
                for group in channels.matching(pattern):
                    yield group, self._scaled(group, scale), f"{pattern!r}: {scale}"
        elif self.scale is not None:
            for group in channels.groups:
                if group.layers or not group.frozen:
                    yield group, self._scaled(group, self.scale), f"scale={self.scale}"
        elif self.levels is not None:
            yield from self._by_level(channels, self.levels)
        for path, number in (self.channels or {}).items():
            yield from self._of_layer(channels, path, number)

    def _by_level(
        self, channels: ChannelGroups, entries: tuple[int | float, ...]
    ) -> Iterator[tuple[ChannelGroup, int, str]]:
        levels = find_levels(channels)
        if len(levels) != len(entries):
            raise OptionError(
                f"width: {len(entries)} levels are given, and the layers of "
                f"{type(channels.model).__name__} run at {len(levels)}: "
                f"{', '.join(map(str, levels))} (finest first, at {channels.inputs.describe()})"
            )
        for level, entry in zip(levels, entries, strict=True):
            who = f"level {level} ({entry})"
            for group in (*level.groups, *level.shared):
                number = entry if self._absolute else self._scaled(group, entry)
                yield group, int(number), who

    def _of_layer(
        self, channels: ChannelGroups, path: str, number: int
    ) -> Iterator[tuple[ChannelGroup, int, str]]:
        groups = [group for group in channels.groups if path in group.layers]
        if not groups:
            paths = [layer for group in channels.groups for layer in group.layers]
            raise PatternError(
                f"width: {path!r} is no layer that makes channels.{nearest(path, paths)}"
            )
        have = sum(group.channels for group in groups)
        if number > have:
            raise OptionError(
                f"width: {path} has {have} channels and cannot get {number}: this pass only makes "
                "layers narrower"
            )
        for group in groups:
            # several groups side by side, of a fused layer, share the number out
            yield group, max(1, group.channels * number // have), f"{path}: {number}"

    def _scaled(self, group: ChannelGroup, scale: float) -> int:
        """Return a group's channels times a multiplier, rounded as the options say."""
        # 0.1 * 30 is no 3.0000000000000004
        steps = round(group.channels * scale / self.round_to, 9)
        rounded = {
            "nearest": math.floor(steps + 0.5),
            "up": math.ceil(steps),
            "down": math.floor(steps),
        }[self.rounding]
        return max(rounded, math.ceil(self.minimum / self.round_to)) * self.round_to

    def _notes(self, channels: ChannelGroups) -> Iterator[str]:
        if self.levels is not None:
            sizes = ", ".join(
                f"{level}: {entry}"
                for level, entry in zip(find_levels(channels), self.levels, strict=True)
            )
            yield f"levels at {channels.inputs.describe()}: {sizes}"
        if any(traced.real for traced in channels.traces):
            yield "a branch of the forward depends on values; only the branch taken was seen"
