"""Saved models: weights and the recipe of what was done to the model, in one safetensors file.

The file holds the ``state_dict`` under its own keys, so any reader of safetensors can use it, and
every parameter and persistent buffer, also those that a class leaves out of its ``state_dict``; and
one entry of metadata, ``pocketize``, with JSON: what was rewritten, as edits that can be repeated
by shape, and what a state_dict does not tell (ties, frozen parameters, train or eval mode, memory
format).

A file never decides what code runs: nothing in it is unpickled, imported or evaluated. The code
comes from the caller, as a factory that builds the model as it was before it was rewritten.
"""

from __future__ import annotations

__all__ = ["FORMAT", "load", "save", "tie"]

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pocketize.artifact.files import atomic_write
from pocketize.artifact.recipe import (
    FORMAT,
    SavedState,
    check_parts,
    read_recipe,
    records_of,
    write_recipe,
)
from pocketize.artifact.safefile import SafeFile, open_safe
from pocketize.artifact.skeleton import build
from pocketize.artifact.statefile import StateFile, is_state_file
from pocketize.artifact.states import (
    MEMORY_FORMATS,
    apply_state,
    describe_mismatch,
    full_state,
    let_classes_load,
    own_tensors,
)
from pocketize.engine.pipeline import history, replay
from pocketize.errors import ArtifactError, PocketizeError
from pocketize.graph.methods import check_module
from pocketize.version import VERSION

_log = logging.getLogger(__name__)


def save(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Save a model's weights and the recipe of what was done to it, for :func:`load`.

    The file is complete or not there at all. Hooks and what else a ``state_dict`` does not hold,
    such as non-persistent buffers, are not saved: :func:`load` has them from the factory.

    Args:
        model: the model, rewritten or not, on any device; it is not changed.
        path: the file, by custom ``*.safetensors``.
        overwrite: replace a file that is there.

    Raises:
        ArtifactError: the file exists or cannot be written, or the state of the model cannot be
            held in safetensors: something that is no tensor, or a tensor that is sparse, quantised
            or without data; or its class puts into its ``state_dict`` what :func:`load` could not
            give back.
    """
    check_module(model)
    state = full_state(model)
    tensors, ties = _distinct_tensors(model, state)
    # one entry only: safetensors writes several in random order, and equal models make equal files
    metadata = {"pocketize": write_recipe(model, state, ties)}
    with atomic_write(path, overwrite=overwrite) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype it lacks
            raise ArtifactError(f"cannot write {path}: {error}") from error


def load(
    path: str | os.PathLike[str],
    factory: Callable[[], nn.Module],
    *,
    device: str | torch.device = "cpu",
    folder: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Load a model that :func:`save` wrote, or ``pocketize apply -o FILE.pt``.

    The factory's model is built without memory for its parameters wherever possible, takes the
    shape that the saved passes gave it, and is then filled from the file. Keys and shapes must
    agree in full. Dtypes, ties, frozen parameters and each module's train or eval mode are those
    of the saved model.

    Args:
        path: the file.
        factory: builds the model as it was before it was rewritten: ``lambda: UNet(width=64)``.
        device: where the parameters and buffers go.
        folder: where the passes ``patchwise`` and ``offload`` have their files, in place of what
            the saved model had: a file does not decide where something is written.

    Returns:
        The rewritten model; ``history(model)`` lists its rewrites.

    Raises:
        ArtifactError: the file cannot be read, is truncated, is not one of :func:`save`'s or was
            written in a newer format; or the factory builds another model than the saved one was,
            or one without the rewrites of its parts.
    """
    if is_state_file(path):
        model = _load(path, StateFile(path), factory, folder)
    else:
        with open_safe(path) as file:
            model = _load(path, file, factory, folder)
    if any(tensor.device != torch.device(device) for tensor in own_tensors(model).values()):
        model.to(device)
    return model


def _load(
    path: str | os.PathLike[str],
    file: SafeFile | StateFile,
    factory: Callable[[], nn.Module],
    folder: str | os.PathLike[str] | None,
) -> nn.Module:
    recipe, shapes = read_recipe(path, file.header), dict(file.header.shapes)
    records = records_of(recipe, f"the recipe in {path}", folder)
    model, hollow = build(factory)
    if lazy := [name for name, value in model.named_parameters() if is_lazy(value)]:
        raise ArtifactError(
            f"the factory must run its model once: {lazy[0]} is not initialised yet (a lazy module)"
        )
    written_by = f"pocketize {recipe.pocketize}"
    if recipe.pocketize != VERSION:
        _log.info("%s was written by %s, in a format that this version reads", path, written_by)
    if history(model):
        raise ArtifactError(
            f"the factory gives a model that was rewritten already "
            f"({', '.join(record.name for record in history(model))}). Build the model as it was "
            f"before: {path} says what to do with it"
        )
    check_parts(recipe, model)
    origin = f"{path} was saved from a {recipe.model}, the factory builds a {type(model).__name__}"
    ties = recipe.ties
    shapes |= {alias: shapes[key] for alias, key in ties.items() if key in shapes}

    def check(made: nn.Module) -> None:
        """Compare shapes before memory is taken: the file's are those of tensors that are in it."""
        state = full_state(made)
        expected = {
            # extra state belongs to its module, which may change its shape at any time
            key: shapes.get(key, ()) if key.endswith("_extra_state") else tuple(value.shape)
            for key, value in state.items()
        }
        if mismatch := describe_mismatch(expected, shapes):
            raise _MisfitError(
                f"{path} does not fit the factory's model:\n{mismatch}\n{origin}. Give the factory "
                "the options that the saved model had before it was rewritten"
            )

    try:
        replay(model, records, check=check)
    except _MisfitError as error:
        raise ArtifactError(str(error)) from None
    except Exception as error:
        # a conversion may raise anything where the file tells it what no pass would
        why = error if isinstance(error, PocketizeError) else f"{type(error).__name__}: {error}"
        raise ArtifactError(
            f"the factory does not build the model that was saved: {why}. {origin}. Give the "
            f"factory the options that the saved model had before it was rewritten; it was "
            f"rewritten by {written_by}"
        ) from error

    state = full_state(model)
    _check_ties(path, state, ties)
    tensors = _read_tensors(file, recipe.state)
    tensors |= {alias: tensors[key] for alias, key in ties.items() if key in tensors}
    try:
        values = _fill(model, state, tensors, hollow=hollow)
        tie(model, ties)
        let_classes_load(model, values, recipe.constants, origin)
        apply_state(model, dataclasses.asdict(recipe.state))
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path} does not fit the factory's model: {error}. {origin}"
        ) from error
    return model


class _MisfitError(Exception):
    """The shapes in a file are not those of the model."""


def _distinct_tensors(
    model: nn.Module, state: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return one tensor for each object in the state, and the other names of each object."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for key, value in state.items():
        _check_tensor(model, key, value)
        if id(value) in names:
            ties[key] = names[id(value)]
            continue
        names[id(value)] = key
        tensor = value.detach().cpu().contiguous()
        # Two parameters may be views of one memory; in safetensors each tensor owns its bytes.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors, ties


def _check_tensor(model: nn.Module, key: str, value: Any) -> None:
    owner = type(model).__name__
    if not isinstance(value, Tensor):
        raise ArtifactError(
            f"{key!r} in the state_dict of {owner} is no tensor but {type(value).__name__}, and "
            "safetensors holds tensors only. If it comes from get_extra_state, return a tensor "
            "there, or leave it out"
        )
    if is_lazy(value):
        raise ArtifactError(
            f"{key!r} of {owner} is not initialised yet (a lazy module): run the model once"
        )
    if value.is_meta:
        raise ArtifactError(f"{key!r} of {owner} has no data (it is on the meta device)")
    if value.layout is not torch.strided or value.is_quantized:
        kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise ArtifactError(
            f"{key!r} of {owner} is {kind}; safetensors holds plain dense tensors only"
        )


def _read_tensors(file: SafeFile | StateFile, described: SavedState) -> dict[str, Tensor]:
    channels_last = set(described.channels_last)
    return {
        key: file.read(key, MEMORY_FORMATS.get(len(shape)) if key in channels_last else None)
        for key, shape in file.header.shapes.items()
    }


def _check_ties(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], ties: Mapping[str, str]
) -> None:
    names: dict[int, str] = {}
    for key, value in state.items():
        first = names.setdefault(id(value), key)
        if ties.get(key, key) != ties.get(first, first):
            raise ArtifactError(
                f"{first} and {key} are one tensor in the factory's model and two in {path}: the "
                "model was saved after its tie had been cut. Cut it in the factory too"
            )


def _fill(
    model: nn.Module, state: Mapping[str, Any], tensors: Mapping[str, Tensor], *, hollow: bool
) -> dict[str, Tensor]:
    """Give every parameter and persistent buffer the tensor of its key; return all by their keys.

    In a hollow model a new parameter replaces each, under all its names. In a real model, which may
    refer to its parameters elsewhere too, each gets the data.
    """
    made: dict[int, Tensor] = {}
    own = {id(tensor) for tensor in own_tensors(model).values()}
    for key, old in state.items():
        if id(old) not in own:
            made[id(old)] = tensors[key]  # extra state, which its module is to load
        elif hollow and old.is_meta:
            if id(old) not in made:
                made[id(old)] = _like(old, tensors[key])
        else:
            old.data = tensors[key].to(old.device)
            made[id(old)] = old
    for module in nn.Module.modules(model) if hollow else ():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                table[name] = made.get(id(tensor), tensor)  # type: ignore[assignment]
    return {key: made[id(old)] for key, old in state.items()}


def _like(old: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(old, nn.Parameter):
        return tensor
    # frozen until apply_state says otherwise: integer tensors cannot require gradients
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.__dict__.update(old.__dict__)
    return parameter


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Tie what was tied in the saved model and is not tied by the factory."""
    for alias, key in ties.items():
        with contextlib.suppress(AttributeError):  # a key that a state_dict hook made up
            owner, _, name = key.rpartition(".")
            tensor = getattr(model.get_submodule(owner), name)
            owner, _, name = alias.rpartition(".")
            if getattr(model.get_submodule(owner), name) is not tensor:
                setattr(model.get_submodule(owner), name, tensor)
