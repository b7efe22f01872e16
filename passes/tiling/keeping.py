"""Where results are kept between sweeps: on the device, in host memory, or in a file."""

from __future__ import annotations

__all__ = ["Keeper", "Kept", "arranged", "is_channels_last", "mapped_file"]

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pocketize._torch import FakeTensor, without_dispatch_modes
from pocketize.errors import InputError
from pocketize.memory.tracker import stand_for_file
from pocketize.passes.tiling.intervals import Region, cut
from pocketize.units import bytes_text


class Kept:
    """A map, or a region of one, that is written and read region by region.

    Args:
        tensor: its memory, (N, C, *spatial), wherever that is.
        device: where regions are read to.
        dtype: in which they are read.
        file: the file behind the memory, removed with it.
        origin: of the map, where the memory begins; None for the map's own.
    """

    def __init__(
        self,
        tensor: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        file: Path | None = None,
        *,
        origin: Sequence[int] | None = None,
    ) -> None:
        self.tensor, self.device, self.dtype, self.file = tensor, device, dtype, file
        self.origin = origin

    def write(self, region: Region, part: Tensor) -> None:
        """Write a region."""
        self.view(region).copy_(part, non_blocking=False)

    def add(self, region: Region | None, part: Tensor) -> None:
        """Add to a region, or to all of it."""
        view = self.tensor if region is None else self.view(region)
        view += part.to(view.device, view.dtype)

    def read(self, region: Region) -> Tensor:
        """Return a region on the device; a view where it lies there already."""
        part = self.view(region)
        return part.to(self.device, self.dtype)

    def close(self) -> None:
        """Give the memory back."""
        del self.tensor
        if self.file is not None:
            with contextlib.suppress(PermissionError):  # somebody holds the result, and the file
                self.file.unlink(missing_ok=True)

    def view(self, region: Region) -> Tensor:
        """Return a region where it lies, to be read or written."""
        if self.origin is not None:
            region = tuple(
                (low - start, high - start)
                for (low, high), start in zip(region, self.origin, strict=True)
            )
        return cut(self.tensor, region)


class Keeper:
    """Makes room for maps.

    Args:
        place: "device", "host" (pinned where there is a GPU) or "disk".
        device: where they are computed.
        folder: for files; None for where the system keeps temporary ones.
        dtype: in which floating maps are kept; None for their own.
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

    def held(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which maps of another are kept."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def room(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        small: bool = False,
        name: str = "",
        channels_last: bool = False,
    ) -> Kept:
        """Return room for a map; small ones are on the device wherever the others are.

        Args:
            shape: of the map.
            dtype: in which it is read.
            small: whether it is to be on the device in any case.
            name: of the map, for keepers that find it again.
            channels_last: whether the channels of a voxel lie side by side.

        Raises:
            InputError: there can be no file in the folder.
        """
        held = dtype if small else self.held(dtype)
        memory, file = self.memory(math.prod(shape), held, small=small, name=name)
        return Kept(arranged(memory, shape, channels_last), self.device, dtype, file)

    def wrote(self, name: str, part: Tensor) -> None:
        """Say that a part of a map has been written, for keepers that find it again."""

    def memory(
        self, size: int, held: torch.dtype, *, small: bool, name: str
    ) -> tuple[Tensor, Path | None]:
        """Return a row of entries, and the file behind it that goes with it; None for none."""
        if small or self.place == "device":
            return torch.empty(size, dtype=held, device=self.device), None
        if self.place == "host":
            return torch.empty(size, dtype=held, pin_memory=self.device.type == "cuda"), None
        fake = torch.empty(0)
        if isinstance(fake, FakeTensor):  # an estimate has no files
            with without_dispatch_modes(), fake.fake_mode:
                mapped = torch.empty(size, dtype=held)
            stand_for_file(mapped)
            return mapped, None
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
        mapped = mapped_file(path, size, held)
        # where the system allows it, the file is gone with the mapping, whatever happens
        with contextlib.suppress(PermissionError):
            path.unlink()
        return mapped, path


def mapped_file(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """Return a row of entries in a file, which is made as long as that where it is shorter.

    Raises:
        InputError: there is no room for it; the file is gone then. Without asking first, writing
            into the mapping would end the process.
    """
    nbytes = size * dtype.itemsize
    try:
        with path.open("ab") as file:
            _reserve(file.fileno(), nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise InputError(
            f"patchwise: no room for a map of {bytes_text(nbytes)} in {path.parent}: "
            f"{error.strerror}; free some, or name another folder"
        ) from error
    # torch's own mapping, so that a measurement can tell it from memory
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def _reserve(file: int, nbytes: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not every file system can
            raise


def arranged(memory: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Give a row of entries the shape of a map (N, C, *spatial), and return it.

    In place: an output that were a view, made without gradients, could not be written in place
    where gradients are enabled.
    """
    axes = list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for axis in reversed([0, *axes[2:], 1] if channels_last else axes):
        strides[axis], step = step, step * max(1, shape[axis])
    return memory.as_strided_(tuple(shape), strides)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of a voxel lie side by side, and would not by chance."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.ndim)
    if wanted is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=wanted)
