"""Conversions: functions that change how a module runs, registered under a name.

An edit is data, and a file must never decide what code runs. So a
:class:`~pocketize.plugin.edits.Convert` edit only names a conversion. The function is in the code
of the pass that proposes it::

    @conversion("in-place-norm")
    def convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
        ...

A conversion returns the module for the path: the same object, changed (another class, hooks), or a
new one, which must take over what the old one had: parameters under their names, hooks, the
training flag. It also runs on fake tensors (in a dry run, or before weights are loaded), so it
reads no values. What it puts into a model must survive ``copy.deepcopy`` and pickling. If it only
changes how a module runs, :func:`reversal` registers how that is taken back, for ``plain``.
"""

from __future__ import annotations

__all__ = ["Conversion", "conversion", "convert", "find_conversion", "reversal", "reversals"]

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pocketize.errors import RewriteError, nearest

Conversion = Callable[[nn.Module, Mapping[str, Any], nn.Module], nn.Module]
"""Takes the module, the options of the edit and the whole model; returns the converted module."""

_CONVERSIONS: dict[str, Conversion] = {}


def conversion(name: str) -> Callable[[Conversion], Conversion]:
    """Register a conversion.

    Args:
        name: its name in edits: the name of the pass, or that with a suffix if a pass has several.

    Raises:
        ValueError: another conversion has the name.
    """

    def register(function: Conversion) -> Conversion:
        held = _CONVERSIONS.setdefault(name, function)
        if (held.__module__, held.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(
                f"the conversion {name!r} is registered already, by "
                f"{held.__module__}.{held.__qualname__}"
            )
        _CONVERSIONS[name] = function
        return function

    return register


_REVERSALS: dict[str, Callable[[nn.Module], None]] = {}


def reversal(name: str, function: Callable[[nn.Module], None]) -> None:
    """Register how a conversion is taken back that changes how a module runs, not what it is.

    Args:
        name: of the conversion.
        function: called with every module of a model, to change it in place; those that were not
            converted it leaves alone.
    """
    _REVERSALS[name] = function


def reversals() -> Mapping[str, Callable[[nn.Module], None]]:
    """Return what :func:`reversal` registered."""
    return _REVERSALS


def find_conversion(name: str) -> Conversion:
    """Return the conversion of a name.

    Raises:
        RewriteError: nothing that was imported has registered it.
    """
    found = _CONVERSIONS.get(name)
    if found is None:
        raise RewriteError(
            f"no conversion is called {name!r}.{nearest(name, _CONVERSIONS)} Import the package of "
            "the pass that proposed it"
        )
    return found


def convert(root: nn.Module, path: str, name: str, options: Mapping[str, Any]) -> None:
    """Convert one module of a model, in place and under all its paths.

    Args:
        root: the model.
        path: path of the module.
        name: name of the conversion.
        options: its options.

    Raises:
        RewriteError: there is no such module or conversion, or it does not fit the module.
    """
    function = find_conversion(name)
    try:
        module = root.get_submodule(path)
    except AttributeError as error:
        raise RewriteError(f"cannot convert {path!r}: {error}") from None
    converted = function(module, options, root)
    if not isinstance(converted, nn.Module):
        raise RewriteError(
            f"the conversion {name!r} of {path or 'the model'} returned "
            f"{type(converted).__name__}; it must return a module"
        )
    if converted is module:
        return
    if module is root:
        raise RewriteError(
            f"the conversion {name!r} made a new module for the model itself, which must stay "
            "the object it is"
        )
    for parent in list(root.modules()):
        for key, child in list(parent._modules.items()):
            if child is module and parent is not converted:
                parent._modules[key] = converted
