"""Checkpointing as a pass: the submodules that free most for the least work are run twice.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. The
machinery is ``torch.utils.checkpoint``'s, which replays random states and autocast;
:mod:`~pocketize.passes.shared.second_run` makes the module for it as the first run found it.
"""

from __future__ import annotations

__all__ = ["Checkpoint", "CheckpointedForward"]

import bisect
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pocketize._torch import global_forward_hooks
from pocketize.engine.dry_run import DryRun
from pocketize.engine.pipeline import history
from pocketize.engine.surgery import apply_edits
from pocketize.errors import MeasureError, PocketizeWarning, RewriteError
from pocketize.graph.clone import clone_modules
from pocketize.memory import measure
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import (
    Forward,
    hooked,
    is_foreign,
    obstacle,
    unwrapping,
    without_backward,
    wrapping,
)
from pocketize.passes.shared.patterns import matched
from pocketize.passes.shared.regions import Region, Survey, survey
from pocketize.passes.shared.second_run import Run
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion, reversal
from pocketize.plugin.edits import Convert
from pocketize.plugin.options import read_target
from pocketize.units import bytes_text, large_text

#: Of the choices predicted to need least, how many are estimated where the target is not met.
_LAST = 6
#: How many sizes of regions the search begins with, at most about this many.
_SIZES = 40
_TARGET = "checkpoint: option 'target'"
#: Peaks this close to the smallest one found are as good, if they cost less work.
_NEAR = 1.01


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Pass):
    """Keep only the inputs of some submodules and run their forward again in the backward pass.

    Which submodules is a search: those that free most activation bytes per floating-point operation
    are taken until the estimated peak of a training step meets the target. Outputs, gradients and
    running statistics stay what they were. The estimate is of the model as it is: what passes that
    come later save is not in it.

    Attributes:
        target: the peak to reach at the least cost, as a size ("4GiB") or a share of the present
            peak ("75%"); none is the smallest peak that is found.
        only: patterns (fnmatch) of the modules to checkpoint; the target then plays no part.
        keep: patterns of modules that are not to be run twice.
        optimizer: whose state counts in the estimate; none for a step without an update.
    """

    name: ClassVar[str] = "checkpoint"
    summary: ClassVar[str] = "Run chosen blocks again in backward instead of keeping activations"
    after: ClassVar[tuple[str, ...]] = REBUILDING
    conflicts: ClassVar[tuple[str, ...]] = ("recompute",)

    target: str | None = None
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam"

    def validate(self) -> None:
        """Refuse targets that are no size and no share."""
        if self.target is not None:
            read_target(self.target, 1, _TARGET)

    @property
    def guarantee(self) -> Guarantee:
        """The same operators on the same numbers, some of them twice."""
        return Guarantee.EXACT

    def propose(self, target: Target) -> Proposal:
        """Choose the submodules.

        Raises:
            PatternError: a pattern matches no module.
            RewriteError: no choice reaches the target.
        """
        reason = _refusal(target.model)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        kept = _matching(target.model, self.keep, "keep")
        wanted = _matching(target.model, self.only, "only")
        try:
            surveyed = survey(target.model, target.inputs)
        except RewriteError as error:
            return Proposal(refused=(Refusal("", str(error)),))
        possible, refused = _candidates(target.model, surveyed, kept, wanted)
        dry_run = DryRun(target.model, target.inputs, target.variants)
        while True:
            notes: list[str] = []
            if wanted:
                chosen = _outermost(possible)
            else:
                try:
                    chosen, notes = _Search(self, target, surveyed, possible).run()
                except MeasureError as error:
                    refusal = Refusal("", f"its training step cannot be estimated: {error}")
                    return Proposal(refused=(refusal,))
            broken = dry_run.errors(_edits(chosen))
            if not broken:
                break
            refused += [
                Refusal(path, f"run again it does not do what it did: {why}")
                for path, why in broken.items()
            ]
            possible = [region for region in possible if region.path not in broken]
        changes = tuple(
            Change(region.path, "runs again in backward", _why(region)) for region in chosen
        )
        return Proposal(tuple(_edits(chosen)), changes, tuple(refused), tuple(notes))


def _refusal(model: nn.Module) -> str:
    if not any(model.children()):
        return "it has no submodules, and to run it whole once more would free nothing"
    already = [path for path, m in model.named_modules() if wrapping(m, CheckpointedForward)]
    if already:
        shown = ", ".join(already[:3]) + (", ..." if len(already) > 3 else "")
        return f"{len(already)} modules of it are already checkpointed ({shown})"
    if any(record.name in Checkpoint.conflicts for record in history(model)):
        return "it was rewritten by recompute, which already keeps less than checkpoints would"
    return ""


def _why(region: Region) -> str:
    return f"frees {bytes_text(region.frees)} for {large_text(region.work)} operations more"


def _edits(regions: Iterable[Region]) -> list[Convert]:
    return [Convert(region.path, "checkpoint", {}) for region in regions]


def _matching(model: nn.Module, patterns: Sequence[str], option: str) -> set[str]:
    """Return the paths of the submodules that patterns match, one path for each."""
    found = {id(model.get_submodule(p)) for p in matched(model, patterns, f"checkpoint: {option}")}
    return {path for path, module in model.named_modules() if id(module) in found}


def _candidates(
    model: nn.Module, surveyed: Survey, kept: set[str], wanted: set[str]
) -> tuple[list[Region], list[Refusal]]:
    """Return the regions that may be chosen, and refusals of those that a user would expect."""
    possible: list[Region] = []
    refused: dict[str, str] = {}
    for path in sorted(wanted - surveyed.regions.keys()):
        refused[path] = obstacle(model.get_submodule(path)) or "its forward does not run"
    for path, region in surveyed.regions.items():
        if wanted and path not in wanted:
            continue
        if not wanted and not (region.composite and region.frees):
            continue  # a layer alone keeps little but its input, which a checkpoint keeps too
        held = [k for k in kept if k == path or k.startswith(f"{path}.")]
        reason = region.obstacle
        if held:
            reason = f"keep names {'it' if path in held else held[0]}"
        elif wanted and not region.frees and not reason:
            reason = "nothing would be freed: autograd keeps nothing of it but its inputs"
        if reason:
            refused[path] = reason
        else:
            possible.append(region)
    rows = []
    for path, reason in refused.items():
        above = {path[: m.start()] for m in re.finditer(r"\.", path)}
        if not any(refused.get(outer) == reason for outer in above):
            rows.append(Refusal(path, reason))
    return possible, rows


def _outermost(regions: Sequence[Region]) -> list[Region]:
    return [r for r in regions if not any(other.contains(r) for other in regions)]


class _Search:
    """Looks for the cheapest choice of regions that meets the target.

    Every choice is predicted from the survey. Of those that no other one beats in both work and
    memory, a few are estimated by a whole training step on fake tensors, by bisection.
    """

    def __init__(
        self, given: Checkpoint, target: Target, surveyed: Survey, possible: list[Region]
    ) -> None:
        self.given, self.surveyed, self.inputs = given, surveyed, target.inputs
        self.model = target.model
        self.front = _front(possible, surveyed)
        self.tried: dict[int, int] = {}

    def run(self) -> tuple[list[Region], list[str]]:
        """Return the choice, and sentences about it.

        Raises:
            RewriteError: no choice meets the target.
        """
        before, target = self._estimated(()), self.given.target
        goal = 0 if target is None else read_target(target, before, _TARGET)
        if before <= goal:
            return [], [f"the estimated peak, {bytes_text(before)}, is within {target} already"]
        found = self._bisected(goal)
        smallest = min(self.tried.values(), default=before)
        if target is not None and smallest > goal:
            raise RewriteError(
                f"checkpoint: no choice of modules brings the training peak from "
                f"{bytes_text(before)} to {target} ({bytes_text(goal)}); the smallest found is "
                f"{bytes_text(min(smallest, before))}. Ask for that, or try all "
                "passes with pocketize.fit"
            )
        if smallest >= before:
            return [], ["running submodules again would not lower the estimated training peak"]
        if found is None:  # as small as can be: of choices that are as good, the cheapest
            found = min(i for i, peak in self.tried.items() if peak <= _NEAR * smallest)
        chosen = list(self.front[found])
        more = 100 * _work(chosen) / max(self.surveyed.work, 1)
        return chosen, [
            f"estimated training peak {bytes_text(before)} -> {bytes_text(self.tried[found])} "
            f"(optimizer {self.given.optimizer or 'none'}), for {more:.0f} % of a forward more"
        ]

    def _bisected(self, goal: int) -> int | None:
        """Return the index of the cheapest choice that meets a goal; ``None`` if none does."""
        last = len(self.front) - 1
        fits = next(
            (i for i in range(last, max(-1, last - _LAST), -1) if self._peak(i) <= goal), None
        )
        if fits is None:
            return None
        return bisect.bisect_left(range(fits), True, key=lambda i: self._peak(i) <= goal)

    def _peak(self, index: int) -> int:
        if index not in self.tried:
            self.tried[index] = self._estimated(self.front[index])
        return self.tried[index]

    def _estimated(self, chosen: Sequence[Region]) -> int:
        copied = clone_modules(self.model)
        apply_edits(copied, _edits(chosen))
        given = self.given.optimizer
        return measure(copied, self.inputs, "train", given, estimate=True).peak


def _front(possible: Sequence[Region], surveyed: Survey) -> list[tuple[Region, ...]]:
    """Return the choices that are predicted to need less than all cheaper ones, cheapest first."""
    choices = {frozenset(choice) for choice in _choices(possible, surveyed)}
    weighed = [(_work(choice), surveyed.predicted(choice), choice) for choice in choices]
    front, least = [], surveyed.predicted(())
    for _, predicted, choice in sorted(weighed, key=lambda item: item[:2]):
        if predicted < least:
            front.append(tuple(sorted(choice, key=lambda region: region.begin)))
            least = predicted
    return front


def _choices(possible: Sequence[Region], surveyed: Survey) -> Iterator[Sequence[Region]]:
    """Yield choices of regions that are worth a look, none with one region inside another.

    What a region frees comes back, for a while, when it is run again, so small regions may do
    better than large ones: for some sizes, the largest regions up to that size are where it begins.
    From there the regions are left out one by one, each time the one that spares most work for
    what it adds to the peak; and, as the peak is a maximum over time that no single region may
    lower, the same the other way: those that free most for their work are taken one by one.
    """
    sizes = sorted({region.frees for region in possible})
    sets = {frozenset(_outermost([r for r in possible if r.frees <= cap])) for cap in sizes}
    for start in sorted(sets, key=_work)[:: max(1, len(sets) // _SIZES)]:
        ranked = sorted(
            start, key=lambda region: (-region.frees / max(region.work, 1), region.path)
        )
        for count in range(1, len(ranked) + 1):
            yield ranked[:count]
        left = list(ranked)
        while len(left) > 1:
            now = surveyed.predicted(left)
            without = [(r, surveyed.predicted([o for o in left if o is not r]) - now) for r in left]
            least, _ = max(without, key=lambda pair: pair[0].work / (max(pair[1], 0) + 1))
            left.remove(least)
            yield list(left)


def _work(regions: Iterable[Region]) -> int:
    return sum(region.work for region in regions)


@conversion("checkpoint")
def _convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    reason = obstacle(module)
    if reason or wrapping(module, CheckpointedForward):
        raise RewriteError(f"checkpoint: {reason or 'the module is already checkpointed'}")
    CheckpointedForward(module).install()
    return module


class CheckpointedForward(Forward):
    """A module's forward of which only the inputs are kept for the backward pass.

    Without gradients, and inside function transforms, it is the forward itself; also while modules
    inside have forward hooks, which must not run twice. Under ``torch.compile`` a module without
    buffers is part of the compiled graph, and the compiler recomputes its operators; a module with
    buffers runs outside of it, because the compiler would update them twice.
    """

    #: Whether the warning about hooks was given.
    _warned = False

    lowers: ClassVar[str] = "checkpoint"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward, and remember how to run it again."""
        if without_backward():
            return self.original(*args, **kwargs)
        if torch.compiler.is_compiling() and not list(self.module.buffers()):
            return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
        return self._checkpointed(*args, **kwargs)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def _checkpointed(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_hooked():
            return self.original(*args, **kwargs)
        # A second run gives the module the attributes that it had: other threads wait meanwhile.
        with self._lock:
            run = Run(self.module, self.original, self._lock, args, kwargs)
            return checkpoint(run, *run.saved, use_reentrant=False, context_fn=run.contexts)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _is_hooked(self) -> bool:
        """Tell, and warn once, if forward hooks would run twice."""
        inner = {path: m for path, m in self.module.named_modules() if m is not self.module}
        path = hooked(inner)
        if not path and not (inner and any(map(is_foreign, global_forward_hooks()))):
            return False
        if not self._warned:
            self._warned = True
            kind = type(self.module).__name__
            warnings.warn(
                f"checkpoint: {path or 'every module'} of a checkpointed {kind} has forward hooks, "
                f"which would run again in the backward pass, so the {kind} keeps its activations "
                "until they are removed",
                PocketizeWarning,
                stacklevel=2,
            )
        return True


reversal("checkpoint", unwrapping(CheckpointedForward))
