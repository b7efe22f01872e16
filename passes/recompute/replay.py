"""What a training step takes, for any choice of the results that are kept: a replay in sizes.

One step was recorded (:mod:`.recorded_step`) with every result rebuilt that can be. For another
choice, values are built and released by the code of :mod:`.values`, on objects that only count
their bytes, and everything else is alive when it was in the recording. It takes milliseconds.
"""

from __future__ import annotations

__all__ = ["Cost", "Moment", "StepRecord", "StepReplay", "ValueRecord"]

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pocketize.ops.effects import Effect
from pocketize.passes.recompute.values import GraphStep, GraphValue, Handle, Replay

#: What running one step again costs beside looking at one moment.
_RUN = 8


class Cost(NamedTuple):
    """What one training step takes.

    Attributes:
        peak: most bytes alive at once, as :func:`pocketize.measure` counts them.
        flops: floating-point operations of convolutions and products that run again.
        stored: bytes kept from the forward for the backward pass, without parameters, buffers and
            the model's inputs.
    """

    peak: int
    flops: int
    stored: int


@dataclass
class ValueRecord:
    """A value of the graph."""

    segment: int
    index: int | None
    nbytes: int
    key: int = 0  # of the storage, of what is kept in any case and neither weight nor input
    made: bool = False  # by a step


@dataclass
class StepRecord:
    """A step of the graph; values are numbers."""

    order: int
    operator: Replay
    use: str | None
    flops: int
    costly: bool
    parents: list[int]
    first: int | None
    overwrites: bool
    results: list[int] = field(default_factory=list)


class Moment(NamedTuple):
    """Something that concerns the graph, and what else is alive: at that time, and until the next.

    The event is "unpack" or "close" of a handle, "release" of the memory of a value in which it was
    made, or "backward".
    """

    event: str
    number: int
    level: int
    highest: int


class StepReplay:
    """A recorded training step.

    Args:
        values: those that autograd asked for, and all that they are made of.
        steps: the operators that made them, in the order of the forward pass.
        handles: the value that autograd asked for, and its segment, each time that it asked.
        moments: in order.
        forward_flops: see below.

    Attributes:
        forward_flops: floating-point operations of convolutions and products in the forward pass.
        work: grows with the time that all replays took, about a millisecond for 500.
    """

    def __init__(
        self,
        values: list[ValueRecord],
        steps: list[StepRecord],
        handles: list[tuple[int, int]],
        moments: list[Moment],
        forward_flops: int,
    ) -> None:
        self._values, self._steps, self._handles = values, steps, handles
        self._moments, self.forward_flops = moments, forward_flops
        self.work = 0

    @property
    def uses(self) -> dict[str, float]:
        """The uses whose results the backward pass may need, with operations for each byte."""
        return {
            step.use: step.flops / max(1, sum(self._values[n].nbytes for n in step.results))
            for step in self._steps
            if step.use is not None
        }

    def depth(self, rebuilt: Collection[str]) -> int:
        """How many uses are rebuilt one from the other at most; each adds to the rounding."""
        depths = [0] * len(self._values)
        for step in self._steps:
            below = max((depths[parent] for parent in step.parents), default=0)
            own = 0 if step.use is None else 1
            for number in step.results:
                depths[number] = 0 if own and step.use not in rebuilt else below + own
        return max(depths, default=0)

    def cost(self, rebuilt: Collection[str]) -> Cost:
        """Replay the step with the results of some uses rebuilt, those of all others kept."""
        count = _Count()
        handles, kept = self._prepare(rebuilt, count)
        read: dict[int, Any] = {}
        stored = 0
        for moment in self._moments:
            count.base = moment.level
            number = moment.number
            if moment.event == "unpack":
                read[number] = handles[number].unpack()
            elif moment.event == "close":
                read.pop(number, None)
                handles.pop(number, None)
            elif moment.event == "release":
                _grow(kept.get(number), self._values[number].nbytes)
            else:
                alive = [self._values[n] for n, watch in kept.items() if watch() is not None]
                stored = sum({v.key: v.nbytes for v in alive if v.key}.values())
            count.rise(moment.highest)
        self.work += len(self._moments) + len(self._values) + _RUN * count.runs
        return Cost(count.peak, count.flops, stored)

    def _prepare(
        self, rebuilt: Collection[str], count: _Count
    ) -> tuple[dict[int, Handle], dict[int, weakref.ref[_Memory]]]:
        """Make the handles of the step, and watch the memory of what is kept.

        A view of what is kept, and what it is overwritten with, is kept in the same memory.
        """
        values: list[_SizedValue] = []
        for value in self._values:
            values.append(_SizedValue(value.segment, None, value.index))
            if not value.made:
                values[-1].tensor = _Memory(count)
        watched = enumerate(values)
        kept = {n: weakref.ref(v.tensor) for n, v in watched if v.tensor is not None}
        chosen = set()
        for step in self._steps:
            if step.use is not None and step.use not in rebuilt:
                for number in step.results:
                    memory = values[number].tensor = _Memory(count)
                    kept[number] = weakref.ref(memory)
                    chosen.add(number)
            elif step.operator.effect in (Effect.VIEW, Effect.WRITER) and step.parents[0] in chosen:
                for number in step.results:
                    values[number].tensor = values[step.parents[0]].tensor
                    chosen.add(number)
            else:
                sizes = {self._values[n].index: self._values[n].nbytes for n in step.results}
                first = None if step.first is None else values[step.first]
                parents = tuple(values[n] for n in step.parents)
                made = _SizedStep(step, parents, first, sizes, count)
                for number in step.results:
                    values[number].step = made
        return {n: Handle(values[v], s) for n, (v, s) in enumerate(self._handles)}, kept


class _Count:
    """Bytes alive, and work."""

    def __init__(self) -> None:
        self.base = self.live = self.peak = self.flops = self.runs = 0

    def rise(self, base: int) -> None:
        self.peak = max(self.peak, base + self.live)


class _Memory:
    """Stands for a tensor and its storage."""

    __slots__ = ("__weakref__", "count", "nbytes")

    def __init__(self, count: _Count, nbytes: int = 0) -> None:
        self.count, self.nbytes = count, 0
        self.grow(nbytes)

    def grow(self, nbytes: int) -> None:
        self.count.live += nbytes - self.nbytes
        self.nbytes = nbytes
        self.count.rise(self.count.base)

    def __del__(self) -> None:
        self.count.live -= self.nbytes


def _grow(watch: weakref.ref[_Memory] | None, nbytes: int) -> None:
    memory = None if watch is None else watch()
    if memory is not None:
        memory.grow(nbytes)


class _SizedValue(GraphValue):
    tensor: Any

    def ready(self) -> Any:
        return self.tensor if self.cached is None else self.cached


class _SizedStep(GraphStep):
    __slots__ = ("count", "first", "overwrites", "sizes")

    def __init__(
        self,
        like: StepRecord,
        parents: tuple[GraphValue, ...],
        first: GraphValue | None,
        sizes: dict[int | None, int],
        count: _Count,
    ) -> None:
        self.operator, self.order = like.operator, like.order
        self.flops, self.costly, self.parents = like.flops, like.costly, parents
        self.count, self.first, self.sizes = count, first, sizes
        self.overwrites = like.overwrites

    def run(self, contents: Mapping[GraphValue, Any], spare: Collection[GraphValue]) -> Any:
        self.count.flops += self.flops
        self.count.runs += 1
        first = self.first
        same = self.operator.effect is Effect.VIEW or (self.overwrites and first in spare)
        if same:
            memory = contents[self.parents[0]]
            made = dict.fromkeys(self.sizes, memory)
        else:
            made = {index: _Memory(self.count, nbytes) for index, nbytes in self.sizes.items()}
        return made.get(None, made)  # of several results, each by its index
