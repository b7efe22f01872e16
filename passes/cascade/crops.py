"""Crops around a foreground: finding them, cutting to them, and putting results back."""

from __future__ import annotations

__all__ = ["Crop", "crop_around", "foreground", "paste", "touched"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketize.errors import InputError


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
    """Return the axes along which a prediction's foreground reaches a border of its crop.

    Args:
        part: (N, K, *spatial), a prediction of the crop's size.
        crop: the crop; where it ends with the volume, nothing can have been cut off.
        background: its class.
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
