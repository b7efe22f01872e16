"""The ledger: what lies in which memory while a forward pass is recorded.

Tensors come and go as Python objects; what they hold belongs to their storage, which views share
and which can be written to.
"""

from __future__ import annotations

__all__ = ["Ledger", "Memory", "bytes_of", "covers", "geometry_of", "is_plain"]

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import FakeTensor, keep_version, release, storage_key, version_of
from pocketize.passes.recompute.values import Geometry, Meter, Value

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


class Memory:
    """What is known of one storage.

    Attributes:
        values: what tensors on it hold, by their geometry; kept values by weak reference, since
            they hold the storage alive themselves.
        version: the version that this is true of; ``None`` to take the next one seen.
        name: name of the parameter that lies here, or of which this is a cast.
        views: how many views were made of it.
        note: how the tensor that fills it was made, for whoever left it here.
        exposed: somebody has a pointer to it, so that it cannot be taken away.
        parameter: the parameter that lies here, and an alias of it.
        shell: the value to build again, its geometry and the number of bytes, where the memory has
            been taken away.
    """

    __slots__ = (
        "exposed",
        "name",
        "note",
        "parameter",
        "shell",
        "values",
        "version",
        "views",
        "watch",
    )

    def __init__(self, watch: weakref.ref[torch.UntypedStorage]) -> None:
        self.watch = watch
        self.values: dict[Geometry, Value | weakref.ref[Value]] = {}
        self.version: int | None = None
        self.name: str | None = None
        self.views = 0
        self.note: Any = None
        self.exposed = False
        self.parameter: tuple[Tensor, Tensor] | None = None
        self.shell: tuple[Value, Geometry, int] | None = None


class Ledger:
    """Knows the value of every tensor of one forward pass.

    Args:
        meter: counts what rebuilding costs.
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._memories: dict[int, Memory] = {}

    def close(self, stage: int) -> None:
        """Forget everything; shells that somebody still holds get their content back."""
        for memory in list(self._memories.values()):
            storage = memory.watch()
            if storage is not None and memory.shell is not None:
                (_, _, _, dtype) = memory.shell[1]
                self._fill(memory, storage, _blank(storage, dtype), stage)
        self._memories.clear()

    def value_of(self, tensor: Tensor, stage: int) -> Value | None:
        """Return what a tensor holds; it is kept from now on if it cannot be built again.

        ``None`` for tensors whose memory cannot be known (sparse, wrappers).
        """
        if not is_plain(tensor):
            return None
        value = self.find(tensor)
        if value is None:
            value = Value(stage)
            memory = self.memory(tensor)
            value.keep(tensor)
            value.parameter = memory.parameter
            memory.values[geometry_of(tensor)] = weakref.ref(value)
            memory.version = version_of(tensor)
        return value

    def find(self, tensor: Tensor) -> Value | None:
        """Return what a tensor holds, if that is known; ``None`` does not keep it."""
        memory = self._memories.get(storage_key(tensor))
        if memory is None:
            return None
        version = version_of(tensor)
        if memory.version is not None and memory.version != version:
            memory.values.clear()  # written to behind the tape's back
        memory.version = version
        held = memory.values.get(geometry_of(tensor))
        return held() if isinstance(held, weakref.ref) else held

    def memory(self, tensor: Tensor) -> Memory:
        """Return what is known of a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        memory = self._memories.get(key)
        if memory is None:
            forget = functools.partial(_forget, weakref.ref(self), key)
            memory = self._memories[key] = Memory(weakref.ref(storage, forget))
        return memory

    def preserve(self, memory: Memory) -> None:
        """Give kept values a copy of their own, before somebody writes to the memory they share."""
        for held in memory.values.values():
            value = held() if isinstance(held, weakref.ref) else held
            if value is not None and value.tensor is not None:
                value.keep(value.tensor.clone())

    def take(self, value: Value) -> None:
        """Take the memory from under a tensor that can be built again."""
        if value.home is None or value.step is None:
            return
        watch, geometry = value.home
        storage = watch()
        memory = None if storage is None else self._memories.get(storage_key(storage))
        if storage is None or memory is None or memory.exposed or memory.shell is not None:
            return
        offset, shape, _, dtype = geometry
        count = 1
        for size in shape:
            count *= size
        whole = offset == 0 and count * dtype.itemsize == storage.nbytes()
        if not whole or memory.values.get(geometry) is not value:
            return  # a part of the memory, or it has been written to since
        if any(isinstance(held, weakref.ref) and held() for held in memory.values.values()):
            return
        memory.shell = value, geometry, storage.nbytes()
        release(storage)

    def bring_back(self, tensor: Tensor, stage: int) -> None:
        """Build the content of a shell again, because somebody is going to read it."""
        if not is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage_key(storage))
        if memory is not None and memory.shell is not None:
            self._fill(memory, storage, tensor, stage)

    def _fill(
        self, memory: Memory, storage: torch.UntypedStorage, tensor: Tensor, stage: int
    ) -> None:
        assert memory.shell is not None
        value, (offset, shape, stride, dtype), nbytes = memory.shell
        memory.shell = None
        content = value.content(stage, self._meter)
        storage.resize_(nbytes)
        with torch.no_grad(), keep_version(tensor):
            alias = tensor.detach()
            if alias.dtype != dtype:
                alias = alias.view(dtype)
            alias.as_strided(shape, stride, offset).copy_(content)


def _forget(ledger: weakref.ref[Ledger], key: int, _: object) -> None:
    alive = ledger()
    if alive is not None:
        alive._memories.pop(key, None)


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
