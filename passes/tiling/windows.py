"""Overlapping windows, whose outputs are averaged where they overlap.

The results are those of MONAI's ``SlidingWindowInferer`` (Cardoso et al., "MONAI: An open-source
framework for deep learning in healthcare", 2022) on the same settings, to rounding. Its functions
place and weigh the windows where it is installed; ours do where it is not.
"""

from __future__ import annotations

__all__ = ["WindowForward", "WindowLayout", "importance", "window_starts"]

import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize._torch import without_dispatch_modes
from pocketize.errors import InputError
from pocketize.passes.tiling.slabs import Assembly, OutputParts, PartForward, Volume

#: Standard deviation of the Gaussian, as a part of the window.
_SIGMA = 0.125


class WindowForward(PartForward):
    """A model's forward that runs in overlapping windows.

    Windows are run row by row along the axis that is cut most often. What no later row reaches is
    divided by its weights, reduced and stored, so that no more than one row of the outputs is in
    memory before.
    """

    own_options: ClassVar[frozenset[str]] = frozenset({"batch", "overlap", "weights"})

    def layout(self, volume: Volume) -> WindowLayout:
        """Return where the windows of a volume lie.

        Raises:
            InputError: it has another number of axes.
        """
        window = _per_axis("size", self.tiling.sizes, volume.rank)
        return WindowLayout(volume, window, _per_axis("overlap", self.tiling.overlaps, volume.rank))

    def rows(self, volume: Volume) -> tuple[list[list[tuple[int, ...]]], tuple[int, ...]]:
        """Return rows of windows, with starts in the volume, before its padding."""
        layout = self.layout(volume)
        moved = [
            [tuple(at - pad for at, pad in zip(start, layout.pads, strict=True)) for start in row]
            for row in layout.rows
        ]
        return moved, layout.window

    def first_row(self, volume: Volume, row: int) -> int:
        """Return the first row whose windows overlap those of another."""
        layout = self.layout(volume)
        begins = [each[0][layout.axis] for each in layout.rows]
        size = layout.window[layout.axis]
        return next(each for each, begin in enumerate(begins) if begin + size > begins[row])

    def assembly(
        self, volume: Volume, sample: Tensor, before: Sequence[Any], first: int, **more: Any
    ) -> Assembly:
        """Average the outputs, with weights of their resolution."""
        layout = self.layout(volume)
        full = _importance(layout.window, self.tiling.weights)
        weights = before[-1].weights if before else full
        sizes = tuple(sample.shape[-volume.rank :])
        if tuple(full.shape) == sizes:
            weights = full
        elif tuple(weights.shape) != sizes:  # each coarser one is made of the one before
            weights = F.interpolate(weights[None, None], sizes, mode="nearest-exact")[0, 0]
        return _RowMean(layout, sample, weights, self.first_row(volume, first), first, **more)


def _per_axis(name: str, given: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    if len(given) not in (1, rank):
        raise InputError(
            f"patchwise: {name} has {len(given)} numbers and the input {rank} spatial axes; give "
            "one number for each, or a single one for all"
        )
    return given * rank if len(given) == 1 else given


class WindowLayout:
    """Where the windows lie, in a volume that is padded to at least one window.

    Attributes:
        window: size of a window.
        image: size of the padded volume.
        pads: voxels of padding before the volume.
        axis: the axis along which rows follow each other.
        rows: starts of the windows of each row.
        count: number of windows.
    """

    def __init__(self, volume: Volume, window: tuple[int, ...], overlap: Sequence[float]) -> None:
        self.rank, self.sizes, self.window = volume.rank, volume.sizes, window
        pairs = list(zip(window, volume.sizes, strict=True))
        self.image = tuple(max(pair) for pair in pairs)
        self.pads = tuple(max(0, a - b) // 2 for a, b in pairs)
        steps = [
            a if a == b else max(1, int(a * (1 - part)))
            for a, b, part in zip(window, self.image, overlap, strict=True)
        ]
        starts = window_starts(self.image, window, steps)
        self.axis = max(range(self.rank), key=lambda a: len({start[a] for start in starts}))
        begins = sorted({start[self.axis] for start in starts})
        self.rows = [[s for s in starts if s[self.axis] == begin] for begin in begins]
        self.count = len(starts)


class _RowMean(Assembly):
    """One output of the network, averaged row by row.

    Args:
        layout: where the windows lie.
        sample: what the network returned for a window.
        weights: of the entries of a window's output.
        at: the row that comes first.
        first: the first row that is stored.
        more: storage, finish and name for :class:`OutputParts`.
    """

    def __init__(
        self,
        layout: WindowLayout,
        sample: Tensor,
        weights: Tensor,
        at: int,
        first: int,
        **more: Any,
    ) -> None:
        if not sample.is_floating_point():
            raise InputError(
                f"patchwise: windows that overlap are averaged, and an output of {sample.dtype} "
                "cannot be; return logits, and say reduce='argmax' for labels"
            )
        self.layout, self.weights, self.first = layout, weights, first
        self.dtype, self.wide = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        self.tile = tuple(sample.shape[-layout.rank :])
        sizes = zip(layout.image, self.tile, layout.window, strict=True)
        self.whole = tuple(size * out // window for size, out, window in sizes)
        self.lead = list(sample.shape[: -layout.rank])
        self.crops = [self._crop(axis) for axis in range(layout.rank)]
        self.begins = [self._scaled(row[0][layout.axis], layout.axis) for row in layout.rows[at:]]
        low, high = self.crops[layout.axis]
        axis = layout.axis - layout.rank
        self.parts = OutputParts(axis, high - low, done=self.begin(first), **more)
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, start: Sequence[int], part: Tensor) -> None:
        layout, begin = self.layout, self.begins[0]
        if self.sums is None:
            shape = list(self.whole)
            shape[layout.axis] = self.tile[layout.axis]
            # one sample's leading axes, however many windows ran at once
            lead = [part.shape[0], *self.lead[1:]]
            self.sums = torch.zeros(lead + shape, dtype=self.wide, device=part.device)
            self.counts = torch.zeros(shape, dtype=self.wide, device=part.device)
        assert self.counts is not None
        where: list[Any] = [...]
        for axis, at in enumerate(start):
            place = self._scaled(at + layout.pads[axis], axis)
            place -= begin if axis == layout.axis else 0
            where.append(slice(place, place + self.tile[axis]))
        weights = self.weights.to(part.device, self.wide)
        self.sums[tuple(where)] += part.to(self.wide) * weights
        self.counts[tuple(where)] += weights

    def begin(self, row: int) -> int:
        layout, (low, high) = self.layout, self.crops[self.layout.axis]
        if row == len(layout.rows):
            return high - low
        place = self._scaled(layout.rows[row][0][layout.axis], layout.axis)
        return min(max(place, low), high) - low

    def end_row(self, row: int) -> None:
        """Store what no later row reaches."""
        layout = self.layout
        assert self.sums is not None
        assert self.counts is not None
        begin = self.begins[0]
        last = row == len(layout.rows) - 1
        axis, size = layout.axis - layout.rank, self.tile[layout.axis]
        end = begin + size if last else self.begins[1]
        done = min(end - begin, size)
        if row >= self.first:
            self._store(begin, done)
        if last:
            return
        del self.begins[0]
        graph = self.sums.requires_grad  # it needs the present sums and counts
        self.sums = _shifted(self.sums, axis, done, copy=graph)
        self.counts = _shifted(self.counts, axis, done, copy=graph)

    def _store(self, begin: int, done: int) -> None:
        assert self.sums is not None
        assert self.counts is not None
        axis = self.layout.axis - self.layout.rank
        sums, counts = self.sums.narrow(axis, 0, done), self.counts.narrow(axis, 0, done)
        mean = sums / counts if sums.requires_grad else sums.div_(counts)
        for each, (low, high) in enumerate(self.crops):
            where = each - self.layout.rank
            if where == axis:
                first = max(low - begin, 0)
                last = max(first, min(high - begin, done))
                mean = mean.narrow(axis, first, last - first)
            else:
                mean = mean.narrow(where, low, high - low)
        if mean.shape[axis]:
            self.parts.add(mean.to(self.dtype))

    def _scaled(self, at: int, axis: int) -> int:
        return at * self.tile[axis] // self.layout.window[axis]

    def _crop(self, axis: int) -> tuple[int, int]:
        """Return the part of an axis that is no padding of the volume."""
        layout = self.layout
        if layout.sizes[axis] == layout.image[axis]:
            return 0, self.whole[axis]
        zoom = self.whole[axis] / layout.window[axis]
        pad = layout.pads[axis]
        return round(pad * zoom), round((pad + layout.sizes[axis]) * zoom)


def _shifted(tensor: Tensor, axis: int, by: int, *, copy: bool) -> Tensor:
    """Shift along an axis, and fill with zeros."""
    size = tensor.shape[axis]
    if copy:
        shape = list(tensor.shape)
        shape[axis] = by
        return torch.cat([tensor.narrow(axis, by, size - by), tensor.new_zeros(shape)], axis)
    # a row is large: move it without a copy, in pieces that do not overlap their targets
    for at in range(0, size - by, by):
        length = min(by, size - by - at)
        tensor.narrow(axis, at, length).copy_(tensor.narrow(axis, at + by, length))
    tensor.narrow(axis, size - by, by).zero_()
    return tensor


def window_starts(
    image: Sequence[int], window: Sequence[int], steps: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return where windows begin that cover a volume; the last of a row ends with the volume.

    Args:
        image: sizes of the volume, at least the window's.
        window: sizes of a window.
        steps: from one to the next, at least 1.
    """
    monai = _monai()
    if monai is not None:
        slices = monai[0](tuple(image), tuple(window), tuple(steps))
        return [tuple(int(each.start) for each in one) for one in slices]
    axes = []
    for size, length, step in zip(image, window, steps, strict=True):
        count = -(-(size - length) // step) + 1
        axes.append([min(index * step, size - length) for index in range(count)])
    return list(itertools.product(*axes))


@functools.lru_cache(maxsize=8)
def _importance(window: tuple[int, ...], kind: str) -> Tensor:
    with without_dispatch_modes(), torch.inference_mode(False):  # it outlives this call
        return importance(window, kind)


def importance(window: Sequence[int], kind: str) -> Tensor:
    """Return the weights of a window's voxels, float32.

    Args:
        window: its sizes.
        kind: "constant", or "gaussian" with a standard deviation of an eighth of the window and
            no weight below a thousandth.
    """
    monai = _monai()
    if monai is not None:
        made: Tensor = monai[1](tuple(window), mode=kind, sigma_scale=_SIGMA).float()
        return made.expand(tuple(window))
    if kind == "constant":
        return torch.ones(tuple(window))
    weights = torch.ones(())
    for size in window:
        places = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        one = torch.exp(-places.square() / (2 * (_SIGMA * size) ** 2))
        weights = weights.unsqueeze(-1) * one
    return weights.clamp_min(max(float(weights.min()), 1e-3))


@functools.cache
def _monai() -> tuple[Any, Any] | None:
    """Return MONAI's functions that place and weigh windows; None where it is not installed."""
    try:
        from monai.data.utils import compute_importance_map, dense_patch_slices
    except ImportError:
        return None
    return dense_patch_slices, compute_importance_map
