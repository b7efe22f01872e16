"""Labels: which channel is which, wherever it goes, and which channels belong together.

Every index of every weight axis has a number, its *channel index*. A :class:`Value` says which
channel indices are on the axes of a tensor, by *labels*: integer arrays of the tensor's rank with
size 1 on every axis that the label does not live on, so that their cost does not depend on the
spatial size. Operators that move data move labels in the same way; operators that combine tensors
*unite* channel indices. Those that are united in the end are *coupled*, one *unit*: they are kept
or dropped together. :class:`UnionFind` collects the unions and finds the units.

Conventions:

* channel index 0 stands for a channel that cannot be dropped; whatever is united with it is frozen;
* axes of size 1 carry no label, which makes gates, broadcasting and depthwise kernels trivial;
* an axis without label is *fixed*: its size is the user's (batch, space, input channels);
* an axis whose size follows whatever it meets (the result of ``expand`` or ``zeros``) gets *fresh*
  channel indices, which belong to no tensor;
* a label may live on several axes, after a view has split one: it is then *deferred*, and
  :meth:`UnionFind.solve` ties all but one of these axes, the leading ones unless a check has asked
  for the trailing ones.
"""

from __future__ import annotations

__all__ = ["FROZEN", "UnionFind", "Value"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]

FROZEN = 0

#: Pairs from which on it pays to look for repeated ones.
_MANY = 2**16


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of one tensor.

    Attributes:
        shape: the tensor's shape.
        labels: arrays of channel indices, of the tensor's rank, size 1 or full on every axis; no
            two of them live on the same axis.
    """

    shape: tuple[int, ...]
    labels: tuple[Indices, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """Return a possibly negative axis as a non-negative one."""
        return axis + self.ndim if axis < 0 else axis

    def label_on(self, axis: int) -> Indices | None:
        """Return the label that lives on an axis, ``None`` if there is none."""
        return next((label for label in self.labels if label.shape[axis] > 1), None)

    def fixed(self, axis: int) -> bool:
        """Whether the size of this axis is the user's: more than 1, and no label."""
        return self.shape[axis] > 1 and self.label_on(axis) is None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the shape is this one and the labels can live on it."""
        return self.shape == shape and all(
            label.ndim == len(shape)
            and all(size in (1, full) for size, full in zip(label.shape, shape, strict=True))
            for label in self.labels
        )

    def off(self, axis: int) -> tuple[Indices, ...]:
        """Return the labels that do not live on an axis."""
        return tuple(label for label in self.labels if label.shape[axis] == 1)


def axes_of(label: Indices) -> list[int]:
    """Return the axes on which a label lives."""
    return [axis for axis, size in enumerate(label.shape) if size > 1]


def along(indices: Indices, axis: int, rank: int) -> Indices:
    """Return a vector of channel indices as a label on one axis of a tensor of some rank."""
    return indices.reshape([-1 if a == axis else 1 for a in range(rank)])


class UnionFind:
    """Collects unions of channel indices, and the reasons why some are frozen."""

    def __init__(self, trailing: frozenset[str] = frozenset()) -> None:
        self.count = 1  # index 0 is FROZEN
        self.trailing = trailing
        self.tensors = 1  # indices below belong to tensors, the others are fresh
        self._edges: list[tuple[Indices, Indices]] = []
        self._frozen: list[tuple[Indices, str]] = []
        self._deferred: dict[str, Indices] = {}

    def new(self, size: int) -> Indices:
        """Return ``size`` new channel indices."""
        start, self.count = self.count, self.count + size
        return np.arange(start, self.count, dtype=np.int64)

    def end_of_tensors(self) -> None:
        """Declare that all tensors have their channel indices; those made from now on are fresh."""
        self.tensors = self.count

    def fresh(self, shape: Sequence[int], axes: Iterable[int]) -> tuple[Indices, ...]:
        """Return labels of fresh indices for some axes of a tensor."""
        return tuple(
            along(self.new(shape[axis]), axis, len(shape)) for axis in axes if shape[axis] > 1
        )

    def is_fresh(self, label: Indices) -> bool:
        """Whether no index of a label belongs to a tensor."""
        return bool((label >= self.tensors).all())

    def unite(self, a: Indices, b: Indices, reason: str) -> None:
        """Unite two arrays of indices element by element, with broadcasting.

        Args:
            a: any shape.
            b: a shape that broadcasts with ``a``.
            reason: why, told where one of the two is frozen.
        """
        for one, other in _meetings(a, b):
            left, right = (np.ravel(x) for x in np.broadcast_arrays(one, other))
            for here, there in ((left, right), (right, left)):
                met = here[there == FROZEN]
                if met.size:
                    self.freeze(met, reason)
            live = (left != FROZEN) & (right != FROZEN) & (left != right)
            if live.any():
                self._edges.append(_distinct(left[live], right[live]))

    def freeze(self, indices: Indices, reason: str, *, first: bool = False) -> None:
        """Forbid that any of these indices is dropped, and say why.

        Args:
            indices: any shape.
            reason: why; of several reasons the first is told.
            first: tell this one rather than earlier ones.
        """
        indices = np.unique(indices)
        indices = indices[indices != FROZEN]
        if indices.size:
            self._frozen.insert(0 if first else len(self._frozen), (indices, reason))

    def freeze_value(self, value: Value, reason: str, *, first: bool = False) -> None:
        """Freeze every index of a value."""
        for label in value.labels:
            self.freeze(label, reason, first=first)

    def tie_axes(self, label: Indices, axes: Iterable[int], reason: str) -> Indices:
        """Tie axes of a label: what is dropped at one position of them is dropped at all.

        A label that lives on no other axis is frozen.

        Returns:
            The label with size 1 on these axes.
        """
        here = [axis for axis in axes if label.shape[axis] > 1]
        if not here:
            return label
        if len(here) == len(axes_of(label)):
            self.freeze(label, reason)
            return np.full((1,) * label.ndim, FROZEN, dtype=np.int64)
        first = _first(label, here)
        self.unite(label, first, reason)
        return first

    def vector_on(self, value: Value, axis: int, reason: str) -> Indices | None:
        """Return the channel indices along one axis as a vector; its label's other axes are tied.

        Returns:
            An array of ``value.shape[axis]`` indices, or ``None`` where the axis has no label.
        """
        label = value.label_on(axis)
        if label is None:
            return None
        others = [a for a in axes_of(label) if a != axis]
        return self.tie_axes(label, others, reason).reshape(-1)

    def reduce(self, label: Indices, axes: Iterable[int], reason: str) -> Indices:
        """Remove some axes of a label, as a sum over them does.

        Where a split axis loses a part, the rest is tied; if a check has asked to tie the trailing
        axes of that split instead, the rest goes on as a label.

        Returns:
            The label with size 1 on these axes, and on all axes if nothing goes on.
        """
        gone = [axis for axis in axes if label.shape[axis] > 1]
        rest = [axis for axis in axes_of(label) if axis not in gone]
        if not gone:
            return label
        if rest and self._keeps_trailing(label):
            return self.tie_axes(label, gone, reason)
        if rest:
            self.tie_axes(label, rest, reason)
        return np.full((1,) * label.ndim, FROZEN, dtype=np.int64)

    def _keeps_trailing(self, label: Indices) -> bool:
        return any(
            key in self.trailing and bool(np.isin(label.flat[0], split))
            for key, split in self._deferred.items()
        )

    def defer(self, key: str, label: Indices) -> None:
        """Note a label that a view has spread over several axes."""
        self._deferred[key] = label

    def deferred_keys(self) -> tuple[str, ...]:
        """Return the keys of all deferred labels."""
        return tuple(self._deferred)

    def align(self, values: Sequence[Value], shape: Sequence[int], reason: str) -> Value:
        """Unite values that are combined element by element, with broadcasting.

        Args:
            values: the operands; their shapes broadcast to ``shape``.
            shape: the shape of the result.
            reason: why, told where the union freezes.
        """
        rank = len(shape)
        operands = self._one_of_split([_pad_rank(value, rank) for value in values])
        result: list[Indices] = []
        for index, operand in enumerate(operands):
            for label in operand.labels:
                others = operands[:index] + operands[index + 1 :]
                met = {a for a in axes_of(label) for other in others if other.fixed(a)}
                label = self.tie_axes(label, met, reason)
                clash = [x for x in result if set(axes_of(x)) & set(axes_of(label))]
                for other in clash:
                    self.unite(other, label, reason)
                if not clash and axes_of(label):
                    result.append(label)
        return Value(tuple(shape), tuple(result))

    def _one_of_split(self, operands: list[Value]) -> list[Value]:
        """Let one axis alone change where a label on several meets labels that live on one each.

        Else every index of the one axis would be united with every index of the other.
        """
        for split in [x for value in operands for x in value.labels if len(axes_of(x)) > 1]:
            axes = axes_of(split)
            alone = {tuple(axes_of(x)) for value in operands for x in value.labels}
            if sum((axis,) in alone for axis in axes) < 2:
                continue
            stay = axes[1:] if self._keeps_trailing(split) else axes[:-1]
            reason = (
                "it meets channels that a view has split, and another axis of the split changes"
            )
            operands = [
                Value(value.shape, tuple(self.tie_axes(x, stay, reason) for x in value.labels))
                for value in operands
            ]
        return operands

    def solve(self) -> tuple[Indices, dict[int, str]]:
        """Find the units.

        Returns:
            The unit of every index, named by its smallest index; and for each frozen unit the first
            reason given.
        """
        trial = UnionFind()
        trial._edges, trial._frozen = list(self._edges), list(self._frozen)
        while True:
            roots = _components(self.count, trial._edges)
            unsettled = False
            for key, label in self._deferred.items():
                current = roots[label]
                varying = [a for a in axes_of(label) if _varies(current, a)]
                if len(varying) > 1:
                    unsettled = True
                    trial.tie_axes(label, varying[1:] if key in self.trailing else varying[:1], key)
            if not unsettled:
                break
        reasons: dict[int, str] = {}
        for indices, reason in trial._frozen:
            for root in np.unique(roots[indices]).tolist():
                reasons.setdefault(root, reason)
        return roots, reasons


def _pad_rank(value: Value, rank: int) -> Value:
    extra = rank - value.ndim
    if not extra:
        return value
    ones = (1,) * extra
    return Value(
        ones + value.shape,
        tuple(label.reshape(ones + label.shape) for label in value.labels),
    )


def _meetings(a: Indices, b: Indices) -> list[tuple[Indices, Indices]]:
    """Return pairs of arrays that unite what ``a`` and ``b`` do, without forming their product.

    Where ``a`` alone has some axes and ``b`` alone others, everything on the former meets
    everything on the latter. It is enough that all of ``a`` meets the first of ``b``, and all of
    ``b`` the first of ``a``. (If such a first is frozen, what meets it is frozen one by one.)
    """
    rank = max(a.ndim, b.ndim)
    a, b = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (a, b))
    only_a, only_b = (
        [axis for axis in range(rank) if x.shape[axis] > 1 and y.shape[axis] == 1]
        for x, y in ((a, b), (b, a))
    )
    if not only_a or not only_b:
        return [(a, b)]
    return [(a, _first(b, only_b)), (_first(a, only_a), b)]


def _first(label: Indices, axes: Sequence[int]) -> Indices:
    """Return the first index of some axes, which stay with size 1."""
    return label[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(label.ndim))]


def _distinct(left: Indices, right: Indices) -> tuple[Indices, Indices]:
    """Drop pairs that occur again: labels that live on many axes meet in few ways, many times."""
    if left.size < _MANY:
        return left, right
    base = int(right.max()) + 1
    pairs = np.unique(left * base + right)
    return pairs // base, pairs % base


def _varies(label: Indices, axis: int) -> bool:
    return bool((label != _first(label, [axis])).any())


def squeeze_constant(label: Indices) -> Indices:
    """Give size 1 to the axes along which a label does not vary."""
    for axis in axes_of(label):
        if not _varies(label, axis):
            label = _first(label, [axis])
    return label


def _components(count: int, edges: list[tuple[Indices, Indices]]) -> Indices:
    """Connected components by vectorised union to the smaller label with pointer jumping."""
    parent = np.arange(count, dtype=np.int64)
    if not edges:
        return parent
    left = np.concatenate([a for a, _ in edges])
    right = np.concatenate([b for _, b in edges])
    while True:
        a, b = parent[left], parent[right]
        differ = a != b
        if not differ.any():
            return parent
        a, b, left, right = a[differ], b[differ], left[differ], right[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            jumped = parent[parent]
            if np.array_equal(jumped, parent):
                break
            parent = jumped
