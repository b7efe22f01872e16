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

#: Replays of one search: as many values as all of them may look at, and no more of them than this.
_LOOKS, _REPLAYS = 2_000_000, 6_000
#: So many choices of a front are changed at a time, evenly over its peaks.
_ABREAST = 24


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
    optimizer: Literal["adam", "sgd"] | None = "adam",
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

    Args:
        step: the recorded step.
        seeds: choices to begin with, besides those that keep everything and nothing.
    """
    uses = sorted(step.uses)
    limit = min(_REPLAYS, max(4 * len(uses), _LOOKS // step.size))
    costs: dict[frozenset[str], Cost] = {}
    for seed in ((), uses, *seeds):
        rebuilt = frozenset(step.uses.keys() & set(seed))
        costs[rebuilt] = step.cost(rebuilt)
    changed: set[frozenset[str]] = set()
    while len(costs) < limit:
        best = list(_pareto(costs))
        waiting = [rebuilt for rebuilt in best if rebuilt not in changed]
        if not waiting:
            break
        every = max(1, len(waiting) // _ABREAST)
        for rebuilt in waiting[::every]:
            changed.add(rebuilt)
            for use in uses:
                neighbour = rebuilt ^ {use}
                if neighbour not in costs:
                    costs[neighbour] = step.cost(neighbour)
    return _pareto(costs)


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
