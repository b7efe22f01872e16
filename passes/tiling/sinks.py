"""Volumes outside of torch that are written box by box, by one process or by several."""

from __future__ import annotations

__all__ = ["FakeStorage", "SharedSink", "Sink", "SinkStorage"]

import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketize.errors import InputError
from pocketize.passes.tiling.intervals import Box, cut, is_empty
from pocketize.passes.tiling.processes import TileGroup
from pocketize.passes.tiling.sources import FakeVolume, block_index
from pocketize.passes.tiling.storage import Buffer, Storage


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
        self.shape = tuple(shape)
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
        """Write a box (1, C, *box), as far as it is within the volume."""
        sizes = self.shape[self.channels :]
        rows = zip(box, sizes, strict=True)
        inner = tuple((min(low, size), min(high, size)) for (low, high), size in rows)
        if is_empty(inner):
            return
        part = cut(part, tuple((0, high - low) for low, high in inner))
        part = part[0] if self.channels else part[0, 0]
        part = part.float() if part.dtype == torch.bfloat16 else part
        self.put(inner, part.cpu().numpy().astype(self.dtype, copy=False))

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


class FakeStorage(Storage):
    """Storage of outputs that are dropped."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Buffer:
        """Return a buffer that drops what is written."""
        return FakeVolume(shape, self.device, dtype)
