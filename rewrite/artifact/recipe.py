"""The recipe of a saved model: what was done to it, and what a state_dict does not tell."""

from __future__ import annotations

__all__ = [
    "FORMAT",
    "Recipe",
    "SavedState",
    "check_parts",
    "in_folder",
    "parse_data",
    "read_recipe",
    "records_of",
    "structure",
    "ties_of",
    "write_recipe",
]

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pocketize.artifact.safefile import Header
from pocketize.artifact.states import constants_of, describe_state
from pocketize.engine.pipeline import history
from pocketize.errors import ArtifactError
from pocketize.plugin.base import PassRecord
from pocketize.untrusted import read_as, read_json
from pocketize.version import VERSION

FORMAT = 1
"""Version of the metadata. A reader refuses what is newer than itself and reads what is older."""


@dataclass(frozen=True)
class SavedState:
    """What :func:`~pocketize.artifact.states.describe_state` returns."""

    modes: dict[str, bool]
    frozen: tuple[str, ...]
    channels_last: tuple[str, ...]
    buffers: dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """What a file's metadata hold, or a recipe without a file.

    ``model`` is for error messages only. A recipe without a file has ``shapes``, and neither
    ``state`` nor ``constants``.
    """

    format: int
    pocketize: str
    model: str
    records: tuple[Any, ...]
    ties: dict[str, str]
    state: SavedState = SavedState({}, (), (), {})
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    #: of the parts that were rewritten alone, the names of the passes
    parts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def write_recipe(model: nn.Module, state: Mapping[str, Any], ties: Mapping[str, str]) -> str:
    """Write the recipe of a model.

    Args:
        model: the model.
        state: what :func:`~pocketize.artifact.states.full_state` returns.
        ties: other names of its tensors.

    Raises:
        ArtifactError: its class adds to its ``state_dict`` what could not be given back.
    """
    data = {
        **structure(model, ties),
        "state": describe_state(model, state),
        "constants": constants_of(model, state),
    }
    return json.dumps(data, sort_keys=True, allow_nan=False)


def structure(model: nn.Module, ties: Mapping[str, str]) -> dict[str, Any]:
    """Return the part of a recipe that says how the structure of a model is made again."""
    data = {
        "format": FORMAT,
        "pocketize": VERSION,
        "torch": str(torch.__version__),
        "model": type(model).__qualname__,  # for error messages only
        "records": [in_folder(record, None).to_json() for record in history(model)],
        "ties": dict(ties),
    }
    if parts := _parts_of(model):
        data["parts"] = parts
    return data


def check_parts(recipe: Recipe, model: nn.Module) -> None:
    """Compare the parts that were rewritten alone with those of a model that is to be rewritten.

    Raises:
        ArtifactError: one of them was not rewritten, so that its passes would be lost.
    """
    found = _parts_of(model)
    for part, names in recipe.parts.items():
        if found.get(part) != names:
            raise ArtifactError(
                f"the part {part!r} of the {recipe.model} was rewritten alone, by "
                f"{', '.join(names)}, and how is not in the recipe of the whole. Build a model "
                "whose part is rewritten likewise, or save that part by itself"
            )


def _parts_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the paths of parts that were rewritten alone, with the names of their passes."""
    return {
        path: tuple(record.name for record in done)
        for path, module in model.named_modules()
        if path and (done := history(module))
    }


def ties_of(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the further names of each tensor in a state, with its first name."""
    names: dict[int, str] = {}
    return {
        key: names[id(value)]
        for key, value in state.items()
        if names.setdefault(id(value), key) != key
    }


def records_of(
    recipe: Recipe, where: str, folder: str | os.PathLike[str] | None
) -> list[PassRecord]:
    """Return the records of a recipe, with the caller's folder.

    Args:
        recipe: the recipe.
        where: what errors call it.
        folder: where its passes have their files.

    Raises:
        ArtifactError: a record is damaged, or a pass needs a folder.
    """
    try:
        place = None if folder is None else os.fspath(folder)
        records = [in_folder(PassRecord.from_json(record), place) for record in recipe.records]
    except ArtifactError as error:
        raise ArtifactError(f"{where} is damaged: {error}") from error
    if folder is None and any(record.options.get("resume") is True for record in records):
        raise ArtifactError(
            f"{where} keeps what it has computed in a folder, and a file does not decide which: "
            "name one, load(path, factory, folder='...') or --folder"
        )
    return records


def in_folder(record: PassRecord, folder: str | None) -> PassRecord:
    """Return a record with the caller's folder, or none, in place of the one that it names."""
    named = {key: value for key, value in record.options.items() if key != "folder"}
    edits = []
    for edit in record.edits:
        options = edit.get("options")
        if isinstance(options, dict) and "folder" in options:
            place = folder if "disk" in options.values() else None
            edit = {**edit, "options": {**options, "folder": place}}
            named |= {} if place is None else {"folder": place}
        edits.append(edit)
    return dataclasses.replace(record, options=named, edits=tuple(edits))


def read_recipe(path: str | os.PathLike[str], header: Header) -> Recipe:
    """Read the recipe of a file.

    Raises:
        ArtifactError: there is none, it is damaged, or a newer version wrote it.
    """
    text = header.metadata.get("pocketize")
    if text is None:
        raise ArtifactError(
            f"{path} holds plain weights and no recipe: pocketize did not write it. Load it with "
            "model.load_state_dict(safetensors.torch.load_file(path))"
        )
    try:
        return parse_data(read_json(text), os.fspath(path))
    except ValueError as error:
        raise ArtifactError(f"the recipe in {path} is damaged: {error}") from error


def parse_data(data: Any, source: str) -> Recipe:
    """Read a recipe's JSON.

    Args:
        data: of the JSON.
        source: what errors call it.

    Raises:
        ArtifactError: a newer version wrote it.
        ValueError: it is no recipe.
    """
    try:
        version = data["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ArtifactError(
                f"{source} was written by pocketize {data.get('pocketize')} in format {version}; "
                f"this is pocketize {VERSION}, which reads formats up to {FORMAT}. "
                "Install a newer pocketize"
            )
        names = {field.name for field in dataclasses.fields(Recipe)}
        return read_as(Recipe, {key: data[key] for key in data if key in names}, "recipe")
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error
