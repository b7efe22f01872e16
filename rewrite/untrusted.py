"""Text that others wrote: read within limits, shown without control characters."""

from __future__ import annotations

__all__ = ["markdown", "one_line", "printable", "read_as", "read_json", "read_toml", "scrub"]

import dataclasses
import json
import re
import sys
import types
import typing
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")

#: Levels of lists and mappings within each other; what is ours has fewer than ten.
DEEPEST = 64
#: Above all counts of bytes and operations; it can be a float.
_LARGEST = 1 << 100


def read_json(text: str | bytes) -> Any:
    """Read JSON, strictly: no name twice in one object, no ``NaN``, nothing nested too deeply.

    Raises:
        ValueError: it is not such JSON; the text says why.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_nesting(value)
    return value


def read_toml(text: str) -> dict[str, Any]:
    """Read TOML that is not nested too deeply.

    Raises:
        ValueError: it is not such TOML; the text says why.
    """
    try:
        value: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_nesting(value)
    return value


_TOO_DEEP = f"more than {DEEPEST} lists or mappings lie within each other"


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for held in level
            if isinstance(held, dict | list)
            for item in (held.values() if isinstance(held, dict) else held)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.100} is there twice")
    return made


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def read_as(kind: type[_T], data: Any, where: str) -> _T:
    """Turn JSON data into a dataclass, and check every level.

    Args:
        kind: the dataclass; its fields are dataclasses, tuples, dicts, ``bool``, ``int``,
            ``float``, ``str``, ``Any``, or a union of these with ``None``.
        data: what :func:`read_json` returned, or the same with tuples for lists.
        where: what ``data`` is, for the error.

    Raises:
        ValueError: the data is no ``kind``; the text says where, what was expected and what came.
    """
    made: _T = _read(kind, data, where)
    return made


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and types.NoneType in parts:
            return None
        parts = tuple(part for part in parts if part is not types.NoneType)
        return _read(next((p for p in parts if type(data) is p), parts[-1]), data, where)
    if origin is tuple:
        items = data if isinstance(data, tuple) else _checked(list, data, where)
        kinds = (parts[0],) * len(items) if parts[-1] is Ellipsis else parts
        if len(kinds) != len(items):
            raise ValueError(f"{where}: expected {len(kinds)} values, got {len(items)}.")
        pairs = enumerate(zip(kinds, items, strict=True))
        return tuple(_read(part, value, f"{where}[{i}]") for i, (part, value) in pairs)
    if origin is dict:
        items = _checked(dict, data, where).items()
        return {key: _read(parts[1], value, f"{where}.{key}") for key, value in items}
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, _checked(dict, data, where), where)
    return _checked(kind, data, where)


def _read_record(kind: Any, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    none = dataclasses.MISSING
    needed = {f.name for f in fields if f.default is none and f.default_factory is none}
    if missing := needed - data.keys():
        raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}.")
    if unknown := data.keys() - {field.name for field in fields}:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}.")
    given = [field.name for field in fields if field.name in data]
    return kind(**{name: _read(hints[name], data[name], f"{where}.{name}") for name in given})


def _checked(kind: Any, data: Any, where: str) -> Any:
    # bool is an int to isinstance, but not to a reader of the data
    number = kind is float and type(data) is int
    fits = number or (isinstance(data, kind) and (kind is bool or not isinstance(data, bool)))
    if not fits:
        raise ValueError(f"{where}: expected {kind.__name__}, got {data!r:.100}.")
    if isinstance(data, int | float) and not abs(data) < _LARGEST:  # nor is NaN
        raise ValueError(f"{where}: expected a smaller number, got {data!r:.100}.")
    return float(data) if number else data


def printable(text: str) -> str:
    r"""Return text that a terminal cannot take for commands: ``ESC`` becomes ``\x1b``.

    Line ends and tabs stay; other control characters, and those that turn the direction of writing,
    are spelled out.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def scrub(text: str) -> str:
    """Remove from a text what differs between runs and machines: memory addresses and folders."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    absolute = r"(?<![\w.)\]])(?:~|[A-Za-z]:)?[/\\](?:[\w.+-]+[/\\])+([\w.+-]+)"
    return re.sub(absolute, r"\1", text)


def one_line(text: str) -> str:
    """Return printable text for a cell of a table: line ends become spaces."""
    return printable(re.sub(r"[\n\t]", " ", text))


def markdown(text: str, *, paragraph: bool = False) -> str:
    """Return text that Markdown shows as it is.

    Args:
        text: of one cell of a table, or a part of a paragraph; line ends become spaces.
        paragraph: it begins a paragraph, where some characters would begin a title or a list.
    """
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", one_line(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;")
    # an underscore within a word is no emphasis, so names stay readable in the source
    escaped = re.sub(
        r"(?<![A-Za-z0-9_])_+|_+(?![A-Za-z0-9_])", lambda m: m[0].replace("_", r"\_"), escaped
    )
    if not paragraph:
        return escaped
    return re.sub(r"^(\d*)([#>+=~.)-])", r"\1\\\2", escaped.lstrip())
