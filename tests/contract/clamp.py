"""The promises of passes that set widths: nothing is wider than asked for, except with a reason."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pocketize.channels.analysis import analyse
from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.engine.pipeline import PassPlan
from tests.contract.case import Case
from tests.contract.checking import require
from tests.contract.widths import width_of

__all__ = ["clamped", "halved"]


def clamped(case: Case) -> None:
    """Layers are as wide as the net's author expects, and the plan tells of every other one."""
    assert case.net is not None, "this case states no expectations"
    assert case.plan is not None, "this case has no plan"
    groups = analyse(case.original, case.inputs)
    require([*_unexpected(case, groups), *_untold(case, groups)])


def halved(case: Case) -> None:
    """Layers that can be narrowed have half of their channels, rounded up."""
    assert case.net is not None, "this case states no expectations"
    require(
        f"{path}: {width_of(case.original, path)} -> {width_of(case.rewritten, path)}"
        for path in case.net.movable
        if width_of(case.rewritten, path) != (width_of(case.original, path) + 1) // 2
    )


def _unexpected(case: Case, groups: ChannelGroups) -> Iterator[str]:
    net, plan = case.net, case.plan
    assert net is not None
    assert plan is not None
    old, new = case.original, case.rewritten
    for path in net.movable:
        if width_of(new, path) != net.width:
            yield f"{path}: {width_of(old, path)} -> {width_of(new, path)}, expected {net.width}"
    for path in net.shrinks:
        if width_of(new, path) >= width_of(old, path):
            yield f"{path}: {width_of(old, path)} -> {width_of(new, path)}, expected fewer"
    for path, reason in net.frozen.items():
        before, after = width_of(old, path), width_of(new, path)
        if before != after:
            yield f"{path}: {before} -> {after}, expected to stay"
        elif before > net.width and reason not in _refusal(plan, groups, path):
            yield f"{path}: expected to stay because of {reason!r}: {_refusal(plan, groups, path)}"
        elif before <= net.width and reason not in groups.explain(path or "weight"):
            yield f"{path}: explain does not say {reason!r}: {groups.explain(path or 'weight')}"


def _refusal(plan: PassPlan, groups: ChannelGroups, path: str) -> str:
    """What the plan says of the groups that a layer belongs to; a group goes by its first layer."""
    together = _together(groups, path)
    return "; ".join(row.why for row in plan.refused if row.path in together) or "(no refusal)"


def _untold(case: Case, groups: ChannelGroups) -> Iterator[str]:
    """Layers that are as wide as they were, and too wide, of which the plan says nothing."""
    assert case.net is not None
    assert case.plan is not None
    told = {row.path for row in case.plan.refused}
    for path, module in case.original.named_modules():
        if not isinstance(module, _ConvNd | nn.Linear) or f"{path}.weight" in groups.unreached:
            continue
        before, after = width_of(case.original, path), width_of(case.rewritten, path)
        made = groups.matching(path) if path else groups.groups
        if all(group.channels <= case.net.width for group in made):
            continue  # a fused layer: several groups side by side, each narrow enough
        if before == after > case.net.width and told.isdisjoint(_together(groups, path)):
            yield f"{path}: stays at {after} channels, and the plan says nothing of it"


def _groups_of(groups: ChannelGroups, path: str) -> list[ChannelGroup]:
    """The groups that a layer's weights, or one parameter, take part in."""
    name, _, axis = path.partition("@")
    prefix = f"{name}." if name else ""
    return [
        group
        for group in groups.groups
        if any(
            (m.tensor == name and str(m.axis) == axis) if axis else m.tensor.startswith(prefix)
            for m in group.members
        )
    ]


def _together(groups: ChannelGroups, path: str) -> set[str]:
    """Layers that share a group with this one; a group goes by its first layer in the plan."""
    sharing = {layer for group in _groups_of(groups, path) for layer in group.layers}
    # A tied weight is known by its first name only; the layer itself is known by what it makes.
    return sharing | {path}
