"""Overlapping windows, whose outputs are averaged where they overlap.

The results are those of MONAI's ``SlidingWindowInferer`` (Cardoso et al., "MONAI: An open-source
framework for deep learning in healthcare", 2022) on the same settings, to rounding.
"""

from __future__ import annotations

__all__ = ["WindowForward", "Windows", "importance", "window_starts"]

import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize._torch import without_dispatch_modes
from pocketize.errors import InputError
from pocketize.passes.tiling.forward import Tiling
from pocketize.passes.tiling.slabs import Assembly, Layout, PartForward, Volume

#: Standard deviation of the Gaussian, as a part of the window.
_SIGMA = 0.125


class WindowForward(PartForward):
    """A model's forward that runs in overlapping windows.

    Windows are run row by row along the axis that is cut most often. What no later row reaches is
    divided by its weights, reduced and stored, so that no more than one row of the outputs is in
    memory before.
    """

    own_options: ClassVar[frozenset[str]] = frozenset({"batch", "overlap", "weights"})

    def layout(self, volume: Volume) -> Windows:
        """Cut into windows."""
        return Windows(volume, self.tiling)


def _per_axis(name: str, given: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    if len(given) not in (1, rank):
        raise InputError(
            f"patchwise: {name} has {len(given)} numbers and the input {rank} spatial axes; give "
            "one number for each, or a single one for all"
        )
    return given * rank if len(given) == 1 else given


class Windows(Layout):
    """Where the windows lie, in a volume that is padded to at least one window.

    Attributes:
        image: size of the padded volume.
        pads: voxels of padding before the volume.
        kind: of the weights.
    """

    def __init__(self, volume: Volume, tiling: Tiling) -> None:
        self.volume, self.kind = volume, tiling.weights
        self.sizes = _per_axis("size", tiling.sizes, volume.rank)
        overlap = _per_axis("overlap", tiling.overlaps, volume.rank)
        pairs = list(zip(self.sizes, volume.sizes, strict=True))
        self.image = tuple(max(pair) for pair in pairs)
        self.pads = tuple(max(0, a - b) // 2 for a, b in pairs)
        steps = [
            a if a == b else max(1, int(a * (1 - part)))
            for a, b, part in zip(self.sizes, self.image, overlap, strict=True)
        ]
        starts = [
            tuple(at - pad for at, pad in zip(start, self.pads, strict=True))
            for start in window_starts(self.image, self.sizes, steps)
        ]
        self.axis = max(range(volume.rank), key=lambda a: len({start[a] for start in starts}))
        begins = sorted({start[self.axis] for start in starts})
        self.rows = [[s for s in starts if s[self.axis] == begin] for begin in begins]

    def first_row(self, row: int) -> int:
        """Return the first row whose windows overlap those of another."""
        begins, size = [each[0][self.axis] for each in self.rows], self.sizes[self.axis]
        return next(each for each, begin in enumerate(begins) if begin + size > begins[row])

    def assembly(self, sample: Tensor, before: Sequence[Any], first: int, **more: Any) -> Assembly:
        """Average the outputs, with weights of their resolution."""
        full = _importance(self.sizes, self.kind)
        weights = before[-1].weights if before else full
        sizes = tuple(sample.shape[-self.volume.rank :])
        if tuple(full.shape) == sizes:
            weights = full
        elif tuple(weights.shape) != sizes:  # each coarser one is made of the one before
            weights = F.interpolate(weights[None, None], sizes, mode="nearest-exact")[0, 0]
        return _RowMean(self, sample, weights, first, **more)


class _RowMean(Assembly):
    """One output of the network, averaged row by row, with ``weights`` of a window's entries."""

    def __init__(
        self, layout: Windows, sample: Tensor, weights: Tensor, first: int, **more: Any
    ) -> None:
        if not sample.is_floating_point():
            raise InputError(
                f"patchwise: windows that overlap are averaged, and an output of {sample.dtype} "
                "cannot be; return logits, and say reduce='argmax' for labels"
            )
        self.layout, self.weights, rank = layout, weights, layout.volume.rank
        self.dtype, self.wide = sample.dtype, torch.promote_types(sample.dtype, torch.float32)
        self.tile = tuple(sample.shape[-rank:])
        sizes = zip(layout.image, self.tile, layout.sizes, strict=True)
        self.whole = tuple(size * out // window for size, out, window in sizes)
        self.lead = list(sample.shape[:-rank])
        self.crops = [self._crop(axis) for axis in range(rank)]
        places = [self._scaled(row[0], layout.axis) for row in layout.rows]
        low, high = self.crops[layout.axis]
        begins = [min(max(place, low), high) - low for place in places]
        super().__init__(layout.axis - rank, [*begins, high - low], first, **more)
        #: where each row begins that is not done yet
        self.places = places[layout.first_row(first) :]
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, start: Sequence[int], part: Tensor) -> None:
        layout, begin = self.layout, self.places[0]
        if self.sums is None:
            shape = list(self.whole)
            shape[layout.axis] = self.tile[layout.axis]
            # one sample's leading axes, however many windows ran at once
            lead = [part.shape[0], *self.lead[1:]]
            self.sums = torch.zeros(lead + shape, dtype=self.wide, device=part.device)
            self.counts = torch.zeros(shape, dtype=self.wide, device=part.device)
        assert self.counts is not None
        where: list[Any] = [...]
        for axis in range(len(start)):
            place = self._scaled(start, axis) - (begin if axis == layout.axis else 0)
            where.append(slice(place, place + self.tile[axis]))
        weights = self.weights.to(part.device, self.wide)
        self.sums[tuple(where)] += part.to(self.wide) * weights
        self.counts[tuple(where)] += weights

    def end_row(self, row: int) -> None:
        """Store what no later row reaches."""
        assert self.sums is not None
        assert self.counts is not None
        begin, *later = self.places
        size = self.tile[self.layout.axis]
        done = min(later[0] - begin, size) if later else size
        if row >= self.first:
            self._store(begin, done)
        if later:
            self.places = later
            graph = self.sums.requires_grad  # it needs the present sums and counts
            self.sums = _shifted(self.sums, self.axis, done, copy=graph)
            self.counts = _shifted(self.counts, self.axis, done, copy=graph)

    def _store(self, begin: int, done: int) -> None:
        assert self.sums is not None
        assert self.counts is not None
        sums, counts = self.sums.narrow(self.axis, 0, done), self.counts.narrow(self.axis, 0, done)
        mean = sums / counts if sums.requires_grad else sums.div_(counts)
        for axis, (low, high) in enumerate(self.crops, -len(self.crops)):
            if axis == self.axis:
                low = max(low - begin, 0)
                high = max(low, min(high - begin, done))
            mean = mean.narrow(axis, low, high - low)
        if mean.shape[self.axis]:
            self._append(mean.to(self.dtype))

    def _scaled(self, start: Sequence[int], axis: int) -> int:
        """Return where in the output a window begins along an axis."""
        layout = self.layout
        return (start[axis] + layout.pads[axis]) * self.tile[axis] // layout.sizes[axis]

    def _crop(self, axis: int) -> tuple[int, int]:
        """Return the part of an axis that is no padding of the volume."""
        layout, size = self.layout, self.layout.volume.sizes[axis]
        if size == layout.image[axis]:
            return 0, self.whole[axis]
        zoom, pad = self.whole[axis] / layout.sizes[axis], layout.pads[axis]
        return round(pad * zoom), round((pad + size) * zoom)


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
    """Return where windows begin that cover a volume; the last of a row ends with the volume."""
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

    A Gaussian has a standard deviation of an eighth of the window, and no weight is below a
    thousandth.
    """
    if kind == "constant":
        return torch.ones(tuple(window))
    weights = torch.ones(())
    for size in window:
        places = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        one = torch.exp(-places.square() / (2 * (_SIGMA * size) ** 2))
        weights = weights.unsqueeze(-1) * one
    return weights.clamp_min(max(float(weights.min()), 1e-3))
