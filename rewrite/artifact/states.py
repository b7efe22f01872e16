"""The state of a model, also if its class overrides ``state_dict`` or ``load_state_dict``.

A class may leave weights out, rename or nest them, add numbers of its own, take fewer arguments, or
derive something when it loads. So a saved model has every parameter and persistent buffer under
torch's names. Loading puts these in place directly; then the class loads what its own
``state_dict`` returns, so that it derives what it needs.

The rest of this file describes what no ``state_dict`` has (modes, frozen parameters, memory
formats), and the differences between two states, in words.
"""

from __future__ import annotations

__all__ = [
    "MEMORY_FORMATS",
    "apply_state",
    "class_state",
    "constants_of",
    "describe_mismatch",
    "describe_state",
    "full_state",
    "leaves",
    "let_classes_load",
    "overrides",
    "own_tensors",
    "place_of",
    "same_values",
    "shape_text",
]

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pocketize._torch import storage_key
from pocketize.errors import ArtifactError

_log = logging.getLogger(__name__)


def overrides(model: nn.Module, method: str) -> bool:
    """Whether a model, by its class or an attribute, overrides a method of ``nn.Module``."""
    return getattr(getattr(model, method), "__func__", None) is not getattr(nn.Module, method)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer by its path, ties under each of their names."""
    tensors: dict[str, Tensor] = {}
    for path, module in nn.Module.named_modules(model, remove_duplicate=False):
        prefix = f"{path}." if path else ""
        passing = getattr(module, "_non_persistent_buffers_set", ())
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and name not in passing:
                    tensors[f"{prefix}{name}"] = tensor
    return tensors


def full_state(model: nn.Module) -> dict[str, Any]:
    """Return a model's state: ``state_dict(keep_vars=True)`` as ``nn.Module`` makes it, and more.

    An override in the root is bypassed; what inner modules, hooks and extra state add is included.
    So is every parameter and persistent buffer itself, even if modules leave some out or copy them.
    """
    own = own_tensors(model)
    try:
        state = dict(nn.Module.state_dict(model, keep_vars=True))
    except Exception:  # of a module inside that takes other arguments, which torch cannot call
        return own
    places = {place_of(tensor): tensor for tensor in reversed(own.values())}
    known = {id(tensor) for tensor in own.values()}
    for key, value in state.items():
        if isinstance(value, Tensor) and id(value) not in known:
            # a detached alias: take the tensor itself
            state[key] = own.get(key, places.get(place_of(value), value))
    held = {id(value) for value in state.values()}
    return state | {key: tensor for key, tensor in own.items() if id(tensor) not in held}


def class_state(model: nn.Module) -> Any:
    """Return what ``state_dict()`` of the model's class returns; an empty dict if it raises."""
    try:
        return model.state_dict()
    except Exception as error:  # nothing can be loaded into such a model, by torch neither
        owner = type(model).__name__
        _log.info("%s.state_dict() raises %s: %s", owner, type(error).__name__, error)
        return {}


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a nest of dicts and lists holds, with the keys that lead there."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, state


def place_of(tensor: Tensor) -> Any:
    """Return a key that is equal for tensors with the same numbers in the same memory."""
    if tensor.layout is not torch.strided or is_lazy(tensor) or not tensor.numel():
        return id(tensor)
    shape, stride = tuple(tensor.shape), tensor.stride()
    return storage_key(tensor), tensor.storage_offset(), shape, stride, tensor.dtype


def constants_of(model: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Return what a class of its own adds to the state_dict: numbers and texts, by their keys.

    :func:`load` cannot give these back, but it can tell whether the factory's model has the same.

    Raises:
        ArtifactError: it adds anything else.
    """
    returned = class_state(model) if overrides(model, "state_dict") else {}
    known = [value for value in state.values() if isinstance(value, Tensor)]
    places = {place_of(tensor) for tensor in known}
    constants = {}
    for key, value in leaves(returned):
        if isinstance(value, Tensor):
            if place_of(value) in places or any(same_values(value, other) for other in known):
                continue
        elif value is None or isinstance(value, bool | int | float | str):
            constants[key] = repr(value)
            continue
        raise ArtifactError(
            f"state_dict() of {type(model).__name__} holds {key!r}, which is no parameter or "
            "buffer of it, so it could not be loaded again. Register it as a buffer, or let "
            "get_extra_state return it as a tensor"
        )
    return constants


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach().cpu(), right.detach().cpu()
    return bool(((left == right) | ((left != left) & (right != right))).all())


def let_classes_load(
    model: nn.Module, values: Mapping[str, Tensor], constants: Mapping[str, Any], origin: str
) -> None:
    """Call ``load_state_dict`` of a model with its own state, once all weights are in place.

    Classes and hooks then derive what they derive when they load, and get their extra state.
    """
    owner, own = type(model).__name__, own_tensors(model)
    before = {key: _fingerprint(tensor) for key, tensor in own.items()}
    returned = class_state(model)
    found = dict(leaves(returned))
    for key, value in constants.items():
        if repr(found.get(key)) != value:
            raise ArtifactError(
                f"state_dict() of {owner} says {found.get(key)!r} of {key!r}, and the file says "
                f"{value}, which is no tensor and cannot be loaded. {origin}. Let the factory "
                "build the model with it, or register it as a buffer"
            )
    if isinstance(returned, dict):
        held = {id(tensor) for tensor in own.values()}
        returned |= {k: v for k, v in values.items() if id(v) not in held and k in returned}
        if returned and not overrides(model, "load_state_dict"):
            # what hooks take out is in place, and strict loading must not miss it
            returned = {**values, **returned}
    try:
        if returned:
            model.load_state_dict(returned)
    except Exception as error:  # a class's own code may raise anything
        raise ArtifactError(
            f"load_state_dict() of {owner} does not take what its state_dict() returns: "
            f"{type(error).__name__}: {error}. {origin}. load() puts the weights in place, then "
            "lets the class load its own state, for what it derives from that: let "
            "model.load_state_dict(model.state_dict()) work"
        ) from error
    after = own_tensors(model)
    changed = [k for k, v in before.items() if k not in after or _fingerprint(after[k]) != v]
    if changed:
        raise ArtifactError(
            f"load_state_dict() of {owner} changes {changed[0]!r} when it loads what its "
            f"state_dict() returns, so the model would not be the one that was saved. {origin}. "
            "Let it load values as they are"
        )


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return tuple(tensor.shape), tensor.dtype, zlib.crc32(flat.view(torch.uint8).numpy().data)


_FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_SHOWN = 5

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last format of a tensor, by its number of axes."""


def describe_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe modes, frozen parameters, memory formats and dtypes that ``state`` leaves out.

    Returns:
        A JSON-able mapping for :func:`apply_state`: ``modes`` holds the paths of the modules whose
        mode is not that of the module around them, ``frozen`` and ``channels_last`` hold keys of
        the state, ``buffers`` the dtype of each floating-point buffer that the state does not
        hold.
    """
    modes: dict[str, bool] = {}
    for path, module, inherited in _modules(model):
        if module.training != inherited:
            modes[path] = module.training
    return {
        "modes": modes,
        "frozen": [
            key
            for key, value in state.items()
            if isinstance(value, nn.Parameter) and not value.requires_grad
        ],
        "channels_last": [key for key, value in state.items() if _is_channels_last(value)],
        "buffers": {
            name: str(buffer.dtype).removeprefix("torch.")
            for name, buffer in model.named_buffers()
            if name not in state and buffer.is_floating_point()
        },
    }


def apply_state(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Give the model the modes, frozen parameters and buffer dtypes that were described."""
    modes = described.get("modes", {})
    for path, module, inherited in _modules(model):
        # not module.train(), which owners override, for instance to keep a part in eval mode
        module.training = bool(modes.get(path, inherited))
    frozen = set(described.get("frozen", ()))
    for key, value in full_state(model).items():
        if isinstance(value, nn.Parameter):
            value.requires_grad_(key not in frozen)
    for name, dtype in described.get("buffers", {}).items():
        owner, _, attribute = name.rpartition(".")
        buffers = model.get_submodule(owner)._buffers
        buffer = buffers.get(attribute)
        if buffer is not None and dtype in _FLOATS:
            buffers[attribute] = buffer.to(_FLOATS[dtype])


def _modules(model: nn.Module) -> Iterable[tuple[str, nn.Module, bool]]:
    """Every module with its path and the mode of the module around it; True for the root."""
    modes: dict[str, bool] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        yield path, module, modes[parent] if path else True
        modes[path] = module.training


def _is_channels_last(value: Tensor) -> bool:
    if value.dim() not in MEMORY_FORMATS:
        return False
    # by strides: of a 1x1 kernel, is_contiguous says that it is in either format
    plain, last = (
        torch.empty_like(value, device="meta", memory_format=memory_format).stride()
        for memory_format in (torch.contiguous_format, MEMORY_FORMATS[value.dim()])
    )
    return value.stride() == last != plain


def describe_mismatch(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: str = "the file",
) -> str:
    """Say how the shapes in a source differ from those of a model; ``""`` where they agree."""
    lines = []
    if missing := [key for key in expected if key not in found]:
        lines.append(f"  not in {source}: {_few(missing)}")
    if foreign := sorted(found.keys() - expected.keys()):
        lines.append(f"  not in the model: {_few(foreign)}")
    other = [
        f"{key} ({shape_text(found[key])} in {source}, {shape_text(shape)} in the model)"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if other:
        lines.append(f"  other shapes: {_few(other)}")
    return "\n".join(lines)


def _few(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a shape as ``"16x8x3x3"``."""
    return "x".join(map(str, shape)) or "scalar"
