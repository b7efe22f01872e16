"""Bytes of what autograd saves for the backward pass."""

from __future__ import annotations

__all__ = ["SavedTensors"]

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pocketize._torch import storage_key
from pocketize.memory.tracker import storage_bytes


class SavedTensors:
    """Collects the storages that autograd saves, each once.

    The tensors live as long as this object, so that no storage gets the key of an earlier one. Use
    it on fake tensors, which take no memory.

    Args:
        apart: tensors whose storages are not counted, such as parameters.
        saw: called with the key of a storage each time that autograd saves it.

    Attributes:
        sizes: bytes of each storage by its key, in the order in which they were first saved.
    """

    def __init__(
        self, apart: Iterable[Tensor] = (), saw: Callable[[int], None] | None = None
    ) -> None:
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._apart = storage_bytes(apart).keys()
        self._saw = saw

    def hooks(self) -> AbstractContextManager[Any]:
        """Return the context in which what autograd saves is collected."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def bytes(self, apart: Iterable[Tensor] = ()) -> int:
        """Return the bytes of all storages, without those of further tensors."""
        out = storage_bytes(apart)
        return sum(size for key, size in self.sizes.items() if key not in out)

    def _pack(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # without its graph, which would refer to itself
        key = storage_key(tensor)
        if key not in self._apart:
            self._alive.append(tensor)
            self.sizes.setdefault(key, tensor.untyped_storage().nbytes())
            if self._saw is not None:
                self._saw(key)
        return tensor
