"""Signal energy and edge information: how much an image varies, and where it varies sharply."""

from __future__ import annotations

__all__ = ["edge_information", "edges_of_plane", "energy_of_plane", "signal_energy"]

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.packages import needed_for
from pocketize.passes.complexity.planes import Plane, Range, grey, mean_over_planes
from pocketize.passes.complexity.scales import check_count

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
        image: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        per_pixel: divide by the square of the number of pixels.
        constant_term: count the coefficient of frequency 0, the image's mean.
        axis: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        value_range: see there.

    Raises:
        InputError: the image cannot be measured.
        OptionError: scipy is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, signal energy.
    """

    def of_plane(plane: Plane) -> float:
        return energy_of_plane(plane, per_pixel=per_pixel, constant_term=constant_term)

    return mean_over_planes(image, of_plane, axis=axis, value_range=value_range)


def energy_of_plane(plane: Plane, *, per_pixel: bool = True, constant_term: bool = False) -> float:
    """Signal energy of one plane; see :func:`signal_energy`."""
    with needed_for("signal energies", "scipy"):
        from scipy import fft
    values = grey(plane) / 255
    if not constant_term:
        values = values - values.flat[0]  # so that a constant image is 0 and not rounding
    magnitudes = np.abs(fft.fft2(values)) ** 2
    if not constant_term:
        magnitudes[0, 0] = 0
    return float(magnitudes.sum() / values.size**2 if per_pixel else magnitudes.sum())


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
        image: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        operator: ``"sobel"``, or ``"scharr"``, which is the same in all directions.
        edge_scales: how many scales the mean is over.
        axis: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        value_range: see there.

    Raises:
        InputError: the image cannot be measured, or is too small for so many scales.
        OptionError: another operator, no positive number of scales, or scipy is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, edge information.
    """

    def of_plane(plane: Plane) -> float:
        return edges_of_plane(plane, operator=operator, edge_scales=edge_scales)

    return mean_over_planes(image, of_plane, axis=axis, value_range=value_range)


def edges_of_plane(plane: Plane, *, operator: str = "sobel", edge_scales: int = 3) -> float:
    """Edge information of one plane; see :func:`edge_information`."""
    with needed_for("edge information", "scipy"):
        from scipy.ndimage import correlate1d
    if operator not in _SMOOTHING:
        raise OptionError(f"operator: expected 'sobel' or 'scharr', got {operator!r}")
    check_count("edge_scales", edge_scales)
    if min(plane.shape[:2]) >> (edge_scales - 1) < 2:
        raise InputError(
            f"an image of {plane.shape[0]} x {plane.shape[1]} is too small for edges at "
            f"{edge_scales} scales: give a smaller edge_scales, or leave it out"
        )
    values, smoothing = grey(plane) / 255, _SMOOTHING[operator]
    squares = []
    for _ in range(edge_scales):
        across = correlate1d(correlate1d(values, _DERIVATIVE, axis=1), smoothing, axis=0)
        down = correlate1d(correlate1d(values, _DERIVATIVE, axis=0), smoothing, axis=1)
        squares.append(float(np.mean(across**2 + down**2)))
        values = _halve(values)
    return float(np.mean(squares))


def _halve(values: Plane) -> Plane:
    height, width = values.shape[0] // 2, values.shape[1] // 2
    blocks = values[: 2 * height, : 2 * width].reshape(height, 2, width, 2)
    halved: Plane = blocks.mean(axis=(1, 3))
    return halved
