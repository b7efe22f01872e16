"""Class maps from a first network's prediction, or from labels, to guide a second network.

Everything is resized linearly (bilinear, trilinear) with ``align_corners=False`` and without
antialiasing: voxels are cells, and the corners of the first and the last coincide.
"""

from __future__ import annotations

__all__ = ["class_maps", "prediction_of", "resize", "shrink_labels", "shrunken"]

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize.errors import InputError
from pocketize.graph.capture import find_tensors

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_ROUNDING = 1e-6  # 0.29 * 100 is 28.999999999999996


def resize(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Resize (N, C, *spatial) linearly to other spatial sizes."""
    if tuple(x.shape[2:]) == tuple(sizes):
        return x
    return F.interpolate(x, size=tuple(sizes), mode=_MODES[x.ndim - 2], align_corners=False)


def shrunken(
    sizes: Sequence[int], scale: Sequence[float], multiple: Sequence[int]
) -> tuple[int, ...]:
    """Return the sizes of a first stage's input.

    Args:
        sizes: spatial sizes of the volume.
        scale: factor of each axis, in (0, 1].
        multiple: of each axis, what the result is rounded to; at least one of it remains.

    Returns:
        ``floor(size * scale)``, as in ``torch.nn.functional.interpolate``, to the nearest
        multiple.
    """
    made = []
    for size, factor, step in zip(sizes, scale, multiple, strict=True):
        scaled = max(1, int(size * factor + _ROUNDING))
        made.append(max(1, int(scaled / step + 0.5)) * step)
    return tuple(made)


def prediction_of(output: Any, sizes: Sequence[int]) -> Tensor:
    """Return the prediction at full resolution among what a network returns.

    Args:
        output: a tensor, or tensors in lists, tuples, dicts or objects. Networks with deep
            supervision return several resolutions, or one tensor (N, heads, C, *spatial).
        sizes: spatial sizes of the network's input.

    Returns:
        The first tensor (N, C, *spatial) of these sizes; if there is none, the largest tensor of
        that rank. Of several heads the first.

    Raises:
        InputError: no tensor has that rank.
    """
    rank = len(sizes) + 2
    tensors = [t[:, 0] if t.ndim == rank + 1 else t for t in find_tensors(output)]
    fitting = [t for t in tensors if t.ndim == rank and t.is_floating_point()]
    if not fitting:
        shapes = [tuple(t.shape) for t in tensors]
        raise InputError(
            f"cascade: stage 1 must return class maps (N, K, *spatial) with {len(sizes)} spatial "
            f"axes, as its input has; got {shapes or type(output).__name__}"
        )
    same = [t for t in fitting if tuple(t.shape[2:]) == tuple(sizes)]
    return same[0] if same else max(fitting, key=lambda t: t.shape[2:].numel())


def class_maps(logits: Tensor, guidance: str) -> Tensor:
    """Return class maps of a prediction.

    Args:
        logits: (N, K, *spatial). A single class is the foreground, from a sigmoid.
        guidance: ``"softmax"`` for probabilities, ``"argmax"`` for ones at the likeliest class and
            zeros elsewhere.

    Returns:
        Maps of the same shape and dtype.
    """
    if logits.shape[1] == 1:
        return logits.sigmoid() if guidance == "softmax" else (logits > 0).to(logits.dtype)
    if guidance == "softmax":
        return logits.softmax(1)
    return _one_hot(logits.argmax(1, keepdim=True), logits.shape[1], logits.dtype)


def shrink_labels(
    labels: Tensor, classes: int, sizes: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the fraction of each class in the cells of a smaller volume.

    One class after the other is resized, so that maps of all classes exist at the small size only.

    Args:
        labels: whole numbers (N, *spatial) or (N, 1, *spatial), from 0 to below ``classes``; for
            one class 0 and 1.
        classes: how many.
        sizes: the smaller spatial sizes.
        dtype: of the result.

    Returns:
        (N, K, *sizes).

    Raises:
        InputError: the labels are no whole numbers, have another rank or are out of range.
    """
    labels = _checked(labels, classes, len(sizes))
    wanted = range(classes) if classes > 1 else (1,)
    return torch.cat([resize((labels == index).to(dtype), sizes) for index in wanted], 1)


def _one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    shape = [1, classes] + [1] * (labels.ndim - 2)
    return (labels == torch.arange(classes, device=labels.device).view(shape)).to(dtype)


def _checked(labels: Tensor, classes: int, axes: int) -> Tensor:
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"cascade: labels must be whole numbers, one class for each voxel; got {labels.dtype}. "
            "Take argmax(1) of one-hot labels"
        )
    if labels.ndim == axes + 1:
        labels = labels.unsqueeze(1)
    if labels.ndim != axes + 2 or labels.shape[1] != 1:
        raise InputError(
            f"cascade: labels must have the shape (N, *spatial) or (N, 1, *spatial) with {axes} "
            f"spatial axes, got {tuple(labels.shape)}"
        )
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        end = max(classes, 2)
        if low < 0 or high >= end:
            raise InputError(
                f"cascade: labels must be from 0 to {end - 1}, got {low} to {high}; give what is "
                "to be ignored the background's label"
            )
    return labels
