"""What is left of an image at a coarser scale, shown at full size (Mishra et al. 2021, eq. 2).

Level ``s`` of a U-Net sees the image subsampled by ``2^s``. For a number that can be compared
between levels, the subsampled image is brought back to full size before it is measured.
"""

from __future__ import annotations

__all__ = ["check_count", "coarsest_scale", "degrade", "resize", "scale_names", "subsample"]

from collections.abc import Sequence
from numbers import Integral

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.planes import Plane


def subsample(plane: Plane, scale: int) -> Plane:
    """Return the plane with ``1 / 2^scale`` of its height and width, rounded down.

    Bilinear, without antialiasing: the variant that reproduces the paper's figures of CHASE_DB1.

    Raises:
        InputError: nothing would be left of the plane.
    """
    height, width = plane.shape[0] >> scale, plane.shape[1] >> scale
    if not height or not width:
        possible = coarsest_scale(plane)
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


def coarsest_scale(plane: Plane) -> int:
    """Return the largest ``s`` for which a pixel is left after subsampling by ``2^s``."""
    height, width = plane.shape[:2]
    return int(min(height, width)).bit_length() - 1


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
