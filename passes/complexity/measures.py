"""Measures of planes: the size of a JPEG, keypoints, the energy of the signal and of its edges.

Keypoints are corners and blobs that a detector finds again in another view. The detectors are those
that come with OpenCV from PyPI. SURF is patented and built into none of its packages; SIFT, whose
patent ended in 2020, finds the same kind of points.
"""

from __future__ import annotations

__all__ = [
    "QUALITY",
    "edge_information",
    "jpeg_complexity",
    "keypoints",
    "signal_energy",
]

import io
import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.planes import (
    Plane,
    Range,
    check_count,
    grey,
    planes_of,
    resize,
    subsample,
    to_8_bit,
)
from pocketize.reading import needed_for

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
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`; rounded
            to 8 bits.
        quality: of the JPEG, 1 to 100; by default the paper's.
        scale: 0 for the plain measure.
        size: what ``size(image)`` is. ``"raw"``, one byte per pixel and colour, compares across all
            images. ``"file"`` is the paper's convention, the size of the file the image came in;
            it compares only within one storage format, and turns the order of data sets round
            where one came as JPEG and another as TIFF.
        file_bytes: the size of the file, for ``size="file"``; a volume's whole file.

    Raises:
        InputError: the image cannot be measured, or has no such scale.
        OptionError: quality, scale or size is out of range, or Pillow is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, JPEG complexity and eq. 2.
    """
    check_count("scale", scale, least=0)
    planes = list(planes_of(image, axis=axis, value_range=value_range))
    value = float(np.mean([_jpeg_of_plane(plane, scale, quality) for plane in planes]))
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


def _jpeg_of_plane(plane: Plane, scale: int, quality: int) -> float:
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


# ORB keeps the strongest 500 by default, which would make all busy images equal.
_MOST_OF_ORB = 100_000


def keypoints(
    image: npt.NDArray[Any],
    *,
    detector: Literal["sift", "orb"] = "sift",
    by: Literal["count", "strength"] = "count",
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """Local keypoints per 1000 pixels: how many, or their strengths added up.

    Of the luma, rounded to 8 bits, with OpenCV's default thresholds; the result does not depend on
    chance or on the number of threads. Strength is the detector's response: the contrast of the
    blob for SIFT, Harris' measure for ORB; the two do not compare with each other.

    Args:
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        detector: ``"sift"`` or ``"orb"``, which is faster and blind within 31 pixels of the border.
        by: ``"count"`` or ``"strength"``.

    Raises:
        InputError: the image cannot be measured.
        OptionError: another detector, or OpenCV is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, keypoints.
    """
    with needed_for("keypoints", "opencv-python-headless"):
        import cv2
    if detector not in ("sift", "orb"):
        raise OptionError(
            f"detector: expected 'sift' or 'orb', got {detector!r}"
            + (": SURF is patented, OpenCV's packages lack it" if str(detector) == "surf" else "")
        )
    if by not in ("count", "strength"):
        raise OptionError(f"by: expected 'count' or 'strength', got {by!r}")
    made = cv2.SIFT_create() if detector == "sift" else cv2.ORB_create(nfeatures=_MOST_OF_ORB)
    values = []
    for plane in planes_of(image, axis=axis, value_range=value_range):
        found = made.detect(np.ascontiguousarray(to_8_bit(grey(plane))), None)
        # threads find them in any order; fsum is the same in every order
        total = len(found) if by == "count" else math.fsum(point.response for point in found)
        values.append(1000 * total / (plane.shape[0] * plane.shape[1]))
    return float(np.mean(values))


# Smoothing across the derivative, and the derivative per pixel.
_SMOOTHING = {"sobel": np.array([1, 2, 1]) / 4, "scharr": np.array([3, 10, 3]) / 16}
_DERIVATIVE = np.array([-1, 0, 1]) / 2


def signal_energy(
    image: npt.NDArray[Any],
    *,
    per_pixel: bool = True,
    constant_term: bool = False,
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """Signal energy: the sum of the squared magnitudes of the Fourier coefficients.

    Of the luma from 0 to 1. As the paper words it, the sum grows with the square of the number of
    pixels and is mostly the brightness of the image, so by default it is divided by that square and
    the constant term is left out: by Parseval's theorem this is the variance of the pixels, between
    0 and 0.25, and compares between images of all sizes. ``per_pixel=False, constant_term=True`` is
    the sum to the letter.

    Args:
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        per_pixel: divide by the square of the number of pixels.
        constant_term: count the coefficient of frequency 0, the image's mean.

    Raises:
        InputError: the image cannot be measured.
        OptionError: scipy is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, signal energy.
    """
    with needed_for("signal energies", "scipy"):
        from scipy import fft
    energies = []
    for plane in planes_of(image, axis=axis, value_range=value_range):
        values = grey(plane) / 255
        if not constant_term:
            values = values - values.flat[0]  # so that a constant image is 0 and not rounding
        magnitudes = np.abs(fft.fft2(values)) ** 2
        if not constant_term:
            magnitudes[0, 0] = 0
        energies.append(magnitudes.sum() / (values.size**2 if per_pixel else 1))
    return float(np.mean(energies))


def edge_information(
    image: npt.NDArray[Any],
    *,
    operator: Literal["sobel", "scharr"] = "sobel",
    edge_scales: int = 3,
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """Edge information: squared horizontal plus squared vertical derivatives, over scales.

    ``mean over scales of mean over pixels of (Gx^2 + Gy^2)``, of the luma from 0 to 1. The operator
    is normalised to the derivative per pixel of its scale; each further scale has half the size, by
    means over 2 x 2 pixels. Borders are mirrored.

    Args:
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        operator: ``"sobel"``, or ``"scharr"``, which is the same in all directions.
        edge_scales: how many scales the mean is over.

    Raises:
        InputError: the image cannot be measured, or is too small for so many scales.
        OptionError: another operator, no positive number of scales, or scipy is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, edge information.
    """
    with needed_for("edge information", "scipy"):
        from scipy.ndimage import correlate1d
    if operator not in _SMOOTHING:
        raise OptionError(f"operator: expected 'sobel' or 'scharr', got {operator!r}")
    check_count("edge_scales", edge_scales)
    smoothing, squares = _SMOOTHING[operator], []
    for plane in planes_of(image, axis=axis, value_range=value_range):
        if min(plane.shape[:2]) >> (edge_scales - 1) < 2:
            raise InputError(
                f"an image of {plane.shape[0]} x {plane.shape[1]} is too small for edges at "
                f"{edge_scales} scales: give a smaller edge_scales, or leave it out"
            )
        values = grey(plane) / 255
        for _ in range(edge_scales):
            across = correlate1d(correlate1d(values, _DERIVATIVE, axis=1), smoothing, axis=0)
            down = correlate1d(correlate1d(values, _DERIVATIVE, axis=0), smoothing, axis=1)
            squares.append(float(np.mean(across**2 + down**2)))
            height, width = values.shape[0] // 2, values.shape[1] // 2
            blocks = values[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
            values = blocks.mean(axis=(1, 3))
    return float(np.mean(squares))
