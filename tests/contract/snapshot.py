"""A model as it stood at one moment: to tell afterwards whether anything touched it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.contract.widths import tensors_of

__all__ = ["HOOK_TABLES", "Snapshot", "plain_attributes"]

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OURS = "_pocketize_history"


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Python values that a module holds itself: numbers, texts, flags and containers of such."""
    held = {}
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, Tensor | nn.Module):
            continue
        if _is_plain(value):
            held[name] = value
    return held


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return True
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    return False


@dataclass(frozen=True)
class _TensorState:
    identity: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    version: int
    value: Tensor
    gradient: Tensor | None

    @staticmethod
    def of(tensor: Tensor) -> _TensorState:
        gradient = tensor.grad if tensor.is_leaf else None
        return _TensorState(
            id(tensor),
            tensor.data_ptr(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.requires_grad,
            tensor._version,
            tensor.detach().clone(),
            None if gradient is None else gradient.clone(),
        )

    def differences(self, other: _TensorState) -> list[str]:
        found = [
            f"{name} {getattr(self, name)} -> {getattr(other, name)}"
            for name in ("identity", "address", "shape", "stride", "dtype", "requires_grad")
            if getattr(self, name) != getattr(other, name)
        ]
        if not found and not _same(self.value, other.value):
            found.append("value")
        if (self.gradient is None) != (other.gradient is None):
            found.append("grad appeared or vanished")
        elif self.gradient is not None and not _same(self.gradient, other.gradient):
            found.append("grad")
        if not found and self.version != other.version:
            found.append("written to in place")
        return found


def _same(a: Tensor, b: Tensor | None) -> bool:
    return (
        b is not None
        and a.shape == b.shape
        and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    )


def _random_state() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return (torch.random.get_rng_state().tolist(), random.getstate(), (kind, list(keys), *rest))


class Snapshot:
    """Everything about a model, and about the random generators, that a rewrite may not change."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = {path: type(m) for path, m in model.named_modules(remove_duplicate=False)}
        self.identities = {path: id(m) for path, m in model.named_modules(remove_duplicate=False)}
        self.modes = {p: m.training for p, m in model.named_modules(remove_duplicate=False)}
        self.hooks = {
            path: {table: list(vars(m).get(table, {}).items()) for table in HOOK_TABLES}
            for path, m in model.named_modules()
        }
        self.attributes = {p: repr(plain_attributes(m)) for p, m in model.named_modules()}
        self.names = {path: sorted(vars(m)) for path, m in model.named_modules()}
        self.keys = list(model.state_dict())
        self.tensors = {name: _TensorState.of(t) for name, t in tensors_of(model).items()}
        self.random = _random_state()

    def differences(self, later: Snapshot) -> list[str]:
        """Say what changed between this moment and a later one; empty if nothing."""
        found = [
            f"{what} changed"
            for what in ("classes", "identities", "modes", "hooks", "attributes", "names", "keys")
            if getattr(self, what) != getattr(later, what)
        ]
        for name, state in self.tensors.items():
            if name not in later.tensors:
                found.append(f"{name} is gone")
            else:
                found += [f"{name}: {text}" for text in state.differences(later.tensors[name])]
        if self.random != later.random:
            found.append("a random generator was advanced")
        return found
