"""Buffers for results between tile loops: on the device, in host memory, or in a file."""

from __future__ import annotations

__all__ = ["Buffer", "Storage", "is_channels_last", "mapped_file", "reserve"]

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Sequence
from io import RawIOBase
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pocketize._torch import FakeTensor, without_dispatch_modes
from pocketize.errors import InputError
from pocketize.memory.hints import note_move
from pocketize.memory.tracker import waits_elsewhere
from pocketize.passes.tiling.intervals import Box, cut
from pocketize.units import bytes_text

#: Files of at most so many bytes are filled with zeros, a block of these at a time.
_FILLED = 1 << 30
_ZEROS = memoryview(bytes(1 << 20))


class Buffer:
    """The memory of a map, or of a box of one, that is written and read box by box.

    Args:
        tensor: the memory, (N, C, *spatial), on any device.
        device: where boxes are read to; None for that of the memory.
        dtype: in which they are read; None for that of the memory.
        file: the file behind the memory, removed with it.
        origin: where in the map the memory begins; None for the map's own origin.
    """

    #: Several processes write their boxes of a map to the same place.
    shared: ClassVar[bool] = False

    def __init__(
        self,
        tensor: Tensor,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        file: Path | None = None,
        *,
        origin: Sequence[int] | None = None,
    ) -> None:
        self.tensor, self.file, self.origin = tensor, file, origin
        self.device, self.dtype = device or tensor.device, dtype or tensor.dtype

    def add(self, box: Box | None, part: Tensor) -> None:
        """Add to a box, or to the whole buffer."""
        view = self.tensor if box is None else self.view(box)
        view += part.to(view.device, view.dtype)

    def read(self, box: Box) -> Tensor:
        """Return a box on the device; a view where it is there already."""
        return self.view(box).to(self.device, self.dtype)

    def write(self, box: Box, part: Tensor) -> None:
        """Overwrite a box."""
        self.view(box).copy_(part)

    def close(self) -> None:
        """Free the memory."""
        del self.tensor
        if self.file is not None:
            with contextlib.suppress(PermissionError):  # somebody holds the result, and the file
                self.file.unlink(missing_ok=True)

    def view(self, box: Box) -> Tensor:
        """Return a view of a box, to be read or written."""
        if self.origin is not None:
            box = tuple(
                (low - start, high - start)
                for (low, high), start in zip(box, self.origin, strict=True)
            )
        return cut(self.tensor, box)


class Storage:
    """Allocates buffers.

    Args:
        place: "device", "host" (pinned where there is a GPU) or "disk".
        device: where maps are computed.
        folder: for files; None for the system's folder of temporary files.
        dtype: in which floating-point maps are stored; None for their own.
    """

    def __init__(
        self,
        place: str,
        device: torch.device,
        *,
        folder: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.place, self.device, self.folder, self.dtype = place, device, folder, dtype

    def allocate(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        small: bool = False,
        name: str = "",
        channels_last: bool = False,
    ) -> Buffer:
        """Return an uninitialised buffer for a map that is read in some dtype.

        A ``small`` one is on the device in any case, in the dtype itself. A storage that finds maps
        again does so by their ``name``.

        Raises:
            InputError: there can be no file in the folder.
        """
        stored = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
        row, file = self.allocate_row(
            math.prod(shape), dtype if small else stored, small=small, name=name
        )
        return Buffer(_as_map(row, shape, channels_last), self.device, dtype, file)

    def note_written(self, name: str, part: Tensor) -> None:
        """Called after a part of a map has been written, for a storage that finds it again."""

    def allocate_row(
        self, size: int, dtype: torch.dtype, *, small: bool, name: str
    ) -> tuple[Tensor, Path | None]:
        """Return a row of entries, and the file behind it that is to be removed with it."""
        if small or self.place == "device":
            return torch.empty(size, dtype=dtype, device=self.device), None
        fake = torch.empty(0)
        if self.place == "disk":
            note_move(size * dtype.itemsize, "map")
        if isinstance(fake, FakeTensor) and self.place == "disk":  # an estimate has no files
            with without_dispatch_modes(), fake.fake_mode:
                mapped = torch.empty(size, dtype=dtype)
            waits_elsewhere(mapped, host=False)
            return mapped, None
        if self.place == "host":
            pinned = self.device.type == "cuda" and not isinstance(fake, FakeTensor)
            row = torch.empty(size, dtype=dtype, pin_memory=pinned)
            waits_elsewhere(row, host=True)
            return row, None
        try:
            with tempfile.NamedTemporaryFile(
                prefix="pocketize-", suffix=".map", dir=self.folder, delete=False
            ) as file:
                path = Path(file.name)
        except OSError as error:
            raise InputError(
                f"patchwise: no file can be made in folder={self.folder!r}: {error}; make the "
                "folder, or name another"
            ) from error
        mapped = mapped_file(path, size, dtype)
        with path.open("r+b", buffering=0) as written:
            # where the system allows it, the file is gone with the mapping, whatever happens
            with contextlib.suppress(PermissionError):
                path.unlink()
            try:
                _fill(written, size * dtype.itemsize)
            except OSError as error:
                raise _no_room(path, size * dtype.itemsize, error) from error
        return mapped, path


def mapped_file(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """Return a row of entries in a file, which is extended to that size where it is shorter.

    Raises:
        InputError: the disk is full; the file is removed then. Without asking first, writing into
            the mapping would end the process.
    """
    nbytes = size * dtype.itemsize
    try:
        with path.open("ab") as file:
            reserve(file.fileno(), nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _no_room(path, nbytes, error) from error
    # torch's own mapping, so that a measurement can tell it from memory
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def _no_room(path: Path, nbytes: int, error: OSError) -> InputError:
    return InputError(
        f"patchwise: no room for a map of {bytes_text(nbytes)} in {path.parent}: "
        f"{error.strerror}; free some, or name another folder"
    )


def _fill(file: RawIOBase, nbytes: int) -> None:
    """Write zeros to a file of zeros: a page that the system writes costs less than a page fault.

    A large file may not fit into the system's cache, and the disk would write it twice.
    """
    if nbytes <= _FILLED:
        for start in range(0, nbytes, len(_ZEROS)):
            file.write(_ZEROS[: nbytes - start])


def reserve(file: int, nbytes: int) -> None:
    """Extend a file, by its number, to a size, where the system can say that there is room.

    Raises:
        OSError: there is none.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not every file system can
            raise


def _as_map(row: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Give a row of entries the shape of a map (N, C, *spatial), in place.

    An output that were a view, made without gradients, could not be written in place where
    gradients are enabled.
    """
    axes = list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for axis in reversed([0, *axes[2:], 1] if channels_last else axes):
        strides[axis], step = step, step * max(1, shape[axis])
    return row.as_strided_(tuple(shape), strides)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in channels-last format, and not contiguous at the same time."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.ndim)
    if wanted is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=wanted)
