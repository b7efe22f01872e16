"""Count the bytes of live tensors: which storages exist, since when, and which module made them.

A dispatch mode sees every operator below autograd, in the forward as in the backward pass. For
each tensor it watches the *storage*, so that views and aliases count once. A weak reference to the
storage calls back at the moment when it is freed, in Python or in C++. Peaks are therefore those
of the untracked run, to the byte. What an operator allocates and frees inside itself (im2col
buffers, oneDNN or cuDNN workspaces) is not seen.

The tracker records events only. :meth:`LiveTracker.finish` sorts the storages into categories,
when it is known what became of each.
"""

from __future__ import annotations

__all__ = [
    "CATEGORIES",
    "LiveStorage",
    "LiveTracker",
    "Trace",
    "is_composite",
    "storage_bytes",
    "storages_of",
    "waits_elsewhere",
]

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pocketize._torch import (
    FakeTensor,
    OpOverload,
    TorchDispatchMode,
    has_kernel,
    pytree,
    run_parts,
    schema_of,
    sparse_parts,
    storage_key,
)
from pocketize.memory.hints import ON
from pocketize.memory.in_place import counts_in_autograd, in_place_overload

if TYPE_CHECKING:
    from pocketize.memory.work import Work

aten = torch.ops.aten

#: What live bytes are divided into, in the order of the reports.
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "inputs",
)


@dataclass(frozen=True)
class Trace:
    """What one tracked step held.

    Attributes:
        peak: most bytes alive at once; ``categories`` and ``modules`` divide them.
        events: ``(label, live bytes)`` after every allocation and release, in order.
        storages: every storage that was alive at one of the events.
        elsewhere: most bytes at once in host memory or in mapped files, where a pass moved what is
            not in ``peak`` therefore.
    """

    peak: int
    categories: dict[str, int]
    modules: dict[str, int]
    events: list[tuple[str, int]]
    storages: list[LiveStorage]
    elsewhere: int


@dataclass(slots=True, eq=False)
class LiveStorage:
    """One storage, from its first sighting to its release.

    Attributes:
        nbytes: its size.
        born: the first event at which it is alive.
        phase: of the step, in which that was.
        module: path of the module that made it.
        role: its category, where it was given one.
        kept: it was alive when the forward ended.
        died: the first event at which it is not alive any more.
    """

    nbytes: int
    born: int
    phase: str
    module: str
    role: str | None = None
    kept: bool = False
    died: float = math.inf

    @property
    def category(self) -> str:
        """One of :data:`CATEGORIES`, once the step is over."""
        if self.role is not None:
            return self.role
        return "activations" if self.phase == "forward" and self.kept else "temporaries"


class LiveTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that follows the storages of one device.

    Use: :meth:`assign` a role to what is alive already, enter the mode, set the phase with
    :meth:`enter` as the step goes on, leave the mode, :meth:`finish`.

    Args:
        device: only tensors on devices of this type count.
        where: returns the path of the module that runs.
        fake: the tensors are fake, but for those that a model hides from ``state_dict``.
        like_cuda: the tensors are fake ones on the CPU in place of a GPU, whose memory host memory
            is not.
        every: look at every event for storages that were resized without an operator, not only
            where the peak depends on them.
        work: is told of every operator of the step after it has run, and of every move.

    Attributes:
        peak: most bytes alive at once since the first phase began.
        host_is_apart: host memory is not the device's.
    """

    def __init__(
        self,
        device: torch.device,
        where: Callable[[], str] = str,
        *,
        fake: bool = False,
        like_cuda: bool = False,
        every: bool = False,
        work: Work | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._every, self._work = every, work
        self._sole = counts_in_autograd()
        self._device = device.type
        self.host_is_apart = like_cuda or device.type != "cpu"
        self._apart = _ON_DISK, *((_ON_HOST,) if self.host_is_apart else ())
        self._fake = fake
        self._where = where
        self._phase = ""
        self._live: dict[int, LiveStorage] = {}
        self._records: list[LiveStorage] = []
        self._watches: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._events: list[tuple[str, int]] = []
        self._bytes = 0
        self._elsewhere: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._elsewhere_bytes = self._elsewhere_peak = 0
        self.peak = 0
        self._peak_at = 0

    def assign(self, role: str, tensors: Iterable[Tensor], module: str = "") -> None:
        """Give the storages of some tensors their category, from their first moment on.

        Storages not seen before are counted from now on. A category once given stays.
        """
        for tensor in tensors:
            for storage in self._storages(tensor):
                self._see(storage)
                record = self._live.get(storage_key(storage))
                if record is not None and record.role is None:
                    record.role, record.module = role, module

    def __enter__(self) -> Any:
        ON.trackers.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        ON.trackers.remove(self)
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    @property
    def now(self) -> int:
        """The number of events so far."""
        return len(self._events)

    def storage_of(self, tensor: Tensor) -> LiveStorage | None:
        """Return what is known of a tensor's storage; ``None`` if it is not followed."""
        return self._live.get(storage_key(tensor))

    def enter(self, phase: str) -> None:
        """Begin a phase: ``"forward"``, then ``"backward"`` and ``"optimizer"`` when training."""
        if self._phase == "forward":
            for record in self._live.values():
                record.kept = True
        self._phase = phase
        self._log(phase)

    def finish(self) -> Trace:
        """Stop following storages and return the figures at the moment of the peak.

        A storage with a role (parameters, gradients, optimizer state, inputs) had it from birth:
        the result of a convolution's backward that became a ``.grad`` was a gradient all along. Of
        the others, activations were made in the forward phase and were alive when it ended; what
        the forward freed, and what backward or the optimizer made, is temporary.
        """
        self._watches.clear()  # the callbacks go with the references
        self._live.clear()
        categories = dict.fromkeys(CATEGORIES, 0)
        modules: dict[str, int] = {}
        for record in self._records:
            if record.born <= self._peak_at < record.died:
                categories[record.category] += record.nbytes
                modules[record.module] = modules.get(record.module, 0) + record.nbytes
        self._elsewhere.clear()
        found = (self.peak, categories, modules, self._events, self._records)
        return Trace(*found, self._elsewhere_peak)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func, self._device):
            # Only without autograd do composite operators arrive whole: what they allocate inside
            # counts just as it does in training, where their parts arrive here one by one.
            with self:
                return run_parts(func, args, kwargs)
        if func is not aten.lift_fresh.default or not self._fake:
            self._look((args, kwargs))  # but not at the real data of a fake constant
        if self._phase == "backward":
            func = in_place_overload(func, args, self._sole) or func
        out = func(*args, **kwargs)
        if self._work is not None and self._phase:
            self._work.note(func, args, kwargs, out)
        # An operator that writes in place returns what it was given; it may have resized it.
        self._look((args, kwargs) if _writes(func) else out)
        return out

    def _look(self, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor):
                for storage in self._storages(value):
                    self._see(storage)

    def _storages(self, tensor: Tensor) -> list[torch.UntypedStorage]:
        if tensor.device.type != self._device:
            return [s for s in storages_of(tensor) if tensor.is_cpu and self._is_elsewhere(s)]
        if self._fake and tensor.dim() == 0 and not isinstance(tensor, FakeTensor):
            return []  # a Python number on its way into an operator
        return storages_of(tensor)

    def _is_elsewhere(self, storage: torch.UntypedStorage) -> bool:
        key = storage_key(storage)
        return storage.filename is not None or any(t.get(key) is storage for t in self._apart)

    def _see(self, storage: torch.UntypedStorage) -> None:
        if self._is_elsewhere(storage):
            self._see_elsewhere(storage)
            return
        key, nbytes = storage_key(storage), storage.nbytes()
        record = self._live.get(key)
        if record is None:
            if nbytes:
                self._watches[key] = weakref.ref(storage, functools.partial(self._release, key))
                self._begin(key, LiveStorage(nbytes, 0, self._phase, self._where()))
        elif record.nbytes != nbytes:
            self._release(key)
            self._watches[key] = weakref.ref(storage, functools.partial(self._release, key))
            self._begin(key, dataclasses.replace(record, nbytes=nbytes, died=math.inf))

    def _see_elsewhere(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is not in this device's memory, such as a mapped file."""
        key, nbytes = storage_key(storage), storage.nbytes()
        if key not in self._elsewhere:
            self._add_elsewhere(key, nbytes, storage)

    def _add_elsewhere(self, key: int, nbytes: int, holder: Any) -> None:
        watch = weakref.ref(holder, functools.partial(self._release_elsewhere, key))
        self._elsewhere[key] = nbytes, watch
        self._elsewhere_bytes += nbytes
        self._elsewhere_peak = max(self._elsewhere_peak, self._elsewhere_bytes)

    def _release_elsewhere(self, key: int, _: object = None) -> None:
        nbytes, _watch = self._elsewhere.pop(key)
        self._elsewhere_bytes -= nbytes

    def moved(self, nbytes: int, place: str, holder: Any) -> None:
        """Count a move, see :func:`pocketize.memory.hints.note_move`."""
        if holder is not None:
            self._add_elsewhere(-id(holder), nbytes, holder)  # no storage has such a key
        if self._work is not None and self._phase:
            self._work.note_move(nbytes, place, away=holder is not None)

    def followed(self, count: int) -> None:
        """See :func:`pocketize.memory.hints.note_followed`."""
        if self._work is not None and self._phase:
            self._work.followed += count

    def _see_resized(self) -> None:
        """Look for storages whose memory was taken away without an operator."""
        for key, watch in list(self._watches.items()):
            storage, record = watch(), self._live.get(key)
            if storage is not None and record is not None and storage.nbytes() < record.nbytes:
                record.died = len(self._events)
                self._bytes -= record.nbytes - storage.nbytes()
                left = dataclasses.replace(record, nbytes=storage.nbytes(), died=math.inf)
                left.born = len(self._events)
                self._live[key] = left
                self._records.append(left)

    def _begin(self, key: int, record: LiveStorage) -> None:
        record.born = len(self._events)
        self._live[key] = record
        self._records.append(record)
        self._bytes += record.nbytes
        self._log(self._label())

    def _release(self, key: int, _: object = None) -> None:
        record = self._live.pop(key, None)
        self._watches.pop(key, None)
        if record is not None:
            record.died = len(self._events)
            self._bytes -= record.nbytes
            self._log(self._label())

    def _label(self) -> str:
        return f"{self._phase} {self._where()}".strip()

    def _log(self, label: str) -> None:
        if not self._phase:  # before the step: one event in all
            return
        if self._bytes > self.peak or self._every:
            self._see_resized()
        if self._bytes > self.peak:
            self.peak, self._peak_at = self._bytes, len(self._events)
        self._events.append((label, self._bytes))


_Storages = weakref.WeakValueDictionary[int, torch.UntypedStorage]
#: Storages in host memory, and fake ones in place of mapped files, by their address.
_ON_HOST, _ON_DISK = _Storages(), _Storages()


def waits_elsewhere(tensor: Tensor, *, host: bool) -> None:
    """Count a tensor as ``elsewhere``, not as the device's.

    Args:
        tensor: in host memory, or a fake one that represents a mapped file.
        host: in host memory, which is the device's own on the CPU.
    """
    for storage in storages_of(tensor):
        (_ON_HOST if host else _ON_DISK)[storage_key(storage)] = storage


def storage_bytes(tensors: Iterable[Tensor], apart: Iterable[Tensor] = ()) -> dict[int, int]:
    """Return the bytes of the storages behind tensors by the key of each, in their order.

    Args:
        tensors: alive, so that the keys are distinct.
        apart: tensors whose storages are left out.
    """
    out = {storage_key(storage) for tensor in apart for storage in storages_of(tensor)}
    found = {storage_key(s): s.nbytes() for tensor in tensors for s in storages_of(tensor)}
    return {key: nbytes for key, nbytes in found.items() if key not in out}


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storages behind a tensor: one, or those of the parts of a sparse tensor."""
    if tensor.layout is torch.sparse_coo:
        return [key for part in sparse_parts(tensor) for key in storages_of(part)]
    try:
        return [tensor.untyped_storage()]
    except (NotImplementedError, RuntimeError):  # a wrapper that owns no memory itself
        return []


@functools.cache
def is_composite(func: Any, device: str) -> bool:
    """Tell whether an operator is composed of others and has no kernel on the device."""
    if not isinstance(func, OpOverload):
        return False
    own = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}.get(device, "CPU")
    name = str(func.name())  # type: ignore[no-untyped-call]
    composite = has_kernel(name, "CompositeImplicitAutograd")  # None: prim::device, for one
    return bool(composite) and not has_kernel(name, own)


@functools.cache
def _writes(func: Any) -> bool:
    """Tell whether an operator returns tensors that it was given to write to."""
    schema = schema_of(func)
    return schema is not None and any(
        returned.alias_info is not None and returned.alias_info.is_write
        for returned in schema.returns
    )
