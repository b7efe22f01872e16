"""Text from files and strangers: read within limits, shown without control characters."""

from __future__ import annotations

__all__ = ["check_nesting", "markdown", "one_line", "printable", "read_json"]

import json
import re
from typing import Any

#: Levels of lists and mappings within each other; what is ours has fewer than ten.
DEEPEST = 64


def read_json(text: str | bytes) -> Any:
    """Read JSON, strictly: no name twice in one object, no ``NaN``, nothing nested too deeply.

    Raises:
        ValueError: it is not such JSON; the text says why.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_nesting(value)
    return value


_TOO_DEEP = f"more than {DEEPEST} lists or mappings lie within each other"


def check_nesting(value: Any) -> None:
    """Check that lists and mappings do not lie too deeply within each other for recursion.

    Raises:
        ValueError: they do.
    """
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
