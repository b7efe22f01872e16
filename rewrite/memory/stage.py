"""What a measurement runs: a copy of the model and its inputs, real or fake, on a device."""

from __future__ import annotations

__all__ = [
    "Stage",
    "device_of",
    "explained",
    "fake_inputs",
    "fake_stage",
    "real_inputs",
    "real_stage",
]

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    storage_key,
    without_dispatch_modes,
)
from pocketize.errors import MeasureError, PocketizeError, brief
from pocketize.graph.capture import settle_inputs
from pocketize.graph.clone import clone, fake_clone
from pocketize.graph.inputs import Inputs, as_inputs, to_model
from pocketize.memory.in_place import is_dense

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass(frozen=True)
class Stage:
    """A model and inputs that may be run, trained and thrown away.

    Attributes:
        description: the device as the report names it.
        like_cuda: tensors on the CPU represent those of a GPU.
        active: context to run in: the fake mode, or nothing.
    """

    model: nn.Module
    inputs: Inputs
    device: torch.device
    description: str
    fake: bool = False
    like_cuda: bool = False
    active: AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)


def real_stage(
    model: nn.Module, inputs: Any, device: torch.device | None, *, own: bool = False
) -> Stage:
    """Prepare a measurement on real tensors.

    Args:
        model: the model; untouched unless ``own``.
        inputs: anything that ``as_inputs`` takes, or ``None`` to guess.
        device: where to; ``None`` leaves the model where it is.
        own: use model and inputs themselves, without a copy.

    Raises:
        MeasureError: the device is not there, or the model's tensors hold no values.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise MeasureError(
                f"{name} of {type(model).__name__} has a shape but no values (device "
                f"{tensor.device}); give it memory, e.g. with model.to_empty(device='cpu'), or "
                "pass estimate=True"
            )
    place = device or device_of(model)
    if not _is_available(place):
        raise MeasureError(
            f"cannot measure on {place}: this machine has no such device; pass estimate=True for "
            "figures without it"
        )
    given = settle_inputs(model, inputs)
    copy = model if own else clone(model)
    if device is not None:
        copy = copy.to(place)
    for parameter in copy.parameters():
        parameter.grad = None
    moved = real_inputs(given, copy, place)
    return Stage(copy, moved, place, _describe(place))


def fake_stage(model: nn.Module, inputs: Any, device: torch.device | None) -> Stage:
    """Prepare an estimate, which takes no memory at any size.

    The tensors are on the device asked for where the machine has it, and otherwise on the CPU.
    """
    wanted = device or device_of(model)
    if wanted.type == "meta":
        wanted = torch.device("cpu")
    present = _is_available(wanted)
    place = wanted if present else torch.device("cpu")
    given = settle_inputs(model, None) if inputs is None else inputs
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    copy = fake_clone(model, fakes, device=place)
    with fakes:
        if place.type == "cpu":
            _keep_scalars(model, copy)
        moved = fake_inputs(given, copy, place)
    name = _describe(place) if present else f"{wanted.type} (on CPU fakes)"
    return Stage(
        copy,
        moved,
        place,
        name,
        fake=True,
        like_cuda=wanted.type == "cuda" and not present,
        active=fakes,
    )


def real_inputs(given: Inputs, model: nn.Module, place: torch.device) -> Inputs:
    """Return copies of inputs on the device of a model, floating ones in its dtype."""
    taken = {storage_key(t) for t in given.tensors()}
    moved = to_model(given, model)

    def copied(tensor: Tensor) -> Tensor:
        there = tensor.detach().to(place)
        if storage_key(there) in taken:
            there = there.clone()
        return there.requires_grad_(tensor.requires_grad)

    return moved.map(_once(copied))


def fake_inputs(given: Any, model: nn.Module, place: torch.device) -> Inputs:
    """Return fake inputs for a fake model; to be called under its mode.

    A text such as ``"1x4x512x512x512"`` then makes fake tensors at once.
    """

    def faked(tensor: Tensor) -> Tensor:
        # From scratch, so that a view of something larger does not bring its whole storage, and
        # fake tensors of another mode do not mix with these.
        shape, stride = tensor.shape, tensor.stride()
        made = (
            torch.empty_strided(shape, stride, dtype=tensor.dtype, device=place)
            if is_dense(shape, stride)
            else torch.empty(shape, dtype=tensor.dtype, device=place)
        )
        return made.requires_grad_(tensor.requires_grad)

    return to_model(as_inputs(given, model).map(_once(faked)), model)


@contextlib.contextmanager
def explained(model: nn.Module, inputs: str, *, train: bool, estimate: bool) -> Iterator[None]:
    """Turn what a user's model raises into a :class:`MeasureError` that says what to do."""
    what = f"{type(model).__name__} did not get through a " + (
        f"training step on {inputs}" if train else f"forward pass on {inputs}"
    )
    try:
        yield
    except PocketizeError:
        raise
    except _DATA_DEPENDENT as error:
        raise MeasureError(
            f"{what}: it asks for the values of tensors ({error}), and an estimate has only "
            "shapes; use estimate=False"
        ) from error
    except Exception as error:  # a user's forward, loss or hooks may raise anything
        text = f"{what}: {brief(error)}"
        advice = _advice(text, estimate)
        raise MeasureError(f"{text.rstrip('.')}. {advice}" if advice else text) from error


def _advice(text: str, estimate: bool) -> str:
    if "Expected more than 1 value per channel" in text:
        return "A norm has one value per channel here: give a batch of 2, or a larger input."
    if any(sign in text for sign in _NO_MEMORY):
        return "There is not enough memory to measure; estimate=True needs none."
    if estimate:
        return "This was on fake tensors; if the model runs on real ones, use estimate=False."
    return ""


def _keep_scalars(model: nn.Module, copy: nn.Module) -> None:
    """Give fake buffers of one element their value, as some modules read it.

    Norms with a cumulative average read how many batches they have seen, others whether they were
    initialised. Call it under the fake mode, in which such constants stay fake tensors.
    """
    known: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.numel() != 1 or buffer.device.type != "cpu":
                continue
            if isinstance(buffer, FakeTensor):
                continue
            if id(buffer) not in known:
                with without_dispatch_modes():
                    value = buffer.tolist()
                known[id(buffer)] = torch.tensor(value, dtype=buffer.dtype)
            copy.get_submodule(path)._buffers[name] = known[id(buffer)]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first tensor; the CPU if it has none."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def _is_available(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    backend = getattr(torch, device.type, None)
    available = getattr(backend, "is_available", None)
    return bool(available is not None and available())


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def _once(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply ``fn`` once to a tensor that is given several times."""
    # with the tensor itself, so that no other tensor gets its id
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def remembered(tensor: Tensor) -> Tensor:
        if id(tensor) not in results:
            results[id(tensor)] = tensor, fn(tensor)
        return results[id(tensor)][1]

    return remembered
