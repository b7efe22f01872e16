"""How one traced operator computes a box of its result from boxes of its inputs.

A :class:`Form` belongs to one node of a traced graph. It returns the boxes of its inputs that a box
of its result reads, and computes that box: with the operator's own padding where the box touches
the border of the whole tensor, and nowhere else. Tensors are (N, C, *spatial); a box has an
interval for each spatial axis, batch and channels are always whole.
"""

from __future__ import annotations

__all__ = [
    "Context",
    "Convolution",
    "Expanded",
    "Form",
    "Pointwise",
    "Pooling",
    "ResampleForm",
    "Shuffled",
    "Transposed",
]

import abc
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pocketize.passes.tiling.gradients_only import NotConvolved
from pocketize.passes.tiling.intervals import Box, Interval, ReceptiveField, Resampling

InputBoxes = dict[fx.Node, Box]


class Context(Protocol):
    """What a form reads its inputs from."""

    def part(self, node: fx.Node, box: Box) -> Tensor:
        """Return a box of a result, within one that ``input_boxes`` returned."""

    def value(self, node: fx.Node) -> Any:
        """Return a result that is no map: a weight, a vector, a number."""

    def statistics(self, node: fx.Node) -> Tensor:
        """Return the statistics of a norm."""


class Form(abc.ABC):
    """A local form of an operator ``node``.

    A ``cheap`` one costs no more than reading its inputs, so that it is computed again rather than
    stored.
    """

    cheap = False

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @abc.abstractmethod
    def input_boxes(self, box: Box) -> InputBoxes:
        """Return the input boxes that a box of the result reads."""

    @abc.abstractmethod
    def run(self, box: Box, context: Context) -> Tensor:
        """Compute a box of the result."""


class Pointwise(Form):
    """Every entry depends on the entries at its own position, over all channels.

    Args:
        node: the operator; it is called with its own arguments, tensors cut to the box.
        maps: the tensor arguments that are maps of the result's size, or of size 1 on some axes.
        target: called instead of the operator; None for the operator itself.
    """

    cheap = True

    def __init__(self, node: fx.Node, maps: Sequence[fx.Node], target: Any = None) -> None:
        super().__init__(node)
        self.maps = {source: tuple(source.meta["val"].shape[2:]) for source in maps}
        self.target: Any = target or node.target

    def input_boxes(self, box: Box) -> InputBoxes:
        """The same box, of sources of size 1 all of them."""
        return {source: self._within(box, source) for source in self.maps}

    def run(self, box: Box, context: Context) -> Tensor:
        """Run the operator on the boxes."""

        def local(source: fx.Node) -> Any:
            if source in self.maps:
                return context.part(source, self._within(box, source))
            return context.value(source)

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), local)
        result: Tensor = self.target(*args, **kwargs)
        return result

    def _within(self, box: Box, source: fx.Node) -> Box:
        pairs = zip(box, self.maps[source], strict=True)
        return tuple(interval if size != 1 else (0, 1) for interval, size in pairs)


class Expanded(Pointwise):
    """A map expanded along axes of size 1, to the size of the box."""

    def run(self, box: Box, context: Context) -> Tensor:
        """Expand the part."""
        (source,) = self.maps
        x, sizes = context.part(source, self._within(box, source)), self.node.meta["val"].shape
        return x.expand(*sizes[:2], *(high - low for low, high in box))


class _Kernel(Form):
    """Moves a kernel over one input map, with a receptive field for each spatial axis."""

    def __init__(self, node: fx.Node, source: fx.Node, fields: Sequence[ReceptiveField]) -> None:
        super().__init__(node)
        self.source, self.fields = source, tuple(fields)
        self._stride = tuple(field.stride for field in fields)
        self._dilation = tuple(field.dilation for field in fields)

    def input_boxes(self, box: Box) -> InputBoxes:
        """The receptive field of the box."""
        pairs = zip(self.fields, box, strict=True)
        return {self.source: tuple(field.needed(interval) for field, interval in pairs)}

    def _input(self, context: Context, box: Box) -> Tensor:
        """Return the box of the input that is read, which may be empty."""
        x = context.part(self.source, self.input_boxes(box)[self.source])
        for axis, (field, interval) in enumerate(zip(self.fields, box, strict=True)):
            low, high = field.inside(interval)
            if low == high:
                x = x.narrow(axis + 2, 0, 0)
        return x


class Convolution(_Kernel):
    """A convolution, strided or dilated, with zeros around the map."""

    def __init__(
        self,
        node: fx.Node,
        source: fx.Node,
        weight: fx.Node,
        bias: fx.Node | None,
        fields: Sequence[ReceptiveField],
        groups: int,
    ) -> None:
        super().__init__(node, source, fields)
        self.weight, self.bias, self.groups = weight, bias, groups

    def run(self, box: Box, context: Context, *, differentiable_only: bool = False) -> Tensor:
        """Convolve, with padding at the border.

        Of what is ``differentiable_only`` only the shape and the gradients are right.
        """
        x = self._input(context, box)
        rows = list(zip(self.fields, box, strict=True))
        native = [_native_padding(field, interval) for field, interval in rows]
        x = _padded(
            x,
            [
                (0, 0) if by_operator else field.outside(interval)
                for (field, interval), by_operator in zip(rows, native, strict=True)
            ],
        )
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(box) - 1]
        given: Any = NotConvolved.apply if differentiable_only else convolve
        y: Tensor = given(
            x,
            context.value(self.weight),
            None if self.bias is None else context.value(self.bias),
            self._stride,
            tuple(native),
            self._dilation,
            self.groups,
        )
        for axis, ((field, interval), by_operator) in enumerate(zip(rows, native, strict=True)):
            if by_operator:  # which pads both ends; one of them may be no border
                skip = (by_operator - field.outside(interval)[0]) // field.stride
                y = y.narrow(axis + 2, skip, interval[1] - interval[0])
        return y


class Transposed(Convolution):
    """A transposed convolution; its fields are those of the convolution that it transposes."""

    def input_boxes(self, box: Box) -> InputBoxes:
        """The inputs that write to the box."""
        read = []
        for field, interval in zip(self.fields, box, strict=True):
            low, high = field.writers(interval)
            if low == high:  # nothing writes there; one entry keeps the shape valid
                low = min(low, field.size - 1)
                high = low + 1
            read.append((low, high))
        return {self.source: tuple(read)}

    def run(self, box: Box, context: Context, *, differentiable_only: bool = False) -> Tensor:
        """Convolve, and cut or pad to the box."""
        read = self.input_boxes(box)[self.source]
        x = context.part(self.source, read)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(box) - 1]
        y: Tensor = convolve(
            x,
            context.value(self.weight),
            None,
            stride=self._stride,
            dilation=self._dilation,
            groups=self.groups,
        )
        pads = []
        for axis, (field, interval) in enumerate(zip(self.fields, box, strict=True)):
            low, high = field.written(read[axis])
            start = min(max(interval[0], low), interval[1])
            stop = max(start, min(interval[1], high))
            y = y.narrow(axis + 2, start - low if start < stop else 0, stop - start)
            pads.append((start - interval[0], interval[1] - stop))
        y = _padded(y, pads)  # what no input writes to
        if self.bias is not None:
            y = y + context.value(self.bias).to(y.dtype).reshape(1, -1, *(1 for _ in box))
        return y


class Pooling(_Kernel):
    """The largest or the mean entry of pooling windows.

    Args:
        kind: "max" or "mean".
        ends: for means, where the padding behind ends on each axis: entries beyond it do not count
            to a window's size, as with ``ceil_mode``.
        include_pad: means count the padding.
        divisor: what sums are divided by instead of the size of the window.
    """

    def __init__(
        self,
        node: fx.Node,
        source: fx.Node,
        fields: Sequence[ReceptiveField],
        kind: str,
        *,
        ends: Sequence[int] = (),
        include_pad: bool = True,
        divisor: int | None = None,
    ) -> None:
        super().__init__(node, source, fields)
        self.kind, self.ends = kind, tuple(ends)
        self.include_pad, self.divisor = include_pad, divisor

    def run(self, box: Box, context: Context) -> Tensor:
        """Pool, with padding at the border."""
        x, rank = self._input(context, box), len(box)
        pads = [field.outside(each) for field, each in zip(self.fields, box, strict=True)]
        kernel = tuple(field.kernel for field in self.fields)
        if self.kind == "max":
            lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
            pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
            result: Tensor = pool(_padded(x, pads, lowest), kernel, self._stride, 0, self._dilation)
            return result
        mean: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        result = mean(_padded(x, pads), kernel, self._stride)
        if self.divisor is not None:
            return result * (math.prod(kernel) / self.divisor)
        for axis, (field, interval, end) in enumerate(
            zip(self.fields, box, self.ends, strict=True)
        ):
            counts = self._counts(field, interval, end)
            if all(count == field.kernel for count in counts):
                continue
            ratio = [field.kernel / count for count in counts]
            factor = torch.tensor(ratio, dtype=result.dtype, device=result.device)
            result = result * factor.reshape([-1 if a == axis + 2 else 1 for a in range(rank + 2)])
        return result

    def _counts(self, field: ReceptiveField, interval: Interval, end: int) -> list[int]:
        """Return the number of entries that each window along one axis counts."""
        counts = []
        for at in range(*interval):
            low = at * field.stride - field.padding
            high = min(low + field.kernel, end)
            if not self.include_pad:
                low, high = max(low, 0), min(high, field.size)
            counts.append(max(1, high - low))
        return counts


class ResampleForm(Form):
    """Every entry is an input, a constant, or a mixture of inputs, axis by axis.

    Interpolation, padding and cropping; ``constant`` is what -1 in the indices stands for.
    """

    def __init__(
        self, node: fx.Node, source: fx.Node, sources: Sequence[Resampling], constant: float = 0.0
    ) -> None:
        super().__init__(node)
        self.source, self.sources, self.constant = source, tuple(sources), constant
        self.cheap = all(each.weights is None for each in sources)

    def input_boxes(self, box: Box) -> InputBoxes:
        """The receptive field."""
        return {self.source: self._reads(box)}

    def run(self, box: Box, context: Context) -> Tensor:
        """Run the operator on the boxes."""
        read = self._reads(box)
        x = context.part(self.source, read)
        for axis in reversed(range(len(box))):  # in torch's order, so that Inf and NaN agree
            source = self.sources[axis].local(box[axis], read[axis])
            x = _mixed(x, axis + 2, source, self.constant)
        return x

    def _reads(self, box: Box) -> Box:
        pairs = zip(self.sources, box, strict=True)
        # a box of constants still reads one entry, for dtype and device
        return tuple(w if w[0] < w[1] else (0, 1) for w in (s.reads(r) for s, r in pairs))


def _mixed(x: Tensor, axis: int, source: Resampling, constant: float) -> Tensor:
    length = source.indices.shape[1]
    if source.identity and length == x.shape[axis]:
        return x
    taps = []
    for tap, row in enumerate(source.indices):
        index = torch.from_numpy(row.clip(0)).to(x.device)
        picked = x.index_select(axis, index)
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        if source.weights is not None:
            weights = torch.from_numpy(source.weights[tap].copy()).to(x.device, x.dtype)
            picked = picked * weights.reshape(shape)
        elif (row < 0).any():
            empty = torch.from_numpy(row < 0).to(x.device).reshape(shape)
            picked = picked.masked_fill(empty, constant)
        taps.append(picked)
    total = taps[0]
    for picked in taps[1:]:
        total = total + picked
    return total


def _native_padding(field: ReceptiveField, interval: Interval) -> int:
    """Return the padding along one axis that the convolution operator itself adds.

    It adds as much in front as behind, and the surplus is cut off; otherwise the input is padded,
    which copies it. With a graph nothing is cut, as its gradient of 0 makes NaN of an Inf.
    """
    start, stop = field.inside(interval)
    front, behind = field.outside(interval)
    if start == stop or (front != behind and torch.is_grad_enabled()):
        return 0
    most = max(front, behind)
    wasted = (most - front) % field.stride
    return most if not wasted else 0


def _padded(x: Tensor, pads: Sequence[Interval], value: float = 0.0) -> Tensor:
    """Add entries before and behind each spatial axis."""
    flat = [size for pair in reversed(pads) for size in pair]  # the last axis comes first
    return F.pad(x, flat, value=value) if any(flat) else x


class Shuffled(Form):
    """A pixel shuffle, which makes a block of pixels of each, or its inverse.

    Args:
        node: the operator; it is called on the blocks that a box touches.
        source: the input map.
        factor: the length of a block.
        up: channels become space.
    """

    cheap = True

    def __init__(self, node: fx.Node, source: fx.Node, factor: int, *, up: bool) -> None:
        super().__init__(node)
        self.source, self.factor, self.up = source, factor, up

    def input_boxes(self, box: Box) -> InputBoxes:
        """The pixels whose blocks the box touches, or the blocks that become its pixels."""
        n = self.factor
        if self.up:
            return {self.source: tuple((low // n, -(-high // n)) for low, high in box)}
        return {self.source: tuple((low * n, high * n) for low, high in box)}

    def run(self, box: Box, context: Context) -> Tensor:
        """Shuffle, and cut blocks that are in the box in part."""
        read = self.input_boxes(box)[self.source]
        assert callable(self.node.target)
        x: Tensor = self.node.target(context.part(self.source, read), self.factor)
        for axis, ((low, high), (start, _)) in enumerate(zip(box, read, strict=True)):
            if self.up:
                x = x.narrow(axis + 2, low - start * self.factor, high - low)
        return x
