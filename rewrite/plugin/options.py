"""Option values: checked against a dataclass annotation, read from text, written as text.

The options of a pass come from a Python call, a recipe (TOML), a saved model (JSON) or the command
line (text). The annotation of the dataclass field says what a value may be in all four cases.

A library (pydantic, cattrs) would replace half of ``_convert``, about 30 lines, at the price of a
dependency. The text form, its inverse, the words for a type and strict JSON would remain.

Text is read as follows. ``none`` is None; ``true``, ``yes``, ``on`` and ``1`` are true; a list is
``a|b|c`` or JSON ``["a","b"]``; a mapping is a JSON object; a double-quoted value is a JSON string.
"""

from __future__ import annotations

__all__ = [
    "UnsupportedAnnotation",
    "attribute_sentences",
    "check_value",
    "describe_annotation",
    "read_size",
    "read_target",
    "read_text",
    "split_options",
    "to_jsonable",
    "write_text",
]

import collections.abc
import contextlib
import inspect
import json
import math
import numbers
import re
import types
import typing
from typing import Any

from pocketize.errors import OptionError
from pocketize.units import UNITS, quantity
from pocketize.untrusted import read_json

_UNIONS = (typing.Union, types.UnionType)
_MAPPINGS = (dict, collections.abc.Mapping)
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NONE = ("none", "null")


class UnsupportedAnnotation(TypeError):
    """A pass declares an option of a type that has no text form."""


class _MismatchError(Exception):
    """A value that does not fit the annotation."""


class _NotJSONError(_MismatchError):
    pass


def check_value(value: Any, annotation: Any, *, from_file: bool = False) -> Any:
    """Return ``value`` in its canonical form for ``annotation``: lists as tuples, ints as floats.

    Args:
        value: what was given in Python, or read from JSON or TOML.
        annotation: the resolved annotation of the dataclass field.
        from_file: also accept text for a value that is not text. TOML has no null, so a recipe says
            ``width = "none"``.

    Raises:
        OptionError: the value does not fit; the message says what was expected and what came.
        UnsupportedAnnotation: the annotation is none that an option can have.
    """
    try:
        return _convert(value, annotation)
    except _MismatchError as mismatch:
        if from_file and isinstance(value, str):
            return read_text(value, annotation)
        raise OptionError(
            f"expected {describe_annotation(annotation)}, got {value!r} ({type(value).__name__})"
        ) from mismatch


def read_text(text: str, annotation: Any) -> Any:
    """Return the value of a text, for a field annotated with ``annotation``.

    Raises:
        OptionError: the text is no value of that type.
        UnsupportedAnnotation: the annotation is none that an option can have.
    """
    try:
        return _convert(text.strip(), annotation, text=True)
    except _MismatchError as mismatch:
        raise OptionError(f"expected {describe_annotation(annotation)}, got {text!r}") from mismatch


def _convert(value: Any, annotation: Any, text: bool = False) -> Any:
    """Return a value in its canonical form; with ``text`` it is a text to be read."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        _expect(value.lower() in _NONE if text else value is None, value)
        return None
    if annotation is bool:
        if text:
            _expect(value.lower() in _TRUE + _FALSE, value)
            return value.lower() in _TRUE
        return _expect(isinstance(value, bool), value)
    if annotation in (int, float):
        number_kind = numbers.Integral if annotation is int else numbers.Real
        _expect(text or (isinstance(value, number_kind) and not isinstance(value, bool)), value)
        try:
            number = annotation(value)
        except (ValueError, OverflowError) as error:
            raise _MismatchError(value) from error
        # JSON has no word for infinity, so an infinite option could not be saved with the model
        return _expect(annotation is int or math.isfinite(number), number)
    if annotation is str:
        return _unquote(value) if text else _expect(isinstance(value, str), value)
    if origin is typing.Literal:
        if text:
            same = [a for a in arguments if str(a).lower() == _unquote(value).lower()]
        else:
            same = [a for a in arguments if a == value and type(a) is type(value)]
        _expect(bool(same), value)
        return same[0]
    if origin in _UNIONS:
        # the pickiest text first: str takes any text, and true or false also 1 and 0
        late = {bool: 1, str: 2} if text else {}
        for member in sorted(arguments, key=lambda member: late.get(member, 0)):
            with contextlib.suppress(_MismatchError):
                return _convert(value, member, text)
        raise _MismatchError(value)
    if annotation is tuple or origin is tuple:
        return _convert_tuple(value, arguments, text)
    if annotation is not Any and annotation not in _MAPPINGS and origin not in _MAPPINGS:
        raise UnsupportedAnnotation(
            f"{annotation!r} cannot be the type of an option: use bool, int, float, str, None, "
            "Literal, tuple or dict of these, or a union of them"
        )
    if text:
        return _convert(_json(value), annotation)
    if annotation is Any:
        return value
    _expect(isinstance(value, collections.abc.Mapping), value)
    kind = arguments[1] if arguments else Any
    return {_convert(key, str): _convert(item, kind) for key, item in value.items()}


def _convert_tuple(value: Any, arguments: tuple[Any, ...], text: bool) -> tuple[Any, ...]:
    many = not arguments or arguments[-1] is Ellipsis
    if text and value.startswith("["):
        try:
            return _convert_tuple(_json(value), arguments, False)
        except _NotJSONError:
            # a pattern such as [ab]*.conv begins like a list; a JSON list of strings begins with ["
            if value[1:].lstrip().startswith('"'):
                raise
    if text:
        value = [item.strip() for item in value.split("|")] if value else []
    elif isinstance(value, str) and many:
        # keep="enc*" means one pattern; taken as a sequence it would be four of one letter each
        value = (value,)
    _expect(isinstance(value, (list, tuple)), value)
    untyped = str if text else Any
    kinds = (arguments[0] if arguments else untyped,) * len(value) if many else arguments
    _expect(len(kinds) == len(value), value)
    return tuple(_convert(item, kind, text) for item, kind in zip(value, kinds, strict=True))


def _json(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        raise _NotJSONError(text) from error


def _expect(fits: bool, value: Any) -> Any:
    if not fits:
        raise _MismatchError(value)
    return value


def _unquote(text: str) -> str:
    if not text.startswith('"'):
        return text
    value = _json(text)
    return str(_expect(isinstance(value, str), value))


def describe_annotation(annotation: Any) -> str:
    """Put an annotation into words for people who do not read Python: ``"int or none"``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return "any value"
    if annotation is None or annotation is type(None):
        return "none"
    if annotation is bool:
        return "true or false"
    if origin is typing.Literal:
        return _or([repr(argument) for argument in arguments])
    if origin in _UNIONS:
        return _or([describe_annotation(argument) for argument in arguments])
    if annotation is tuple or origin is tuple:
        if not arguments or arguments[-1] is Ellipsis:
            return f"list of {describe_annotation(arguments[0])}" if arguments else "list"
        return "list of " + ", ".join(describe_annotation(argument) for argument in arguments)
    if annotation in _MAPPINGS or origin in _MAPPINGS:
        return f"mapping to {describe_annotation(arguments[1])}" if arguments else "mapping"
    return str(getattr(annotation, "__name__", annotation))


def _or(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def read_size(text: str, where: str, example: str) -> int:
    """Return the bytes that an option says, such as ``"16MiB"``.

    Args:
        text: a number with a unit.
        where: the pass and the option, for the error.
        example: a size that would do.

    Raises:
        OptionError: it is no size, or below one byte.
    """
    size = quantity(text, "bytes")
    if size is None or size < 1:
        raise OptionError(
            f"{where}: expected a size such as {example!r} (units: {', '.join(UNITS['bytes'])}), "
            f"got {text!r}"
        )
    return int(size)


def read_target(text: str, peak: int, where: str) -> int:
    """Return the bytes of a peak to reach: a size, or a share of the present peak such as "50%".

    Args:
        text: what the option says.
        peak: the present peak.
        where: as for :func:`read_size`.

    Raises:
        OptionError: it is neither.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        share = float(match[1])
        if 0 < share <= 100:
            return int(peak * share / 100)
    elif (size := quantity(text, "bytes")) and size > 0:
        return int(size)
    units = ", ".join(UNITS["bytes"])
    raise OptionError(
        f"{where}: expected a size such as '4GiB' (units: {units}) or a share of the present peak "
        f"such as '50%', got {text!r}"
    )


def split_options(text: str) -> dict[str, str]:
    """Split ``"width=16,keep=a|b"`` into ``{"width": "16", "keep": "a|b"}``.

    Commas inside double quotes, square brackets or braces belong to the value.

    Raises:
        OptionError: a piece is no ``option=value``, an option comes twice, or a bracket or a quote
            is left open.
    """
    options: dict[str, str] = {}
    for piece in _split_commas(text):
        name, equals, value = piece.partition("=")
        name = name.strip()
        if not equals or not name:
            raise OptionError(f"{piece.strip()!r} is not of the form option=value")
        if name in options:
            raise OptionError(f"option {name!r} is given twice; a list is written {name}=a|b")
        options[name] = value.strip()
    return options


def _split_commas(text: str) -> list[str]:
    pieces, start, closers, quoted = [], 0, "", False
    skip = False
    for position, character in enumerate(text):
        if skip:
            skip = False
        elif quoted:
            skip, quoted = character == "\\", character != '"'
        elif character == '"':
            quoted = True
        elif character in "[{":
            closers += "]" if character == "[" else "}"
        elif closers and character == closers[-1]:
            closers = closers[:-1]
        elif character == "," and not closers:
            pieces.append(text[start:position])
            start = position + 1
    if quoted or closers:
        raise OptionError(f"a {closers[-1:] or chr(34)} is missing in {text!r}")
    return [*pieces, text[start:]] if text.strip() else []


def to_jsonable(value: Any) -> Any:
    """Return ``value`` with every tuple as a list, as JSON would give it back."""
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, collections.abc.Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    return value


def write_text(value: Any) -> str:
    """Write a value as :func:`read_text` reads it, in the shortest form that is not ambiguous."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = value.strip() == value and not set(value) & set(',|"[]{}')
        return value if plain and value.lower() not in _NONE else json.dumps(value)
    if isinstance(value, (list, tuple)):
        items = [write_text(item) for item in value]
        simple = items and not any(set(item) & set(',|"[]{}') or not item for item in items)
        return "|".join(items) if simple else json.dumps(to_jsonable(value), separators=(",", ":"))
    if isinstance(value, collections.abc.Mapping):
        return json.dumps(to_jsonable(value), separators=(",", ":"))
    return str(value)


def attribute_sentences(cls: type) -> dict[str, str]:
    """Return the explanation of every attribute from the docstring's ``Attributes:`` section.

    Base classes are read too; ``cls`` overrides them. Empty where
    Python runs without docstrings.
    """
    sentences: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docstring = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, section = docstring.partition("Attributes:\n")
        name = ""
        for line in section.splitlines():
            if line.strip() and not line.startswith(" "):
                break  # the next section
            if start := re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line):
                name = start[1]
                sentences[name] = start[2].strip()
            elif name and line.strip():
                sentences[name] += " " + line.strip()
    return sentences
