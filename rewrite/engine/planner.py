"""Ask a pass, check its edits on a fake copy, freeze what cannot be resized, ask again."""

from __future__ import annotations

__all__ = ["settle_proposal"]

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx, nn

from pocketize.channels.analysis import Analysis
from pocketize.channels.groups import ChannelGroup, ChannelGroups
from pocketize.channels.unread import unread_warning
from pocketize.engine.dry_run import DryRun
from pocketize.engine.repairs import Derived, candidates, derived
from pocketize.engine.verify import Mismatch, backward_failure, check_edits, split_channel
from pocketize.errors import VerifyError
from pocketize.graph.capture import TracedGraph, Tracer, capture
from pocketize.graph.inputs import Inputs
from pocketize.plugin.base import Change, Pass, Proposal, Target
from pocketize.plugin.edits import Convert, Edit, Redraw, Resize, SetArgument, SetAttribute

logger = logging.getLogger(__name__)

_ATTEMPTS = 100
#: How many numbers that were not changed a plan names.
_NAMED = 5


def settle_proposal(
    model: nn.Module,
    given: Pass,
    inputs: Inputs,
    generator: torch.Generator | None,
    variants: Sequence[Inputs] = (),
) -> Proposal:
    """Return a pass's proposal that has been checked.

    Raises:
        VerifyError: no variant of the proposal does what it predicts.
    """
    return _with_all_rows(_Planner(model, given, inputs, generator, variants).solve())


def _with_all_rows(proposal: Proposal) -> Proposal:
    """Add a row for each module with edits and without a row of the pass.

    A pass's row for a module covers all edits there. Where a pass has rows, they cover all resized
    tensors too: a layer's row includes what is resized with it.
    """
    paths = {change.path for change in proposal.changes}
    missing: dict[str, list[str]] = {}
    for edit in proposal.edits:
        sized = not isinstance(edit, Convert | Redraw)
        if edit.path not in paths and not (paths and sized):
            missing.setdefault(edit.path, []).append(edit.what)
    rows = (Change(path, "; ".join(dict.fromkeys(what))) for path, what in missing.items())
    return replace(proposal, changes=(*proposal.changes, *rows))


class _Planner:
    """One pass on one model; the graphs are traced once."""

    def __init__(
        self,
        model: nn.Module,
        given: Pass,
        inputs: Inputs,
        generator: torch.Generator | None,
        variants: Sequence[Inputs],
    ) -> None:
        self.model, self.given, self.inputs, self.generator = model, given, inputs, generator
        self.variants = tuple(variants)
        self.analysis: Analysis | None = None
        self.frozen: dict[int, str] = {}
        self.trailing: frozenset[str] = frozenset()
        self.repairs: list[Edit] = []
        self.settled: ChannelGroups | None = None
        self.seen: dict[str, int] = {}

    def solve(self) -> Proposal:
        last = ""
        for _ in range(_ATTEMPTS):
            proposal = self.given.propose(self._target())
            if any(isinstance(edit, Convert) for edit in proposal.edits):
                return self._dry_run(proposal)
            resizes = any(isinstance(edit, Resize | SetAttribute) for edit in proposal.edits)
            channels = self._channels() if self.analysis or resizes else None
            if channels is None or not proposal.edits:
                return proposal
            if split := split_channel(channels, proposal.edits):
                raise VerifyError(f"{self.given.name}: {split}")
            self.repairs = [r for r in self.repairs if r not in proposal.edits]
            mismatch = check_edits(self.model, channels, self._edits(proposal))
            while mismatch is not None and self._repair(channels, proposal, mismatch):
                mismatch = check_edits(self.model, channels, self._edits(proposal))
            if mismatch is None:
                failure = backward_failure(self.model, channels, self._edits(proposal))
                if failure is None:
                    return self._finished(proposal)
                last = f"its backward: {type(failure).__name__}: {failure}"
                self._freeze_backward(channels, proposal, last)
            else:
                last = mismatch.text
                self._freeze(channels, mismatch)
            logger.debug("%s: %s", self.given.name, last)
        raise VerifyError(
            f"{self.given.name}: the rewritten model does not run as predicted, whatever is left "
            f"out; last at {last}"
        )

    def _dry_run(self, proposal: Proposal) -> Proposal:
        """Check a proposal that converts modules by running it."""
        error = DryRun(self.model, self.inputs, self.variants).error(proposal.edits)
        if error:
            raise VerifyError(
                f"{self.given.name}: the converted model does not run as the original does: "
                f"{error}. The model is as it was"
            )
        return proposal

    def _target(self) -> Target:
        return Target(
            model=self.model,
            inputs=self.inputs,
            generator=self.generator,
            variants=self.variants,
            record=lambda train: capture(self.model, self.inputs, train=train),
            analyse=self._channels,
            record_variants=self._record_variants,
        )

    def _record_variants(self) -> tuple[TracedGraph, ...]:
        if self.analysis is not None:
            return self.analysis.traces[2:]
        tracer = Tracer(self.model)
        return tuple(tracer.trace(v, train=t) for v in self.variants for t in (False, True))

    def _channels(self) -> ChannelGroups:
        if self.analysis is None:
            self.analysis = Analysis(self.model, self.inputs, self.variants)
        if self.settled is None:
            self.settled = self.analysis.solve(self.frozen, self.trailing)
        return self.settled

    def _edits(self, proposal: Proposal) -> tuple[Edit, ...]:
        return (*proposal.edits, *self.repairs)

    def _repair(self, channels: ChannelGroups, proposal: Proposal, at: Mismatch) -> bool:
        """Change a size in the module's code too, if the forward then gets further."""
        traced = channels.traces[at.position[0]]
        done = {_place(edit) for edit in self.repairs}
        for candidate in candidates(self.model, traced, at):
            if any(_place(edit) in done for edit in candidate):
                continue
            after = check_edits(self.model, channels, (*self._edits(proposal), *candidate))
            if after is None or after.position > at.position:
                self.repairs += candidate
                return True
        return False

    def _freeze(self, channels: ChannelGroups, at: Mismatch) -> None:
        """Freeze the channels of the operator where the prediction failed."""
        self.repairs = []
        self.settled = None
        split = f"#{at.node.name}"
        deferred = self.analysis.unions.deferred_keys() if self.analysis else ()
        pending = [key for key in deferred if key.endswith(split)]
        if pending and pending[0] not in self.trailing:
            self.trailing |= frozenset(pending)
            return
        units = at.units
        reason = f"the check found that it cannot change: {at.text}"
        if not units or all(unit in self.frozen for unit in units):
            # The cause is not among the operator's own tensors: look further around it.
            tried = self.seen[at.node.name] = self.seen.get(at.node.name, 0) + 1
            units = _around(channels, at.node, tried)
        hit = set(units)
        for group in channels.groups:
            if not hit.isdisjoint(group.roots.tolist()):
                for unit in group.roots.tolist():
                    self.frozen.setdefault(unit, reason)

    def _freeze_backward(self, channels: ChannelGroups, proposal: Proposal, why: str) -> None:
        """Freeze the group whose resizing breaks the backward; it is found by halving."""
        dropped = ~channels.survivors_of(proposal.edits)
        suspects = [g for g in channels.groups if dropped[channels.members_of(g)].any()]

        def breaks(groups: Sequence[ChannelGroup]) -> bool:
            stays = np.ones(len(dropped), dtype=bool)
            for group in groups:
                indices = channels.members_of(group)
                stays[indices] = ~dropped[indices]
            edits = (*channels.edits(stays), *self.repairs)
            runs = check_edits(self.model, channels, edits) is None
            return runs and backward_failure(self.model, channels, edits) is not None

        while len(suspects) > 1:
            half = len(suspects) // 2
            broken = next((g for g in (suspects[:half], suspects[half:]) if breaks(g)), None)
            if broken is None:
                break  # it takes several groups together
            suspects = broken
        self.repairs, self.settled = [], None
        for group in suspects:
            for unit in group.roots.tolist():
                self.frozen.setdefault(unit, f"the check found that it cannot change: {why}")

    def _finished(self, proposal: Proposal) -> Proposal:
        whys = {True: "a literal in its graph", False: "its forward reads it"}
        rows = tuple(
            Change(edit.path, edit.what, whys[isinstance(edit, SetArgument)])
            for edit in self.repairs
        )
        unread = unread_warning(self._channels(), proposal.edits)
        proposal = replace(
            proposal,
            edits=self._edits(proposal),
            changes=proposal.changes + rows,
            warnings=proposal.warnings + ((unread,) if unread else ()),
        )
        return self._scaled(proposal) if Redraw() in proposal.edits else proposal

    def _scaled(self, proposal: Proposal) -> Proposal:
        """Change numbers derived from widths, on which weights that are drawn anew rely.

        Sliced weights keep the numbers that they were trained with.
        """
        channels = self._channels()
        found = derived(self.model, channels, proposal.edits)
        follow = [item for item in found if item.edit is not None]

        def runs(items: Sequence[Derived]) -> bool:
            edits = [item.edit for item in items if item.edit is not None]
            return check_edits(self.model, channels, (*proposal.edits, *edits)) is None

        if follow and not runs(follow):
            follow = [item for item in follow if runs([item])]
            follow = follow if runs(follow) else []
        left = [str(item) for item in found if item not in follow]
        notes = proposal.notes
        if left:
            more = f"; and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            notes += (
                f"numbers that may derive from a width, and are not changed: "
                f"{'; '.join(left[:_NAMED])}{more}",
            )
        edits = tuple(item.edit for item in follow if item.edit is not None)
        rows = tuple(
            Change(edit.path, edit.what, f"it {item.why.removeprefix('which ')}")
            for item in follow
            if (edit := item.edit) is not None
        )
        return replace(
            proposal,
            edits=(*proposal.edits, *edits),
            changes=proposal.changes + rows,
            notes=notes,
        )


def _place(edit: Edit) -> tuple[str, ...]:
    """Return what an edit changes, without the value."""
    if isinstance(edit, SetArgument):
        return edit.module, edit.node, edit.argument
    if isinstance(edit, SetAttribute):
        return edit.module, edit.name
    return (edit.path,)


def _around(channels: ChannelGroups, node: fx.Node, tried: int) -> tuple[int, ...]:
    """Return free units of the modules around a node, one level further out each time."""
    path = str(node.meta["module"])
    for _ in range(tried - 1):
        path = path.rpartition(".")[0]
    units: list[int] = []
    for group in channels.groups:
        inside = any(
            not path or m.tensor == path or m.tensor.startswith(f"{path}.") for m in group.members
        )
        if group.frozen is None and inside:
            units += group.roots.tolist()
    return tuple(units)
