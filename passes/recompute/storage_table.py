"""The storage table: what every storage holds while a forward pass is recorded.

Values belong to storages, which views share and operators write to, not to tensor objects.
"""

from __future__ import annotations

__all__ = ["StorageRecord", "StorageTable", "bytes_of", "covers", "geometry_of", "is_plain"]

import functools
import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import FakeTensor, keep_version, release, storage_key, version_of
from pocketize.passes.recompute.values import Geometry, GraphValue

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


@dataclass(eq=False, slots=True)
class StorageRecord:
    """What is known of one storage.

    Attributes:
        watch: the storage, while it exists.
        values: what tensors on it hold, by their geometry; kept values by weak reference, since
            they hold the storage alive themselves.
        version: the version that this is true of; ``None`` to take the next one seen.
        name: name of the parameter stored here, or of which this is a cast.
        views: how many views were made of it.
        note: how the tensor that fills it was made, for :mod:`.fusing`.
        exposed: code outside torch has a pointer to it, so that it cannot be freed.
        parameter: the parameter stored here, and an alias of it.
        freed: the value to compute again, its geometry and the number of bytes, if the memory was
            released.
    """

    watch: weakref.ref[torch.UntypedStorage]
    values: dict[Geometry, GraphValue | weakref.ref[GraphValue]] = field(default_factory=dict)
    version: int | None = None
    name: str | None = None
    views: int = 0
    note: Any = None
    exposed: bool = False
    parameter: tuple[Tensor, Tensor] | None = None
    freed: tuple[GraphValue, Geometry, int] | None = None


class StorageTable:
    """Knows the value of every tensor of one forward pass."""

    def __init__(self) -> None:
        self._records: dict[int, StorageRecord] = {}

    def close(self, segment: int) -> None:
        """Forget everything; freed tensors still referenced get their content back."""
        for record in list(self._records.values()):
            storage = record.watch()
            if storage is not None and record.freed is not None:
                (_, _, _, dtype) = record.freed[1]
                self._fill(record, storage, _blank(storage, dtype), segment)
        self._records.clear()

    def value_of(self, tensor: Tensor, segment: int) -> GraphValue | None:
        """Return what a tensor holds; it is kept from now on if it cannot be built again.

        ``None`` for tensors whose memory cannot be known (sparse, wrappers).
        """
        if not is_plain(tensor):
            return None
        value = self.find(tensor)
        if value is None:
            value = GraphValue(segment)
            record = self.record(tensor)
            value.keep(tensor)
            value.parameter = record.parameter
            record.values[geometry_of(tensor)] = weakref.ref(value)
            record.version = version_of(tensor)
        return value

    def find(self, tensor: Tensor) -> GraphValue | None:
        """Return what a tensor holds, if that is known; ``None`` does not keep it."""
        record = self._records.get(storage_key(tensor))
        if record is None:
            return None
        version = version_of(tensor)
        if record.version is not None and record.version != version:
            record.values.clear()  # written to by something that the graph did not see
        record.version = version
        held = record.values.get(geometry_of(tensor))
        return held() if isinstance(held, weakref.ref) else held

    def record(self, tensor: Tensor) -> StorageRecord:
        """Return what is known of a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        record = self._records.get(key)
        if record is None:
            forget = functools.partial(_forget, weakref.ref(self), key)
            record = self._records[key] = StorageRecord(weakref.ref(storage, forget))
        return record

    def preserve(self, record: StorageRecord) -> None:
        """Give kept values a copy of their own, before their memory is written to."""
        for held in record.values.values():
            value = held() if isinstance(held, weakref.ref) else held
            if value is not None and value.tensor is not None:
                value.keep(value.tensor.clone())

    def take(self, value: GraphValue) -> None:
        """Release the memory of a tensor that can be computed again."""
        if value.home is None or value.step is None:
            return
        watch, geometry = value.home
        storage = watch()
        record = None if storage is None else self._records.get(storage_key(storage))
        if storage is None or record is None or record.exposed or record.freed is not None:
            return
        offset, shape, _, dtype = geometry
        whole = offset == 0 and math.prod(shape) * dtype.itemsize == storage.nbytes()
        if not whole or record.values.get(geometry) is not value:
            return  # a part of the storage, or it has been written to since
        if any(isinstance(held, weakref.ref) and held() for held in record.values.values()):
            return
        record.freed = value, geometry, storage.nbytes()
        release(storage)

    def bring_back(self, tensor: Tensor, segment: int) -> None:
        """Compute the content of a freed tensor again, before it is read."""
        if not is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        record = self._records.get(storage_key(storage))
        if record is not None and record.freed is not None:
            self._fill(record, storage, tensor, segment)

    def _fill(
        self, record: StorageRecord, storage: torch.UntypedStorage, tensor: Tensor, segment: int
    ) -> None:
        assert record.freed is not None
        value, (offset, shape, stride, dtype), nbytes = record.freed
        record.freed = None
        content = value.content(segment)
        storage.resize_(nbytes)
        with torch.no_grad(), keep_version(tensor):
            alias = tensor.detach()
            if alias.dtype != dtype:
                alias = alias.view(dtype)
            alias.as_strided(shape, stride, offset).copy_(content)


def _forget(storages: weakref.ref[StorageTable], key: int, _: object) -> None:
    alive = storages()
    if alive is not None:
        alive._records.pop(key, None)


def _blank(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """Return a tensor of no elements on a storage."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, (0,), (1,))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor owns its memory as ordinary ones do."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    kind = type(tensor)
    return kind in _PLAIN or bool(kind.__torch_dispatch__ is Tensor.__torch_dispatch__)


def geometry_of(tensor: Tensor) -> Geometry:
    """Where in its storage a tensor lies."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def bytes_of(tensor: Tensor) -> int:
    """Size of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def covers(tensor: Tensor) -> bool:
    """Whether a tensor takes up all of its storage."""
    return bytes_of(tensor) == tensor.untyped_storage().nbytes()
