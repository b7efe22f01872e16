"""Read safetensors files: the whole header is checked first, then tensors are read.

Format (https://github.com/huggingface/safetensors#format): 8 bytes, little endian, the size N of
the header; N bytes of JSON, ``{"name": {"dtype", "shape", "data_offsets"}, "__metadata__":
{...}}``; the data, to which the offsets are relative. Tensors follow each other without holes.

The file is opened once, so that what is read is what was checked. It is read, not mapped, so that
a file that is truncated meanwhile raises an error and does not kill the process.
"""

from __future__ import annotations

__all__ = ["Header", "SafeFile", "open_safe", "read_header"]

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from pocketize.artifact.files import reading
from pocketize.errors import ArtifactError
from pocketize.untrusted import read_json

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
_MOST_AXES = 64  # that torch has
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",  # in newer versions of torch only
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


@dataclass(frozen=True)
class _Entry:
    """One tensor: its type, its shape, and where it lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafeFile:
    """An open safetensors file.

    Attributes:
        header: what it says of itself; checked against the size of the file.
    """

    def __init__(self, path: str | os.PathLike[str], file: BufferedReader) -> None:
        self._path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        text = file.read(length) if length <= _LARGEST_HEADER else b""
        if len(start) == 8 and text[:1] == b"{" and len(text) < length:
            raise self._truncated(size, 8 + length)
        try:
            content = read_json(text)
            metadata = content.pop("__metadata__", {})
            given = {
                key: (entry["dtype"], entry["shape"], entry["data_offsets"])
                for key, entry in content.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a safetensors file{_guess(start)}") from error
        if not _is_texts(metadata):
            raise self._damaged("its metadata is no mapping from text to text")
        self._entries = {key: self._entry(key, *value) for key, value in given.items()}
        self._check_places(8 + length, size)
        self.header = Header({key: e.shape for key, e in self._entries.items()}, metadata)
        self._data = 8 + length

    def _entry(self, key: str, name: Any, shape: Any, offsets: Any) -> _Entry:
        kind = _DTYPES.get(name) if isinstance(name, str) else None
        dtype = getattr(torch, kind, None) if kind is not None else None
        if dtype is None:
            raise self._damaged(f"{key!r:.100} has the type {name!r:.100}, which is not known here")
        if not _is_sizes(shape) or len(shape) > _MOST_AXES:
            raise self._damaged(f"{key!r:.100} has the shape {shape!r:.100}")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"{key!r:.100} lies at {offsets!r:.100}")
        # of an empty tensor, too, torch multiplies the sizes
        if math.prod(max(1, size) for size in shape) * dtype.itemsize >= 1 << 62:
            raise self._damaged(f"{key!r:.100} has the shape {shape!r:.100}")
        if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise self._damaged(
                f"{key!r:.100} lies at {offsets!r:.100}, which does not fit the shape {shape!r:.80}"
            )
        return _Entry(dtype, tuple(shape), *offsets)

    def _check_places(self, data: int, size: int) -> None:
        end = 0
        for key, entry in sorted(self._entries.items(), key=lambda pair: pair[1].begin):
            if entry.begin != end:
                raise self._damaged(f"before {key!r:.100} is a hole, or another tensor")
            end = entry.end
        if size < data + end:
            raise self._truncated(size, data + end)
        if size > data + end:
            raise self._damaged(f"{size - data - end:,} bytes at its end belong to no tensor")

    def read(self, key: str, memory_format: torch.memory_format | None = None) -> Tensor:
        """Read a tensor, which owns its memory.

        Raises:
            ArtifactError: the file has changed.
        """
        entry = self._entries[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.end > entry.begin:
            raw = tensor.view(-1).view(torch.uint8)
            with reading(self._path):
                self._file.seek(self._data + entry.begin)
                count = self._file.readinto(raw.numpy().data)
            if count != len(raw):
                raise self._damaged("it became shorter while it was read")
            if entry.dtype is torch.bool:
                raw.ne_(0)  # a byte of another value is no bool
        return tensor if memory_format is None else tensor.clone(memory_format=memory_format)

    def _truncated(self, size: int, expected: int) -> ArtifactError:
        return ArtifactError(
            f"{self._path} is truncated: it has {size:,} of {expected:,} bytes. Copy or save it "
            "again"
        )

    def _damaged(self, why: str) -> ArtifactError:
        return ArtifactError(f"{self._path} is damaged: {why}. Copy or save it again")


@contextlib.contextmanager
def open_safe(path: str | os.PathLike[str]) -> Iterator[SafeFile]:
    """Open a safetensors file and check its header.

    Raises:
        ArtifactError: there is no such file, it is truncated or damaged, or it is no safetensors
            file.
    """
    with reading(path):
        file = open(path, "rb")  # noqa: SIM115  (closed below; what the caller does is no reading)
    with file:
        with reading(path):
            opened = SafeFile(path, file)
        yield opened


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ArtifactError: as :func:`open_safe`.
    """
    with open_safe(path) as file:
        return file.header


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _guess(start: bytes) -> str:
    if not start:
        return ": it is empty"
    if start.startswith(b"PK"):
        return ": it looks like one that torch.save wrote"
    if start.startswith(b"version "):
        return ": it looks like a pointer of Git LFS; run git lfs pull"
    return ""
