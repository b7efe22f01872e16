"""Results of a forward by tiles in files from which an interrupted forward continues.

A resume state is a folder. Maps are files that are written tile by tile. A small file, which is
replaced atomically, says how far they are valid; what was written after it is written again, with
the same values. So a process may end at any moment. Before the small file is written, all others
are flushed to the disk.

The small file has the size of each map and checksums of all that was written. If a file was
deleted, truncated or overwritten since, the volume is computed from the beginning.
"""

from __future__ import annotations

__all__ = [
    "ResumableExecution",
    "ResumeState",
    "ResumeStorage",
    "digest",
    "resume_state_for",
    "storage_for",
]

import contextlib
import functools
import hashlib
import io
import logging
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import pytree
from pocketize.errors import InputError, PocketizeWarning
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.forward import PatchForward, autocast_state, is_fake
from pocketize.passes.tiling.intervals import Box
from pocketize.passes.tiling.program import Program, TileLoop
from pocketize.passes.tiling.storage import Buffer, Storage, mapped_file
from pocketize.passes.tiling.tracing import fingerprint, tensors_by_name

logger = logging.getLogger(__name__)

#: Seconds between two commits.
INTERVAL = 10.0
_STATE = "progress.pt"
_LOCK = "lock"
#: Bytes that are read at once where a digest is made.
_BLOCK = 1 << 24


class ResumeState:
    """A folder with the results of one forward; ``progress`` is as it was last committed, or empty.

    Args:
        folder: of the user, with one folder for each forward that is not finished.
        identity: of the forward: a digest of operators and values.

    Raises:
        InputError: the folder cannot be made, or another process runs the same forward.
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
        #: files of maps that are flushed by each commit
        self.maps: dict[str, Path] = {}
        #: sizes of maps, checksums of their parts by offset, shape and strides, and those of small
        #: results
        self._tables: dict[str, dict[str, Any]] = {"rows": {}, "parts": {}, "small": {}}
        self.progress: dict[str, Any] = {}
        if (self.folder / _STATE).exists():
            self._restore()

    def _restore(self) -> None:
        """Continue from the files, if all of them are what was written."""
        try:
            held = _read(self.folder / _STATE)
            for name, (size, dtype) in held["rows"].items():
                path = self.folder / f"{name}.map"
                if path.stat().st_size != size * dtype.itemsize:
                    raise OSError(f"{path.name} has another size")
                row = mapped_file(path, size, dtype)
                for (offset, shape, stride), written in held["parts"].get(name, {}).items():
                    if _checksum(row.as_strided(shape, stride, offset)) != written:
                        raise OSError(f"{path.name} holds other values")
            for name, written in held["small"].items():
                _read(self.folder / f"{name}.pt", written)
        except OSError as error:
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
        self.progress = held["state"]
        self._tables = {name: held[name] for name in self._tables}
        logger.info("continuing from %s", self.folder)

    def row(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return a row of entries, with what was written into it before."""
        path = self.maps[name] = self.folder / f"{name}.map"
        self._tables["rows"][name] = size, dtype
        return mapped_file(path, size, dtype)

    def note_written(self, name: str, part: Tensor) -> None:
        """Note that a part of a map, a view of it, has been written."""
        place = int(part.storage_offset()), tuple(part.shape), part.stride()
        self._tables["parts"].setdefault(name, {})[place] = _checksum(part)

    def put(self, name: str, value: Any) -> None:
        """Store a small result."""
        self._tables["small"][name] = _replace(self.folder / f"{name}.pt", value)

    def get(self, name: str) -> Any:
        """Return a small result."""
        return _read(self.folder / f"{name}.pt", self._tables["small"][name])

    def is_due(self) -> bool:
        """Whether it is time to commit."""
        return time.monotonic() - self._committed >= INTERVAL

    def commit(self, progress: dict[str, Any], unused: Iterable[str] = ()) -> None:
        """Note that all that was written until now is valid, and remove what nothing reads."""
        unused = tuple(unused)
        for name in unused:
            for table in (self.maps, *self._tables.values()):
                table.pop(name, None)
        for path in self.maps.values():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _replace(self.folder / _STATE, {"state": progress, **self._tables})
        self.progress = progress
        self._committed = time.monotonic()
        for name in unused:
            for path in (self.folder / f"{name}.map", self.folder / f"{name}.pt"):
                with contextlib.suppress(PermissionError):  # a mapped file that cannot be removed
                    path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove the folder; tensors that were read from it stay."""
        self.close()
        (self.folder / _STATE).unlink(missing_ok=True)  # first, as the others vanish one by one
        shutil.rmtree(self.folder, ignore_errors=True)  # as far as mapped files can be removed

    def close(self) -> None:
        """Release the folder for a later process."""
        self._lock.close()


class ResumeStorage(Storage):
    """Allocates maps in the files of a resume state."""

    def __init__(
        self, state: ResumeState, device: torch.device, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__("disk", device, dtype=dtype)
        self.state = state

    def allocate_row(
        self, size: int, dtype: torch.dtype, *, small: bool, name: str
    ) -> tuple[Tensor, Path | None]:
        """Return a row of a file, with what was written into it before."""
        return self.state.row(name, size, dtype), None

    def note_written(self, name: str, part: Tensor) -> None:
        """Add a checksum."""
        self.state.note_written(name, part)


def storage_for(
    forward: PatchForward,
    place: str,
    device: torch.device,
    state: ResumeState | None,
    dtype: torch.dtype | None = None,
) -> Storage:
    """Return the storage of results, or of outputs, in a call of a forward."""
    if state is not None:
        return ResumeStorage(state, device, dtype=dtype)
    return Storage(place, device, folder=forward.tiling.folder, dtype=dtype)


@contextlib.contextmanager
def resume_state_for(
    forward: PatchForward, inputs: Inputs, *more: Any
) -> Iterator[ResumeState | None]:
    """Open the resume state of a call, and remove it at the end; after an error it stays.

    Yields None without ``resume``, or where gradients are enabled. ``more`` is what else
    distinguishes the call.
    """
    tiling, model = forward.tiling, forward.module
    if not tiling.resume or is_fake(inputs) or torch.is_grad_enabled():
        yield None
        return
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    identity = [torch.__version__, replace(tiling, folder=None), autocast_state()]
    identity += [fingerprint(model), spec, *more]
    identity += [value for pair in tensors_by_name(model).items() for value in pair]
    assert tiling.folder is not None  # the pass requires one
    state = ResumeState(tiling.folder, digest([*identity, *leaves]))
    try:
        yield state
    except BaseException:
        state.close()
        raise
    state.finish()


class ResumableExecution(Execution):
    """One forward whose progress is in a resume state, which also has its storage."""

    def __init__(self, program: Program, *, state: ResumeState, **settings: Any) -> None:
        super().__init__(program, **settings)
        self.state = state
        self._number = self._passed = 0  # of the step, and tiles of its loop that are done
        #: small results that are in files, and names of those that nothing reads any more
        self._written: set[str] = set()
        self._unused: list[str] = []

    def _begin(self) -> int:
        progress = self.state.progress
        if not progress:
            return 0
        by_name = {node.name: node for node in self.program.graph.nodes}
        self._number, self._passed = int(progress["step"]), int(progress["tile"])
        self._done = int(progress["done"])
        here = _to(self.storage.device)
        self.norms = {by_name[name]: here(tensor) for name, tensor in progress["norms"].items()}
        self._measures = {by_name[name]: here(held) for name, held in progress["measures"].items()}
        steps = self.program.steps[: self._number]
        freed = {node for step in steps for node in step.frees}
        for step in steps:
            maps, small = (
                (step.targets, step.reductions)
                if isinstance(step, TileLoop)
                else ((), (step.node,))
            )
            for node in maps:
                if node not in freed:
                    made = self.finished if self._is_finished(node) else self.stored
                    made[node] = self._allocate(node)
            for node in small:
                if node not in freed and node not in self.norms:
                    self.stored[node] = here(self.state.get(node.name))
                    self._written.add(node.name)
        for node in freed:
            self.stored.pop(node, None)
        return self._number

    def _step(self, number: int) -> None:
        self._number = number
        super()._step(number)
        self._passed = 0

    def _free(self, nodes: Sequence[fx.Node]) -> None:
        super()._free(nodes)  # of files only the memory; the next commit removes them
        self._unused += [node.name for node in nodes if node.op != "placeholder"]
        if isinstance(self.program.steps[self._number], TileLoop) or self.state.is_due():
            self._commit(self._number + 1, 0)
            self.state.maps.clear()  # nothing more is written into them

    def _write(self, buffer: Buffer, node: fx.Node, box: Box) -> None:
        super()._write(buffer, node, box)
        self.state.note_written(node.name, buffer.view(box))

    def _tiles(self, step: TileLoop) -> Sequence[tuple[int, ...]]:
        return super()._tiles(step)[self._passed :]

    def _tell(self) -> None:
        super()._tell()
        if isinstance(self.program.steps[self._number], TileLoop):
            self._passed += 1
            if self.state.is_due():
                self._commit(self._number, self._passed)

    def _commit(self, step: int, tile: int) -> None:
        there = _to(torch.device("cpu"))
        for node, value in self.stored.items():
            new = not isinstance(value, Buffer) and node.name not in self._written
            if new and node.op != "placeholder":
                # a clone, as a file would have all memory that a view belongs to
                small = pytree.tree_map_only(Tensor, lambda t: t.cpu().clone(), value)
                self.state.put(node.name, small)
                self._written.add(node.name)
        self.state.commit(
            {
                "step": step,
                "tile": tile,
                "done": self._done,
                "norms": {node.name: there(tensor) for node, tensor in self.norms.items()},
                "measures": {node.name: there(held) for node, held in self._measures.items()},
            },
            self._unused,
        )
        self._unused.clear()


def _to(device: torch.device) -> Callable[[Any], Any]:
    return lambda value: pytree.tree_map_only(Tensor, lambda t: t.to(device), value)


# -- files and digests -----------------------------------------------------------------------------


def digest(parts: Iterable[Any]) -> str:
    """Return a digest of texts and values of tensors, in hexadecimal digits."""
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
    """Yield the bytes of a tensor of any device and strides, a block at a time."""
    if tensor.numel() * tensor.element_size() > _BLOCK and max(tensor.shape) > 1:
        axis = next(axis for axis, size in enumerate(tensor.shape) if size > 1)
        half = tensor.shape[axis] // 2
        yield from _blocks(tensor.narrow(axis, 0, half))
        yield from _blocks(tensor.narrow(axis, half, tensor.shape[axis] - half))
    elif tensor.numel():
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(part: Tensor) -> int:
    return functools.reduce(lambda made, block: zlib.crc32(block, made), _blocks(part), 0)


def _replace(path: Path, value: Any) -> str:
    """Replace a file atomically; return its digest, which the file begins with."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    content = buffer.getbuffer()
    made = hashlib.blake2b(content, digest_size=20).hexdigest()
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(made.encode())
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return made


def _read(path: Path, expected: str | None = None) -> Any:
    """Read what :func:`_replace` wrote; the content must match both digests."""
    content = path.read_bytes()
    told, content = content[:40], content[40:]
    made = hashlib.blake2b(content, digest_size=20).hexdigest()
    if made.encode() != told or expected not in (None, made):
        raise OSError(f"{path.name} is not what was written")
    return torch.load(io.BytesIO(content), weights_only=True)


def _locked(path: Path) -> Any:
    """Return a file that no other process can lock until it is closed."""
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
