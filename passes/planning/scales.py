"""Which scale of the images each level of a network works at."""

from __future__ import annotations

__all__ = ["level_scales"]

import math
from typing import Any

from torch import nn

from pocketize.channels.analysis import analyse
from pocketize.channels.levels import find_levels
from pocketize.graph.capture import settle_inputs


def level_scales(model: nn.Module, inputs: Any = None) -> tuple[int, ...]:
    """Return for each resolution level the ``s`` with which it sees the images at ``1 / 2^s``.

    A U-Net has 0, 1, 2, ...; one with a strided stem skips some. Where a pooling leaves an axis
    out, as in volumes of few slices, the axes that it does not leave out decide.

    Args:
        model: any module; unchanged.
        inputs: example inputs; ``None`` guesses.

    Raises:
        CaptureError, InputError: the model does not run on the inputs, or none could be guessed.
    """
    settled = settle_inputs(model, inputs)
    full = max((tuple(t.shape[2:]) for t in settled.tensors()), key=_voxels)
    scales = []
    for level in find_levels(analyse(model, settled)):
        if len(level.size) == len(full) and _voxels(level.size):
            ratio = max(whole / part for whole, part in zip(full, level.size, strict=True))
        else:  # positions of a linear layer
            ratio = _voxels(full) / max(1, _voxels(level.size))
            ratio = ratio ** (1 / max(1, len(full)))
        scales.append(max(0, round(math.log2(ratio))))
    return tuple(scales)


def _voxels(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
