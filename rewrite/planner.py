"""Ask a pass, check its answer on a copy without memory, freeze what does not move, ask again."""

from __future__ import annotations

__all__ = ["settle_proposal"]

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from pocketize.base import Change, Pass, Proposal, Target
from pocketize.capture import capture
from pocketize.channels import Analysis
from pocketize.edits import Edit, Resize, SetAttribute
from pocketize.errors import VerifyError
from pocketize.groups import ChannelGroups
from pocketize.inputs import Inputs
from pocketize.verify import Mismatch, check_backward, check_edits

logger = logging.getLogger(__name__)

_ATTEMPTS = 100


def settle_proposal(
    model: nn.Module, given: Pass, inputs: Inputs, generator: torch.Generator | None
) -> Proposal:
    """Return a pass's proposal that has been checked.

    Args:
        model: the model to be rewritten; unchanged.
        given: the pass.
        inputs: example inputs on the model's device.
        generator: source of random numbers for the pass.

    Raises:
        VerifyError: no variant of the proposal does what it predicts.
    """
    return _Planner(model, given, inputs, generator).settle()


class _Planner:
    """One pass on one model; the recordings are made once."""

    def __init__(
        self, model: nn.Module, given: Pass, inputs: Inputs, generator: torch.Generator | None
    ) -> None:
        self.model, self.given, self.inputs, self.generator = model, given, inputs, generator
        self.analysis: Analysis | None = None
        self.frozen: dict[int, str] = {}
        self.trailing: frozenset[str] = frozenset()
        self.repairs: list[SetAttribute] = []
        self.settled: ChannelGroups | None = None
        self.seen: dict[str, int] = {}

    def settle(self) -> Proposal:
        mismatch: Mismatch | None = None
        for _ in range(_ATTEMPTS):
            proposal = self.given.propose(self._target())
            resizes = any(isinstance(edit, Resize | SetAttribute) for edit in proposal.edits)
            channels = self._channels() if self.analysis or resizes else None
            if channels is None or not proposal.edits:
                return proposal
            self.repairs = [r for r in self.repairs if r not in proposal.edits]
            mismatch = check_edits(self.model, channels, self._edits(proposal))
            while mismatch is not None and self._repair(channels, proposal, mismatch):
                mismatch = check_edits(self.model, channels, self._edits(proposal))
            if mismatch is None:
                check_backward(self.model, channels, self._edits(proposal))
                return self._finished(proposal)
            logger.debug("%s: %s", self.given.name, mismatch.text)
            self._freeze(channels, mismatch)
        assert mismatch is not None
        raise VerifyError(
            f"{self.given.name}: the rewritten model does not run as predicted, whatever is left "
            f"out; last at {mismatch.text}"
        )

    def _target(self) -> Target:
        return Target(
            model=self.model,
            inputs=self.inputs,
            generator=self.generator,
            record=lambda train: capture(self.model, self.inputs, train=train),
            analyse=self._channels,
        )

    def _channels(self) -> ChannelGroups:
        if self.analysis is None:
            self.analysis = Analysis(self.model, self.inputs)
        if self.settled is None:
            self.settled = self.analysis.settle(self.frozen, self.trailing)
        return self.settled

    def _edits(self, proposal: Proposal) -> tuple[Edit, ...]:
        return (*proposal.edits, *self.repairs)

    def _repair(self, channels: ChannelGroups, proposal: Proposal, at: Mismatch) -> bool:
        """Let a Python attribute follow, if that carries the recording further."""
        for candidate in _candidates(self.model, at):
            if any((r.module, r.name) == (candidate.module, candidate.name) for r in self.repairs):
                continue
            after = check_edits(self.model, channels, (*self._edits(proposal), candidate))
            if after is None or after.position > at.position:
                self.repairs.append(candidate)
                return True
        return False

    def _freeze(self, channels: ChannelGroups, at: Mismatch) -> None:
        """Take back what was assumed of the operator where the prediction failed."""
        self.repairs = []
        self.settled = None
        split = f"#{at.node.name}"
        pending = [key for key in self._pending() if key.endswith(split)]
        if pending and pending[0] not in self.trailing:
            self.trailing |= frozenset(pending)
            return
        units = at.units
        reason = f"the check found that it cannot change: {at.text}"
        if not units or all(unit in self.frozen for unit in units):
            # The culprit is not among the operator's own tensors: widen the circle.
            tried = self.seen[at.node.name] = self.seen.get(at.node.name, 0) + 1
            units = _around(channels, at.node, tried)
        for unit in units:
            self.frozen.setdefault(unit, reason)

    def _pending(self) -> tuple[str, ...]:
        return self.analysis.algebra.pending_keys() if self.analysis else ()

    def _finished(self, proposal: Proposal) -> Proposal:
        rows = tuple(
            Change(r.module, f"{r.name} {r.old} -> {r.new}", "its forward reads it")
            for r in self.repairs
        )
        return replace(proposal, edits=self._edits(proposal), changes=proposal.changes + rows)


def _candidates(model: nn.Module, at: Mismatch) -> Iterator[SetAttribute]:
    """Yield attributes of the module at fault and its owners that hold a size that changed."""
    path = str(at.node.meta["module"])
    sizes = dict(sorted(at.sizes))
    while True:
        for name, value in vars(model.get_submodule(path)).items():
            for suffix, number in _numbers(value):
                if number in sizes and not name.startswith("_"):
                    yield SetAttribute(path, f"{name}{suffix}", number, sizes[number])
        if not path:
            return
        path = path.rpartition(".")[0]


def _numbers(value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield "", value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            if isinstance(item, int) and not isinstance(item, bool):
                yield f".{index}", item


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
