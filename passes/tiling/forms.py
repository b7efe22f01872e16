"""How one recorded operator computes a part of its result from parts of its inputs.

A :class:`Form` belongs to one node of a recorded graph. It says which regions of its inputs a
region of its result takes, and computes that region: with the operator's own padding where the
region touches the border of the whole tensor, and nowhere else. Tensors are (N, C, *spatial); a
region has a window for each spatial axis, batch and channels are always whole.
"""

from __future__ import annotations

__all__ = ["Context", "Convolution", "Form", "Mixing", "Pointwise", "Pooling", "Transposed"]

import abc
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pocketize.passes.tiling.intervals import Reach, Region, Source, Window

Needs = dict[fx.Node, Region]


class Context(Protocol):
    """What a form reads its inputs from."""

    def part(self, node: fx.Node, region: Region) -> Tensor:
        """Return a region of a result, which was asked for by ``needs``."""

    def value(self, node: fx.Node) -> Any:
        """Return a result that is no map: a weight, a vector, a number."""

    def statistics(self, node: fx.Node) -> Tensor:
        """Return what was gathered for a norm."""


class Form(abc.ABC):
    """A local form of an operator.

    Attributes:
        node: the recorded operator.
        cheap: it costs no more than reading its inputs, so that computing it again beats keeping
            it.
    """

    cheap = False

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @abc.abstractmethod
    def needs(self, region: Region) -> Needs:
        """Return the regions of the inputs that a region of the result takes."""

    @abc.abstractmethod
    def run(self, region: Region, context: Context) -> Tensor:
        """Compute a region of the result."""


class Pointwise(Form):
    """Every entry depends on the entries at its own place, over all channels.

    Args:
        node: the operator; it is called with its own arguments, tensors cut to the region.
        maps: the tensor arguments that are maps of the result's size, or of size 1 on some axes.
    """

    cheap = True

    def __init__(self, node: fx.Node, maps: Sequence[fx.Node]) -> None:
        super().__init__(node)
        self.maps = {source: _spatial(source) for source in maps}

    def needs(self, region: Region) -> Needs:
        """See :meth:`Form.needs`."""
        return {source: _broadcast(region, sizes) for source, sizes in self.maps.items()}

    def run(self, region: Region, context: Context) -> Tensor:
        """See :meth:`Form.run`."""

        def local(source: fx.Node) -> Any:
            if source in self.maps:
                return context.part(source, _broadcast(region, self.maps[source]))
            return context.value(source)

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), local)
        result: Tensor = self.call(args, kwargs, region)
        return result

    def call(self, args: Any, kwargs: Any, region: Region) -> Any:
        """Call the operator on the parts."""
        assert callable(self.node.target)
        return self.node.target(*args, **kwargs)


class _Weighted(Form):
    """A convolution of either direction.

    Args:
        node: the operator.
        source: the input map.
        weight: the node of the weight.
        bias: the node of the bias, or None.
        reaches: one for each spatial axis; of a transposed convolution those of the one that it
            transposes.
        groups: of the operator.
    """

    def __init__(
        self,
        node: fx.Node,
        source: fx.Node,
        weight: fx.Node,
        bias: fx.Node | None,
        reaches: Sequence[Reach],
        groups: int,
    ) -> None:
        super().__init__(node)
        self.source, self.weight, self.bias = source, weight, bias
        self.reaches, self.groups = tuple(reaches), groups


class Convolution(_Weighted):
    """A convolution, strided or dilated, with zeros around the map."""

    def needs(self, region: Region) -> Needs:
        """See :meth:`Form.needs`."""
        return {self.source: _needed(self.reaches, region)}

    def run(self, region: Region, context: Context) -> Tensor:
        """See :meth:`Form.run`."""
        x = _input(context, self.source, self.reaches, region)
        native = [
            _native(reach, window) for reach, window in zip(self.reaches, region, strict=True)
        ]
        pads: list[int] = []
        for reach, window, by_operator in zip(self.reaches, region, native, strict=True):
            pads = [*((0, 0) if by_operator else reach.outside(window)), *pads]
        x = F.pad(x, pads) if any(pads) else x
        weight = context.value(self.weight)
        bias = None if self.bias is None else context.value(self.bias)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(region) - 1]
        y = convolve(
            x,
            weight,
            bias,
            stride=tuple(reach.stride for reach in self.reaches),
            padding=tuple(native),
            dilation=tuple(reach.dilation for reach in self.reaches),
            groups=self.groups,
        )
        for axis, (reach, window, by_operator) in enumerate(
            zip(self.reaches, region, native, strict=True)
        ):
            if by_operator:  # which pads both ends; one of them may be no border
                skip = (by_operator - reach.outside(window)[0]) // reach.stride
                y = y.narrow(axis + 2, skip, window[1] - window[0])
        return y


class Transposed(_Weighted):
    """A transposed convolution."""

    def needs(self, region: Region) -> Needs:
        """See :meth:`Form.needs`."""
        return {self.source: self._writers(region)}

    def run(self, region: Region, context: Context) -> Tensor:
        """See :meth:`Form.run`."""
        read = self._writers(region)
        x = context.part(self.source, read)
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[
            len(region) - 1
        ]
        y = convolve(
            x,
            context.value(self.weight),
            None,
            stride=tuple(reach.stride for reach in self.reaches),
            dilation=tuple(reach.dilation for reach in self.reaches),
            groups=self.groups,
        )
        pads: list[int] = []
        for axis, (reach, window) in enumerate(zip(self.reaches, region, strict=True)):
            low, high = reach.written(read[axis])
            start = min(max(window[0], low), window[1])
            stop = max(start, min(window[1], high))
            y = y.narrow(axis + 2, start - low if start < stop else 0, stop - start)
            pads = [start - window[0], window[1] - stop, *pads]  # the last axis comes first
        if any(pads):
            y = F.pad(y, pads)  # what no input writes to
        if self.bias is not None:
            y = y + context.value(self.bias).to(y.dtype).reshape(1, -1, *(1 for _ in region))
        result: Tensor = y
        return result

    def _writers(self, region: Region) -> Region:
        read = []
        for reach, window in zip(self.reaches, region, strict=True):
            low, high = reach.writers(window)
            if low == high:  # nothing writes there; one entry keeps the shapes alive
                low = min(low, reach.size - 1)
                high = low + 1
            read.append((low, high))
        return tuple(read)


class Pooling(Form):
    """The largest or the mean entry of windows.

    Args:
        node: the operator.
        source: the input map.
        reaches: one for each spatial axis.
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
        reaches: Sequence[Reach],
        kind: str,
        *,
        ends: Sequence[int] = (),
        include_pad: bool = True,
        divisor: int | None = None,
    ) -> None:
        super().__init__(node)
        self.source, self.reaches, self.kind = source, tuple(reaches), kind
        self.ends, self.include_pad, self.divisor = tuple(ends), include_pad, divisor

    def needs(self, region: Region) -> Needs:
        """See :meth:`Form.needs`."""
        return {self.source: _needed(self.reaches, region)}

    def run(self, region: Region, context: Context) -> Tensor:
        """See :meth:`Form.run`."""
        x = _input(context, self.source, self.reaches, region)
        kernel = tuple(reach.kernel for reach in self.reaches)
        stride = tuple(reach.stride for reach in self.reaches)
        rank = len(region)
        if self.kind == "max":
            lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
            x = _padded(x, self.reaches, region, lowest)
            dilation = tuple(reach.dilation for reach in self.reaches)
            pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
            result: Tensor = pool(x, kernel, stride, 0, dilation)
            return result
        x = _padded(x, self.reaches, region, 0.0)
        mean: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        result = mean(x, kernel, stride)
        size = 1
        for reach in self.reaches:
            size *= reach.kernel
        for axis, (reach, window, end) in enumerate(
            zip(self.reaches, region, self.ends, strict=True)
        ):
            counts = self._counts(reach, window, end)
            if self.divisor is None and all(count == reach.kernel for count in counts):
                continue
            ratio = [reach.kernel / count if self.divisor is None else 1.0 for count in counts]
            factor = torch.tensor(ratio, dtype=result.dtype, device=result.device)
            result = result * factor.reshape([-1 if a == axis + 2 else 1 for a in range(rank + 2)])
        return result * (size / self.divisor) if self.divisor is not None else result

    def _counts(self, reach: Reach, window: tuple[int, int], end: int) -> list[int]:
        """Return how many entries each window along one axis counts."""
        counts = []
        for place in range(*window):
            low = place * reach.stride - reach.padding
            high = min(low + reach.kernel, end)
            if not self.include_pad:
                low, high = max(low, 0), min(high, reach.size)
            counts.append(max(1, high - low))
        return counts


class Mixing(Form):
    """Every entry is an input, a constant, or a mixture of inputs, axis by axis.

    Interpolation, padding and cropping.

    Args:
        node: the operator.
        source: the input map.
        sources: one for each spatial axis.
        constant: what -1 in the indices stands for.
    """

    def __init__(
        self, node: fx.Node, source: fx.Node, sources: Sequence[Source], constant: float = 0.0
    ) -> None:
        super().__init__(node)
        self.source, self.sources, self.constant = source, tuple(sources), constant
        self.cheap = all(each.weights is None for each in sources)

    def needs(self, region: Region) -> Needs:
        """See :meth:`Form.needs`."""
        return {self.source: self._reads(region)}

    def run(self, region: Region, context: Context) -> Tensor:
        """See :meth:`Form.run`."""
        read = self._reads(region)
        x = context.part(self.source, read)
        for axis in reversed(range(len(region))):  # as torch does it, so that Inf has the same fate
            source = self.sources[axis].local(region[axis], read[axis])
            x = _mixed(x, axis + 2, source, self.constant)
        return x

    def _reads(self, region: Region) -> Region:
        pairs = zip(self.sources, region, strict=True)
        # a region of nothing but constants still needs something to take dtype and device from
        return tuple(w if w[0] < w[1] else (0, 1) for w in (s.reads(r) for s, r in pairs))


def _mixed(x: Tensor, axis: int, source: Source, constant: float) -> Tensor:
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


def _native(reach: Reach, window: Window) -> int:
    """Return the padding that a convolution can be told to add itself along one axis.

    It adds as much in front as behind, and what that makes too much is cut from the result; only
    where it cannot is the input copied to be padded. The copy would be as large as the input. With
    a graph nothing is cut, as its gradient of 0 would make NaN of an Inf in the input.
    """
    start, stop = reach.inside(window)
    front, behind = reach.outside(window)
    if start == stop or (front != behind and torch.is_grad_enabled()):
        return 0
    most = max(front, behind)
    wasted = (most - front) % reach.stride
    return most if not wasted else 0


def _inside(reaches: Sequence[Reach], region: Region) -> Region:
    return tuple(reach.inside(window) for reach, window in zip(reaches, region, strict=True))


def _needed(reaches: Sequence[Reach], region: Region) -> Region:
    return tuple(reach.needed(window) for reach, window in zip(reaches, region, strict=True))


def _input(context: Context, source: fx.Node, reaches: Sequence[Reach], region: Region) -> Tensor:
    """Return the part of the input that is read, which may be empty."""
    x = context.part(source, _needed(reaches, region))
    for axis, (low, high) in enumerate(_inside(reaches, region)):
        if low == high:
            x = x.narrow(axis + 2, 0, 0)
    return x


def _padded(x: Tensor, reaches: Sequence[Reach], region: Region, value: float) -> Tensor:
    """Add the operator's padding where a region touches the border."""
    pads: list[int] = []
    for reach, window in zip(reaches, region, strict=True):
        pads = [*reach.outside(window), *pads]  # the last axis comes first
    return F.pad(x, pads, value=value) if any(pads) else x


def _spatial(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape[2:])


def _broadcast(region: Region, sizes: Sequence[int]) -> Region:
    """Return a region in a map that may have size 1 on some axes."""
    return tuple(
        window if size != 1 else (0, 1) for window, size in zip(region, sizes, strict=True)
    )
