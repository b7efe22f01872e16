"""Weights from a file into a model, without opening a pickle."""

from __future__ import annotations

__all__ = ["load_weights"]

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.artifact.pickles import PICKLES, read_pickle
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
from pocketize.errors import ArtifactError, nearest

_log = logging.getLogger(__name__)

#: Under which training loops (nnU-Net's the last) store a state_dict in a checkpoint.
_KEYS = ("state_dict", "model_state_dict", "model", "network_weights")
#: What torch.compile puts before the names of weights, and with it other wrappers.
_COMPILED = "_orig_mod."
_WRAPPERS = ("module.", "model.", "net.", _COMPILED)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    trust: bool = False,
) -> None:
    """Load a state_dict into a model; keys and shapes must agree in full.

    Names that begin with ``module.``, ``model.``, ``net.`` or ``_orig_mod.`` (of wrappers) are read
    without that where only so they fit the model, and a warning is logged.

    Where the model has code of its own for that (``load_state_dict``, ``_load_from_state_dict``,
    hooks), that code decides which keys it takes, and no weight may be left as it was built.

    Args:
        model: the model; unchanged where an error is raised, unless its own code raised it.
        path: ``.safetensors``, or what ``torch.save`` wrote (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``): a state_dict, or a checkpoint that holds one as ``"state_dict"``,
            ``"model_state_dict"``, ``"model"`` or ``"network_weights"``, or holds only one.
        key: under which a checkpoint holds it.
        trust: unpickle the file as it is; it may then run any code. Otherwise nothing that the file
            names is imported, and what is no tensor, number or text is left out.

    Raises:
        ArtifactError: the file cannot be read, holds more than weights, or does not fit the model.
    """
    by_class = _loads_itself(model)
    suffix = Path(path).suffix.lower()
    returned = class_state(model)
    if suffix == ".safetensors":
        with open_safe(path) as file:
            state: dict[str, Any] = {name: file.read(name) for name in file.header.shapes}
    elif suffix in PICKLES:
        content = read_pickle(path, trust=trust)
        state = _find_state(content, path, key, returned if by_class else None)
    else:
        raise ArtifactError(
            f"cannot tell what {path} holds: expected .safetensors or {', '.join(PICKLES)}"
        )
    for name, value in leaves(state):
        if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided):
            raise ArtifactError(f"{path}: {name!r} is no dense tensor with data")
    own = own_tensors(model)
    flat = bool(returned) and isinstance(returned, dict) and _is_state(returned)
    expected = _shapes(returned if flat else full_state(model))
    if not by_class:
        state, prefix = _without_wrapper(state, expected)
        if prefix:
            _log.warning("%s: the names of its weights were read without %r", path, prefix)
    found = _shapes(dict(leaves(state)))
    mismatch = describe_mismatch(expected, found)
    if mismatch and not by_class:
        raise ArtifactError(f"{path} does not fit {type(model).__name__}:\n{mismatch}")
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


def _find_state(
    content: Any, path: str | os.PathLike[str], key: str | None, own: Any
) -> dict[str, Any]:
    """Return the state_dict in a checkpoint.

    Args:
        content: of the file.
        path: its name, for errors.
        key: under which it is; None to look for it.
        own: what ``state_dict()`` returns, if the model's class loads such a state itself.
    """
    nested = own is not None
    if isinstance(content, Mapping) and key is not None:
        if key not in content:
            there, hint = ", ".join(map(repr, content)), nearest(key, map(str, content))
            raise ArtifactError(f"{path} holds no {key!r}, but {there:.200}.{hint}")
        content = content[key]
    elif isinstance(content, Mapping) and not (_is_state(content) or _has_keys(content, own)):
        held = [k for k, v in content.items() if isinstance(v, Mapping) and v and _is_state(v)]
        likely = [k for k in _KEYS if isinstance(content.get(k), Mapping) and (nested or k in held)]
        found = likely or ([] if nested else held)
        if len(found) > 1:
            raise ArtifactError(
                f"{path} holds several state_dicts: {', '.join(found)}. Say which, as "
                f"{path}:{found[0]}"
            )
        if found:
            content = content[found[0]]
            if not likely:
                _log.warning("%s: what it holds as %r was taken for the weights", path, found[0])
    if not isinstance(content, dict) or not (nested or _is_state(content)):
        kind = type(content).__name__
        keys = f" with {', '.join(map(repr, list(content)[:5]))}" if kind == "dict" else ""
        raise ArtifactError(
            f"{path} holds a {kind}{keys}, not a state_dict. Save the weights alone: "
            "torch.save(model.state_dict(), path)"
        )
    return content


def _has_keys(content: Mapping[Any, Any], own: Any) -> bool:
    return isinstance(own, Mapping) and bool(own) and content.keys() == own.keys()


def _without_wrapper(
    state: dict[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], str]:
    """Take off what wrappers put before the names of weights, if all names then fit the model."""
    taken: list[str] = []
    stripped = state
    while _shapes(stripped) != expected:
        prefix = next((p for p in _WRAPPERS if all(key.startswith(p) for key in stripped)), "")
        if prefix:
            stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
        elif any(_COMPILED in key for key in stripped):  # parts that were compiled
            prefix = _COMPILED
            stripped = {key.replace(prefix, ""): value for key, value in stripped.items()}
        if not prefix or not stripped or len(stripped) < len(state):
            return state, ""
        taken.append(prefix)
    return stripped, "".join(taken)
