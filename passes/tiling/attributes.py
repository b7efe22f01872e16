"""What the attributes of modules hold: a change between two calls, or in one, is seen.

A forward by tiles runs operators only. So one that changes attributes is refused, but for tensors
that it stores for later: reading one after a forward by tiles is an error.
"""

from __future__ import annotations

__all__ = [
    "Description",
    "Identity",
    "Lost",
    "NotComputed",
    "check_state",
    "is_table",
    "mark_lost",
    "state_of",
]

import array
import collections
import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

import numpy as np
from torch import Tensor, nn

from pocketize.errors import ExecutionError
from pocketize.passes.shared.object_state import slots_of
from pocketize.passes.tiling.tiled_graph import TilingError

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, tuple, set, frozenset, collections.deque, bytearray, array.array)
#: What counts by its identity, whatever it holds.
_WHOLE = (type, types.ModuleType, logging.Logger, logging.Handler)
#: What has a name of its own.
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
#: Objects and levels that one description looks at: a trainer may hang on a module.
_OBJECTS, _LEVELS = 20_000, 50
#: What torch or the tracer writes into a module without changing what it computes.
_OWN = {"training", "forward", "_is_full_backward_hook"}

#: Path of an attribute, and an index or key in the list or dict that it is; None for itself.
Lost: TypeAlias = tuple[str, Any]


# -- descriptions --------------------------------------------------------------------------------


class Identity:
    """Compares by the identity of an object, and keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        """The same in every process: name and code, without addresses."""
        named = self.value if isinstance(self.value, _NAMED) else type(self.value)
        code = named.__code__.co_code if isinstance(named, types.FunctionType) else b""
        return f"{named.__module__}.{named.__qualname__} {code.hex()}"


class _Unseen:
    """Equals no other: what is behind it was not looked at."""

    def __init__(self, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        return "more"


class Description:
    """Describes values so that descriptions are equal only where a forward sees no difference.

    Objects count by their identity, and by their attributes and items at any depth; functions and
    methods also by what they are bound to and close over. Objects of other classes that are written
    in C count by their identity only.

    Args:
        known: modules that are described elsewhere; here they count by their identity.
        tensor: what to put for a tensor.
        unseen: what to put for what is nested too deep, or too much.
    """

    def __init__(
        self,
        known: Iterable[nn.Module] = (),
        *,
        tensor: Callable[[Any], Any] = lambda _: Tensor,
        unseen: Callable[[Any], Any] = _Unseen,
    ) -> None:
        self._known = {id(module) for module in known}
        self._tensor, self._unseen = tensor, unseen
        #: What was described, by its address, with its number; kept alive, so that none is reused.
        self._seen: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any, level: int = 0) -> Any:
        """Return the description, which can be hashed."""
        if isinstance(value, Tensor | NotComputed):
            return self._tensor(value)
        if _is_simple(value):
            return type(value), value
        if isinstance(value, _WHOLE) or id(value) in self._known:
            return Identity(value)
        if id(value) in self._seen:
            return "again", self._seen[id(value)][0]
        if len(self._seen) >= _OBJECTS or level >= _LEVELS:
            return self._unseen(value)
        self._seen[id(value)] = len(self._seen), value
        held = tuple(self.of(each, level + 1) for each in _held(value))
        if isinstance(value, np.ndarray):
            content = value.tolist() if value.dtype.hasobject else value.tobytes()
            return value.shape, value.dtype, self.of(content, level + 1)
        if isinstance(value, dict):
            items = [each for pair in value.items() for each in pair]
        elif isinstance(value, _CONTAINERS):
            items = list(value)
        else:
            return Identity(value), held
        kind = frozenset if isinstance(value, set | frozenset) else tuple
        return type(value), held, kind(self.of(each, level + 1) for each in items)


def _held(value: Any) -> Iterator[Any]:
    """Yield what an object holds besides its items: attributes with their names."""
    if isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
        return
    if isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    if isinstance(value, types.FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # empty yet
                yield cell.cell_contents
    for name, each in {**getattr(value, "__dict__", {}), **slots_of(value)}.items():
        yield from (name, each)


def _is_simple(value: Any) -> bool:
    """Whether a value is a number, a text or the like, or a tuple of them."""
    return isinstance(value, _SIMPLE) or (
        isinstance(value, tuple) and all(_is_simple(item) for item in value)
    )


def is_table(name: str) -> bool:
    """Whether an attribute is one of a module's dicts of parameters, buffers, modules or hooks."""
    return name in ("_parameters", "_buffers", "_modules") or name.endswith(
        ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    )


# -- changes -------------------------------------------------------------------------------------


class NotComputed:
    """Replaces a tensor that the whole volume's forward stores in an attribute; using it raises.

    What the last whole forward stored would be of another volume, or of other weights.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __repr__(self) -> str:
        return f"NotComputed({self._name!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copying and pickling ask for
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse functions and operators of tensors."""
        next(arg for arg in _flat((args, kwargs)) if isinstance(arg, NotComputed))._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        raise ExecutionError(
            f"patchwise: the forward leaves a tensor in {self._name}, which a forward by tiles "
            "does not compute as a whole; return it from the network, or run the volume whole"
        )


_BINARY = ("add", "sub", "mul", "truediv", "pow", "matmul")
_OTHERS = ("getitem", "len", "iter", "neg", "float", "lt", "gt", "le", "ge")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(NotComputed, f"__{_name}__", NotComputed._refuse)


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [value]
    return [leaf for item in value for leaf in _flat(item)]


def mark_lost(model: nn.Module, lost: Iterable[Lost]) -> None:
    """Replace tensors in attributes that a forward by tiles has not computed."""
    for name, key in lost:
        path, _, attribute = name.rpartition(".")
        held = vars(model.get_submodule(path))
        place: Any = held.get(attribute)
        if key is None or not isinstance(place, list | dict):
            held[attribute] = NotComputed(name)
        else:
            place[key] = NotComputed(name)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return what the attributes of all modules hold; of tensors, which they are."""
    description = Description(model.modules(), tensor=Identity, unseen=Identity)
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers, **module._parameters}.items():
            if name in _OWN or is_table(name):
                continue
            where = f"{path}.{name}" if path else name
            if isinstance(value, list | tuple | set):
                state[where] = [description.of(item) for item in value]
            elif isinstance(value, dict):
                state[where] = {key: description.of(item) for key, item in value.items()}
            else:
                state[where] = description.of(value)
    return state


def check_state(
    model: nn.Module, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[Lost, ...]:
    """Refuse a forward that changes attributes; return where it stores tensors.

    Raises:
        TilingError: it changes something else than a tensor in an attribute.
    """
    lost: list[Lost] = []
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if name in before and (old == new or (old != old and new != new)):  # NaN
            continue
        path, _, attribute = name.rpartition(".")
        module, changed = model.get_submodule(path), _changed(old, new)
        held = attribute in module._buffers or attribute in module._parameters
        if held or not all(
            isinstance(v, Identity) and isinstance(v.value, Tensor) for v in changed.values()
        ):
            raise TilingError(
                f"its forward changes the attribute {name}, which a forward by tiles would not"
            )
        hooks = module._forward_pre_hooks.values()
        if attribute not in [getattr(hook, "name", None) for hook in hooks]:  # a weight norm's
            lost += [(name, key) for key in changed]
    return tuple(lost)


def _changed(old: Any, new: Any) -> dict[Any, Any]:
    """Return the new values of a container by index or key, or the one value, that differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return {i: b for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        return {key: value for key, value in new.items() if old.get(key) != value}
    return {None: new}
