"""Resize channel groups to chosen widths: one implementation for every pass that does."""

from __future__ import annotations

__all__ = ["Resized", "fit_units", "resize_groups", "sizes_after", "units_for"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.channels.ranking import rank_units, strongest
from pocketize.plugin.base import Change, Refusal
from pocketize.plugin.edits import Edit, Redraw

Slices: TypeAlias = list[tuple[Tensor, int, NDArray[np.int64]]]


@dataclass(frozen=True)
class Resized:
    """Edits that resize groups, and how a plan tells them."""

    edits: tuple[Edit, ...]
    changes: tuple[Change, ...]


def units_for(group: ChannelGroup, channels: int) -> int:
    """Return the most whole units of a group that have no more channels than this; at least one."""
    return min(group.units, max(1, channels // group.step))


def fit_units(group: ChannelGroup, channels: int) -> tuple[int, Refusal | None]:
    """Return the units that a group keeps for a number of channels, and what cannot be met."""
    units = units_for(group, channels)
    got = units * group.step
    if got == min(channels, group.channels):
        return units, None
    return units, Refusal(
        group.name,
        f"{got} channels instead of {channels}: its channels can only be dropped in steps of "
        f"{group.step}",
    )


def sizes_after(
    channels: ChannelGroups, wanted: Mapping[ChannelGroup, int]
) -> dict[str, tuple[int, ...]]:
    """Return the shape that every parameter would have; nothing is copied or rewritten."""
    shapes = {name: list(p.shape) for name, p in channels.model.named_parameters()}
    for group, units in wanted.items():
        for member in group.members:
            if member.tensor in shapes:
                shapes[member.tensor][member.axis] -= (
                    group.units - units
                ) * member.positions.shape[1]
    return {name: tuple(shape) for name, shape in shapes.items()}


def resize_groups(
    channels: ChannelGroups, wanted: Mapping[ChannelGroup, int], *, weights: str
) -> Resized:
    """Return the edits that bring groups to a number of units.

    Args:
        channels: the analysis.
        wanted: units to keep, at least one, for each group that changes.
        weights: ``"slice"`` keeps the units with the largest L2 norm over all the weights that make
            them; ``"reset"`` draws all weights of the model anew.
    """
    if not wanted:
        return Resized((), ())
    parameters: dict[str, Tensor] = dict(channels.model.named_parameters())
    buffers = dict(channels.model.named_buffers())
    selection = {}
    for group, units in wanted.items():
        slices = _weights_of(channels, group, parameters, buffers)
        selection[group] = _choose(slices, units)
    changes = []
    for group, units in wanted.items():
        for layer in group.layers or (group.name,):
            others = "" if layer == group.name else f"moves with {group.name}"
            before, after = _layer_width(channels, group, layer, units)
            changes.append(Change(layer, f"{before} -> {after} channels", others))
    edits = channels.resize(selection)
    if weights == "reset":
        edits = (*edits, Redraw())
    return Resized(edits, tuple(changes))


def _layer_width(
    channels: ChannelGroups, group: ChannelGroup, layer: str, units: int
) -> tuple[int, int]:
    roots = set(group.roots.tolist())
    for site in channels.producers:
        if site.module == layer:
            before = sum(int(root) in roots for root in channels.roots[site.indices])
            if before:
                return before, before * units // group.units
    return group.channels, units * group.step


def _choose(weights: Slices, units: int) -> NDArray[np.int64]:
    """Return the units to keep, ascending."""
    if any(tensor.is_meta for tensor, _, _ in weights):
        return np.arange(units)  # a model without values, planned for its shapes
    return strongest(rank_units(weights), units)


def _weights_of(
    channels: ChannelGroups,
    group: ChannelGroup,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> Slices:
    """The weights that make a group's channels: first axes; any tensor if there are none.

    Buffers count only where nothing else does, as in a bank of fixed filters.
    """
    members = [m for m in group.members if m.tensor in parameters] or list(group.members)
    sites = [site.indices for site in channels.producers if site.module in group.layers]
    made = np.concatenate(sites) if sites else np.empty(0, dtype=np.int64)
    makers = [m for m in members if np.isin(channels.axes[m.tensor, m.axis], made).any()]
    return [
        (
            (parameters if m.tensor in parameters else buffers)[m.tensor].detach(),
            m.axis,
            m.positions,
        )
        for m in makers or members
    ]
