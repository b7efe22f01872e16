"""Tensors inside what a forward returns, replaced where they are, the containers kept in type."""

from __future__ import annotations

__all__ = ["dressed", "map_tensors"]

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from pocketize.graph.inputs import is_dressed

#: Values that hold no tensor, or are no containers.
_OPAQUE = (str, bytes, int, float, type, nn.Module, FunctionType, MethodType, ModuleType)


def map_tensors(
    value: Any, wanted: Callable[[Tensor], bool], fn: Callable[[Tensor], Tensor]
) -> Any:
    """Replace some of the tensors in a nest.

    Args:
        value: tensors in tuples, named tuples, lists, mappings, dataclasses (frozen ones and those
            with slots included) and plain objects, in any nesting.
        wanted: tells which tensors to replace.
        fn: returns what replaces one.

    Returns:
        The same object where nothing is to be replaced, otherwise a shallow copy of each container
        on the way to a replaced tensor, of the same type. Nothing is written to ``value``.
    """
    return _mapped(value, wanted, fn, {})


def dressed(made: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with the class and the attributes of another, such as a ``MetaTensor``."""
    if not is_dressed(like):
        return made
    result = made.as_subclass(type(like))
    vars(result).update(vars(like))
    return result


def _mapped(
    value: Any,
    wanted: Callable[[Tensor], bool],
    fn: Callable[[Tensor], Tensor],
    copies: dict[int, Any],
) -> Any:
    if isinstance(value, Tensor):
        return fn(value) if wanted(value) else value
    if id(value) in copies:  # objects may refer to each other, and to themselves
        return copies[id(value)]
    if not _holds(value, wanted, set()):
        return value
    if isinstance(value, tuple):
        items = [_mapped(item, wanted, fn, copies) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    made = copies[id(value)] = copy.copy(value)
    for key, item in _items(value):
        made[key] = _mapped(item, wanted, fn, copies)
    for name in _attributes(value):
        item = _mapped(getattr(value, name), wanted, fn, copies)
        object.__setattr__(made, name, item)  # also of a frozen dataclass
    return made


def _holds(value: Any, wanted: Callable[[Tensor], bool], seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        return wanted(value)
    if value is None or isinstance(value, _OPAQUE) or id(value) in seen:
        return False
    seen.add(id(value))
    inner = [item for _, item in _items(value)]
    inner += [getattr(value, name) for name in _attributes(value)]
    return any(_holds(item, wanted, seen) for item in inner)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, tuple | list):
        yield from enumerate(value)
    elif isinstance(value, MutableMapping):
        yield from value.items()


def _attributes(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return list(getattr(value, "__dict__", ()))
