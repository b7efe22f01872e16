"""Images as every measure sees them: planes, grey or colour, on the scale of 8-bit images.

A *plane* is a float64 array, ``[height, width]`` or ``[height, width, 3]``, with values from 0 to
255. So that a number does not depend on how an image was stored:

* 8-bit images are taken as they are, 1-bit ones as 0 and 255;
* unsigned 16-bit images are divided by 257, which turns 65535 into 255;
* floats and all other integers are scaled from their own minimum and maximum, over the whole image
  or volume, because nothing else is known of their range; a constant one is 0 everywhere;
* ``value_range`` overrides all of these, for a camera of 12 bits, a window of CT values, or to keep
  images comparable whose own ranges differ. Values outside are clipped.

A volume is measured slice by slice along ``axis``, and the mean over the slices is its number.

Level ``s`` of a U-Net sees the image subsampled by ``2^s``. For a number that can be compared
between levels, :func:`degrade` brings the subsampled image back to full size before it is measured
(Mishra et al. 2021, eq. 2).
"""

from __future__ import annotations

__all__ = [
    "Plane",
    "check_count",
    "degrade",
    "grey",
    "planes_of",
    "resize",
    "scale_names",
    "subsample",
    "to_8_bit",
]

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError

Plane: TypeAlias = npt.NDArray[np.float64]
Range: TypeAlias = tuple[float, float]

# ITU-R BT.601, as Pillow and OpenCV turn colours grey
_LUMA = np.array([0.299, 0.587, 0.114])


def planes_of(
    image: npt.NDArray[Any], *, axis: int | None = None, value_range: Range | None = None
) -> Iterator[Plane]:
    """Give the planes of an image or volume, one by one.

    Args:
        image: ``[height, width]``, ``[height, width, 3]`` in colour, a volume of three dimensions,
            or ``[x, y, z, channels]``: volumes that are scaled each for itself.
        axis: the axis along which a volume is cut. By default the last one, except that three
            dimensions of which the last has size 3 are one image in colour.
        value_range: the values that become 0 and 255; by default as the module says.

    Raises:
        InputError: no array, empty, of another shape, not of numbers, or with NaN or infinity.
        OptionError: no such axis, or an empty range.
    """
    check_image(image)
    if value_range is not None and not value_range[0] < value_range[1]:
        raise OptionError(f"value_range: expected (low, high) with low < high, got {value_range}")
    if image.ndim == 4:
        volumes = [image[..., channel] for channel in range(image.shape[3])]
    elif image.ndim == 3 and axis is None and image.shape[2] == 4:
        raise InputError(
            f"an array of shape {image.shape} may be an image with an alpha channel or a volume of "
            "four slices: drop the alpha channel (image[..., :3]), or name the axis of the slices"
        )
    else:
        volumes = [image]
    in_colour = image.ndim == 3 and axis is None and image.shape[2] == 3
    along = -1 if axis is None else axis
    if image.ndim > 2 and not -3 <= along < 3:
        raise OptionError(f"axis: a volume is cut along 0, 1 or 2 (or -1, -2, -3), got {axis}")
    for volume in volumes:
        scaling = _scaling(volume, value_range)
        if volume.ndim == 2 or in_colour:
            yield scaling(volume)
        else:
            yield from (scaling(part) for part in np.moveaxis(volume, along, 0))


def grey(plane: Plane) -> Plane:
    """Return the luma of a plane, ``[height, width]``; a grey one as it is."""
    return plane if plane.ndim == 2 else plane @ _LUMA


def to_8_bit(plane: Plane) -> npt.NDArray[np.uint8]:
    """Round a plane to whole numbers from 0 to 255."""
    return np.rint(plane).clip(0, 255).astype(np.uint8)


def check_image(image: object) -> None:
    """Check that this is an image that can be measured.

    Raises:
        InputError: it is not; the message says what it is.
    """
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"expected a numpy array (channels last) or a path, got {type(image).__name__}"
        )
    if image.ndim not in (2, 3, 4):
        raise InputError(
            f"expected an image of 2 dimensions, with colours of 3, or a volume of 3 or 4; got an "
            f"array of shape {image.shape}"
        )
    if image.size == 0:
        raise InputError(f"the image is empty: its shape is {image.shape}")
    if image.dtype.kind not in "buif":
        raise InputError(f"expected an image of numbers, got an array of {image.dtype}")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        wrong = int(np.size(image) - np.count_nonzero(np.isfinite(image)))
        raise InputError(
            f"{wrong} of the {image.size} values of the image are NaN or infinite; replace them "
            "(numpy.nan_to_num) or leave the image out"
        )


def _scaling(
    image: npt.NDArray[Any], value_range: Range | None
) -> Callable[[npt.NDArray[Any]], Plane]:
    if value_range is not None:
        low, high = value_range
    elif image.dtype == bool:
        low, high = 0, 1
    elif image.dtype == np.uint8:
        low, high = 0, 255
    elif image.dtype == np.uint16:
        low, high = 0, 65535
    else:
        # as Python numbers, so that the width of narrow integers does not wrap around
        low, high = image.min().item(), image.max().item()
    # in this order 8-bit values come out as they are, to the last bit
    width = (high - low) / 255
    if width == float("inf"):
        raise InputError(
            f"the values of the image, {low} to {high}, are too far apart to be scaled"
        )
    width = width or 1.0  # the image is constant, up to rounding

    def scaling(part: npt.NDArray[Any]) -> Plane:
        scaled: Plane = (part.astype(np.float64) - low) / width
        return scaled.clip(0, 255)

    return scaling


def subsample(plane: Plane, scale: int) -> Plane:
    """Return the plane with ``1 / 2^scale`` of its height and width, rounded down.

    Bilinear, without antialiasing: the variant that reproduces the paper's figures of CHASE_DB1.

    Raises:
        InputError: nothing would be left of the plane.
    """
    height, width = plane.shape[0] >> scale, plane.shape[1] >> scale
    if not height or not width:
        possible = min(plane.shape[:2]).bit_length() - 1
        raise InputError(
            f"an image of {plane.shape[0]} x {plane.shape[1]} has no scale 1/{2**scale}; the "
            f"coarsest is 1/{2**possible}: ask for at most {possible + 1} scales"
        )
    return resize(plane, (height, width))


def degrade(plane: Plane, scale: int) -> Plane:
    """Return the plane subsampled by ``2^scale`` and brought back to its size; at 0, the plane."""
    return plane if scale == 0 else resize(subsample(plane, scale), plane.shape)


def resize(plane: Plane, size: Sequence[int]) -> Plane:
    """Resize a plane to ``size[0] x size[1]``, bilinear without antialiasing."""
    if plane.shape[:2] == tuple(size[:2]):
        return plane
    # the same as OpenCV's INTER_LINEAR, but on floats; torch is there anyway, and imported here so
    # that a list of commands does not wait for it
    import torch

    channels = plane[None] if plane.ndim == 2 else plane.transpose(2, 0, 1)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(channels.copy())[None], tuple(size[:2]), mode="bilinear"
    )[0].numpy()
    result: Plane = resized[0] if plane.ndim == 2 else resized.transpose(1, 2, 0)
    return result


def check_count(option: str, value: int, least: int = 1) -> None:
    """Check an option that counts something.

    Raises:
        OptionError: it is no whole number, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{option}: expected a whole number from {least} on, got {value!r}")


def scale_names(scales: int) -> list[str]:
    """Return ``["1", "1/2", "1/4", ...]``."""
    return ["1", *(f"1/{2**scale}" for scale in range(1, scales))]
