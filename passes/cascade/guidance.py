"""Class maps to guide a second network, and crops around what a first one found.

Everything is resized linearly (bilinear, trilinear) with ``align_corners=False`` and without
antialiasing: voxels are cells, and the corners of the first and the last coincide.
"""

from __future__ import annotations

__all__ = [
    "Crop",
    "class_maps",
    "crop_around",
    "foreground",
    "paste",
    "prediction_of",
    "resize",
    "shrink_labels",
    "shrunken",
    "touched",
]

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Return class maps of logits (N, K, *spatial), of the same shape and dtype.

    ``"softmax"`` gives probabilities, ``"argmax"`` ones at the likeliest class and zeros elsewhere.
    A single class is the foreground, from a sigmoid.
    """
    if logits.shape[1] == 1:
        return logits.sigmoid() if guidance == "softmax" else (logits > 0).to(logits.dtype)
    if guidance == "softmax":
        return logits.softmax(1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    one_hot = logits.argmax(1, keepdim=True) == classes.view(1, -1, *[1] * (logits.ndim - 2))
    return one_hot.to(logits.dtype)


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


# -- crops ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """A part of a volume.

    Attributes:
        low: its first voxel along each axis.
        high: the voxel behind its last.
        sizes: of the volume.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether it is the whole volume."""
        return not any(self.low) and self.high == self.sizes

    @property
    def extent(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(b - a for a, b in zip(self.low, self.high, strict=True))

    def cut(self, x: Tensor) -> Tensor:
        """Return the part of (N, C, *spatial)."""
        inside: tuple[Any, ...] = (..., *map(slice, self.low, self.high))
        return x[inside]


def foreground(maps: Tensor, background: int) -> Tensor:
    """Return where a prediction is no background, (N, *spatial).

    Args:
        maps: (N, K, *spatial): logits or probabilities of several classes, logits of one, or labels
            (N, 1, *spatial) as whole numbers.
        background: its class; of a single map, what is not above zero.
    """
    if not maps.is_floating_point():
        return maps[:, 0] != background
    if maps.shape[1] == 1:
        return maps[:, 0] > 0
    return maps.argmax(1) != background


def crop_around(
    mask: Tensor, sizes: Sequence[int], margin: Sequence[int], multiple: Sequence[int]
) -> Crop:
    """Return the crop around a foreground that was found at a lower resolution.

    Args:
        mask: (N, *spatial), bool; the crop holds the foreground of every sample.
        sizes: spatial sizes of the volume.
        margin: voxels of the volume to add on both sides of each axis.
        multiple: the sizes of the crop are multiples of these where the volume allows it.

    Returns:
        The crop, within the volume; all of it where there is no foreground.
    """
    seen = mask.any(0)
    low, high = [], []
    for axis, (size, wide, step) in enumerate(zip(sizes, margin, multiple, strict=True)):
        others = [a for a in range(seen.ndim) if a != axis]
        line = seen.any(others) if others else seen
        found = line.nonzero()
        if not len(found):
            return Crop((0,) * len(sizes), tuple(sizes), tuple(sizes))
        cells = seen.shape[axis]
        first, last = int(found[0]), int(found[-1]) + 1
        a = max(0, first * size // cells - wide)
        b = min(size, -(-last * size // cells) + wide)
        extent = min(size, -(-(b - a) // step) * step)
        a = min(max(0, a - (extent - (b - a)) // 2), size - extent)
        low.append(a)
        high.append(a + extent)
    return Crop(tuple(low), tuple(high), tuple(sizes))


def touched(part: Tensor, crop: Crop, background: int) -> tuple[int, ...]:
    """Return the axes along which a foreground in ``part`` (N, K, *spatial) reaches a cut border.

    Where the crop ends with the volume, nothing can have been cut off.
    """
    axes = []
    for axis in range(len(crop.sizes)):
        faces = []
        if crop.low[axis] > 0:
            faces.append(part.narrow(axis + 2, 0, 1))
        if crop.high[axis] < crop.sizes[axis]:
            faces.append(part.narrow(axis + 2, crop.extent[axis] - 1, 1))
        if any(bool(foreground(face, background).any()) for face in faces):
            axes.append(axis)
    return tuple(axes)


def paste(part: Tensor, crop: Crop, background: int, outside: Sequence[float] | float) -> Tensor:
    """Put a result of a crop into a volume that is background elsewhere.

    Args:
        part: (..., C, *spatial), of the crop's sizes or smaller by a whole number.
        crop: the crop.
        background: its class, which labels (whole numbers) get outside.
        outside: what classes get outside: a value for each, or the value of all but the
            background's, which then is 0.

    Raises:
        InputError: the crop does not begin and end with voxels of a lower resolution, or there are
            more or fewer classes than values.
    """
    axes = len(crop.sizes)
    found = part.shape[-axes:]
    corner, sizes = [], []
    for have, a, extent, size in zip(found, crop.low, crop.extent, crop.sizes, strict=True):
        if a * have % extent or size * have % extent:
            raise InputError(
                f"cascade: an output of sizes {tuple(found)} for a crop of {crop.extent} at "
                f"{crop.low} does not fit into the volume's voxels at that resolution; let stage 2 "
                "return full resolution only (no deep supervision), or do not crop"
            )
        corner.append(a * have // extent)
        sizes.append(size * have // extent)
    channels = part.shape[-axes - 1]
    filled = part.new_empty((*part.shape[:-axes], *sizes))
    values = _outside(part, channels, background, outside)
    filled.copy_(values.view(channels, *[1] * axes))
    slices = [slice(a, a + n) for a, n in zip(corner, found, strict=True)]
    place: tuple[Any, ...] = (..., *slices)
    filled[place] = part
    return filled


def _outside(
    part: Tensor, channels: int, background: int, outside: Sequence[float] | float
) -> Tensor:
    if not part.is_floating_point():
        return part.new_full((channels,), background)
    if isinstance(outside, int | float):
        values = part.new_full((channels,), float(outside))
        if channels > 1:
            values[background] = 0.0
        return values
    if len(outside) != channels:
        raise InputError(
            f"cascade: option 'outside' has {len(outside)} values for {channels} classes"
        )
    return torch.tensor(tuple(outside), dtype=part.dtype, device=part.device)
