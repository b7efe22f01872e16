"""Which networks of a repository are compared: ``[tool.pocketize]`` or ``pocketize.toml``.

::

    [tool.pocketize]                       # pocketize.toml has the keys without this table
    path = ["src"]                         # where imports start; default: this folder and src

    [[tool.pocketize.models]]
    name = "unet3d"
    model = "nets.unet:build"
    input = "1x1x96x96x96"
    kwargs = { widths = [32, 64, 128] }    # optional, as all that follow
    modes = ["train", "infer"]
    passes = ["recompute:keep=block"]
    optimizer = "adam"
    limits = ["peak 2% 16MiB", "parameters 0%"]
"""

from __future__ import annotations

__all__ = ["EXAMPLE", "Configuration", "WatchedModel", "read_configuration"]

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketize.cli.common import UsageError
from pocketize.errors import PocketizeError, nearest
from pocketize.plugin.registry import parse_pass
from pocketize.report import Threshold
from pocketize.untrusted import read_as, read_toml

#: What to add where nothing is configured.
EXAMPLE = """\
[[tool.pocketize.models]]
name = "unet"
model = "package.module:factory"
input = "1x1x96x96x96"
limits = ["peak 2% 16MiB"]"""

_CHOICES = {"modes": ("train", "infer"), "optimizer": ("adam", "adamw", "sgd", "none")}


@dataclass(frozen=True)
class WatchedModel:
    """One ``[[models]]`` table; the fields are its keys.

    Attributes:
        model: a MODEL of the command line.
        passes: applied before measuring, as by ``--pass``.
        limits: as of ``--fail-over``.
    """

    name: str
    model: str
    input: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train", "infer")
    passes: tuple[str, ...] = ()
    optimizer: str = "adam"
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Configuration:
    """The models, with distinct names, and the folders that imports are searched in first."""

    models: tuple[WatchedModel, ...] = ()
    path: tuple[str, ...] = (".", "src")


def read_configuration(folder: Path) -> Configuration | None:
    """Read the configuration of a folder; ``None`` if there is none.

    Raises:
        UsageError: a file is no TOML, a key or a value is wrong, or both files have settings.
    """
    found = {}
    for name in ("pyproject.toml", "pocketize.toml"):
        try:
            content = read_toml((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UsageError(f"{name} cannot be read: {error}") from error
        if name == "pyproject.toml":
            name, content = f"{name}, tool.pocketize", content.get("tool", {}).get("pocketize")
        if content:
            found[name] = content
    if len(found) > 1:
        raise UsageError(f"{' and '.join(found)} both have settings: keep one")
    if not found:
        return None
    ((where, content),) = found.items()
    try:
        return _read(content, where)
    except (ValueError, PocketizeError) as error:
        text = str(error)
        raise UsageError(text if text.startswith(where) else f"{where}: {text}") from error


def _read(content: dict[str, Any], where: str) -> Configuration:
    tables = content.get("models", []) if isinstance(content, dict) else None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError("write [[models]], in double brackets, once for each model")
    for number, table in enumerate([content, *tables]):
        kind = WatchedModel if number else Configuration
        known = [each.name for each in dataclasses.fields(kind)]
        for key in table.keys() - set(known):
            place = f"models {number}: " if number else ""
            raise ValueError(
                f"{place}unknown key {key!r}.{nearest(key, known)} Keys: {', '.join(known)}"
            )
    made = read_as(Configuration, content, where)
    names = [model.name for model in made.models]
    for model in made.models:
        if names.count(model.name) > 1:
            raise ValueError(f"two models are called {model.name!r}")
        for key, choices in _CHOICES.items():
            value = getattr(model, key)
            if not value or not set([value] if isinstance(value, str) else value) <= set(choices):
                raise ValueError(
                    f"{key} of {model.name!r}: expected of {', '.join(choices)}, got {value!r}"
                )
        for text in model.limits:
            Threshold.parse(text)
        for text in model.passes:
            parse_pass(text)
        try:
            json.dumps(model.kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"kwargs of {model.name!r}: {error}") from error
    return made
