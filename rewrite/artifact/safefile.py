"""The header of a safetensors file, read on its own so that a damaged file can be told from a
foreign.

Format (https://github.com/huggingface/safetensors#format): 8 bytes, little endian, the size N of
the header; N bytes of JSON, ``{"name": {"dtype", "shape", "data_offsets"}, "__metadata__":
{...}}``; the data, to which the offsets are relative.
"""

from __future__ import annotations

__all__ = ["Header", "read_header"]

import json
import os
from dataclasses import dataclass
from typing import Any

from pocketize.errors import ArtifactError

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        shapes: the shape of every tensor.
        metadata: the file's free text entries.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a safetensors file and check that all of its data is there.

    Raises:
        ArtifactError: there is no such file, it is truncated, or it is no safetensors file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if length <= _LARGEST_HEADER else b""
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    if len(start) == 8 and text[:1] == b"{" and len(text) < length:
        raise _truncated(path, size, 8 + length)
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        shapes = {key: tuple(entry["shape"]) for key, entry in content.items()}
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is not a safetensors file{_guess(start)}") from error
    if size < 8 + length + end:
        raise _truncated(path, size, 8 + length + end)
    return Header(shapes, metadata)


def _truncated(path: Any, size: int, expected: int) -> ArtifactError:
    return ArtifactError(
        f"{path} is truncated: it has {size:,} of {expected:,} bytes. Copy or save it again"
    )


def _guess(start: bytes) -> str:
    if not start:
        return ": it is empty"
    if start.startswith(b"PK"):
        return ": it looks like one that torch.save wrote"
    if start.startswith(b"version "):
        return ": it looks like a pointer of Git LFS; run git lfs pull"
    return ""
