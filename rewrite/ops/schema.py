"""Names and arguments of an operator call, read from the operator's schema."""

from __future__ import annotations

__all__ = ["bind", "operator_name"]

from collections.abc import Sequence
from typing import Any

from pocketize._torch import OpOverload, schema_of


def operator_name(target: Any) -> str:
    """Return ``"aten.conv2d"`` for ``aten.conv2d.default`` and ``"aten.add"`` for ``add_``."""
    if isinstance(target, OpOverload):
        namespace, name = schema_of(target).name.split("::")
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        return f"{namespace}.{name}"
    return str(getattr(target, "__name__", target))


def bind(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by the names of the operator's schema, defaults included."""
    if not isinstance(target, OpOverload):
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    bound = {}
    for index, argument in enumerate(schema_of(target).arguments):
        if argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif index < len(args):
            bound[argument.name] = args[index]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound
