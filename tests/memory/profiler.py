"""The peak as torch.profiler sees it: an independent count of the same step, untracked."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from pocketize.memory.modules import held_tensors
from pocketize.memory.stage import real_stage
from pocketize.memory.step import MeasuredStep, fixed_surroundings
from pocketize.memory.tracker import is_composite, storages_of


class ProfiledPeak(NamedTuple):
    """Most bytes alive at once.

    Attributes:
        all: everything that the CPU allocator handed out.
        tensors: without what one operator took and gave back before it returned (oneDNN copies its
            arguments into blocked layouts): its workspace, which no tensor tracker sees.
    """

    all: int
    tensors: int


class _Change(NamedTuple):
    when: int
    pointer: int
    nbytes: int
    operator: tuple[int, int] | None


def profiled_peak(
    model: nn.Module, inputs: Any, mode: str = "train", optimizer: str | None = "adam"
) -> ProfiledPeak:
    with fixed_surroundings():
        stage = real_stage(model, inputs, None)
        step = MeasuredStep(stage.model, stage.inputs, train=mode == "train", optimizer=optimizer)
        step.run()
        step.clear()
        before = _held(step)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step.run()
        # The profiler does not tell of the release of what it has not seen allocated, such as the
        # weight that a weight norm's hook replaces.
        held = sum(nbytes for storage, nbytes in before if not storage.expired())
    # Stable: where the clock ticks too slowly, the order of the tree is that of time.
    changes = sorted(_changes(profiled), key=lambda change: change.when)
    return ProfiledPeak(
        held + _highest(changes), held + _highest(list(_without_workspaces(changes)))
    )


def _held(step: MeasuredStep) -> list[tuple[StorageWeakRef, int]]:
    """The storages of the model, its inputs and the optimizer's state, with their bytes."""
    tensors = [t for module in step.model.modules() for t in held_tensors(module)]
    tensors += step.inputs.tensors()
    if step.optimizer is not None:
        tensors += [t for state in step.optimizer.state.values() for t in state.values()]
    storages = {s._cdata: s for t in tensors for s in storages_of(t)}
    return [(StorageWeakRef(s), s.nbytes()) for s in storages.values()]


def _changes(profiled: Any) -> Iterator[_Change]:
    for root in profiled.profiler.kineto_results.experimental_event_tree():
        yield from _walk(root, None)


def _walk(event: Any, operator: tuple[int, int] | None) -> Iterator[_Change]:
    if operator is None and _is_kernel(event.name):
        operator = event.start_time_ns, event.end_time_ns
    if event.name == "[memory]":
        fields = event.extra_fields
        yield _Change(event.start_time_ns, fields.ptr, fields.alloc_size, operator)
    for child in event.children:
        yield from _walk(child, operator)


@functools.cache
def _is_kernel(name: str) -> bool:
    """An operator that is no composition of others: what a dispatch mode sees as one."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    if not name.startswith("aten::") or packet is None:
        return False
    overloads = [getattr(packet, each) for each in packet.overloads() if "out" not in each]
    return not all(is_composite(each, "cpu") for each in overloads)


def _without_workspaces(changes: list[_Change]) -> Iterator[_Change]:
    taken: dict[int, int] = {}
    dropped: set[int] = set()
    for index, change in enumerate(changes):
        if change.nbytes > 0:
            taken[change.pointer] = index
        elif change.pointer in taken:
            begin = taken.pop(change.pointer)
            if change.operator is not None and changes[begin].operator == change.operator:
                dropped |= {begin, index}
    yield from (change for index, change in enumerate(changes) if index not in dropped)


def _highest(changes: list[_Change]) -> int:
    live = highest = 0
    for change in changes:
        live += change.nbytes
        highest = max(highest, live)
    return highest
