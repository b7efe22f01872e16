"""What the code of a forward reads besides the model: globals, and attributes of classes."""

from __future__ import annotations

__all__ = ["CodeRead", "code_reads", "names_in"]

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

#: Libraries whose code is not followed.
_LIBRARIES = {"torch", "numpy", "pocketize", *sys.stdlib_module_names}
#: Values without code.
_PLAIN = {bool, int, float, str, type(None), tuple, list, dict, set, OrderedDict, Tensor}
#: Methods that are called without their name.
_IMPLICIT = {"forward", "__call__", "__getattr__"}


@dataclass(frozen=True, eq=False)
class CodeRead:
    """A value that code reads: the global ``name`` of a module, or an attribute of a class."""

    label: str
    place: Mapping[str, Any]
    name: str
    value: Any


def code_reads(model: nn.Module) -> list[CodeRead]:
    """Return what the code of a model may read, by label.

    Followed are the forward of each module, and what it names: methods, functions, properties,
    classes, and what these name, but no libraries such as torch. A name is looked up in the globals
    of the function and in all classes, so some of what is found may not be read.
    """
    return sorted(_Reads(model).found.values(), key=lambda read: read.label)


class _Reads:
    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, CodeRead] = {}
        self._names = set(_IMPLICIT)
        self._classes: dict[type, set[str]] = {}  # with the names that were looked up
        self._functions: list[types.FunctionType] = []
        self._seen: set[int] = set()
        for module in model.modules():
            self._follow(module)
            for value in vars(module).values():
                if type(value) not in _PLAIN:
                    self._follow(value)
        while self._step():
            pass

    def _step(self) -> bool:
        """Look up what is new; return whether there was something."""
        functions, self._functions = self._functions, []
        for function in functions:
            where = str(function.__globals__.get("__name__"))
            for name in sorted(names_in(function.__code__)):
                self._names.add(name)
                if name in function.__globals__:
                    self._note(function.__globals__, where, name)
        looked = bool(functions)
        for cls, done in list(self._classes.items()):
            if new := self._names - done:
                done |= new
                looked = True
                for name in sorted(new & vars(cls).keys()):
                    self._note(vars(cls), f"{cls.__module__}.{cls.__qualname__}", name)
        return looked

    def _note(self, place: Mapping[str, Any], where: str, name: str) -> None:
        label = f"{where}.{name}"
        while label in self.found and self.found[label].value is not place[name]:
            label += "'"  # two classes of one name
        if label not in self.found:
            self.found[label] = CodeRead(label, place, name, place[name])
            self._follow(place[name])

    def _follow(self, value: Any) -> None:
        for each in _behind(value):
            if id(each) in self._seen:
                continue
            self._seen.add(id(each))
            if isinstance(each, types.FunctionType):
                if _is_followed(each.__module__):
                    self._functions.append(each)
                continue
            kind = each if isinstance(each, type) else type(each)
            if id(kind) not in self._seen or kind is each:
                self._seen.add(id(kind))
                for cls in kind.__mro__:
                    if _is_followed(cls.__module__):
                        self._classes.setdefault(cls, set())


def _behind(value: Any) -> Iterator[Any]:
    """Yield a value, and the functions that it calls."""
    yield value
    if isinstance(value, property):
        yield from _behind(value.fget)
    elif isinstance(value, staticmethod | classmethod | types.MethodType):
        yield from _behind(value.__func__)
    elif isinstance(value, functools.partial):
        yield from _behind(value.func)
    elif "__wrapped__" in getattr(value, "__dict__", ()):  # also functools.lru_cache's
        yield from _behind(value.__wrapped__)


def _is_followed(module: str | None) -> bool:
    return (module or "").partition(".")[0] not in _LIBRARIES


@functools.cache
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the names in a function's code, and in that of functions inside it."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*map(names_in, inner))
