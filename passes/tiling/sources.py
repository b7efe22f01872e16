"""Volumes outside of torch, read and written box by box: sources, sinks, and their buffers."""

from __future__ import annotations

__all__ = [
    "FakeStorage",
    "FakeVolume",
    "SharedSink",
    "Sink",
    "SinkStorage",
    "SourceBuffer",
    "VolumeSource",
    "block_index",
    "boxes",
]

import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketize.errors import InputError
from pocketize.graph.inputs import as_plain
from pocketize.passes.tiling.intervals import Box
from pocketize.passes.tiling.processes import TileGroup
from pocketize.passes.tiling.storage import Buffer, Storage

#: Parts with more than one value on which ``prepare`` is checked.
_CHECKED = 3
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


# -- sources ---------------------------------------------------------------------------------------


class VolumeSource:
    """A volume that is read box by box, and prepared for a network.

    Args:
        source: anything with ``shape``, ``dtype`` and slicing; or a list of those of one shape, one
            for each channel.
        rank: number of spatial axes; a source has as many, or one for channels before them.
        device: where a network works.
        dtype: of the network's input.
        prepare: applied to each part.

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
    ) -> None:
        self.parts = list(source) if isinstance(source, list | tuple) else [source]
        self.parts = [_as_array(part) for part in self.parts]
        self.device, self.dtype, self.prepare = device, dtype, prepare
        self._work: Any = np.float64 if dtype == torch.float64 else np.float32
        self._checks = _CHECKED if prepare is not None else 0
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
        #: (1, C, *spatial)
        self.shape = (1, channels, *(shape[1:] if self._channels else shape))
        if 0 in self.shape:
            raise InputError(f"run_volume: a source of shape {shape} has no voxels")

    def read(self, box: Box) -> Tensor:
        """Return a box (1, C, *box) as the network sees it."""
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
        kept = raw.clone() if self._checks else None  # prepare may write into its argument
        made = self._prepared(raw)
        if kept is not None and bool((kept != kept.flatten()[0]).any()):
            self._checks -= 1
            self._check_pointwise(kept, made)
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

    def _check_pointwise(self, raw: Tensor, made: Tensor) -> None:
        """Compare half of a part, prepared alone, with half of what was made of the part."""
        axis = max(range(2, raw.ndim), key=lambda axis: raw.shape[axis])
        half = raw.shape[axis] // 2
        if not half:
            return
        alone = self._prepared(raw.narrow(axis, 0, half).clone()).double()
        among = made.narrow(axis, 0, half).double()
        limit = _TOLERANCE * float(among[among.isfinite()].abs().max()) if among.numel() else 0.0
        if not torch.allclose(alone, among, rtol=_TOLERANCE, atol=limit, equal_nan=True):
            raise InputError(
                "run_volume: prepare gives other values for half of a part than for the part; it "
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


# -- sinks -----------------------------------------------------------------------------------------


class Sink:
    """A volume that is written box by box.

    Args:
        out: anything with slice assignment, (*spatial) or with ``channels`` (C, *spatial).
        shape: of the volume.
        dtype: what is written, where ``out`` has no dtype.
        channels: whether there are channels.
        on_block: called for each box that is written, with its index and its values.

    Raises:
        InputError: it has another shape, or a dtype that does not hold the values.
    """

    def __init__(
        self,
        out: Any,
        shape: Sequence[int],
        dtype: Any,
        *,
        channels: bool,
        on_block: Callable[[tuple[slice, ...], Any], None] | None = None,
    ) -> None:
        self.out = out.numpy() if isinstance(out, Tensor) else out
        self.channels, self.on_block = channels, on_block
        self.dtype = np.dtype(getattr(self.out, "dtype", dtype))
        given = tuple(map(int, getattr(self.out, "shape", shape)))
        if given != tuple(shape):
            raise InputError(
                f"run_volume: out has shape {given}, and the result has {tuple(shape)}: labels are "
                "(*spatial), everything else (C, *spatial)"
            )
        if not hasattr(self.out, "__setitem__"):
            raise InputError(
                f"run_volume: out must take slice assignment, as arrays do, got "
                f"{type(self.out).__name__}"
            )
        wanted = np.dtype(dtype)
        if wanted.kind == "u":
            fits = self.dtype.kind in "iu" and np.can_cast(wanted, self.dtype)
        else:
            fits = self.dtype.kind == "f"
        if not fits:
            raise InputError(
                f"run_volume: out has dtype {self.dtype}, which does not hold the result; make it "
                f"{wanted}"
            )

    def write(self, box: Box, part: Tensor) -> None:
        """Write a box (1, C, *box)."""
        part = part[0] if self.channels else part[0, 0]
        part = part.float() if part.dtype == torch.bfloat16 else part
        self.put(box, part.cpu().numpy().astype(self.dtype, copy=False))

    def put(self, box: Box, values: Any) -> None:
        """Write values of a box, and tell so."""
        index = block_index(box, channels=self.channels)
        self.out[index] = values
        if self.on_block is not None:
            self.on_block(index, values)

    def finish(self) -> None:
        """Called when all boxes are written."""


class SharedSink(Sink):
    """A sink that several processes write to, each its own slab.

    Where the slab of a process begins within a chunk, the process before writes to that chunk, too.
    What belongs there is held back, and written when all others are done, one process at a time.

    Raises:
        InputError: processes would not write to the same place, or not safely.
    """

    def __init__(
        self, *args: Any, group: TileGroup, axis: int, slab: tuple[int, int], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.group, self.axis = group, axis
        self._check()
        chunks = getattr(self.out, "shards", None) or getattr(self.out, "chunks", None)
        unit = int(chunks[axis + self.channels]) if chunks else 1
        low, high = slab
        #: where chunks begin that no process before writes to
        self.free = min(high, -(-low // unit) * unit)
        self.held: list[tuple[Box, Any]] = []

    def _check(self) -> None:
        kind = f"{type(self.out).__module__}.{type(self.out).__qualname__}"
        if isinstance(self.out, np.memmap) and self.out.mode in ("r+", "w+"):
            hosts = set(self.group.gather(platform.node()))
            problem = (
                f"pages of a memory map are not safe to write from several machines ({len(hosts)})"
                if len(hosts) > 1
                else ""
            )
        else:
            self.group.gather(None)  # as a process that has a memory map does
            chunked = getattr(self.out, "chunks", None) and not kind.startswith("h5py")
            problem = "" if chunked else f"processes cannot write to one {kind} together"
        problems = [each for each in self.group.gather(problem) if each]
        if problems:
            raise InputError(
                f"run_volume: {problems[0]}; with group, open the same zarr array in each process "
                "(zarr.open_array(path, mode='r+')), or on one machine the same memory map"
            )

    def put(self, box: Box, values: Any) -> None:
        """Write values of a box, or hold them back as far as others write to the same chunk."""
        low, high = box[self.axis]
        if low >= self.free:
            super().put(box, values)
            return
        middle = min(max(self.free, low), high)
        for held, (start, stop) in ((True, (low, middle)), (False, (middle, high))):
            if start < stop:
                inner = (*box[: self.axis], (start, stop), *box[self.axis + 1 :])
                cut = [slice(None)] * values.ndim
                cut[self.axis + self.channels] = slice(start - low, stop - low)
                part = values[tuple(cut)]
                if held:
                    self.held.append((inner, part.copy()))
                else:
                    super().put(inner, part)

    def finish(self) -> None:
        """Write what was held back, one process after the other."""
        flush = getattr(self.out, "flush", None)
        for rank in range(self.group.size):
            self.group.gather(None)  # all before are done
            if rank == self.group.rank:
                for box, values in self.held:
                    super().put(box, values)
                self.held.clear()
                if flush is not None:
                    flush()
        self.group.gather(None)


class SinkBuffer(Buffer):
    """An output of a network, written to a sink."""

    shared = True

    def __init__(self, sink: Sink, device: torch.device) -> None:
        super().__init__(torch.empty(0), device)
        self.sink = sink

    def write(self, box: Box, part: Tensor) -> None:
        """Write a box."""
        self.sink.write(box, part)


class SinkStorage(Storage):
    """Storage of the outputs, which are written to a sink."""

    def __init__(self, sink: Sink, device: torch.device) -> None:
        super().__init__("host", device)
        self.sink = sink

    def allocate(self, *args: Any, **options: Any) -> Buffer:
        """Return a buffer that writes to the sink."""
        return SinkBuffer(self.sink, self.device)


# -- estimates -------------------------------------------------------------------------------------


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


class FakeStorage(Storage):
    """Storage of outputs that are dropped."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Buffer:
        """Return a buffer that drops what is written."""
        return FakeVolume(shape, self.device, dtype)
