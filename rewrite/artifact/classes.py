"""Classes that keyword arguments name by texts, as ``"torch.nn.Conv3d"``."""

from __future__ import annotations

__all__ = ["resolve_classes"]

import collections.abc
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from pocketize.errors import ModelError, nearest


def resolve_classes(
    factory: Callable[..., Any], kwargs: Mapping[str, Any], packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Replace texts that name classes by these classes, also in lists and mappings.

    A text is a name where the factory annotates the argument as a class (``type[nn.Module]``) or a
    function, or where it begins with ``!``. A text that really begins with ``!`` is written with
    two.

    Args:
        factory: the function or class that takes the arguments.
        kwargs: the arguments.
        packages: what may be named besides the modules of ``torch.nn``; naming imports it.

    Raises:
        ModelError: a name is not allowed, or names nothing.
    """

    def resolved(value: Any, asked: bool) -> Any:
        if isinstance(value, str):
            if value.startswith("!!"):
                return value[1:]
            name = value.removeprefix("!")
            return _find(name, packages) if asked or value != name else value
        if isinstance(value, list):
            return [resolved(item, asked) for item in value]
        if isinstance(value, dict):
            return {key: resolved(item, False) for key, item in value.items()}
        return value

    try:
        hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:  # evaluates a user's annotations, whose names may be there for checkers only
        hints = {}
    return {key: resolved(value, _asks(hints.get(key))) for key, value in kwargs.items()}


def _asks(annotation: Any) -> bool:
    """Whether an annotation takes classes or functions, and no text."""
    kinds = [annotation]
    for kind in kinds:  # grows
        if typing.get_origin(kind) not in (type, collections.abc.Callable):
            kinds.extend(typing.get_args(kind))
    callables = (type, collections.abc.Callable)
    return str not in kinds and any(
        kind in callables or typing.get_origin(kind) in callables for kind in kinds
    )


def _find(name: str, packages: Sequence[str]) -> Any:
    module, _, attribute = name.rpartition(".")
    allowed = ("torch.nn", *packages)
    if not any(f"{module}.".startswith(f"{package}.") for package in allowed):
        raise ModelError(
            f"{name!r:.100} is not in {' or '.join(allowed)}, and keyword arguments may name "
            "nothing else; --classes-from PACKAGE allows a package"
        )
    try:
        owner = importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"{name!r:.100} cannot be imported: {error}") from error
    found = getattr(owner, attribute, None)
    if f"{module}.".startswith("torch.nn."):
        known = [key for key, value in vars(owner).items() if _is_module(value)]
        if not _is_module(found):
            raise ModelError(
                f"{module} has no module class {attribute!r}.{nearest(attribute, known)}"
            )
    elif not callable(found):
        raise ModelError(f"{module} has no class or function {attribute!r}")
    return found


def _is_module(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)
