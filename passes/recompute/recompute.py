"""Store the results of convolutions, or fewer, and compute the rest again in the backward pass."""

from __future__ import annotations

__all__ = ["Recompute"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from pocketize._torch import FakeTensorMode
from pocketize.engine.surgery import apply_edits
from pocketize.errors import OptionError, PocketizeError, RewriteError
from pocketize.graph.capture import TracedGraph, quiet_tracing
from pocketize.graph.clone import clone_modules, fake_clone
from pocketize.graph.methods import set_mode
from pocketize.memory import measure
from pocketize.memory.saved import SavedTensors
from pocketize.passes.recompute.curve import front, movable
from pocketize.passes.recompute.forward import recomputing_forward
from pocketize.passes.recompute.recorded_step import record_step
from pocketize.passes.recompute.replay import Cost, StepReplay
from pocketize.passes.recompute.weight_uses import WeightUse, chosen, find_uses, freed
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import obstacle
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.edits import Convert
from pocketize.plugin.options import read_target
from pocketize.units import bytes_text

#: Choices within the budget that are estimated, cheapest first, before the search gives up.
_ESTIMATES = 4
_BUDGET = "recompute: option 'budget'"
_MODES = ("conv", "block", "level")


@dataclass(frozen=True, kw_only=True)
class Recompute(Pass):
    """Store less for the backward pass and build again what it reads, exactly as it was.

    The model stays as it is: each forward pass is followed operator by operator, and autograd is
    given a way to compute a tensor again instead of saving it. Norms, activations, concatenations,
    dropout, pooling and interpolation are always built again; what they cost is small beside a
    convolution. ``activation(norm(x))`` and the convolution of a concatenation are differentiated
    as one, which is where most of the rest goes. Tensors that only the model's Python code still
    holds lose their memory when nothing will read them again.

    Running statistics are updated once, random numbers are drawn again as they were, and autocast
    is in the state it was. What happens inside ``torch.utils.checkpoint`` is left to it. Under
    ``torch.compile``, from torch 2.13 on, the compiler is told what to store.

    With ``budget``, what is stored is searched for: the choice with the least recomputation whose
    peak is within the budget. :func:`~pocketize.passes.recompute.curve.curve` returns all choices
    that are worth a look. The peak is that of the whole training step, as
    ``measure(model, inputs, optimizer=..., estimate=True)`` counts it: parameters, buffers,
    gradients, the optimizer's state, the inputs, what is stored, and all that the forward, the
    backward pass and the update need for a moment, for the inputs of the rewrite and the mean
    square of the outputs as the loss. On a GPU, rounding, fragmentation and workspaces of kernels
    come on top. What passes that come later save is not in it.

    Attributes:
        keep: what is stored: "conv" the result of every convolution and linear layer; "block" of
            the last one of each block; "level" only what crosses from one resolution to another;
            or patterns (fnmatch) of the weights, or of the modules, whose results are stored.
        budget: the peak to stay within with the least recomputation, as a size ("4GiB") or a share
            of the present peak ("36%"); it chooses what is kept.
        optimizer: whose state counts in the budget; none for a step without an update.
        min_bytes: tensors of fewer bytes are stored in any case.
    """

    name: ClassVar[str] = "recompute"
    summary: ClassVar[str] = "Store results of convolutions, or fewer, and rebuild the rest"
    after: ClassVar[tuple[str, ...]] = REBUILDING
    conflicts: ClassVar[tuple[str, ...]] = ("in-place-norm", "offload")

    keep: Literal["conv", "block", "level"] | tuple[str, ...] = "conv"
    budget: str | None = None
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam"
    min_bytes: int = 65536

    def validate(self) -> None:
        """Refuse a negative size, a budget that is none, and one beside a choice."""
        if self.min_bytes < 0:
            raise OptionError(f"recompute: min_bytes must not be negative, got {self.min_bytes}")
        if self.budget is not None:
            read_target(self.budget, 1, _BUDGET)
            if self.keep != "conv":
                raise OptionError("recompute: budget chooses what is kept; leave keep out")
        for mode in _MODES:
            if mode in self.keep and mode != self.keep:
                raise OptionError(
                    f"recompute: keep={mode!r} is a choice of its own and no pattern; for a module "
                    f"of that name, write '{mode}.*' or '{mode}.weight'"
                )

    @property
    def guarantee(self) -> Guarantee:
        """The same operators run on the same tensors."""
        return Guarantee.EXACT

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {"min_bytes": self.min_bytes}

    def propose(self, target: Target) -> Proposal:
        """Choose what is stored and let the model record its forward passes.

        Raises:
            PatternError: a pattern of ``keep`` matches nothing.
            RewriteError: no choice that was found is within the budget, or the model's step cannot
                be estimated, which a budget needs.
        """
        reason = _unfit(target)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        traced = target.traced(train=True)
        uses = find_uses(traced)
        frees = freed(traced, uses)
        step = self._recorded(target, uses, frees)
        before = _stored_as_it_is(target)
        notes: list[str] = []
        rebuilt = chosen(uses, self.keep)
        if self.budget is not None and step is not None:
            search = _BudgetSearch(self, target, step, uses, frees)
            if search.before <= search.goal:
                reason = f"the estimated peak, {bytes_text(search.before)}, is within the budget"
                return Proposal(refused=(Refusal("", reason),))
            rebuilt, notes = search.run()
        notes += _notes(before, step, uses, peaks=self.budget is not None)
        mine = None if step is None else step.cost(_names(rebuilt))
        if before is not None and (not before or (mine is not None and mine.stored >= before)):
            why = f"nothing to gain: {bytes_text(before)} are stored for the backward pass"
            why += "" if mine is None else f", {bytes_text(mine.stored)} would be"
            return Proposal(refused=(Refusal("", why),), notes=tuple(notes))
        return Proposal(
            edits=(self._edit(_names(rebuilt), frees, uses),),
            changes=(_summary(before, mine), *_rows(rebuilt)),
            notes=tuple(notes),
        )

    def _recorded(
        self, target: Target, uses: list[WeightUse], frees: Mapping[str, tuple[int, ...]]
    ) -> StepReplay | None:
        given = target.model, target.inputs, movable(uses), frees, self.min_bytes
        try:
            return record_step(*given, None if self.budget is None else self.optimizer)
        except PocketizeError as error:
            if self.budget is None:
                return None
            raise RewriteError(f"recompute: a budget needs an estimate: {error}") from error

    def unchecked(self, traced: TracedGraph) -> Convert:
        """Return the edit for the model that was traced, in training, as no plan has checked it."""
        uses = find_uses(traced)
        return self._edit(_names(chosen(uses, self.keep)), freed(traced, uses), uses)

    def _edit(
        self,
        rebuilt: frozenset[str],
        frees: Mapping[str, tuple[int, ...]],
        uses: Iterable[WeightUse] = (),
    ) -> Convert:
        listed = {name: list(parts) for name, parts in sorted(frees.items())}
        options = {"rebuilt": sorted(rebuilt), "frees": listed, **self.conversion_options()}
        if rebuilt:  # torch.compile is told by their order which they are
            options["uses"] = [use.name for use in uses]
        return Convert("", self.name, options)


def _unfit(target: Target) -> str:
    if recomputing_forward(target.model) is not None:
        return "it recomputes already"
    return obstacle(target.model)


class _BudgetSearch:
    """Looks for the choice with the least work that is within a budget."""

    def __init__(
        self,
        given: Recompute,
        target: Target,
        step: StepReplay,
        uses: list[WeightUse],
        frees: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.given, self.target, self.step = given, target, step
        self.uses, self.frees = uses, frees
        self.before = self._estimated(frozenset())
        self.goal = read_target(given.budget or "", self.before, _BUDGET)

    def run(self) -> tuple[dict[WeightUse, str], list[str]]:
        """Return what is rebuilt and why, and sentences about it.

        Raises:
            RewriteError: nothing that was found is within the budget.
        """
        best = front(self.step, [_names(chosen(self.uses, mode)) for mode in _MODES])
        fitting = [rebuilt for rebuilt, cost in best.items() if cost.peak <= self.goal]
        for rebuilt in fitting[:_ESTIMATES]:
            peak = self._estimated(rebuilt)
            if peak <= self.goal:
                return self._result(rebuilt, best[rebuilt], peak)
        least = min(self._estimated(rebuilt) for rebuilt in list(best)[-1:])
        raise RewriteError(
            f"recompute: no choice of kept results brings the peak of a training step from "
            f"{bytes_text(self.before)} to {self.given.budget} ({bytes_text(self.goal)}); the "
            f"smallest found is {bytes_text(least)}. Ask for that, or apply amp after it"
        )

    def _result(
        self, rebuilt: frozenset[str], cost: Cost, peak: int
    ) -> tuple[dict[WeightUse, str], list[str]]:
        kept = Recompute(keep=tuple(sorted(movable(self.uses) - rebuilt)))
        share = 100 * cost.flops / max(1, 3 * self.step.forward_flops)
        notes = [
            f"estimated peak of a training step {bytes_text(self.before)} -> {bytes_text(peak)} "
            f"(optimizer {self.given.optimizer or 'none'}), for {share:.1f} % more operations",
            f"the same choice without a search: {kept}",
        ]
        why = "the budget needs its memory"
        return {use: why for use in self.uses if use.name in rebuilt}, notes

    def _estimated(self, rebuilt: frozenset[str]) -> int:
        copied = clone_modules(self.target.model)
        if rebuilt:
            apply_edits(copied, [self.given._edit(rebuilt, self.frees)])
        given = self.given.optimizer
        return measure(copied, self.target.inputs, "train", given, estimate=True).peak


def _names(uses: Iterable[WeightUse]) -> frozenset[str]:
    return frozenset(use.name for use in uses)


def _summary(before: int | None, after: Cost | None) -> Change:
    if before is None or after is None:
        return Change("", "records its forward passes", "its size could not be worked out")
    stored = f"{bytes_text(before)} -> {bytes_text(after.stored)}"
    return Change("", f"stored for the backward pass: {stored}", "the rest is rebuilt")


def _rows(rebuilt: Mapping[WeightUse, str]) -> Iterable[Change]:
    for use, why in rebuilt.items():
        yield Change(use.path, f"result rebuilt, {bytes_text(use.nbytes)}", why)


def _notes(
    before: int | None, step: StepReplay | None, uses: list[WeightUse], *, peaks: bool
) -> Iterable[str]:
    if before is None or step is None:
        yield "its step does not run on fake tensors, so what is saved could not be worked out"
        return
    yield f"as it is: {bytes_text(before)} stored for the backward pass"
    for mode in _MODES:
        cost = step.cost(_names(chosen(uses, mode)))
        share = 100 * cost.flops / max(1, 3 * step.forward_flops)
        peak = f"a peak of {bytes_text(cost.peak)}, " if peaks else ""
        yield (
            f"keep={mode!r}: {bytes_text(cost.stored)} stored, {peak}"
            f"{cost.flops / 1e9:.3g} GFLOP of convolutions and products again "
            f"({share:.0f} % of a training step)"
        )


def _stored_as_it_is(target: Target) -> int | None:
    """Bytes that autograd keeps of the model as it is, without weights and inputs.

    ``None`` if it does not run on fake tensors.
    """
    saved, mode = SavedTensors(), FakeTensorMode(allow_non_fake_inputs=True)
    copy = fake_clone(target.model, mode)
    set_mode(copy, True)
    with torch.inference_mode(False), mode, quiet_tracing(copy), torch.enable_grad():
        inputs = target.inputs.map(lambda t: mode.from_tensor(t.detach().clone()))
        try:
            with saved.hooks():
                inputs.call(copy)
        except Exception:  # a user's forward may raise anything
            return None
    return saved.bytes([*copy.parameters(), *copy.buffers(), *inputs.tensors()])
