"""Recipes: a list of passes with their options, as a TOML file.

::

    [[pass]]
    name = "pocket"
    width = 16
    keep = ["encoder.*", "decoder.0"]

Passes are applied from top to bottom. Keys are the options of the pass; an unknown key is an error.
TOML has no null: ``width = "none"`` is None where the option is not text.

Before the first table, ``variants`` may list settings of the model's attributes, as in
:func:`pocketize.rewrite`::

    variants = [{ "decoder.deep_supervision" = true }, { "decoder.deep_supervision" = false }]
"""

from __future__ import annotations

__all__ = [
    "Variants",
    "dump_recipe",
    "load_recipe",
    "load_variants",
    "parse_recipe",
    "parse_variants",
]

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pocketize.errors import OptionError, RecipeError, RegistryError, nearest
from pocketize.plugin.base import Pass
from pocketize.plugin.registry import get_pass
from pocketize.untrusted import read_toml

Variants: TypeAlias = "tuple[dict[str, Any], ...]"
"""Settings of a model's attributes, one mapping for each variant."""


def load_recipe(path: str | os.PathLike[str]) -> list[Pass]:
    """Read the passes of a recipe file, in order.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or is no recipe; the message says where.
            Or it has variants, which would be lost.
    """
    return parse_recipe(_read(path), source=str(path))


def load_variants(path: str | os.PathLike[str]) -> tuple[list[Pass], Variants]:
    """Read the passes of a recipe file and its variants, for ``rewrite``.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or is no recipe; the message says where.
    """
    return parse_variants(_read(path), str(path))


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a recipe: it is not text in UTF-8") from error


def parse_recipe(text: str, source: str = "recipe") -> list[Pass]:
    """Read the passes of a recipe's text; ``source`` is what errors call it.

    Raises:
        RecipeError: the text is not TOML, or is not a recipe; or it has variants.
    """
    passes, variants = parse_variants(text, source)
    if variants:
        raise RecipeError(
            f"{source} has variants, and only its passes were asked for: use "
            "pocketize.plugin.recipe.load_variants, and rewrite(model, passes=..., variants=...)"
        )
    return passes


def parse_variants(text: str, source: str = "recipe") -> tuple[list[Pass], Variants]:
    """Read the passes and the variants of a recipe's text; ``source`` is what errors call it.

    Raises:
        RecipeError: the text is not TOML, or is not a recipe.
    """
    try:
        content = read_toml(text)
    except ValueError as error:  # a number may have too many digits, which is no TOMLDecodeError
        raise RecipeError(f"{source} is not TOML: {error}") from error
    for key in content:
        if key not in ("pass", "variants"):
            raise RecipeError(
                f"{source}: unknown key {key!r}.{nearest(key, ['pass', 'variants'])} "
                "A recipe is a list of [[pass]] tables"
            )
    tables = content.get("pass", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RecipeError(f"{source}: write [[pass]], in double brackets, once for each pass")
    if not tables:
        raise RecipeError(f"{source} has no [[pass]]: there is nothing to do")
    variants = content.get("variants", [])
    if not isinstance(variants, list) or not all(isinstance(v, dict) and v for v in variants):
        raise RecipeError(
            f'{source}: write variants as a list, [{{ "decoder.deep_supervision" = true }}, ...]'
        )
    passes = [_read_pass(table, f"{source}, pass {n}") for n, table in enumerate(tables, start=1)]
    return passes, tuple(dict(_flat(settings)) for settings in variants)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by their whole paths: TOML reads ``a.b = 1`` as tables within each other."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if value == "none" else value


def _read_pass(table: dict[str, Any], where: str) -> Pass:
    name = table.get("name")
    if not isinstance(name, str):
        close = nearest("name", table) if name is None else ""
        raise RecipeError(f'{where}: expected a name such as name = "pocket", got {name!r}.{close}')
    options = {key: value for key, value in table.items() if key != "name"}
    try:
        return get_pass(name).from_options(options)
    except (OptionError, RegistryError) as error:
        raise RecipeError(f"{where}: {error}") from error


def dump_recipe(passes: Iterable[Pass], variants: Iterable[Mapping[str, Any]] = ()) -> str:
    """Write passes as a recipe that :func:`load_recipe` reads back as equal passes.

    Variants, if there are any, are for :func:`load_variants`.

    Raises:
        RecipeError: an option has a value that TOML cannot hold.
    """
    listed = [_toml(settings) for settings in variants]
    head = [f"variants = [{', '.join(listed)}]\n"] if listed else []
    return "\n".join(head + [_table(each) for each in passes])


def _table(each: Pass) -> str:
    options = "".join(f"{name} = {_toml(value)}\n" for name, value in each.options().items())
    # "none" may be text or None, and TOML cannot represent every value: compare after reading back
    if type(each).from_options(read_toml(options)) != each:
        raise RecipeError(
            f"{each} cannot be written as a recipe: read back, it would be another pass. TOML has "
            "no null, and 'none' is text where the option takes text"
        )
    return f"[[pass]]\nname = {_quote(each.name)}\n{options}"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        items = (f"{_key(key)} = {_toml(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    raise RecipeError(f"a recipe cannot hold {value!r}")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quote(key)


def _quote(text: str) -> str:
    # JSON's strings are TOML's, but for DEL and for characters written as surrogate pairs
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
