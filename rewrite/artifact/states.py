"""What a ``state_dict`` does not tell about a model, as data; and how two states differ, in
words."""

from __future__ import annotations

__all__ = ["MEMORY_FORMATS", "apply_state", "describe_mismatch", "describe_state", "shape_text"]

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.artifact.custom import full_state

_FLOATS = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_SHOWN = 5

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last format of a tensor, by its number of axes."""


def describe_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe modes, frozen parameters, memory formats and dtypes that ``state`` leaves out.

    Args:
        model: the model.
        state: what :func:`full_state` says of it.

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
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """Say how the shapes in a file differ from those of a model; ``""`` where they agree.

    Args:
        expected: shapes of the model, by key.
        found: shapes in the file, by key.
    """
    lines = []
    if missing := [key for key in expected if key not in found]:
        lines.append(f"  not in the file: {_few(missing)}")
    if foreign := sorted(found.keys() - expected.keys()):
        lines.append(f"  not in the model: {_few(foreign)}")
    other = [
        f"{key} ({shape_text(found[key])} in the file, {shape_text(shape)} in the model)"
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
