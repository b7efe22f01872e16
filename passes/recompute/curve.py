"""Which results to keep: the choices that no other one beats in both memory and work.

:func:`curve` is what a planner asks. Each point of the curve is a choice for
``Recompute(keep=...)`` with the peak of a training step and the operations that run again.
"""

from __future__ import annotations

__all__ = ["Choice", "curve", "front", "movable"]

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from pocketize.graph.capture import capture
from pocketize.graph.inputs import as_inputs
from pocketize.passes.recompute.recorded_step import record_step
from pocketize.passes.recompute.replay import Cost, StepReplay
from pocketize.passes.recompute.weight_uses import WeightUse, chosen, find_uses, freed

#: How much all replays of one search may work; ten seconds.
_WORK = 8_000_000
#: Ranges of the peak in which the search goes on from one choice each.
_RANGES = 24
#: Results rebuilt one from the other at most. A rebuilt norm differs from the first one in its last
#: bits, and norms over few values enlarge that from one to the next.
_DEPTH = 8


@dataclass(frozen=True)
class Choice:
    """A choice of the results to keep, and what a training step then takes.

    Attributes:
        keep: for ``Recompute(keep=...)``: the uses of weights whose results are kept. All other
            results of convolutions and linear layers are rebuilt.
        peak: bytes, of the whole step, as ``measure(..., estimate=True)`` counts them.
        flops: floating-point operations of convolutions and products that run again.
        step: operations of the step relative to those of the untouched model's, which are three
            times those of a forward pass: 1.2 for a fifth more.
    """

    keep: tuple[str, ...]
    peak: int
    flops: int
    step: float


def curve(
    model: nn.Module,
    inputs: Any = None,
    *,
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    min_bytes: int = 65536,
) -> list[Choice]:
    """Return the Pareto front of what a training step may keep, found on one recorded step.

    The peak is predicted by a replay of the recorded step, which knows every tensor. It is that of
    the estimate, ``measure(model, inputs, optimizer=optimizer, estimate=True)``, of the rewritten
    model, but for a few bytes; :class:`~pocketize.passes.Recompute` confirms it. Nothing runs on
    real tensors. It takes a few seconds for a U-Net of any input size.

    Args:
        model: any module that is trained; untouched.
        inputs: anything that :func:`pocketize.graph.inputs.as_inputs` takes.
        optimizer: whose state counts; ``None`` for a step without an update.
        min_bytes: as for :class:`~pocketize.passes.Recompute`.

    Returns:
        The choices, from the one with the largest peak and the least work, which keeps the results
        of all convolutions, to the one with the smallest peak that was found.

    Raises:
        InputError: the inputs cannot be read.
        CaptureError: the model cannot be traced.
        MeasureError: it does not get through a training step on fake tensors.
    """
    given = as_inputs(inputs, model)
    traced = capture(model, given, train=True)
    uses = find_uses(traced)
    names = movable(uses)
    step = record_step(model, given, names, freed(traced, uses), min_bytes, optimizer)
    seeds = [[use.name for use in chosen(uses, keep)] for keep in ("block", "level")]
    total = 3 * step.forward_flops
    return [
        Choice(tuple(sorted(names - rebuilt)), cost.peak, cost.flops, 1 + cost.flops / total)
        for rebuilt, cost in front(step, seeds).items()
    ]


def movable(uses: Iterable[WeightUse]) -> frozenset[str]:
    """Return the names of the uses whose results can be rebuilt."""
    return frozenset(use.name for use in uses if use.movable)


def front(step: StepReplay, seeds: Iterable[Collection[str]] = ()) -> dict[frozenset[str], Cost]:
    """Search for the sets of rebuilt results that none other beats in both peak and work.

    A Pareto local search: each choice on the front is changed in every single result, and those of
    its neighbours that nothing beats join the front, until none changes it or enough was replayed.
    It begins with the results that take least work for their memory, one more at a time. No more
    than eight results are rebuilt one from the other, so that rounding does not add up.

    Args:
        step: the recorded step.
        seeds: further choices to begin with.
    """
    uses = sorted(step.uses, key=lambda use: (step.uses[use], use))
    costs: dict[frozenset[str], Cost] = {}

    def look(rebuilt: frozenset[str]) -> None:
        if rebuilt not in costs and step.depth(rebuilt) <= _DEPTH:
            costs[rebuilt] = step.cost(rebuilt)

    before = step.work
    for seed in (*seeds, *(uses[:count] for count in range(len(uses) + 1))):
        look(frozenset(step.uses.keys() & set(seed)))
    changed: set[frozenset[str]] = set()
    while step.work - before < _WORK:
        best = _pareto(costs)
        waiting = [rebuilt for rebuilt in _spread(best) if rebuilt not in changed]
        waiting = waiting or [rebuilt for rebuilt in best if rebuilt not in changed][::8]
        if not waiting:
            break
        for rebuilt in waiting:
            changed.add(rebuilt)
            for use in uses:
                look(rebuilt ^ {use})
    return _pareto(costs)


def _spread(best: dict[frozenset[str], Cost]) -> list[frozenset[str]]:
    """Return one choice of a front for each of some ranges of the peak: that of the least peak.

    Results at coarse resolutions make many choices that hardly differ.
    """
    peaks = [cost.peak for cost in best.values()]
    high, low = max(peaks), min(peaks)
    ranges = {(cost.peak - low) * _RANGES // (high - low + 1): r for r, cost in best.items()}
    return list(ranges.values())


def _pareto(costs: dict[frozenset[str], Cost]) -> dict[frozenset[str], Cost]:
    """Return the choices with a smaller peak than all that take less work, cheapest first."""
    best: dict[frozenset[str], Cost] = {}
    least = float("inf")
    order = sorted(
        costs.items(), key=lambda item: (item[1].flops, item[1].peak, len(item[0]), sorted(item[0]))
    )
    for rebuilt, cost in order:
        if cost.peak < least:
            best[rebuilt], least = cost, cost.peak
    return best
