"""Rules of operators that join tensors, cut them or pick from them."""

from __future__ import annotations

import math

import numpy as np

from pocketize.channels.labels import FROZEN, Indices, Value, along
from pocketize.channels.rules.table import Call, Result, channel_rule
from pocketize.ops import Kind


@channel_rule(Kind.CONCATENATION)
def cat(call: Call) -> Result:
    """Concatenate labels; what has none stands as frozen channels."""
    # Tensors of shape (0,) may stand in any concatenation; they add nothing.
    values = [v for v in call["tensors"] if v.shape != (0,)]
    axis = values[0].axis(call.get("dim", call.get("axis", 0)))
    flat = []
    vectors = []
    for value in values:
        indices = call.vector_on(value, axis)
        vectors.append(
            indices if indices is not None else np.full(value.shape[axis], FROZEN, dtype=np.int64)
        )
        shape = tuple(1 if a == axis else s for a, s in enumerate(value.shape))
        flat.append(Value(shape, value.off(axis)))
    shape = tuple(1 if a == axis else s for a, s in enumerate(call.shape))
    rest = call.unions.align(flat, shape, call.reason)
    joined = np.concatenate(vectors)
    if (joined == FROZEN).all():
        return Value(call.shape, rest.labels)
    return Value(call.shape, (*rest.labels, along(joined, axis, len(shape))))


@channel_rule(Kind.STACK)
def stack(call: Call) -> Result:
    """Stacked tensors must agree on every channel."""
    values = call["tensors"]
    joined = call.unions.align(values, values[0].shape, f"{call.where} needs equal sizes")
    axis = call.get("dim", 0) % len(call.shape)
    labels = tuple(np.expand_dims(label, axis) for label in joined.labels)
    return Value(call.shape, labels)


@channel_rule(Kind.SPLIT)
def split(call: Call) -> Result:
    """Even parts keep the same positions; uneven ones are taken for the sizes of layers."""
    value: Value = call.values()[0]
    axis = value.axis(call.get("dim", 0))
    shapes = call.shapes
    indices = call.vector_on(value, axis)
    if indices is None:
        return [Value(shape, value.labels) for shape in shapes]
    if len({shape[axis] for shape in shapes}) == 1:
        runs = indices.reshape(len(shapes), -1)
        call.unite(runs, runs[:1])
    cuts = np.cumsum([shape[axis] for shape in shapes])[:-1]
    parts = zip(shapes, np.split(indices, cuts), strict=True)
    return [_part(call, value, axis, part, shape) for shape, part in parts]


def _part(call: Call, value: Value, axis: int, indices: Indices, shape: tuple[int, ...]) -> Value:
    """Return a part of a value; an axis of size 1 has no label, so a single channel must stay."""
    rest = value.off(axis)
    if indices.size == 1:
        call.unions.freeze(indices, f"{call.where} takes it alone")
    if indices.size < 2:
        return Value(shape, rest)
    return Value(shape, (*rest, along(indices, axis, value.ndim)))


@channel_rule(Kind.SLICE)
def slice_(call: Call) -> Result:
    """A slice that is one of several equal parts is taken for an even split.

    Any other is taken for the sizes of layers; the check compares its bounds with the prediction.
    """
    value: Value = call.values()[0]
    axis = value.axis(call.get("dim", 0))
    full, size = value.shape[axis], call.shape[axis]
    indices = None if size == full else call.vector_on(value, axis)
    if indices is None:
        return Value(call.shape, value.labels)
    start, step = call.get("start") or 0, call.get("step", 1)
    start = max(start + full, 0) if start < 0 else start
    if step > 1:
        if full % step == 0 and size == full // step:
            runs = indices.reshape(-1, step)
            call.unite(runs, runs[:, :1])
        else:
            call.unions.freeze(indices, f"{call.where} takes every {step}th of a part")
    elif size > 1 and full % size == 0 and start % size == 0:
        parts = indices.reshape(-1, size)
        call.unite(parts, parts[:1])
    if step == 1 and start:
        call.expect("start", indices[:start])
    return _part(call, value, axis, indices[start::step][:size], call.shape)


@channel_rule(Kind.SELECTION)
def select(call: Call) -> Result:
    """Picking by index needs the axis whole."""
    value: Value = call.values()[0]
    axis = value.axis(call.get("dim", 0))
    kept = call.tie_axes(value, [axis])
    labels = tuple(x.squeeze(axis) for x in kept.labels)
    return call.results(labels)


@channel_rule("aten.index")
def index(call: Call) -> Result:
    """Indexing by one integer tensor on an axis without channels moves the others along."""
    value: Value = call.values()[0]
    given = [(axis, x) for axis, x in enumerate(call["indices"]) if x is not None]
    axis, at = given[0]
    inserted = len(call.shape) - value.ndim + 1
    if len(given) != 1 or math.prod(call.shape) == 0:
        return _frozen(call, "indexes it with tensors")
    if call.shape[axis : axis + inserted] != at.shape:  # a boolean mask
        return _frozen(call, "indexes it with a mask")
    return _picked(call, value, axis, at)


def _frozen(call: Call, why: str) -> Value:
    for value in call.values():
        call.freeze(value, why)
    return Value(call.shape)


def _picked(call: Call, value: Value, axis: int, at: Value) -> Value:
    """Return what an integer tensor picks along an axis, in whose place the tensor's axes come."""
    kept = call.tie_axes(value, [axis]).labels
    before, after = axis, value.ndim - axis - 1
    labels = [x.reshape(*x.shape[:axis], *([1] * at.ndim), *x.shape[axis + 1 :]) for x in kept]
    labels += [x.reshape(*([1] * before), *x.shape, *([1] * after)) for x in at.labels]
    return Value(call.shape, tuple(labels))


@channel_rule("aten.index_select")
def index_select(call: Call) -> Result:
    """Selecting along an axis needs it whole; other axes keep their channels."""
    value: Value = call.values()[0]
    at: Value = call["index"]
    if not value.ndim or not at.ndim:
        return _frozen(call, "indexes it with a number")
    return _picked(call, value, value.axis(call["dim"]), at)


@channel_rule(Kind.SAMPLING)
def grid_sample(call: Call) -> Result:
    """Sampling moves space; the grid itself stays as it is, but for its batch, which is x's."""
    x: Value = call["input"]
    grid: Value = call["grid"]
    call.unite(call.vector_on(x, 0), call.vector_on(grid, 0))
    call.freeze(Value(grid.shape, grid.off(0)), "samples at it")
    labels = call.tie_axes(x, range(2, x.ndim)).labels
    return Value(call.shape, labels)


@channel_rule(Kind.GATE)
def glu(call: Call) -> Result:
    """A gated linear unit cuts an axis into two equal halves."""
    value: Value = call.values()[0]
    axis = value.axis(call.get("dim", -1))
    indices = call.vector_on(value, axis)
    if indices is None:
        return Value(call.shape, value.labels)
    halves = indices.reshape(2, -1)
    call.unite(halves[0], halves[1])
    rest = value.off(axis)
    if halves[0].size < 2:
        return Value(call.shape, rest)
    return Value(call.shape, (*rest, along(halves[0], axis, value.ndim)))
