"""Crops of the images of a folder, as a network takes them."""

from __future__ import annotations

__all__ = ["crops_of"]

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketize.cli.common import UsageError
from pocketize.errors import InputError
from pocketize.graph.inputs import Inputs
from pocketize.reading import list_images, read_image


def crops_of(folder: str, inputs: Inputs, count: int, scale: str, seed: int) -> list[Tensor]:
    """Read one crop of each of some images, spread over the folder.

    Args:
        folder: a folder, or one image. Images are ``[*spatial]`` or ``[*spatial, channels]``,
            arrays in ``.npy`` files ``[channels, *spatial]`` as well.
        inputs: what the network takes: one tensor ``(N, channels, *spatial)``; the crops have its
            size, and where an image is smaller, zeros on both sides once it is scaled.
        count: how many, at most.
        scale: ``"standard"`` brings each channel of an image to mean 0 and variance 1, ``"unit"``
            to 0 to 1, ``"none"`` leaves values as they are.
        seed: where the crops lie.

    Returns:
        ``(1, channels, *spatial)`` each, float32.

    Raises:
        InputError: an image has other channels or axes, or cannot be read.
        UsageError: the network takes something else than one image, or no crops are asked for.
    """
    tensors = inputs.tensors()
    if len(tensors) != 1 or tensors[0].dim() < 3:
        raise UsageError(
            f"--calibrate is for networks that take one image, not {inputs.describe()}; calibrate "
            "in Python: pocketize.calibrate(before, after, images)"
        )
    if count < 1:
        raise UsageError(f"--crops must be at least 1, not {count}")
    _, channels, *size = tensors[0].shape
    paths = list_images(folder)
    count = min(count, len(paths))
    chosen = [paths[index * len(paths) // count] for index in range(count)]
    draw = np.random.default_rng(seed % 2**64)
    return [_crop(path, channels, size, scale, draw) for path in chosen]


def _crop(
    path: Path, channels: int, size: list[int], scale: str, draw: np.random.Generator
) -> Tensor:
    image = _scaled(_channels_first(path, channels, len(size)), scale)
    for axis, want in enumerate(size, start=1):
        have = image.shape[axis]
        start = int(draw.integers(max(have - want, 0) + 1))
        image = image.take(range(start, min(start + want, have)), axis)
        pads = [(0, 0)] * image.ndim
        pads[axis] = (
            math.floor((want - image.shape[axis]) / 2),
            math.ceil((want - image.shape[axis]) / 2),
        )
        image = np.pad(image, pads)
    return torch.from_numpy(np.ascontiguousarray(image))[None]


def _channels_first(path: Path, channels: int, axes: int) -> npt.NDArray[np.float32]:
    image = read_image(path).image.astype(np.float32)
    shape = image.shape
    if image.ndim == axes and channels == 1:
        image = image[None]
    elif image.ndim == axes + 1 and shape[-1] == channels and path.suffix != ".npy":
        image = np.moveaxis(image, -1, 0)
    elif image.ndim != axes + 1 or shape[0] != channels or path.suffix != ".npy":
        raise InputError(
            f"{path} has the shape {'x'.join(map(str, shape))}, and the network takes {channels} "
            f"channels of {axes} axes; save what it takes as .npy files of {channels} channels "
            "first"
        )
    if not np.isfinite(image).all():
        raise InputError(f"{path} has values that are not finite")
    return image


def _scaled(image: npt.NDArray[np.float32], scale: str) -> npt.NDArray[np.float32]:
    if scale == "none":
        return image
    axes = tuple(range(1, image.ndim))
    if scale == "unit":
        low, high = image.min(axes, keepdims=True), image.max(axes, keepdims=True)
    else:
        low = image.mean(axes, keepdims=True)
        high = low + image.std(axes, keepdims=True)
    scaled: npt.NDArray[np.float32] = (image - low) / np.maximum(high - low, 1e-6)
    return scaled
