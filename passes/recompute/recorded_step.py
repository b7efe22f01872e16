"""Record one training step on fake tensors, so that it can be replayed for any choice of results.

The step runs with every result rebuilt that can be. Recorded are its allocations and releases, and
when autograd asked for which value.
"""

from __future__ import annotations

__all__ = ["record_step"]

import contextlib
import math
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from pocketize.graph.inputs import Inputs
from pocketize.memory.flops import flops_of
from pocketize.memory.meter import track
from pocketize.memory.stage import explained, fake_stage
from pocketize.memory.step import MeasuredStep, fixed_surroundings
from pocketize.memory.tracker import LiveStorage, LiveTracker, storage_bytes
from pocketize.ops.effects import Effect
from pocketize.passes.recompute.forward import RecomputingForward
from pocketize.passes.recompute.recompute_graph import RecomputeGraph
from pocketize.passes.recompute.replay import Moment, StepRecord, StepReplay, ValueRecord
from pocketize.passes.recompute.values import (
    GraphStep,
    GraphValue,
    Handle,
    Replay,
    in_place_variant,
)

_AGAIN = "built again"


def record_step(
    model: nn.Module,
    inputs: Inputs,
    rebuilt: frozenset[str],
    frees: Mapping[str, tuple[int, ...]],
    min_bytes: int,
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
) -> StepReplay:
    """Record a training step of a model, with the mean square of its outputs as the loss.

    It is the second step where there is an optimizer, whose state the first one makes.

    Args:
        model: never changed, never run.
        inputs: example inputs.
        rebuilt: the uses of weights whose results can be rebuilt.
        frees: see :class:`~.recompute_graph.RecomputeGraph`.
        min_bytes: likewise.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` or ``None``.

    Raises:
        MeasureError: the model does not get through the step on fake tensors.
    """
    text = inputs.describe()
    with fixed_surroundings(), explained(model, text, train=True, estimate=True):
        stage = fake_stage(model, inputs, None)
        forward = _RecordedForward(stage.model, rebuilt, frees, min_bytes)
        forward.install()
        given: dict[str, Any] = {"optimizer": optimizer, "like_cuda": stage.like_cuda}
        with stage.active:
            step = MeasuredStep(stage.model, stage.inputs, train=True, **given)
            if optimizer is not None:
                step.run()
            fixed = [*stage.model.parameters(), *stage.model.buffers(), *stage.inputs.tensors()]
            recording = forward.recording = _Recording(storage_bytes(fixed))
            tracker = LiveTracker(stage.device, recording.label, fake=True, every=True)
            recording.tracker = tracker
            trace = track(stage, step, tracker)
    steps = sorted(recording.steps.values(), key=lambda step: step.order)
    moments = _moments(recording, trace.storages, len(trace.events))
    flops = recording.forward_flops
    return StepReplay(recording.values, steps, recording.handles, moments, flops)


class _Recording:
    """Numbers the values that autograd asks for, and notes when.

    Args:
        fixed: sizes of weights and inputs, by their storages.
    """

    tracker: LiveTracker

    def __init__(self, fixed: Collection[int]) -> None:
        self.fixed, self.building, self.forward_flops = fixed, False, 0
        self.values: list[ValueRecord] = []
        self.steps: dict[int, StepRecord] = {}
        self.handles: list[tuple[int, int]] = []
        self.moments: list[tuple[int, str, int]] = []
        self.memory: weakref.WeakKeyDictionary[GraphValue, LiveStorage] = (
            weakref.WeakKeyDictionary()
        )
        self.released: list[tuple[LiveStorage, int]] = []
        self._numbers: weakref.WeakKeyDictionary[GraphValue, int] = weakref.WeakKeyDictionary()

    def label(self) -> str:
        return _AGAIN if self.building else ""

    def note(self, event: str, number: int) -> None:
        self.moments.append((self.tracker.now, event, number))

    @contextlib.contextmanager
    def built(self) -> Iterator[None]:
        self.building = True
        try:
            yield
        finally:
            self.building = False

    def number(self, value: GraphValue) -> int:
        """Return the number of a value; it and all that it is made of get one."""
        queue = [value]
        while queue:
            value_ = queue[-1]
            if value_ in self._numbers:
                queue.pop()
                continue
            parents = () if value_.step is None else value_.step.parents
            missing = [parent for parent in parents if parent not in self._numbers]
            queue += missing
            if not missing:
                self._add(queue.pop())
        return self._numbers[value]

    def _add(self, value: GraphValue) -> None:
        number = self._numbers[value] = len(self.values)
        if value.step is None:
            assert value.tensor is not None
            key, nbytes = next(iter(storage_bytes([value.tensor]).items()))
            key = 0 if key in self.fixed else key
            self.values.append(ValueRecord(value.segment, value.index, nbytes, key))
            return
        assert value.home is not None
        _, shape, _, dtype = value.home[1]
        nbytes = math.prod(shape) * dtype.itemsize
        self.values.append(ValueRecord(value.segment, value.index, nbytes, -number - 1, True))
        if (memory := self.memory.get(value)) is not None:
            self.released.append((memory, number))
        step = self.steps.get(value.step.order)
        if step is None:
            step = self.steps[value.step.order] = self._step(value.step)
        step.results.append(number)

    def _step(self, step: GraphStep) -> StepRecord:
        first = step.args[0] if step.args else None
        effect = step.operator.effect
        writes = effect is Effect.WRITER or in_place_variant(step.func) is not None
        return StepRecord(
            order=step.order,
            operator=step.operator,
            use=step.use,
            flops=step.flops,
            costly=step.costly,
            parents=[self._numbers[parent] for parent in step.parents],
            first=self._numbers[first] if isinstance(first, GraphValue) else None,
            overwrites=writes,
        )


class _RecordedForward(RecomputingForward):
    recording: _Recording | None = None

    def graph(self) -> RecomputeGraph:
        if self.recording is None:
            return super().graph()
        graph = _RecordedGraph(self.module, self.rebuilt, self.frees, self.min_bytes)
        graph.recording = self.recording
        return graph


class _RecordedGraph(RecomputeGraph):  # type: ignore[no-untyped-call]
    recording: _Recording

    def handle(self, value: GraphValue, segment: int) -> Handle:
        return _RecordedHandle(value, segment, self.recording)

    def finish(self) -> None:
        super().finish()
        self.recording.note("backward", 0)

    def _run(self, func: Any, operator: Replay, args: Any, kwargs: Any) -> Any:
        made = super()._run(func, operator, args, kwargs)
        if operator.heavy:
            self.recording.forward_flops += flops_of(func, args, kwargs, made) or 0
        return made

    def _note(self, step: GraphStep, made: Any, segment: int) -> None:
        super()._note(step, made, segment)
        if step.use is not None:
            for result in made if isinstance(made, tuple | list) else (made,):
                value = self.storages.find(result) if isinstance(result, Tensor) else None
                memory = self.recording.tracker.storage_of(result)
                if value is not None and value.step is step and memory is not None:
                    self.recording.memory[value] = memory


class _RecordedHandle(Handle):
    def __init__(self, value: GraphValue, segment: int, recording: _Recording) -> None:
        super().__init__(value, segment)
        self.recording, self.number = recording, len(recording.handles)
        recording.handles.append((recording.number(value), segment))

    def unpack(self) -> Tensor:
        self.recording.note("unpack", self.number)
        with self.recording.built():
            return super().unpack()

    def move_to(self, segment: int) -> None:
        super().move_to(segment)
        self.recording.handles[self.number] = self.recording.handles[self.number][0], segment

    def __del__(self) -> None:
        self.recording.note("close", self.number)
        super().__del__()


def _moments(recording: _Recording, storages: list[LiveStorage], events: int) -> list[Moment]:
    """Put what was noted in order, with the bytes that do not depend on the choice."""
    changes = np.zeros(events + 1, dtype=np.int64)
    for storage in storages:
        if storage.module != _AGAIN:
            changes[storage.born] += storage.nbytes
            changes[int(min(storage.died, events))] -= storage.nbytes
    levels = np.cumsum(changes)[:events]
    noted = list(recording.moments)
    noted += [
        (int(memory.died) + 1, "release", number)  # once it has left this count
        for memory, number in recording.released
        if memory.died < events
    ]
    noted.sort(key=lambda moment: (moment[0], moment[1] != "release"))
    times = [time for time, *_ in noted]
    moments = [Moment("start", 0, 0, int(levels[: times[0]].max(initial=0)))] if noted else []
    for (time, event, number), end in zip(noted, [*times[1:], events], strict=True):
        level = int(levels[time - 1]) if time else 0
        moments.append(Moment(event, number, level, int(levels[time:end].max(initial=level))))
    return moments
