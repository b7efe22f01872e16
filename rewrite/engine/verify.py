"""Trace a rewritten model again and compare it with what the plan predicted.

A trace cannot tell ``C // 2`` from a literal, so the rules are optimistic. Here the optimism is
checked: edits are carried out on a fake copy, its trace must have the same operators, and every
intermediate shape must be the predicted one. This also catches ``x.view(b, 64, -1)``, which would
otherwise run and be silently wrong. Shapes do not tell which channel is which: so the numbers that
a forward makes itself (``arange(c)``) must be, for the channels that stay, those that they met.
"""

from __future__ import annotations

__all__ = [
    "Mismatch",
    "backward_failure",
    "check_edits",
    "predicted_shape",
    "run_backward",
    "split_channel",
]

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketize._torch import FakeTensor, FakeTensorMode, pytree
from pocketize.channels.groups import ChannelGroups
from pocketize.channels.labels import Value, axes_of
from pocketize.engine.surgery import apply_edits, edited_copy
from pocketize.errors import CaptureError
from pocketize.graph.capture import TracedGraph, find_tensors, quiet_tracing, trace_module
from pocketize.graph.clone import clone
from pocketize.graph.constants import Constants
from pocketize.graph.methods import set_mode
from pocketize.ops import Kind, bind, operator_name, operator_of
from pocketize.plugin.edits import Edit, Redraw


@dataclass(frozen=True, eq=False)
class Mismatch:
    """Where a rewritten model first differs from the prediction.

    Attributes:
        node: the node of the original trace.
        position: (trace, index of the node); later is further.
        units: units that were to shrink and that this operator touches.
        text: what was expected and what came.
        sizes: sizes before and after of the axes that were to shrink here.
        expected: the predicted shapes of the results, -1 for a size that nothing determines.
        arguments: the predicted values of arguments that count channels.
    """

    node: fx.Node
    position: tuple[int, int]
    units: tuple[int, ...]
    text: str
    sizes: frozenset[tuple[int, int]]
    expected: tuple[tuple[int, ...], ...]
    arguments: dict[str, int]


def predicted_shape(value: Value, stays: NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the shape of a value after indices have been dropped."""
    shape = list(value.shape)
    for label in value.labels:
        kept = stays[label]
        axes = axes_of(label)
        for axis in axes:
            others = tuple(a for a in range(value.ndim) if a != axis)
            shape[axis] = int(kept.any(axis=others).sum())
    return tuple(shape)


def check_edits(
    model: nn.Module, channels: ChannelGroups, edits: Sequence[Edit]
) -> Mismatch | None:
    """Carry out edits on a copy without memory and compare its traces with the prediction.

    Returns:
        The first mismatch, ``None`` if everything is as predicted.
    """
    stays = channels.survivors_of(edits)
    moved = Redraw() not in edits  # else no channel is what it was
    copy: nn.Module | None = None
    for index, traced in enumerate(channels.traces):
        if copy is None or traced.real:
            copy = _edited(model, traced, edits)
        mode = contextlib.nullcontext() if traced.real else _mode_of(traced)
        try:
            with mode:
                again = trace_module(copy, traced.inputs, train=traced.train)
        except CaptureError as error:
            if not hasattr(error, "trace_mode"):
                raise
            graph = error.trace_mode.graph
            done = [n for n in graph.nodes if n.op == "call_function"]
            position = _reached(traced, done)
            found = _compare(channels, stays, index, graph, moved=moved, finished=False)
            return found or _mismatch(channels, stays, (index, position), str(error.__cause__))
        found = _compare(channels, stays, index, again.graph, moved=moved, finished=True)
        if found is not None:
            return found
        if again.structure != traced.structure:
            last = len(traced.operators()) - 1
            return _mismatch(channels, stays, (index, last), "the outputs have other shapes")
    return None


def split_channel(channels: ChannelGroups, edits: Sequence[Edit]) -> str:
    """Say where edits keep a channel in one tensor and drop it in another; ``""`` if nowhere."""
    end = channels.fresh_from
    units, stays = channels.roots[:end], channels.survivors_of(edits)[:end]
    split = np.bincount(units, stays) * np.bincount(units, ~stays) > 0
    if not split[units].any():
        return ""
    places: dict[bool, str] = {}
    unit = int(np.flatnonzero(split)[0])
    for (tensor, axis), indices in channels.axes.items():
        for index in np.flatnonzero(units[indices] == unit).tolist():
            places.setdefault(bool(stays[indices[index]]), f"index {index} of {tensor} axis {axis}")
    return f"{places[False]} is dropped, but {places[True]}, which is the same channel, stays"


def _edited(model: nn.Module, traced: TracedGraph, edits: Sequence[Edit]) -> nn.Module:
    if not traced.real:
        return edited_copy(model, edits, _mode_of(traced))
    copy = clone(model)
    apply_edits(copy, [edit for edit in edits if not isinstance(edit, Redraw)])
    return copy


def _mode_of(traced: TracedGraph) -> FakeTensorMode:
    for tensor in traced.inputs.tensors():
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _compare(
    channels: ChannelGroups,
    stays: NDArray[np.bool_],
    index: int,
    graph: fx.Graph,
    *,
    moved: bool,
    finished: bool,
) -> Mismatch | None:
    """Return the first operator that differs from the prediction, among those that ran.

    Args:
        moved: channels keep their weights, so constants must be those of the kept channels.
        finished: the new trace is complete.
    """
    traced = channels.traces[index]
    values = channels.values[index]
    made = Constants(traced.graph), Constants(graph)
    old = traced.operators()
    numbers = [i for i, node in enumerate(old) if not _idle(node)]
    again = [node for node in graph.nodes if node.op == "call_function" and not _idle(node)]
    for position, after in zip(numbers, again, strict=False):
        before = old[position]
        where = (index, position)
        if before.target != after.target:
            text = f"{before.target} was expected to run, {after.target} did"
            return None if traced.real else _mismatch(channels, stays, where, text)
        other = _other_numbers(before, after, made, values, stays) if moved else None
        if other is not None:
            line = f"{operator_name(other.target)} at {other.meta.get('source') or 'its graph'}"
            text = f"the numbers that {line} makes would not be those that the kept channels met"
            return _mismatch(channels, stays, where, text, [values[other]])
        expected = _shapes(values[before], stays, channels)
        found = [tuple(t.shape) for t in find_tensors(after.meta["val"])]
        if expected is not None and found and not _fits(expected, found):
            text = f"expected {_spell(expected)}, got {_spell(found)}"
            return _mismatch(channels, stays, where, text)
        for argument, indices in channels.expected.get(before, {}).items():
            count = int(stays[indices].sum())
            bound = bind(after.target, after.args, after.kwargs)
            given = bound[argument]
            if given < 0:  # counted from the end
                given += after.all_input_nodes[0].meta["val"].shape[bound["dim"]]
            if given != count:
                text = f"expected {argument}={count}, got {given}"
                return _mismatch(channels, stays, where, text)
    if traced.real:
        return None
    if len(again) > len(numbers):
        return _mismatch(channels, stays, (index, len(old) - 1), "more operators ran than before")
    if finished and len(again) < len(numbers):
        where = index, numbers[len(again)]
        return _mismatch(channels, stays, where, "fewer operators ran than before")
    return None


def _other_numbers(
    before: fx.Node,
    after: fx.Node,
    made: tuple[Constants, Constants],
    values: dict[fx.Node, Any],
    stays: NDArray[np.bool_],
) -> fx.Node | None:
    """Return a constant that an operator reads and that holds other numbers than was predicted.

    A single number, as a tensor or repeated, may follow a count of channels: a Python number may.
    """
    old, new = made
    if before in old:
        return None
    reads, again = (
        [x for x in pytree.tree_leaves((n.args, dict(n.kwargs))) if isinstance(x, fx.Node)]
        for n in (before, after)
    )
    for one, two in zip(reads, again, strict=False):
        if one not in old or two not in new or not isinstance(values[one], Value):
            continue
        one, two = old.base(one), new.base(two)
        if old.same(one, new, two):
            continue
        was, now = old.value(one, before), new.value(two, after)
        if was is None or now is None:
            return one
        if _uniform(was) and _uniform(now) and (torch.equal(_first(was), _first(now))):
            continue
        label_axes = {axis for label in values[one].labels for axis in axes_of(label)}
        if not label_axes and _uniform(was) and _uniform(now):
            continue
        for label in values[one].labels:
            for axis in axes_of(label):
                others = tuple(a for a in range(label.ndim) if a != axis)
                kept = np.flatnonzero(stays[label].any(axis=others))
                was = was.index_select(axis, torch.from_numpy(kept))
        if was.shape != now.shape or not torch.equal(was, now):
            return one
    return None


def _uniform(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and bool((tensor == _first(tensor)).all())


def _first(tensor: Tensor) -> Tensor:
    return tensor[(0,) * tensor.ndim]


def _reached(traced: TracedGraph, done: Sequence[fx.Node]) -> int:
    """Return the index of the operator that was about to run when a trace ended early."""
    operators = traced.operators()
    numbers = [i for i, node in enumerate(operators) if not _idle(node)]
    count = sum(not _idle(node) for node in done)
    return numbers[min(count, len(numbers) - 1)]


def _idle(node: fx.Node) -> bool:
    """Whether an operator may come and go with the memory layout, without changing anything."""
    return operator_of(node.target).kind is Kind.COPY


def _shapes(
    value: Any, stays: NDArray[np.bool_], channels: ChannelGroups
) -> list[tuple[int, ...]] | None:
    """Return the predicted shapes of a result; -1 for a size that nothing determines."""
    values = [value] if isinstance(value, Value) else value
    if not isinstance(values, tuple | list) or not all(isinstance(v, Value) for v in values):
        return None
    shapes = []
    for v in values:
        shape = list(predicted_shape(v, stays))
        for label in v.labels:
            if (channels.roots[label] >= channels.fresh_from).all():
                for axis in axes_of(label):
                    shape[axis] = -1
        shapes.append(tuple(shape))
    return shapes


def _fits(expected: list[tuple[int, ...]], found: list[tuple[int, ...]]) -> bool:
    return len(expected) == len(found) and all(
        len(a) == len(b) and all(x in (-1, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(expected, found, strict=True)
    )


def _spell(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _mismatch(
    channels: ChannelGroups,
    stays: NDArray[np.bool_],
    position: tuple[int, int],
    text: str,
    blame: Sequence[Value] = (),
) -> Mismatch:
    """Describe a mismatch; ``blame`` are values that are at fault, if some more than all others."""
    index, number = position
    node = channels.traces[index].operators()[number]
    values = channels.values[index]
    touched = list(_flat([values[n] for n in node.all_input_nodes]))
    touched += list(_flat([values[node]]))
    if any(not stays[label].all() for value in blame for label in value.labels):
        touched = list(blame)
    dropped: list[NDArray[np.int64]] = []
    sizes: set[tuple[int, int]] = set()
    for value in touched:
        sizes |= {
            (before, after)
            for before, after in zip(value.shape, predicted_shape(value, stays), strict=True)
            if before != after
        }
        dropped += [label[~stays[label]] for label in value.labels]
    units = np.unique(channels.roots[np.concatenate(dropped)]) if dropped else np.empty(0, int)
    where = node.meta.get("source") or node.meta["module"] or "the model"
    return Mismatch(
        node,
        position,
        tuple(int(unit) for unit in units),
        f"{node.target} at {where}: {' '.join(text.split())[:300]}",
        frozenset(sizes),
        tuple(_shapes(values[node], stays, channels) or ()),
        {name: int(stays[a].sum()) for name, a in channels.expected.get(node, {}).items()},
    )


def _flat(items: Sequence[Any]) -> Iterator[Value]:
    for item in items:
        if isinstance(item, Value):
            yield item
        elif isinstance(item, tuple | list):
            yield from _flat(item)


def backward_failure(
    model: nn.Module, channels: ChannelGroups, edits: Sequence[Edit]
) -> Exception | None:
    """Run a backward through a copy of the rewritten model, without memory, in training mode.

    Returns:
        What it raised; ``None`` if it ran, or if that of the original does not run either.
    """
    for traced in channels.traces:
        if traced.real or not traced.train:
            continue  # a whole step on real tensors may take too much memory
        with torch.inference_mode(
            False
        ):  # in the caller's there would be nothing to go back through
            failure = _backward(model, traced, edits)
            if failure is not None and _backward(model, traced, ()) is None:
                return failure
    return None


def _backward(model: nn.Module, traced: TracedGraph, edits: Sequence[Edit]) -> Exception | None:
    copy = _edited(model, traced, edits)
    set_mode(copy, True)
    try:
        # the variant's attributes hold in the backward too, in which a part may run again
        variant = traced.inputs.variant(copy)
        with _mode_of(traced), quiet_tracing(copy), torch.enable_grad(), variant:
            # a copy is no inference tensor, a view of one is
            run_backward(traced.inputs.map(lambda t: t.detach().clone()).call(copy))
    except Exception as error:  # a user's forward or backward may raise anything
        return error
    return None


def run_backward(output: Any) -> None:
    """Run the backward of the sum of every output that has one."""
    losses = [t.sum() for t in find_tensors(output) if t.requires_grad and t.numel()]
    if losses:
        torch.autograd.backward(losses)
