"""Weights from a file into a model, without opening a pickle."""

from __future__ import annotations

__all__ = ["load_weights"]

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.artifact.safefile import open_safe
from pocketize.artifact.states import (
    class_state,
    describe_mismatch,
    full_state,
    leaves,
    overrides,
    own_tensors,
    place_of,
    same_values,
)
from pocketize.errors import ArtifactError

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, trust: bool = False) -> None:
    """Load a state_dict into a model; keys and shapes must agree in full.

    Where the model has code of its own for that (``load_state_dict``, ``_load_from_state_dict``,
    hooks), that code decides which keys it takes, and no weight may be left as it was built.

    Args:
        model: the model; unchanged where an error is raised, unless its own code raised it.
        path: ``.safetensors``, or what ``torch.save`` wrote (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``): a state_dict, or a dict that holds one as ``"state_dict"``.
        trust: unpickle what ``weights_only=True`` refuses; the file may then run any code.

    Raises:
        ArtifactError: the file cannot be read, holds more than weights, or does not fit the model.
    """
    by_class = _loads_itself(model)
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        with open_safe(path) as file:
            state: dict[str, Any] = {key: file.read(key) for key in file.header.shapes}
    elif suffix in _PICKLES:
        state = _read_pickle(path, trust, nested=by_class)
    else:
        raise ArtifactError(
            f"cannot tell what {path} holds: expected .safetensors or {', '.join(_PICKLES)}"
        )
    for key, value in leaves(state):
        if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided):
            raise ArtifactError(f"{path}: {key!r} is no dense tensor with data")
    returned = class_state(model)
    own = own_tensors(model)
    flat = bool(returned) and isinstance(returned, dict) and _is_state(returned)
    expected, found = _shapes(returned if flat else full_state(model)), _shapes(dict(leaves(state)))
    mismatch = describe_mismatch(expected, found)
    if mismatch and not by_class:
        hint = ""
        if found and all(key.startswith("module.") for key in found):
            hint = "\nEvery key begins with 'module.': save model.module of a DataParallel model"
        raise ArtifactError(f"{path} does not fit {type(model).__name__}:\n{mismatch}{hint}")
    # what a class leaves out of its state_dict it has from elsewhere
    places = {place_of(value) for _, value in leaves(returned) if isinstance(value, Tensor)}
    missing = {
        key: tensor.detach().clone()
        for key, tensor in own.items()
        if mismatch and place_of(tensor) in places and found.get(key) != expected.get(key)
    }
    try:
        model.load_state_dict(state)
    except Exception as error:  # a class's own code may raise anything
        raise ArtifactError(
            f"{path} does not fit {type(model).__name__}: its load_state_dict() raises "
            f"{type(error).__name__}: {error}" + (f"\n{mismatch}" if mismatch else "")
        ) from error
    given = [value for _, value in leaves(state) if isinstance(value, Tensor)]
    left = [
        key
        for key, tensor in own_tensors(model).items()
        if key in missing
        and same_values(tensor, missing[key])
        and bool((tensor != tensor.reshape(-1)[:1]).any())
        and not any(same_values(tensor, value) for value in given)
    ]
    if left:
        raise ArtifactError(
            f"{path} does not fit {type(model).__name__}: its load_state_dict() leaves {left[0]} "
            f"as it was built\n{mismatch}"
        )


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(value.shape) if isinstance(value, Tensor) else ()
        for key, value in state.items()
        if not key.endswith("_extra_state")
    }


def _loads_itself(model: nn.Module) -> bool:
    """Whether a model has code of its own that may read a state of other keys than its own."""
    return overrides(model, "load_state_dict") or any(
        module._load_state_dict_pre_hooks
        or (
            type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
            and not type(module).__module__.startswith("torch.")
        )
        for module in nn.Module.modules(model)
    )


def _is_state(content: Mapping[Any, Any]) -> bool:
    return all(
        isinstance(key, str) and (isinstance(value, Tensor) or key.endswith("_extra_state"))
        for key, value in content.items()
    )


def _read_pickle(path: str | os.PathLike[str], trust: bool, *, nested: bool) -> dict[str, Any]:
    """Read what torch.save wrote; a nest of dicts only where the model's class is to read it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} cannot be read with weights_only=True: it holds more than weights, or is no "
            "file of torch.save. Opening such a file can run any code it contains. Save the "
            "weights alone with torch.save(model.state_dict(), path), or, if you trust where the "
            "file comes from, add --trust-pickle"
        ) from error
    except Exception as error:  # truncated, or no file of torch.save: its reader may raise anything
        raise ArtifactError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not (nested or _is_state(content)):
        kind = type(content).__name__
        keys = f" with {', '.join(map(repr, list(content)[:5]))}" if kind == "dict" else ""
        raise ArtifactError(
            f"{path} holds a {kind}{keys}, not a state_dict. Save the weights alone: "
            "torch.save(model.state_dict(), path)"
        )
    return content
