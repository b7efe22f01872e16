"""What modules and objects hold: attributes and items, read, copied and put back."""

from __future__ import annotations

__all__ = ["copied", "has_state", "put_state", "slots_of", "state_of", "tensors_of"]

import copy
import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

#: Immutable values without tensors; containers that may be changed.
_PLAIN = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, deque, set, tuple))
#: Containers that classes derive from; what their items are called among the attributes.
_DERIVED, _ITEMS = (OrderedDict, dict, list, deque, set), "its items"
#: Objects with attributes that no forward changes, or that are not its own.
_STATELESS = (type, FunctionType, MethodType, ModuleType, Enum, logging.Logger, logging.Handler)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module may read without being given them: its attributes."""
    found: list[Tensor] = []
    memo: dict[int, tuple[Any, Any]] = {}
    for inner in module.modules():
        copied(state_of(inner), lambda v: found.append(v) if isinstance(v, Tensor) else v, memo)
    return found


def has_state(value: Any) -> bool:
    """Whether a value is an object with attributes or items that a forward may change."""
    if isinstance(value, _STATELESS):
        return False
    package = type(value).__module__.partition(".")[0]
    if not isinstance(value, nn.Module) and package in ("torch", "pocketize"):
        return False
    slots = hasattr(type(value), "__slots__")
    return (
        slots or isinstance(getattr(value, "__dict__", None), dict) or isinstance(value, _DERIVED)
    )


def slots_of(value: Any) -> dict[str, Any]:
    """Return the attributes that an object has in ``__slots__``."""
    found = {}
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            stored = f"_{cls.__name__.lstrip('_')}{name}" if private else name
            if not name.endswith("__") and hasattr(value, stored):
                found[stored] = getattr(value, stored)
    return found


def state_of(held: Any) -> dict[str, Any]:
    """Return the attributes of a module, or of another object, and the items that it has."""
    if isinstance(held, torch.jit.ScriptModule):  # the others are not Python's
        tensors = {"_parameters": dict(held._parameters), "_buffers": dict(held._buffers)}
        return {**tensors, "training": held.training}
    if isinstance(held, nn.Module):
        return dict(vars(held))
    found = {**getattr(held, "__dict__", {}), **slots_of(held)}
    if isinstance(held, _DERIVED):
        found[_ITEMS] = dict(held) if isinstance(held, dict) else list(held)
    return found


def put_state(held: Any, state: dict[str, Any], now: dict[str, Any]) -> None:
    """Give an object other attributes and items; ``now`` are those that it has, or is to have."""
    if isinstance(held, torch.jit.ScriptModule):
        held.training = state["training"]
        for name, buffer in state["_buffers"].items():
            held._buffers[name] = buffer
        return
    if isinstance(held, nn.Module):
        if _is_sharded(state) or _is_sharded(now):
            state = {**state, "_parameters": now["_parameters"]}  # fully_shard gathers them itself
        attributes = vars(held)
        attributes.update(state)
        for name in attributes.keys() - state.keys():
            del attributes[name]
        return
    for name in state_of(held).keys() - state.keys():
        object.__delattr__(held, name) if _is_slot(held, name) else vars(held).pop(name)
    for name, value in state.items():
        if name == _ITEMS:
            _put_items(held, value)
        elif _is_slot(held, name):
            object.__setattr__(held, name, value)  # also of a frozen dataclass
        else:
            vars(held)[name] = value


def _is_slot(held: Any, name: str) -> bool:
    return isinstance(getattr(type(held), name, None), MemberDescriptorType)


def _put_items(held: Any, items: Any) -> None:
    """Give a container other items, by the methods of the class that it derives from."""
    kind: Any = next(each for each in _DERIVED if isinstance(held, each))
    kind.clear(held)
    if isinstance(held, dict):
        for key, item in items.items():
            kind.__setitem__(held, key, item)
    else:
        (kind.update if kind is set else kind.extend)(held, items)


def _is_sharded(state: dict[str, Any]) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in state["_parameters"].values())


def copied(value: Any, leaf: Callable[[Any], Any], memo: dict[int, tuple[Any, Any]]) -> Any:
    """Return a copy of Python's containers in which everything else is what ``leaf`` returns."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    named: Any = getattr(value, "_make", None) if isinstance(value, tuple) else None
    if not named and kind not in _CONTAINERS:
        return leaf(value)
    if known := memo.get(id(value)):  # with the value itself, so that its id stays its own
        return known[1]
    if isinstance(value, tuple):
        items = [copied(item, leaf, memo) for item in value]
        return memo.setdefault(id(value), (value, named(items) if named else tuple(items)))[1]
    made = kind() if kind in (dict, OrderedDict) else copy.copy(value)
    memo[id(value)] = value, made
    if isinstance(value, dict):
        for key, item in value.items():
            made[key] = copied(item, leaf, memo)
    elif kind is not set:
        for place, item in enumerate(value):
            made[place] = copied(item, leaf, memo)
    return made
