"""A state_dict by ``torch.save`` that has the recipe too, as an attribute of the dict.

To torch it is a plain state_dict. :func:`pocketize.load` makes the rewritten model of it again.
"""

from __future__ import annotations

__all__ = ["StateFile", "has_recipe", "is_state_file", "write_state"]

import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor, nn

from pocketize.artifact.files import open_for_torch
from pocketize.artifact.pickles import read_pickle
from pocketize.artifact.recipe import ties_of, write_recipe
from pocketize.artifact.safefile import Header
from pocketize.artifact.states import full_state
from pocketize.errors import ArtifactError

_RECIPE = "pocketize"


class StateFile:
    """A state_dict in memory, read like :class:`~pocketize.artifact.safefile.SafeFile`.

    Attributes:
        header: its shapes, and its recipe if it has one.

    Raises:
        ArtifactError: the file cannot be read as weights alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        state = read_pickle(path)
        if type(state) is not OrderedDict or not all(isinstance(v, Tensor) for v in state.values()):
            raise ArtifactError(f"{path} holds no state_dict that pocketize wrote")
        self._state: dict[str, Tensor] = state
        recipe = vars(state).get(_RECIPE)
        metadata = {_RECIPE: recipe} if isinstance(recipe, str) else {}
        self.header = Header({key: tuple(v.shape) for key, v in state.items()}, metadata)

    def read(self, key: str, memory_format: torch.memory_format | None = None) -> Tensor:
        """Return a tensor of the state; each that is read shares no memory with others."""
        return self._state[key].clone(memory_format=memory_format or torch.contiguous_format)


def is_state_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a state_dict which this module writes."""
    return Path(path).suffix.lower() in (".pt", ".pth")


def has_recipe(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a state_dict with a recipe."""
    with contextlib.suppress(Exception):  # whatever else it is; reading it as such will tell
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _RECIPE in vars(state)
    return False


def write_state(model: nn.Module, path: Path) -> None:
    """Write the ``state_dict`` of a model; with the recipe, if its class has torch's state_dict.

    Raises:
        ArtifactError: its ``state_dict`` raises.
    """
    try:
        state = model.state_dict()
    except Exception as error:  # a class's own code may raise anything
        raise ArtifactError(
            f"state_dict() of {type(model).__name__} raises {type(error).__name__}: {error}. Mend "
            "it, or write a .safetensors file, which holds the weights whatever state_dict does"
        ) from error
    full = full_state(model)
    if type(state) is OrderedDict and state.keys() == full.keys():
        vars(state)[_RECIPE] = write_recipe(model, full, ties_of(full))
    with open_for_torch(path) as file:
        torch.save(state, cast("IO[bytes]", file))
