"""Channel groups: what an analysis has found, and what can be asked of it.

A *unit* is the smallest set of weight indices that can be kept or dropped; a *group* are the units
that live on the same axes of the same tensors, to which a width can be given.
"""

from __future__ import annotations

__all__ = ["ChannelGroup", "ChannelGroups", "Member"]

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from pocketize.channels.labels import Indices
from pocketize.channels.rules import LayerChannels
from pocketize.errors import PatternError, nearest
from pocketize.graph.capture import TracedGraph
from pocketize.graph.inputs import Inputs
from pocketize.plugin.edits import Edit, Resize, SetAttribute, read_attribute


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one tensor that takes part in a group.

    Attributes:
        tensor: name of a parameter or buffer.
        axis: the axis.
        positions: integers of shape (units, count): the indices on this axis of each unit.
    """

    tensor: str
    axis: int
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that move together.

    Attributes:
        layers: paths of the layers that make these channels, in the order in which they run.
        members: every tensor axis that must be resized with them.
        units: number of units, the smallest sets that can be kept or dropped.
        step: channels that one unit stands for, counted in the narrowest tensor that a layer makes
            or reads; more than 1 with grouped convolutions, group norms and attention heads.
        frozen: why the group keeps its size, ``None`` if it can be resized.
    """

    layers: tuple[str, ...]
    members: tuple[Member, ...]
    roots: Indices
    step: int
    frozen: str | None

    def __repr__(self) -> str:
        frozen = f", frozen: {self.frozen}" if self.frozen is not None else ""
        return f"<ChannelGroup {self.name}: {self.channels} channels{frozen}>"

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.roots)

    @property
    def channels(self) -> int:
        """Number of channels, counted as in ``step``."""
        return self.units * self.step

    @property
    def name(self) -> str:
        """Path of the first layer, or the name of the first tensor."""
        return self.layers[0] if self.layers else self.members[0].tensor


@dataclass(eq=False)
class ChannelGroups:
    """The analysis of a model.

    Attributes:
        model: the model, unchanged.
        inputs: what it was traced with.
        traces: evaluation mode first, then training mode, at the same size; then both of each
            variant.
        groups: all groups, free and frozen, in the order in which they run.
        unreached: parameters that the forward never reads; they are left alone.
        axes: the indices of every tensor axis that has some.
        roots: the unit of every index.
        values: for each trace, the labels of every node.
        producers: the channels that each layer makes, in the order in which they run.
        counts: module attributes that must follow a number of channels.
        expected: arguments of operators that must follow a number of channels.
        fresh_from: the first index that belongs to no tensor.
    """

    model: nn.Module
    inputs: Inputs
    traces: tuple[TracedGraph, ...]
    groups: tuple[ChannelGroup, ...]
    unreached: tuple[str, ...]
    axes: dict[tuple[str, int], Indices]
    roots: Indices
    values: tuple[dict[fx.Node, Any], ...]
    producers: tuple[LayerChannels, ...]
    counts: tuple[LayerChannels, ...]
    expected: dict[fx.Node, dict[str, Indices]]
    fresh_from: int

    def __repr__(self) -> str:
        frozen = sum(group.frozen is not None for group in self.groups)
        name, count = type(self.model).__name__, len(self.groups)
        return f"<ChannelGroups of {name}: {count} groups, {frozen} of them frozen>"

    def resize(self, selection: Mapping[ChannelGroup, NDArray[np.int64]]) -> tuple[Edit, ...]:
        """Return the edits that keep just these units of some groups.

        Args:
            selection: for each group to be resized, the indices of the units to keep.
        """
        return self.edits(self.survivors(selection))

    def survivors(self, selection: Mapping[ChannelGroup, NDArray[np.int64]]) -> NDArray[np.bool_]:
        """Return for every index whether it stays, given the units to keep of some groups."""
        mask = np.ones(len(self.roots), dtype=bool)
        for group, units in selection.items():
            mask[group.roots] = False
            mask[group.roots[units]] = True
        return mask[self.roots]

    def survivors_of(self, edits: Iterable[Edit]) -> NDArray[np.bool_]:
        """Return for every index whether it stays, given edits."""
        mask = np.ones(len(self.roots), dtype=bool)
        for edit in edits:
            if isinstance(edit, Resize) and (edit.tensor, edit.axis) in self.axes:
                indices = self.axes[edit.tensor, edit.axis]
                mask[np.delete(indices, list(edit.keep))] = False
        # Indices that belong to no tensor follow the unit they are in.
        fresh = np.arange(len(self.roots)) >= self.fresh_from
        units = np.ones(len(self.roots), dtype=bool)
        units[self.roots[~mask]] = False
        return np.where(fresh, units[self.roots], mask)

    def members_of(self, group: ChannelGroup) -> Indices:
        """Return all indices of a group's units."""
        return np.flatnonzero(np.isin(self.roots, group.roots))

    def edits(self, stays: NDArray[np.bool_]) -> tuple[Edit, ...]:
        """Return the edits that drop every index that does not stay."""
        edits: list[Edit] = []
        for (tensor, axis), indices in self.axes.items():
            kept = stays[indices]
            if not kept.all():
                edits.append(
                    Resize(tensor, axis, tuple(np.flatnonzero(kept).tolist()), indices.size)
                )
        modules = dict(self.model.named_modules())
        for site in dict.fromkeys((s.module, s.attribute) for s in self.counts):
            edits += self._attribute(*site, modules[site[0]], stays)
        return tuple(edits)

    def _attribute(
        self, path: str, attribute: str, module: nn.Module, stays: NDArray[np.bool_]
    ) -> list[Edit]:
        """Return the edit of an attribute that counts channels, if it has that attribute."""
        old = read_attribute(module, attribute)
        sizes = {
            (site.indices.size, int(stays[site.indices].sum()))
            for site in self.counts
            if (site.module, site.attribute) == (path, attribute)
        }
        new = {after for before, after in sizes if before == old and after != before}
        return [SetAttribute(path, attribute, old, new.pop())] if len(new) == 1 else []

    def matching(self, pattern: str) -> tuple[ChannelGroup, ...]:
        """Return the groups of the channels that the modules matching a pattern make.

        For modules that make none (a norm, say) these are the groups of their parameters.

        Args:
            pattern: an ``fnmatch`` pattern on module paths; what is inside a match counts too.

        Raises:
            PatternError: the pattern matches no module.
        """
        paths = [path for path, _ in self.model.named_modules() if path]
        matched = {path for path in paths if fnmatch.fnmatchcase(path, pattern)}
        if not matched:
            raise PatternError(
                f"pattern {pattern!r} matches no module of "
                f"{type(self.model).__name__}.{nearest(pattern, paths)}"
            )

        def inside(path: str) -> bool:
            return any(path == m or path.startswith(f"{m}.") for m in matched)

        indices = [site.indices for site in self.producers if inside(site.module)]
        indices = indices or [a for (name, _), a in self.axes.items() if inside(name)]
        roots = set(self.roots[np.concatenate(indices)].tolist()) if indices else set()
        return tuple(g for g in self.groups if not roots.isdisjoint(g.roots.tolist()))

    def explain(self, path: str) -> str:
        """Tell why a layer moves with others or is frozen.

        Args:
            path: path of a module or name of a parameter.

        Raises:
            PatternError: nothing of that name takes part in the analysis.
        """
        lines = []
        for (tensor, axis), indices in self.axes.items():
            if tensor == path or tensor.startswith(f"{path}."):
                lines += self._explain_axis(tensor, axis, indices)
        if not lines:
            known = {tensor for tensor, _ in self.axes}
            known |= {tensor.rpartition(".")[0] for tensor in known}
            raise PatternError(
                f"{path!r} names no layer with channels in this model.{nearest(path, known)}"
            )
        return "\n".join(lines)

    def _explain_axis(self, tensor: str, axis: int, indices: Indices) -> list[str]:
        lines = []
        roots = set(self.roots[indices].tolist())
        for group in self.groups:
            if roots.isdisjoint(group.roots.tolist()):
                continue
            step = f" in steps of {group.step}" if group.step > 1 else ""
            state = f"frozen: {group.frozen}" if group.frozen else f"free{step}"
            lines.append(f"{tensor} axis {axis} ({indices.size}): {state}")
            others = [f"{m.tensor}[{m.axis}]" for m in group.members]
            shown = [x for x in others if x != f"{tensor}[{axis}]"]
            if shown:
                rest = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
                lines.append(f"    moves with {', '.join(shown[:12])}{rest}")
        return lines or [
            f"{tensor} axis {axis} ({indices.size}): left alone, the forward never reads it"
        ]
