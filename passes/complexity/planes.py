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
"""

from __future__ import annotations

__all__ = ["Plane", "grey", "mean_over_planes", "planes_of", "to_8_bit"]

from collections.abc import Callable, Iterator
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


def mean_over_planes(
    image: npt.NDArray[Any],
    measure: Callable[[Plane], float],
    *,
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """Return the mean of a measure over the planes of an image; see :func:`planes_of`."""
    values = [measure(plane) for plane in planes_of(image, axis=axis, value_range=value_range)]
    return float(np.mean(values))


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
    width = width or 1.0  # a constant image, or one that might as well be

    def scaling(part: npt.NDArray[Any]) -> Plane:
        scaled: Plane = (part.astype(np.float64) - low) / width
        return scaled.clip(0, 255)

    return scaling
