"""Saved tensors wait in host memory, or on disk, for the backward pass.

Source: Rhu et al., "vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural
Network Design", MICRO 2016. The machinery is ``torch.autograd.graph.saved_tensors_hooks``; unlike
``save_on_cpu`` it moves a tensor that several operators save only once, and leaves weights, inputs
and small tensors where they are.
"""

from __future__ import annotations

__all__ = ["Offload", "OffloadedForward", "file_copy", "host_copy"]

import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketize._torch import FakeTensor, storage_key, version_of
from pocketize.engine.pipeline import history
from pocketize.errors import ExecutionError, OptionError, RewriteError
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import first_parameter
from pocketize.memory.hints import host_is_apart, note_move
from pocketize.memory.in_place import is_dense
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import (
    Forward,
    obstacle,
    unwrapping,
    without_backward,
    wrapping,
)
from pocketize.passes.shared.regions import survey
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion, reversal
from pocketize.plugin.edits import Convert
from pocketize.plugin.options import read_size
from pocketize.units import bytes_text


@dataclass(frozen=True, kw_only=True)
class Offload(Pass):
    """Move large saved tensors off the device in the forward, and back in the backward pass.

    It costs the time of two copies over the bus, or of writing and reading a file, and no
    computation. Weights, inputs and small tensors stay. Together with checkpoints, the inputs of
    the checkpointed modules are what is moved.

    Attributes:
        min_bytes: tensors from this size on are moved, "16MiB" for instance.
        to: "host" is pinned memory of the machine, "disk" temporary files.
        folder: for the files; none is where the system keeps temporary ones, which may be memory.
        device: the type of device that the model will train on, where it is not there yet.
    """

    name: ClassVar[str] = "offload"
    summary: ClassVar[str] = "Move large saved tensors to host memory or disk until backward"
    after: ClassVar[tuple[str, ...]] = (*REBUILDING, "in-place-norm", "amp", "checkpoint")
    conflicts: ClassVar[tuple[str, ...]] = ("recompute",)

    min_bytes: str = "16MiB"
    to: Literal["host", "disk"] = "host"
    folder: str | None = None
    device: str | None = None

    def validate(self) -> None:
        """Refuse a size that is none, and a folder without files."""
        _size(self.min_bytes)
        if self.folder is not None and self.to != "disk":
            raise OptionError("offload: option 'folder' is for to='disk'")

    @property
    def guarantee(self) -> Guarantee:
        """The same numbers, kept elsewhere."""
        return Guarantee.EXACT

    def propose(self, target: Target) -> Proposal:
        """Put the model's forward under the hooks."""
        reason = self._refusal(target.model)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        where = "host memory" if self.to == "host" else "temporary files"
        change = Change(
            "",
            f"saved tensors of {bytes_text(_size(self.min_bytes))} and more move to {where}",
            "nobody reads them before the backward pass",
        )
        edit = Convert("", "offload", self.conversion_options())
        return Proposal((edit,), (change,), notes=self._notes(target))

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {"min_bytes": _size(self.min_bytes), "to": self.to, "folder": self.folder}

    def _refusal(self, model: nn.Module) -> str:
        if wrapping(model, OffloadedForward):
            return "its saved tensors are already offloaded"
        if reason := obstacle(model):
            return reason
        if any(record.name in self.conflicts for record in history(model)):
            return "it was rewritten by recompute, which decides itself what autograd keeps"
        first = first_parameter(model)
        device = self.device or (first.device.type if first is not None else "cpu")
        if self.to == "host" and device == "cpu":
            return (
                "it is on the CPU, whose saved tensors are in host memory already; move it to the "
                "GPU first, or say device='cuda' if it will be there, or to='disk'"
            )
        return ""

    def _notes(self, target: Target) -> tuple[str, ...]:
        try:
            kept = survey(target.model, target.inputs).kept
        except RewriteError:
            return ()  # it asks for values; offloading does not depend on a forecast
        large = [nbytes for nbytes in kept if nbytes >= _size(self.min_bytes)]
        return (
            f"on {target.inputs.describe()}, {len(large)} of {len(kept)} saved tensors would move: "
            f"{bytes_text(sum(large))} of {bytes_text(sum(kept))}",
        )


def _size(text: str) -> int:
    return read_size(text, "offload: option 'min_bytes'", "16MiB")


@conversion("offload")
def _convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    reason = obstacle(module)
    if reason or wrapping(module, OffloadedForward):
        raise RewriteError(f"offload: {reason or 'the module is offloaded already'}")
    disk = options.get("to") == "disk"
    forward = OffloadedForward(
        module, int(options["min_bytes"]), disk=disk, folder=options.get("folder")
    )
    forward.install()
    return module


class OffloadedForward(Forward):
    """A forward whose large saved tensors wait in host memory, or in files, for the backward pass.

    Args:
        module: the model.
        min_bytes: tensors from this size on are moved.
        disk: to files instead of host memory; also from a model on the CPU.
        folder: for the files; ``None`` is where the system has its temporary ones.
    """

    lowers: ClassVar[str] = "offload"

    def __init__(
        self, module: nn.Module, min_bytes: int, *, disk: bool = False, folder: str | None = None
    ) -> None:
        super().__init__(module)
        self.min_bytes, self.disk, self.folder = min_bytes, disk, folder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        if without_backward():
            return self.original(*args, **kwargs)
        return self._hooked(*args, **kwargs)

    # The compiler takes no hooks on saved tensors in its graphs; what runs inside is compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
    def _hooked(self, *args: Any, **kwargs: Any) -> Any:
        mover = self._mover((args, kwargs))
        with _RreluStays(mover), torch.autograd.graph.saved_tensors_hooks(mover.pack, _fetch):
            return self.original(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mover(self, given: Any) -> _Mover:
        own = [*self.module.parameters(), *self.module.buffers(), *find_tensors(given)]
        if any(hasattr(tensor, "device_mesh") for tensor in own):
            raise ExecutionError(
                f"offload: the weights of {type(self.module).__name__} are sharded, and gathered "
                "weights cannot be told from activations; shard the model without this pass, e.g. "
                "with fully_shard(model, offload_policy=CPUOffloadPolicy())"
            )
        return _Mover(self, own)

    def place(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Move a tensor away and return what brings it back."""
        if isinstance(tensor, FakeTensor):
            back = _fake_copy(tensor, disk=self.disk)
        else:
            back = file_copy(tensor, self.folder) if self.disk else host_copy(tensor)
        place, nbytes = "disk" if self.disk else "host", tensor.nbytes
        note_move(nbytes, place, back)

        def fetch() -> Tensor:
            note_move(nbytes, place)
            return back()

        return fetch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _fetch(kept: _StayingTensor | _MovedTensor) -> Tensor:
    return kept.fetch()


class _Mover:
    """Moves the tensors that autograd saves in one forward, each of them once."""

    def __init__(self, forward: OffloadedForward, own: Iterable[Tensor]) -> None:
        self._forward = forward
        self._own = {storage_key(tensor) for tensor in own if tensor.layout is torch.strided}
        self._names = {
            storage_key(weight): f"parameter {name!r}"
            for name, weight in forward.module.named_parameters()
            if weight.layout is torch.strided
        }
        self.rests = False  #: whether all that is saved stays
        self._moved: weakref.WeakValueDictionary[Any, _MovedTensor] = weakref.WeakValueDictionary()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pack(self, tensor: Tensor) -> _StayingTensor | _MovedTensor:
        """Return what autograd keeps instead of a tensor."""
        if self.rests or not self._moves(tensor):
            named = self._names and tensor.layout is torch.strided
            return _StayingTensor(tensor, self._names.get(storage_key(tensor)) if named else None)
        layout = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        key = storage_key(tensor), version_of(tensor), layout
        moved = self._moved.get(key)
        if moved is None or moved.storage() is None:  # the address may have been reused
            kept = tensor.detach()
            if type(kept) not in (Tensor, FakeTensor):  # autograd needs no class and no metadata
                kept = kept.as_subclass(Tensor)
            moved = self._moved[key] = _MovedTensor(tensor, self._forward.place(kept))
        return moved

    def _moves(self, tensor: Tensor) -> bool:
        kind = type(tensor)
        if kind is not FakeTensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return False  # it need not have memory of its own
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_inference():
            return False
        away = self._forward.disk or tensor.device.type != "cpu"
        if not away and not (kind is FakeTensor and host_is_apart()):  # it represents a GPU's
            return False
        nbytes = tensor.numel() * tensor.element_size()
        # An expanded tensor is smaller in memory than it says; so moved, it would grow.
        if not self._forward.min_bytes <= nbytes <= tensor.untyped_storage().nbytes():
            return False
        return storage_key(tensor) not in self._own


_RRELU = F.rrelu, torch.rrelu, torch.rrelu_


class _RreluStays(TorchFunctionMode):
    """Autograd saves the noise of ``rrelu`` before that fills it: a copy would be too early."""

    def __init__(self, mover: _Mover) -> None:
        super().__init__()
        self._mover = mover

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a call."""
        self._mover.rests = func in _RRELU
        return func(*args, **(kwargs or {}))


class _StayingTensor:
    """A tensor that is not moved.

    Without its graph: autograd would refer to itself, and a forward without a backward would never
    be freed. With its version: autograd does not compare versions where there are hooks.
    """

    __slots__ = ("_name", "_tensor", "_version")

    def __init__(self, tensor: Tensor, name: str | None) -> None:
        self._tensor, self._version, self._name = tensor.detach(), version_of(tensor), name

    def fetch(self) -> Tensor:
        if (found := version_of(self._tensor)) != self._version:
            name = self._name or f"a tensor of shape {tuple(self._tensor.shape)}"
            raise ExecutionError(
                f"offload: {name}, which the backward pass needs as it was, was written to between "
                f"forward and backward (version {found}, not {self._version}). Call backward() "
                "first and change it then, or give the forward a clone"
            )
        return self._tensor


class _MovedTensor:
    """One tensor that waits elsewhere; brought back once for all who ask at the same time."""

    def __init__(self, tensor: Tensor, place: Callable[[], Tensor]) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self._place = place
        self._back: Callable[[], Tensor | None] = lambda: None

    def fetch(self) -> Tensor:
        tensor = self._back()
        if tensor is None:
            tensor = self._place()
            self._back = weakref.ref(tensor)
        return tensor


def host_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Copy to host memory; pinned, so that copying does not block the host.

    Returns:
        What brings it back.
    """
    device, pinned = tensor.device, tensor.is_cuda
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    copy.copy_(tensor, non_blocking=pinned)
    return lambda: copy.to(device, non_blocking=pinned)


def file_copy(tensor: Tensor, folder: str | None) -> Callable[[], Tensor]:
    """Write the bytes to a temporary file, which is closed after the last read.

    Returns:
        What reads them.

    Raises:
        ExecutionError: there is no room in the folder.
    """
    flat = tensor if is_dense(tensor.shape, tensor.stride()) else tensor.contiguous()
    device, dtype, shape, stride = flat.device, flat.dtype, flat.shape, flat.stride()
    try:
        # It has no name, so that none is left behind; closed with the last who may read it.
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

        def read() -> Tensor:
            file.seek(0)
            linear = torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype)
            return linear.to(device).as_strided(shape, stride)

        weakref.finalize(read, file.close)
        _write(flat, file)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise ExecutionError(
            f"offload: {bytes_text(tensor.nbytes)} cannot be written to {where}: {error}. "
            "Make room there, or name another folder"
        ) from error
    return read


def _fake_copy(tensor: FakeTensor, *, disk: bool) -> Callable[[], Tensor]:
    """Copy in an estimate, where tensors have no values."""
    flat: Any = tensor
    if not is_dense(tensor.shape, tensor.stride()):  # as the real copies do
        flat = tensor.contiguous() if disk else torch.empty_like(tensor, device="meta")
    shape, stride, dtype = flat.shape, flat.stride(), flat.dtype
    mode, device = tensor.fake_mode, tensor.device

    def empty() -> Tensor:
        with mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return empty


def _write(tensor: Tensor, file: Any) -> None:
    """Write a dense tensor in the order of memory, as bytes: NumPy has no bfloat16."""
    linear = tensor.as_strided((tensor.numel(),), (1,)).cpu().view(torch.uint8)
    linear.numpy().tofile(file)


reversal("offload", unwrapping(OffloadedForward))
