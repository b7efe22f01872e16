"""Resize channel groups to chosen widths: one implementation for every pass that does."""

from __future__ import annotations

__all__ = ["Resized", "resize_groups"]

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocketize.base import Change
from pocketize.edits import Edit, Redraw
from pocketize.groups import ChannelGroup, ChannelGroups
from pocketize.ranking import rank_units, strongest


@dataclass(frozen=True)
class Resized:
    """Edits that resize groups, and how a plan tells them.

    Attributes:
        edits: the edits.
        changes: one row for each layer whose width changes.
    """

    edits: tuple[Edit, ...]
    changes: tuple[Change, ...]


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
    tensors: dict[str, Tensor] = dict(channels.model.named_parameters())
    selection = {
        group: strongest(rank_units(_weights_of(channels, group, tensors)), units)
        for group, units in wanted.items()
    }
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
            before = sum(int(root) in roots for root in channels.roots[site.atoms])
            if before:
                return before, before * units // group.units
    return group.channels, units * group.step


def _weights_of(
    channels: ChannelGroups, group: ChannelGroup, tensors: dict[str, Tensor]
) -> list[tuple[Tensor, int, NDArray[np.int64]]]:
    """The weights that make a group's channels: first axes; any tensor if there are none."""
    parameters = [m for m in group.members if m.tensor in tensors]
    sites = [site.atoms for site in channels.producers if site.module in group.layers]
    made = np.concatenate(sites) if sites else np.empty(0, dtype=np.int64)
    makers = [m for m in parameters if np.isin(channels.axes[m.tensor, m.axis], made).any()]
    return [(tensors[m.tensor].detach(), m.axis, m.positions) for m in makers or parameters]
