"""JPEG complexity: how little an image can be compressed."""

from __future__ import annotations

__all__ = ["QUALITY", "jpeg_complexity", "jpeg_of_plane"]

import io
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.packages import needed_for
from pocketize.passes.complexity.planes import Plane, Range, planes_of, to_8_bit
from pocketize.passes.complexity.scales import check_count, resize, subsample

QUALITY = 25
"""The paper's quality of the JPEG."""
_LARGEST_SIDE = 65500  # of libjpeg


def jpeg_complexity(
    image: npt.NDArray[Any],
    *,
    quality: int = QUALITY,
    scale: int = 0,
    size: Literal["raw", "file"] = "raw",
    file_bytes: int | None = None,
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """JPEG complexity: ``J = 1/CR``, ``CR = size(image) / size(JPEG of the image)``.

    At ``scale`` s > 0 layer-wise: the image is subsampled by ``2^s``, compressed, brought back to
    full size and compressed again; ``size(image)`` stays that of the full image. Baseline JPEG with
    4:2:0 chroma and optimised Huffman tables, bilinear resizing without antialiasing: the choices
    that reproduce the paper's figures of CHASE_DB1 within 6 %.

    A constant image is not quite 0: the headers of its JPEG remain, some hundred bytes.

    Args:
        image: see :func:`~pocketize.passes.complexity.planes.planes_of`; rounded to 8 bits.
        quality: of the JPEG, 1 to 100; by default the paper's.
        scale: 0 for the plain measure.
        size: what ``size(image)`` is. ``"raw"``, one byte per pixel and colour, compares across all
            images. ``"file"`` is the paper's convention, the size of the file the image came in;
            it compares only within one storage format, and turns the order of data sets round
            where one came as JPEG and another as TIFF.
        file_bytes: the size of the file, for ``size="file"``; a volume's whole file.
        axis: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        value_range: see there.

    Raises:
        InputError: the image cannot be measured, or has no such scale.
        OptionError: quality, scale or size is out of range, or Pillow is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, JPEG complexity and eq. 2.
    """
    check_count("scale", scale, least=0)
    planes = list(planes_of(image, axis=axis, value_range=value_range))
    value = float(np.mean([jpeg_of_plane(plane, scale, quality=quality) for plane in planes]))
    return value * over_size(size, sum(plane.size for plane in planes), file_bytes)


def over_size(size: str, raw_bytes: int, file_bytes: int | None) -> float:
    """Return the factor from a size over the raw bytes to one over ``size``.

    Raises:
        OptionError: no such size, or no size of a file where that is asked for.
    """
    if size == "raw":
        return 1.0
    if size != "file":
        raise OptionError(f"size: expected 'raw' or 'file', got {size!r}")
    if not file_bytes or file_bytes < 0:
        raise OptionError(
            f"size='file' needs the size of the file that the image came in, got {file_bytes}: "
            "measure a folder or paths, give file_bytes, or take size='raw'"
        )
    return raw_bytes / file_bytes


def jpeg_of_plane(plane: Plane, scale: int = 0, *, quality: int = QUALITY) -> float:
    """JPEG complexity of one plane over its raw bytes; see :func:`jpeg_complexity`."""
    if scale:
        coarse = _decode(_encode(subsample(plane, scale), quality))
        plane = resize(coarse, plane.shape)
    return len(_encode(plane, quality)) / plane.size


def _encode(plane: Plane, quality: int) -> bytes:
    with needed_for("JPEG complexities", "Pillow"):
        from PIL import Image
    check_count("quality", quality)
    if quality > 100:
        raise OptionError(f"quality: JPEG ends at 100, got {quality}")
    if max(plane.shape[:2]) > _LARGEST_SIDE:
        raise InputError(
            f"an image of {plane.shape[0]} x {plane.shape[1]} is too large for JPEG, which ends at "
            f"{_LARGEST_SIDE} pixels a side: measure tiles of it"
        )
    file = io.BytesIO()
    picture = Image.fromarray(to_8_bit(plane))
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return file.getvalue()


def _decode(data: bytes) -> Plane:
    with needed_for("JPEG complexities", "Pillow"):
        from PIL import Image
    decoded: Plane = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64)
    return decoded
