"""Outputs of the class that the network itself would return, such as MONAI's ``MetaTensor``.

Operators run by tiles on plain tensors. Which class and which attributes an output of the untouched
network has is for ``__torch_function__`` of its inputs to say, so a copy of the network without
values is run on inputs of that class.
"""

from __future__ import annotations

__all__ = ["dress"]

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import without_dispatch_modes
from pocketize.graph.capture import find_tensors, quiet_recording
from pocketize.graph.clone import fake_clone
from pocketize.graph.inputs import Inputs, as_plain, is_dressed
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.shared.nests import dressed, map_tensors
from pocketize.passes.tiling.cutting import PatchForward

_META = torch.device("meta")


def dress(model: nn.Module, made: Any, inputs: Inputs) -> Any:
    """Return outputs in the classes and with the attributes that the network gives them.

    Args:
        model: which runs by tiles.
        made: what its forward by tiles returned, with plain tensors.
        inputs: of the call, as they were given.
    """
    if not any(is_dressed(tensor) for tensor in inputs.tensors()):
        return made
    tensors = find_tensors(made)
    likes = _outputs(model, inputs)
    if len(likes) != len(tensors):  # it does not run without values, or runs another way
        likes = [next(filter(is_dressed, inputs.tensors()))] * len(tensors)
    by_identity = {id(t): dressed(t, like) for t, like in zip(tensors, likes, strict=True)}
    return map_tensors(made, lambda t: id(t) in by_identity, lambda t: by_identity[id(t)])


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return what the network itself returns, without values."""

    def hollow(tensor: Tensor) -> Tensor:
        t = as_plain(tensor)
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=_META)
        return dressed(made, tensor)

    with without_dispatch_modes(), torch.no_grad():
        copy = fake_clone(model, contextlib.nullcontext(), device=_META)
        forward = wrapping(copy, PatchForward)
        assert forward is not None
        given = inputs.map(hollow)
        try:
            with quiet_recording(copy):
                return find_tensors(forward.original(*given.args, **given.kwargs))
        except Exception:  # a user's forward may raise anything on tensors without values
            return []
