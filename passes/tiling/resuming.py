"""What a forward by tiles has computed, in files from which a later one can go on.

A journal is a folder. Maps are files that are written tile by tile; a small file says how far they
are good, and takes its place at once or not at all. What was written after it is written again,
with the same values. So a process may end at any moment. Before the small file is written all
others are brought to the disk.

The small file has the size of every map and checksums of all that was written: files that were
deleted, cut short or overwritten since are found before anything is read from them, and the volume
is then computed from the beginning.
"""

from __future__ import annotations

__all__ = ["Journal", "JournalKeeper", "digest", "journal_for"]

import contextlib
import hashlib
import io
import logging
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketize._torch import pytree
from pocketize.errors import InputError, PocketizeWarning
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.cutting import PatchForward, is_fake, surroundings
from pocketize.passes.tiling.keeping import Keeper, mapped_file
from pocketize.passes.tiling.recording import fingerprint, tensors_by_name

logger = logging.getLogger(__name__)

#: Seconds between two notes of how far a forward is.
INTERVAL = 10.0
_STATE = "progress.pt"
_LOCK = "lock"
_Place = tuple[int, tuple[int, ...], tuple[int, ...]]
#: Bytes that are read at once where a digest is made.
_BLOCK = 1 << 24


class _DamageError(Exception):
    """A file is not what was written."""


class Journal:
    """A folder with what one forward has computed.

    Args:
        folder: of the user, in which there is one folder for each forward that is under way.
        identity: of the forward: what it computes, of which values.

    Attributes:
        state: how far it is, as it was last committed; empty at the beginning.

    Raises:
        InputError: the folder cannot be made, or another process is at the same forward.
    """

    def __init__(self, folder: str, identity: str) -> None:
        self.folder = Path(folder) / f"pocketize-{identity[:20]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"patchwise: cannot keep progress in {folder!r}: {error}; name a folder that can "
                "be written"
            ) from error
        self._lock = _locked(self.folder / _LOCK)
        self._committed = time.monotonic()
        self._maps: dict[str, Path] = {}
        self._rooms: dict[str, tuple[int, torch.dtype]] = {}
        #: checksums of the parts of maps, by offset, shape and strides; and of small results
        self._parts: dict[str, dict[_Place, int]] = {}
        self._small: dict[str, str] = {}
        self.state: dict[str, Any] = {}
        if (self.folder / _STATE).exists():
            self._restore()

    def _restore(self) -> None:
        """Go on from what is there, if all of it is what was written."""
        try:
            held = _read(self.folder / _STATE)
            for name, (size, dtype) in held["rooms"].items():
                path = self.folder / f"{name}.map"
                if path.stat().st_size != size * dtype.itemsize:
                    raise _DamageError(f"{path.name} has another size")
                row = mapped_file(path, size, dtype)
                for (offset, shape, stride), written in held["parts"].get(name, {}).items():
                    if _checksum(row.as_strided(shape, stride, offset)) != written:
                        raise _DamageError(f"{path.name} holds other values")
            for name, written in held["small"].items():
                _read(self.folder / f"{name}.pt", written)
        except (_DamageError, OSError) as error:
            warnings.warn(
                f"patchwise: what was computed in {self.folder} is damaged ({error}); the volume "
                "is computed from the beginning",
                PocketizeWarning,
                stacklevel=2,
            )
            for path in self.folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
            return
        self.state, self._small = held["state"], held["small"]
        self._rooms, self._parts = held["rooms"], held["parts"]
        logger.info("going on from %s", self.folder)

    def room(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return a row of entries, with what was written into it before."""
        path = self._maps[name] = self.folder / f"{name}.map"
        self._rooms[name] = size, dtype
        return mapped_file(path, size, dtype)

    def wrote(self, name: str, part: Tensor) -> None:
        """Say that a part of a map, a view of it, has been written."""
        place = int(part.storage_offset()), tuple(part.shape), part.stride()
        self._parts.setdefault(name, {})[place] = _checksum(part)

    def put(self, name: str, value: Any) -> None:
        """Keep a small result."""
        self._small[name] = _replace(self.folder / f"{name}.pt", value)

    def get(self, name: str) -> Any:
        """Return a small result."""
        return _read(self.folder / f"{name}.pt", self._small[name])

    def is_due(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() - self._committed >= INTERVAL

    def commit(self, state: dict[str, Any], idle: Iterable[str] = ()) -> None:
        """Note that all that was written until now is good.

        Args:
            state: how far the forward is: numbers, texts and tensors in dicts, lists and tuples.
            idle: maps and small results that nothing reads any more; they are removed.
        """
        idle = tuple(idle)
        for name in idle:
            for table in (self._maps, self._rooms, self._parts, self._small):
                table.pop(name, None)
        for path in self._maps.values():
            _sync(path)
        held = {"rooms": self._rooms, "parts": self._parts, "small": self._small}
        _replace(self.folder / _STATE, {"state": state, **held})
        self.state = state
        self._committed = time.monotonic()
        for name in idle:
            for path in (self.folder / f"{name}.map", self.folder / f"{name}.pt"):
                with contextlib.suppress(PermissionError):  # a mapped file that cannot be removed
                    path.unlink(missing_ok=True)

    def settle(self) -> None:
        """Nothing more is written into the maps that there are."""
        self._maps.clear()

    def finish(self) -> None:
        """Remove the folder; tensors that were read from it stay."""
        self.close()
        (self.folder / _STATE).unlink(missing_ok=True)  # first: it must not tell of what is gone
        shutil.rmtree(self.folder, ignore_errors=True)  # as far as mapped files can be removed

    def close(self) -> None:
        """Leave the folder to a later process."""
        self._lock.close()


class JournalKeeper(Keeper):
    """Makes room for maps in a journal.

    Args:
        journal: has the files.
        device: where regions are read to.
        dtype: in which floating maps are kept; None for their own.
    """

    def __init__(
        self, journal: Journal, device: torch.device, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__("disk", device, dtype=dtype)
        self.journal = journal

    def memory(
        self, size: int, held: torch.dtype, *, small: bool, name: str
    ) -> tuple[Tensor, Path | None]:
        """Return a row of the journal, with what was written into it before."""
        return self.journal.room(name, size, held), None

    def wrote(self, name: str, part: Tensor) -> None:
        """Have the journal know what it is to find."""
        self.journal.wrote(name, part)


@contextlib.contextmanager
def journal_for(forward: PatchForward, inputs: Inputs, *more: Any) -> Iterator[Journal | None]:
    """Open the journal of a call, and remove it at the end; of one that fails it stays.

    Args:
        forward: by tiles.
        inputs: of the call.
        more: what else tells this call from others.

    Yields:
        The journal; None where none is wanted, or gradients are.
    """
    tiling = forward.tiling
    if not tiling.resume or is_fake(inputs) or torch.is_grad_enabled():
        yield None
        return
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    named = tensors_by_name(forward.module).items()
    told = (
        torch.__version__,
        replace(tiling, folder=None),
        surroundings(),
        fingerprint(forward.module),
        spec,
        *more,
    )
    values = [value for pair in named for value in pair]
    assert tiling.folder is not None  # the pass asks for one
    journal = Journal(tiling.folder, digest([*told, *values, *leaves]))
    try:
        yield journal
    except BaseException:
        journal.close()
        raise
    journal.finish()


def digest(parts: Iterable[Any]) -> str:
    """Return what tells texts and the values of tensors from others, in hexadecimal digits."""
    made = hashlib.blake2b(digest_size=20)
    for part in parts:
        if isinstance(part, Tensor):
            made.update(f"{tuple(part.shape)} {part.dtype};".encode())
            for block in _blocks(part.detach()):
                made.update(block)
        else:
            made.update(f"{part!s};".encode())
    return made.hexdigest()


def _blocks(tensor: Tensor) -> Iterator[Any]:
    """Yield the bytes of a tensor, a block at a time, wherever it is and however it is strided."""
    if tensor.numel() * tensor.element_size() > _BLOCK and max(tensor.shape) > 1:
        axis = next(axis for axis, size in enumerate(tensor.shape) if size > 1)
        half = tensor.shape[axis] // 2
        yield from _blocks(tensor.narrow(axis, 0, half))
        yield from _blocks(tensor.narrow(axis, half, tensor.shape[axis] - half))
    elif tensor.numel():
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        yield raw.numpy()


def _checksum(part: Tensor) -> int:
    made = 0
    for block in _blocks(part):
        made = zlib.crc32(block, made)
    return made


def _replace(path: Path, value: Any) -> str:
    """Write a file that is there as a whole or not at all; return its digest, which is in it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getbuffer()
    told = hashlib.blake2b(content, digest_size=20).hexdigest()
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(told.encode())
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return told


def _read(path: Path, expected: str | None = None) -> Any:
    """Read what :func:`_replace` wrote.

    Args:
        path: the file.
        expected: its digest; None for the one that is in it.

    Raises:
        _DamageError: it holds anything else.
    """
    content = path.read_bytes()
    told, content = content[:40], content[40:]
    made = hashlib.blake2b(content, digest_size=20).hexdigest()
    if made.encode() != told or expected not in (None, made):
        raise _DamageError(f"{path.name} is not what was written")
    return torch.load(io.BytesIO(content), weights_only=True)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _locked(path: Path) -> Any:
    """Return a file that no other process can lock until it is closed.

    Raises:
        InputError: another process has it.
    """
    file = path.open("a+")
    try:
        import fcntl
    except ImportError:  # there is no such lock on Windows: two processes write the same values
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            f"patchwise: another process runs the same network on the same volume in "
            f"{path.parent}; wait for it, or name another folder"
        ) from error
    return file
