"""Sizes of inputs that suit a model, for those that do not."""

from __future__ import annotations

__all__ = ["suggest_sizes"]

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.errors import CaptureError, InputError, MeasureError
from pocketize.graph.capture import Tracer
from pocketize.graph.inputs import Inputs, as_inputs, guess_inputs, to_model

#: A network that halves its volume n times wants sizes that are multiples of 2 ** n.
_STEPS = (2, 4, 8, 16, 32, 64)


@contextlib.contextmanager
def suggest_sizes(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Name the nearest sizes that suit a model where its forward fails on those that were given.

    Args:
        model: the model; a fake copy is traced, and only after an error.
        inputs: what the block runs the model on, as :func:`pocketize.graph.inputs.as_inputs` takes
            it.

    Raises:
        InputError: the model does not run on the inputs, and it runs on others. An error of another
            cause is raised as it is.
    """
    try:
        yield
    except (CaptureError, MeasureError) as error:
        near = _nearest(model, inputs)
        if not near:
            raise
        raise InputError(f"{str(error).rstrip('.')}. It runs on {' and on '.join(near)}") from error


def _nearest(model: nn.Module, inputs: Any) -> list[str]:
    """Describe the next smaller and larger inputs on which a model runs; [] if it runs on these."""
    try:
        tracer = Tracer(model)
        with tracer.mode:
            given = to_model(as_inputs(inputs, model), model)
    except (CaptureError, InputError):
        return []

    def runs(candidate: Inputs) -> bool:
        try:
            for train in (False, True):
                tracer.trace(candidate, train=train)
        except CaptureError:
            return False
        return True

    def rounded(step: int, channels: int | None, rounding: Callable[[float], int]) -> Inputs:
        def resize(tensor: Tensor) -> Tensor:
            shape = list(tensor.shape)
            shape[2:] = [max(1, rounding(size / step)) * step for size in shape[2:]]
            if channels is not None:
                shape[1] = channels
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

        with tracer.mode:
            return given.map(resize)

    if runs(given):
        return []
    for step, channels in [*((step, None) for step in _STEPS), *_other_channels(model, given)]:
        both = (rounded(step, channels, math.floor), rounded(step, channels, math.ceil))
        near = {each.describe(): each for each in both}
        if found := [text for text, each in near.items() if runs(each)]:
            return found
    return []


def _other_channels(model: nn.Module, given: Inputs) -> list[tuple[int, int]]:
    """Return steps of sizes with the channels that the first layer takes, if it takes others."""
    try:
        first = next(guess_inputs(model)).tensors()[0]
    except InputError:
        return []
    (*_, tensor) = given.tensors()
    alike = len(given.tensors()) == 1 and tensor.ndim == first.ndim > 1
    if not alike or tensor.shape[1] == first.shape[1]:
        return []
    return [(step, first.shape[1]) for step in (1, *_STEPS)]
