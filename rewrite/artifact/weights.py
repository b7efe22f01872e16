"""Weights from a file into a model, without opening a pickle."""

from __future__ import annotations

__all__ = ["load_weights"]

import os
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pocketize.artifact.safefile import read_header
from pocketize.artifact.states import describe_mismatch
from pocketize.errors import ArtifactError

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, trust: bool = False) -> None:
    """Load a state_dict into a model; keys and shapes must agree in full.

    Args:
        model: the model; unchanged where an error is raised.
        path: ``.safetensors``, or what ``torch.save`` wrote (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``): a state_dict, or a dict that holds one as ``"state_dict"``.
        trust: unpickle what ``weights_only=True`` refuses; the file may then run any code.

    Raises:
        ArtifactError: the file cannot be read, holds more than weights, or does not fit the model.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        read_header(path)  # for its errors
        state: dict[str, Tensor] = safetensors.torch.load_file(path)
    elif suffix in _PICKLES:
        state = _read_pickle(path, trust)
    else:
        raise ArtifactError(
            f"cannot tell what {path} holds: expected .safetensors or {', '.join(_PICKLES)}"
        )
    expected = {
        key: tuple(value.shape) if isinstance(value, Tensor) else ()
        for key, value in model.state_dict().items()
        if not key.endswith("_extra_state")
    }
    found = {
        key: tuple(value.shape) for key, value in state.items() if not key.endswith("_extra_state")
    }
    if mismatch := describe_mismatch(expected, found):
        hint = ""
        if found and all(key.startswith("module.") for key in found):
            hint = "\nEvery key begins with 'module.': save model.module of a DataParallel model"
        raise ArtifactError(f"{path} does not fit {type(model).__name__}:\n{mismatch}{hint}")
    model.load_state_dict(state, strict=True)


def _read_pickle(path: str | os.PathLike[str], trust: bool) -> dict[str, Any]:
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
    except (RuntimeError, EOFError, ValueError) as error:  # truncated, or no file of torch.save
        raise ArtifactError(f"cannot read {path}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) or str(key).endswith("_extra_state")
        for key, value in content.items()
    ):
        kind = type(content).__name__
        keys = f" with {', '.join(map(repr, list(content)[:5]))}" if kind == "dict" else ""
        raise ArtifactError(
            f"{path} holds a {kind}{keys}, not a state_dict. Save the weights alone: "
            "torch.save(model.state_dict(), path)"
        )
    return content
