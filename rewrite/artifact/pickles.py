"""Read what ``torch.save`` wrote without running code that the file names.

A checkpoint often holds more than weights: settings, numbers of numpy, paths. ``weights_only=True``
refuses such a file as a whole. Here each class or function that torch does not know is replaced by
an empty stand-in, so nothing of the file's choice is imported or called, and the weights are read.
"""

from __future__ import annotations

__all__ = ["PICKLES", "read_pickle"]

import os
import pickle
from typing import Any

import torch

from pocketize.artifact.files import reading
from pocketize.errors import ArtifactError, brief

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
"""What the names of such files end with."""


class _StandIn:
    """In place of an object of a class that is not imported; keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_pickle(path: str | os.PathLike[str], *, trust: bool = False) -> Any:
    """Read a file of ``torch.save``, on the CPU.

    Args:
        path: the file.
        trust: unpickle it as it is; it may then run any code.

    Raises:
        ArtifactError: the file cannot be read.
    """
    try:
        with reading(path):
            return _load(path, trust)
    except ArtifactError:
        raise
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} cannot be read with weights_only=True: it holds more than weights, or is no "
            "file of torch.save. Opening such a file can run any code it contains. Save the "
            "weights alone with torch.save(model.state_dict(), path), or, if you trust where the "
            "file comes from, add --trust-pickle"
        ) from error
    except Exception as error:  # truncated, or no file of torch.save: its reader may raise anything
        raise ArtifactError(
            f"cannot read {path}: it is damaged, incomplete or no file of torch.save "
            f"({brief(error)})"
        ) from error


def _load(path: str | os.PathLike[str], trust: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # of an old or another format
            unknown = []
        if trust or not unknown:
            raise
        # named, for errors that say what a file holds
        stand_ins: list[Any] = [
            (type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in unknown
        ]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, _StandIn):  # a whole module, say
            raise error
        return content
