"""A network as the planner sees it: its levels, what can be resized there, its size and peak."""

from __future__ import annotations

__all__ = ["Network"]

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from pocketize.channels.analysis import analyse
from pocketize.channels.groups import ChannelGroup
from pocketize.channels.levels import find_levels
from pocketize.engine.pipeline import plan
from pocketize.errors import OptionError, PlanningError, RewriteError
from pocketize.graph.capture import settle_inputs
from pocketize.memory import measure
from pocketize.passes.planning.counting import Counter, Sizes
from pocketize.passes.widths.width import Width
from pocketize.plugin.edits import Resize


class Network:
    """A model, its levels, and what it would be at other widths.

    Attributes:
        inputs: what it was recorded with.
        levels: its resolution levels, finest first.
        free: for each level, the groups that can be resized; a group made at several levels is at
            the finest.
        stuck: layers that turned out immovable when a plan was rehearsed.
    """

    def __init__(self, model: nn.Module, inputs: Any, keep: Sequence[str]) -> None:
        self.model = model
        self.inputs = settle_inputs(model, inputs)
        self.keep = tuple(keep)
        self.channels = analyse(model, self.inputs)
        self.levels = find_levels(self.channels)
        kept = {group for pattern in self.keep for group in self.channels.matching(pattern)}
        self.free = [
            [group for group in level.groups if group.frozen is None and group not in kept]
            for level in self.levels
        ]
        if not any(self.free):
            raise PlanningError(
                f"{type(model).__name__} has no width that can change: all its channels are frozen "
                "or kept; `pocketize explain` tells why"
            )
        self.stuck: list[str] = []
        self._counter = Counter(self.channels, self.levels)
        self.sizes = self._counter.count({})

    def count(self, wanted: Mapping[ChannelGroup, int]) -> Sizes:
        """Return the sizes at some units; nothing is rewritten."""
        return self._counter.count(wanted)

    def peak(
        self,
        wanted: Mapping[ChannelGroup, int],
        mode: Literal["train", "infer"],
        optimizer: Literal["adam", "sgd"] | None,
    ) -> int:
        """Return the estimated peak at some units: the model is rewritten, and counted on fakes."""
        model = self.model
        if any(units < group.units for group, units in wanted.items()):
            model = plan(model, self.width(wanted), inputs=self.inputs).apply()
        return measure(model, self.inputs, mode, optimizer, estimate=True).peak

    def width(self, wanted: Mapping[ChannelGroup, int]) -> Width:
        """Return the pass that brings groups to some units: by level if that says it all.

        Args:
            wanted: units of every free group, with at least one that changes.
        """
        numbers = {group: units * group.step for group, units in wanted.items()}
        by_level = [{numbers[group] for group in groups} for groups in self.free]
        if all(len(here) == 1 for here in by_level):
            made = Width(levels=tuple(n for here in by_level for n in here), keep=self.keep)
            if self._asks(made, numbers):
                return made
        return Width(channels=self._by_layer(numbers))

    def _asks(self, made: Width, numbers: Mapping[ChannelGroup, int]) -> bool:
        try:
            demands = made.demands(self.channels)
        except (OptionError, RewriteError):
            return False  # a group that is made at two levels, which are to differ
        return all(demands.get(group, group.channels) == n for group, n in numbers.items())

    def _by_layer(self, numbers: Mapping[ChannelGroup, int]) -> dict[str, int]:
        """Return numbers by a layer that makes each group, where possible only that group."""
        makes: dict[str, int] = {}
        for group in self.channels.groups:
            for layer in group.layers:
                makes[layer] = makes.get(layer, 0) + 1
        found: dict[str, int] = {}
        for group, number in numbers.items():
            if number < group.channels:
                layer = min(group.layers, key=lambda path: makes[path])  # the first of the least
                found[layer] = found.get(layer, 0) + number
        return found

    def immovable(self, wanted: Mapping[ChannelGroup, int]) -> list[ChannelGroup]:
        """Rehearse a plan, and return the groups that the engine's check would not let shrink.

        Args:
            wanted: units of every free group, with at least one that changes.
        """
        first = plan(self.model, self.width(wanted), inputs=self.inputs).passes[0]
        resized = {(e.tensor, e.axis): e.keep for e in first.edits if isinstance(e, Resize)}
        return [
            group
            for group, units in wanted.items()
            if units < group.units
            and not any(
                (member.tensor, member.axis) in resized
                and not set(member.positions.ravel().tolist())
                <= set(resized[member.tensor, member.axis])
                for member in group.members
            )
        ]

    def freeze(self, groups: Sequence[ChannelGroup]) -> None:
        """Leave groups out of every further plan."""
        self.stuck += [group.name for group in groups]
        self.free = [[group for group in level if group not in groups] for level in self.free]
