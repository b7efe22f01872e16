"""Volumes outside of torch that are read box by box."""

from __future__ import annotations

__all__ = ["FakeVolume", "Prepare", "SourceBuffer", "VolumeSource", "block_index", "boxes"]

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pocketize.errors import InputError
from pocketize.graph.inputs import as_plain
from pocketize.passes.tiling.intervals import Box, cut, is_empty
from pocketize.passes.tiling.storage import Buffer

#: ``prepare`` is checked on a corner of each part, of so many voxels along each axis.
_CORNER = 4
#: How far ``prepare`` of a part may be from the part of ``prepare``, relative to the largest value.
_TOLERANCE = 1e-4

Prepare = Callable[[Tensor], Tensor]


def block_index(box: Box, *, channels: bool) -> tuple[slice, ...]:
    """Return slices of a volume (*spatial), or with channels (C, *spatial)."""
    index = tuple(slice(low, high) for low, high in box)
    return (slice(None), *index) if channels else index


def boxes(shape: Sequence[int], block: Sequence[int]) -> Iterator[Box]:
    """Yield boxes of a size that cover a volume of spatial sizes, the last ones smaller."""
    axes = [
        [(low, min(low + size, full)) for low in range(0, full, size)]
        for full, size in zip(shape, block, strict=True)
    ]
    yield from itertools.product(*axes)


class VolumeSource:
    """A volume that is read box by box, and prepared for a network.

    Args:
        source: anything with ``shape``, ``dtype`` and slicing; or a list of those of one shape, one
            for each channel.
        rank: number of spatial axes; a source has as many, or one for channels before them.
        device: where a network works.
        dtype: of the network's input.
        prepare: applied to each part.
        pad_to: zeros follow at the end of each axis, after ``prepare``, up to a multiple of this.

    Raises:
        InputError: it has no shape, another number of axes, no voxels, or no real numbers.
    """

    def __init__(
        self,
        source: Any,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
        prepare: Prepare | None = None,
        pad_to: int | Sequence[int] = 1,
    ) -> None:
        self.parts = list(source) if isinstance(source, list | tuple) else [source]
        self.parts = [_as_array(part) for part in self.parts]
        self.device, self.dtype, self.prepare = device, dtype, prepare
        self._work: Any = np.float64 if dtype == torch.float64 else np.float32
        shapes = [tuple(map(int, part.shape)) for part in self.parts]
        if not shapes or any(shape != shapes[0] for shape in shapes):
            raise InputError(
                f"run_volume: a list of sources has volumes of one shape, one for each channel, "
                f"got {shapes}"
            )
        shape = shapes[0]
        self._channels = len(shape) == rank + 1 and len(shapes) == 1
        if len(shape) != rank and not self._channels:
            several = " in a list" if len(shapes) > 1 else " or (C, *spatial)"
            raise InputError(
                f"run_volume: a source of shape {shape} does not fit {rank} spatial axes: expected "
                f"(*spatial){several}, without a batch; take an index, or say size with one number "
                "for each spatial axis"
            )
        channels = shape[0] if self._channels else len(shapes)
        #: spatial sizes of the source
        self.sizes = shape[1:] if self._channels else shape
        if 0 in shape:
            raise InputError(f"run_volume: a source of shape {shape} has no voxels")
        multiples = (pad_to,) * rank if isinstance(pad_to, int) else tuple(pad_to)
        if len(multiples) != rank or min(multiples) < 1:
            raise InputError(
                f"run_volume: pad_to is a number of at least 1, or one for each of {rank} axes, "
                f"got {pad_to}"
            )
        rows = zip(self.sizes, multiples, strict=True)
        #: (1, C, *spatial), padded
        self.shape = (1, channels, *(-(-size // multiple) * multiple for size, multiple in rows))

    def axes_text(self) -> str:
        """Say how many axes are taken for spatial, where the first one is not; else ``""``."""
        if not self._channels:
            return ""
        axes = len(self.sizes)
        return f" ({axes} spatial {'axis' if axes == 1 else 'axes'}; the first is that of channels)"

    def read(self, box: Box) -> Tensor:
        """Return a box (1, C, *box) as the network sees it."""
        inner = tuple(
            (min(low, size), min(high, size))
            for (low, high), size in zip(box, self.sizes, strict=True)
        )
        wanted = [high - low for low, high in box]
        if is_empty(inner):
            return torch.zeros([*self.shape[:2], *wanted], device=self.device, dtype=self.dtype)
        part = self._read(inner)
        pads = [n - have for n, have in zip(wanted, part.shape[2:], strict=True)]
        return pad(part, [n for last in reversed(pads) for n in (0, last)]) if any(pads) else part

    def _read(self, box: Box) -> Tensor:
        index = block_index(box, channels=self._channels)
        # a copy, in an order and of a dtype that torch knows
        arrays = [np.array(part[index], dtype=self._work, order="C") for part in self.parts]
        array = arrays[0] if self._channels else np.stack(arrays)
        expected = (self.shape[1], *(high - low for low, high in box))
        if array.shape != expected:
            raise InputError(
                f"run_volume: the source returned {array.shape} for a box of {expected}; it must "
                "be sliced as a NumPy array is"
            )
        raw = torch.from_numpy(array)[None].to(self.device)
        if self.prepare is None:
            return raw.to(self.dtype)
        corner = tuple((0, min(_CORNER, size)) for size in raw.shape[2:])
        kept = cut(raw, corner).clone()  # prepare may write into its argument
        made = self._prepared(raw)
        _check_pointwise(self._prepared(kept), cut(made, corner))
        return made.to(self.dtype)

    def _prepared(self, raw: Tensor) -> Tensor:
        assert self.prepare is not None
        shape = raw.shape
        made = self.prepare(raw)
        if not isinstance(made, Tensor) or made.shape != shape:
            got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise InputError(
                f"run_volume: prepare takes a tensor (1, C, *box) and returns one of the same "
                f"shape, got {got} for {list(shape)}"
            )
        return made


def _check_pointwise(alone: Tensor, among: Tensor) -> None:
    """Compare a corner of a part, prepared alone, with that of the prepared part."""
    finite = among[among.isfinite()]
    limit = _TOLERANCE * float(finite.abs().max()) if finite.numel() else 0.0
    if not torch.allclose(alone.double(), among.double(), _TOLERANCE, limit, equal_nan=True):
        raise InputError(
            "run_volume: prepare gives other values for a corner of a part than for the part; it "
            "must compute each voxel from that voxel alone. Compute means, deviations and "
            "percentiles of the volume before, and let prepare use these numbers"
        )


def _as_array(source: Any) -> Any:
    if isinstance(source, Tensor):
        source = as_plain(source).detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    lacking = [n for n in ("shape", "dtype", "__getitem__") if not hasattr(source, n)]
    if lacking:
        raise InputError(
            f"run_volume: a source has shape, dtype and slicing; {type(source).__name__} has no "
            f"{', '.join(lacking)}. Open a file first: numpy.load(..., mmap_mode='r'), "
            "nibabel.load(...).dataobj, zarr.open(...)"
        )
    if np.dtype(source.dtype).kind not in "fiub":
        raise InputError(f"run_volume: a source of {source.dtype} has no real numbers")
    return source


class SourceBuffer(Buffer):
    """An input of a network, read from a source."""

    def __init__(self, source: VolumeSource) -> None:
        super().__init__(torch.empty(0), source.device, source.dtype)
        self.source = source

    def read(self, box: Box) -> Tensor:
        """Return a box, prepared."""
        return self.source.read(box)


class FakeVolume(Buffer):
    """Takes the place of a source or a sink where values do not matter."""

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(torch.empty(0), device, dtype)
        self.shape = tuple(shape)

    def read(self, box: Box) -> Tensor:
        """Return a box without values."""
        sizes = [high - low for low, high in box]
        return torch.empty([*self.shape[:2], *sizes], device=self.device, dtype=self.dtype)

    def write(self, box: Box, part: Tensor) -> None:
        """Drop a box."""
