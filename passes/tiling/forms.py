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
    "OutOfPlace",
    "Pointwise",
    "Pooling",
    "ResampleForm",
    "SplitPart",
    "Transposed",
]

import abc
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

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
    """A local form of an operator.

    Attributes:
        node: the traced operator.
        cheap: it costs no more than reading its inputs, so that it is computed again rather than
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
    """

    cheap = True

    def __init__(self, node: fx.Node, maps: Sequence[fx.Node]) -> None:
        super().__init__(node)
        self.maps = {source: tuple(source.meta["val"].shape[2:]) for source in maps}

    def input_boxes(self, box: Box) -> InputBoxes:
        """The receptive field."""
        return {source: _broadcast(box, sizes) for source, sizes in self.maps.items()}

    def run(self, box: Box, context: Context) -> Tensor:
        """Run the operator on the boxes."""

        def local(source: fx.Node) -> Any:
            if source in self.maps:
                return context.part(source, _broadcast(box, self.maps[source]))
            return context.value(source)

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), local)
        result: Tensor = self.call(args, kwargs, box)
        return result

    def call(self, args: Any, kwargs: Any, box: Box) -> Any:
        """Call the operator on the parts."""
        assert callable(self.node.target)
        return self.node.target(*args, **kwargs)


class _Kernel(Form):
    """Moves a kernel over one input map, with a receptive field for each spatial axis."""

    def __init__(self, node: fx.Node, source: fx.Node, fields: Sequence[ReceptiveField]) -> None:
        super().__init__(node)
        self.source, self.fields = source, tuple(fields)

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

    def run(self, box: Box, context: Context) -> Tensor:
        """Convolve, with padding at the border."""
        x = self._input(context, box)
        rows = list(zip(self.fields, box, strict=True))
        native = [_native_padding(field, interval) for field, interval in rows]
        pads: list[int] = []
        for (field, interval), by_operator in zip(rows, native, strict=True):
            pads = [*((0, 0) if by_operator else field.outside(interval)), *pads]
        x = F.pad(x, pads) if any(pads) else x
        weight = context.value(self.weight)
        bias = None if self.bias is None else context.value(self.bias)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(box) - 1]
        y = convolve(
            x,
            weight,
            bias,
            stride=tuple(field.stride for field in self.fields),
            padding=tuple(native),
            dilation=tuple(field.dilation for field in self.fields),
            groups=self.groups,
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

    def run(self, box: Box, context: Context) -> Tensor:
        """Convolve, and cut or pad to the box."""
        read = self.input_boxes(box)[self.source]
        x = context.part(self.source, read)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(box) - 1]
        y: Tensor = convolve(
            x,
            context.value(self.weight),
            None,
            stride=tuple(field.stride for field in self.fields),
            dilation=tuple(field.dilation for field in self.fields),
            groups=self.groups,
        )
        pads: list[int] = []
        for axis, (field, interval) in enumerate(zip(self.fields, box, strict=True)):
            low, high = field.written(read[axis])
            start = min(max(interval[0], low), interval[1])
            stop = max(start, min(interval[1], high))
            y = y.narrow(axis + 2, start - low if start < stop else 0, stop - start)
            pads = [start - interval[0], interval[1] - stop, *pads]  # the last axis comes first
        if any(pads):
            y = F.pad(y, pads)  # what no input writes to
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
        x = self._input(context, box)
        kernel = tuple(field.kernel for field in self.fields)
        stride = tuple(field.stride for field in self.fields)
        rank = len(box)
        if self.kind == "max":
            lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
            x = self._padded(x, box, lowest)
            dilation = tuple(field.dilation for field in self.fields)
            pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
            result: Tensor = pool(x, kernel, stride, 0, dilation)
            return result
        x = self._padded(x, box, 0.0)
        mean: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        result = mean(x, kernel, stride)
        for axis, (field, interval, end) in enumerate(
            zip(self.fields, box, self.ends, strict=True)
        ):
            counts = self._counts(field, interval, end)
            if self.divisor is None and all(count == field.kernel for count in counts):
                continue
            ratio = [field.kernel / count if self.divisor is None else 1.0 for count in counts]
            factor = torch.tensor(ratio, dtype=result.dtype, device=result.device)
            result = result * factor.reshape([-1 if a == axis + 2 else 1 for a in range(rank + 2)])
        size = math.prod(kernel)
        return result * (size / self.divisor) if self.divisor is not None else result

    def _padded(self, x: Tensor, box: Box, value: float) -> Tensor:
        pads: list[int] = []
        for field, interval in zip(self.fields, box, strict=True):
            pads = [*field.outside(interval), *pads]  # the last axis comes first
        return F.pad(x, pads, value=value) if any(pads) else x

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

    It adds as much in front as behind, and the surplus is cut from the result. Otherwise the input
    is padded, which copies it. With a graph nothing is cut, as its gradient of 0 would make NaN of
    an Inf in the input.
    """
    start, stop = field.inside(interval)
    front, behind = field.outside(interval)
    if start == stop or (front != behind and torch.is_grad_enabled()):
        return 0
    most = max(front, behind)
    wasted = (most - front) % field.stride
    return most if not wasted else 0


def _broadcast(box: Box, sizes: Sequence[int]) -> Box:
    """Return a box in a map that may have size 1 on some axes."""
    return tuple(
        interval if size != 1 else (0, 1) for interval, size in zip(box, sizes, strict=True)
    )


class OutOfPlace(Pointwise):
    """The out-of-place overload of an operator that writes into its input."""

    def __init__(self, node: fx.Node, maps: list[fx.Node], target: Any) -> None:
        super().__init__(node, maps)
        self.target = target

    def call(self, args: Any, kwargs: Any, box: Box) -> Any:
        """Call the other overload."""
        return self.target(*args, **kwargs)


class Expanded(Pointwise):
    """A map expanded along axes of size 1, to the size of the box."""

    def call(self, args: Any, kwargs: Any, box: Box) -> Any:
        """Expand the part."""
        x, sizes = args[0], list(self.node.meta["val"].shape)
        return x.expand(*sizes[:2], *(high - low for low, high in box))


class SplitPart(Pointwise):
    """One of several results of an operator that splits channels."""

    def __init__(self, node: fx.Node, maps: list[fx.Node], split: fx.Node, index: int) -> None:
        super().__init__(node, maps)
        self.split, self.index = split, index

    def run(self, box: Box, context: Context) -> Tensor:
        """Split the part and return one of the results."""
        x = context.part(next(iter(self.maps)), box)
        args, kwargs = fx.node.map_arg((self.split.args, self.split.kwargs), lambda _: x)
        assert callable(self.split.target)
        result: Tensor = self.split.target(*args, **kwargs)[self.index]
        return result
