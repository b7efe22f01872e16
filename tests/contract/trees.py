"""Outputs of any container, taken apart, dataclasses included."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["structure", "tensors"]


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(repr(key), item) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return [(str(index), item) for index, item in enumerate(value)]
    return None


def structure(value: Any) -> Any:
    """Containers with their types and keys; tensors as shape, dtype and device; the rest as is."""
    children = _children(value)
    if children is not None:
        return type(value).__qualname__, [(key, structure(item)) for key, item in children]
    if isinstance(value, Tensor):
        return "Tensor", tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, float):
        return "float"
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a container, in order."""
    children = _children(value)
    if children is not None:
        for _, item in children:
            yield from tensors(item)
    elif isinstance(value, Tensor):
        yield value
