"""Rules of operators that move or repeat data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pocketize.channels.labels import FROZEN, Indices, Value, along, axes_of, squeeze_constant
from pocketize.channels.rules.table import Call, Result, channel_rule
from pocketize.ops import Kind


@channel_rule(Kind.RESHAPE)
def reshape(call: Call) -> Result:
    """Reshape labels as their tensor is reshaped."""
    return reshape_value(call, call.values()[0], call.shape)


def reshape_value(call: Call, value: Value, shape: tuple[int, ...]) -> Value:
    """Return a value reshaped; labels that a split spreads over several axes are pending."""
    blocks = _blocks(value.shape, shape)
    labels: list[Indices] = []
    for label in value.labels:
        broadcast, target = list(label.shape), [1] * len(shape)
        for old, new in blocks:
            if any(label.shape[axis] > 1 for axis in old):
                for axis in old:
                    broadcast[axis] = value.shape[axis]
                for axis in new:
                    target[axis] = shape[axis]
        moved = squeeze_constant(np.broadcast_to(label, broadcast).reshape(target))
        if len(axes_of(moved)) > max(1, len(axes_of(label))):
            call.unions.defer(f"{call.where}#{call.node.name}", moved)
        clash = [x for x in labels if set(axes_of(x)) & set(axes_of(moved))]
        real = [x for x in [*clash, moved] if not call.unions.is_fresh(x)]
        if clash:
            labels = [x for x in labels if not any(x is other for other in clash)]
            for other in [*clash, moved]:
                if len(real) != 1 or other is not real[0]:
                    call.unions.freeze(other, f"{call.where} merges two axes of channels into one")
            moved = real[0] if len(real) == 1 else np.full((1,) * len(shape), FROZEN)
        if axes_of(moved):
            labels.append(moved)
    return Value(shape, tuple(labels))


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal size into the smallest runs of axes of equal size."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left = [i] if i < len(old) else []
        right = [j] if j < len(new) else []
        a, b = (old[i] if left else 1), (new[j] if right else 1)
        if a == 1 and b != 1 and left:
            blocks.append((left, []))
            i += 1
            continue
        if b == 1 and a != 1 and right:
            blocks.append(([], right))
            j += 1
            continue
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        blocks.append((left, right))
    return blocks


@channel_rule(Kind.PERMUTATION)
def permute(call: Call) -> Result:
    """Move the axes of labels."""
    value: Value = call.values()[0]
    order = _order(call, value.ndim)
    labels = tuple(label.transpose(order) for label in value.labels)
    return Value(call.shape, labels)


@channel_rule("aten.mT", "aten.matrix_H", replace=True)
def transpose_matrices(call: Call) -> Result:
    """Exchange the last two axes."""
    value: Value = call.values()[0]
    return Value(call.shape, tuple(label.swapaxes(-1, -2) for label in value.labels))


def _order(call: Call, rank: int) -> list[int]:
    axes = list(range(rank))
    dims = call.get("dims")
    if dims is not None:
        return [d % rank for d in dims]
    if call.get("dim0", call.get("axis0")) is not None:
        a = call.get("dim0", call.get("axis0")) % rank
        b = call.get("dim1", call.get("axis1")) % rank
        axes[a], axes[b] = axes[b], axes[a]
        return axes
    if call.get("source") is not None:
        source, target = call["source"], call["destination"]
        pairs = zip(*([x] if isinstance(x, int) else x for x in (source, target)), strict=True)
        moves = sorted((t % rank, s % rank) for s, t in pairs)
        rest = [axis for axis in axes if axis not in {s for _, s in moves}]
        for to, axis in moves:
            rest.insert(to, axis)
        return rest
    return axes[::-1]


@channel_rule(Kind.EXPANSION)
def expand(call: Call) -> Result:
    """Axes that grow from size 1 take their size from whatever they meet."""
    value, *like = call.values()
    if like:
        return call.unions.align([value, *like], call.shape, call.reason)
    rank, extra = len(call.shape), len(call.shape) - value.ndim
    labels = tuple(x.reshape((1,) * extra + x.shape) for x in value.labels)
    grown = [a for a in range(rank) if a < extra or value.shape[a - extra] == 1]
    return Value(call.shape, (*labels, *call.unions.fresh(call.shape, grown)))


@channel_rule(Kind.REPETITION)
def repeat(call: Call) -> Result:
    """Repeat labels; an axis repeated from size 1 takes its size from whatever it meets."""
    value: Value = call.values()[0]
    times = list(call.get("repeats") or call.get("dims"))
    times = [1] * (value.ndim - len(times)) + times
    extra = len(times) - value.ndim
    spread = [label.reshape((1,) * extra + label.shape) for label in value.labels]
    labels = [
        np.tile(label, [n if label.shape[axis] > 1 else 1 for axis, n in enumerate(times)])
        for label in spread
    ]
    grown = [a for a in range(len(times)) if a < extra or value.shape[a - extra] == 1]
    return Value(call.shape, (*labels, *call.unions.fresh(call.shape, grown)))


@channel_rule("aten.repeat_interleave")
def repeat_interleave(call: Call) -> Result:
    """Repeat each channel a fixed number of times."""
    value: Value = call.values()[0]
    times, axis = call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or axis is None:
        for operand in call.values():
            call.freeze(operand, "repeats by a tensor or over all axes")
        return Value(call.shape)
    axis = value.axis(axis)
    labels = tuple(np.repeat(x, times, axis) if x.shape[axis] > 1 else x for x in value.labels)
    grown = [axis] if value.shape[axis] == 1 else []
    return Value(call.shape, (*labels, *call.unions.fresh(call.shape, grown)))


@channel_rule("aten.flip")
def flip(call: Call) -> Result:
    """Reverse labels."""
    value: Value = call.values()[0]
    labels = tuple(np.flip(x, call["dims"]) for x in value.labels)
    return Value(call.shape, labels)


@channel_rule("aten.roll")
def roll(call: Call) -> Result:
    """Rolling moves positions by an amount in the code: the axes stay whole."""
    value: Value = call.values()[0]
    return call.tie_axes(value, call["dims"] or range(value.ndim))


@channel_rule(Kind.PADDING)
def pad(call: Call) -> Result:
    """Channels that padding adds are frozen; other padding passes channels by."""
    value: Value = call.values()[0]
    amounts = list(call.get("pad") or call.get("padding"))
    mode = call.get("mode", "constant" if "pad" in call.arguments else "")
    labels: list[Indices] = []
    padded = {a for a in range(value.ndim) if any(_around(amounts, value.ndim, a))}
    for label in value.labels:
        if len(axes_of(label)) > 1:
            label = call.unions.tie_axes(label, padded, f"{call.where} needs the axis whole")
        for axis in padded & set(axes_of(label)):
            if mode != "constant":
                call.unions.freeze(label, f"{call.where} pads it with its own values")
            low, high = _around(amounts, value.ndim, axis)
            widths = [
                (max(low, 0), max(high, 0)) if a == axis else (0, 0) for a in range(label.ndim)
            ]
            label = np.pad(label, widths, constant_values=FROZEN)
            label = label.take(range(max(-low, 0), label.shape[axis] - max(-high, 0)), axis)
        if axes_of(label):
            labels.append(label)
    return Value(call.shape, tuple(labels))


def _around(amounts: Sequence[int], rank: int, axis: int) -> tuple[int, int]:
    """Return the padding before and after an axis; pairs are given from the last axis on."""
    pair = amounts[2 * (rank - 1 - axis) : 2 * (rank - axis)]
    return (pair[0], pair[1]) if pair else (0, 0)


@channel_rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(call: Call) -> Result:
    """Channels move to space (or back) in runs of factor squared that stay whole."""
    value: Value = call.values()[0]
    axis = value.ndim - 3
    value = call.tie_axes(value, [axis + 1, axis + 2])
    indices = call.vector_on(value, axis)
    if indices is None:
        return Value(call.shape, value.labels)
    if call.operator.endswith("unshuffle"):
        run = call["downscale_factor"] ** 2
        indices = np.repeat(indices, run)
    else:
        run = call["upscale_factor"] ** 2
        groups = indices.reshape(-1, run)
        call.unite(groups, groups[:, :1])
        indices = groups[:, 0]
    rest = value.off(axis)
    if indices.size < 2:
        return Value(call.shape, rest)
    return Value(call.shape, (*rest, along(indices, axis, value.ndim)))


@channel_rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: Call) -> Result:
    """A shuffle of g groups stays a shuffle if every group drops the same positions."""
    value: Value = call.values()[0]
    indices = call.vector_on(value, 1)
    if indices is None:
        return call.like("input" if "input" in call.arguments else "self")
    groups = indices.reshape(call["groups"], -1)
    call.unite(groups, groups[:1])
    return Value(call.shape, (*value.off(1), along(groups.T.reshape(-1), 1, value.ndim)))


@channel_rule("aten.im2col")
def im2col(call: Call) -> Result:
    """Each channel becomes one run of kernel positions."""
    value: Value = call.values()[0]
    axis = value.ndim - 3
    value = call.tie_axes(value, [a for a in range(value.ndim) if a != axis])
    indices = call.vector_on(value, axis)
    if indices is None:
        return Value(call.shape)
    run = np.repeat(indices, math.prod(call["kernel_size"]))
    shape = [1] * len(call.shape)
    shape[-2] = -1
    return Value(call.shape, (run.reshape(shape),))


@channel_rule(
    *(
        f"aten.fft_{inverse}{kind}{n}"
        for inverse in ("", "i")
        for kind in ("fft", "rfft")
        for n in ("", "2", "n")
    ),
    *(f"aten.fft_{name}" for name in ("hfft", "ihfft", "fftshift", "ifftshift")),
)
def fourier(call: Call) -> Result:
    """A Fourier transform needs its axes whole; the others pass."""
    value: Value = call.values()[0]
    dims = call.get("dim")
    if dims is None:
        dims = range(value.ndim)
    kept = call.tie_axes(value, [dims] if isinstance(dims, int) else dims)
    return Value(call.shape, kept.labels)


@channel_rule("aten.view_as_real", "aten.view_as_complex")
def complex_view(call: Call) -> Result:
    """Real and imaginary part are one more axis at the end."""
    value: Value = call.values()[0]
    if call.operator.endswith("real"):
        return Value(call.shape, tuple(x[..., None] for x in value.labels))
    kept = call.tie_axes(value, [-1])
    return Value(call.shape, tuple(x[..., 0] for x in kept.labels))


@channel_rule("aten._has_compatible_shallow_copy_type", replace=True)
def set_data(call: Call) -> Result:
    """Asked where one tensor becomes the data of another: they have the same channels."""
    one, other = call.values()
    if one.shape == other.shape:
        call.unions.align([one, other], one.shape, call.reason)
    else:
        for value in (one, other):
            call.freeze(value, "gives it data of another shape")
    return Value(())
