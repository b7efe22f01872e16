"""Visual clutter: feature congestion and sub-band entropy (Rosenholtz, Li, Nakano 2007).

Both look at CIELab. The authors' published code computes it from XYZ with white at Y = 1, against a
reference white of Y = 100, so that its L ends at 9 instead of 100; their weights and thresholds
were set there, and so are ours.
"""

from __future__ import annotations

__all__ = ["feature_congestion", "subband_entropy"]

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity.planes import (
    Plane,
    Range,
    check_count,
    planes_of,
    resize,
)
from pocketize.reading import needed_for

_LEVELS, _ORIENTATIONS = 3, 4
_REDUCE = np.array([0.05, 0.25, 0.4, 0.25, 0.05])
# Just noticeable differences of L, a and b: what a colour's covariance has at least.
_COLOUR_NOISE = np.array([0.0007, 0.1, 0.05]) ** 2
# Standard deviations in pixels: of what colour and contrast are pooled over, of the filters of
# orientation, of the energies they give, and of what orientation is pooled over.
_POOL, _ORIENTED, _ENERGY_POOL, _ORIENTATION_POOL = 3.0, 16 / 14 * 1.75, 1.75 / 2**0.5, 14.0
_ENERGY_NOISE, _ORIENTATION_NOISE = 1.0, 0.001
# A channel of Lab that varies by less than this is constant.
_LEAST_RANGE = 0.008


def feature_congestion(
    image: npt.NDArray[Any],
    *,
    levels: int = _LEVELS,
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """Feature congestion: how crowded colours, contrasts and orientations are.

    At the levels of a Gaussian pyramid of Lab, with local means over Gaussian windows: colour
    clutter is ``det(cov(L, a, b))^(1/6)``; contrast clutter the standard deviation of the magnitude
    of a difference of Gaussians of L; orientation clutter ``det(cov(c, s))^(1/4)``, where c and s
    are the opponent energies, horizontal less vertical and right less left diagonal, over their
    total. Of each the largest over the levels is taken at every pixel; the number is the mean of
    ``colour / 0.2088 + contrast / 0.0660 + orientation / 0.0269``. Grey images have the a and b of
    grey colours. Least noticeable differences are added to the covariances, so a constant image has
    1.248, and nothing has less.

    The authors' code also takes the largest, but its maps of coarser levels shrink to a quarter
    each time they are brought up a level, so that the finest nearly always wins: ``levels=1`` is
    the closest to its figures.

    Args:
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        levels: of the pyramid.

    Raises:
        InputError: the image cannot be measured, or is too small for so many levels.
        OptionError: no positive number of levels, or scipy or scikit-image is not installed.

    Source: Rosenholtz, Li, Nakano, Measuring visual clutter, Journal of Vision 7(2):17, 2007; one
        of the candidates of Mishra, Chen, Hu, ACM JETC 2021.
    """
    check_count("levels", levels)
    least, means = 2 ** (levels - 1), []
    for plane in planes_of(image, axis=axis, value_range=value_range):
        if min(plane.shape[:2]) < least:
            raise InputError(
                f"feature congestion at {levels} levels takes images of {least} x {least} and "
                f"more, got {plane.shape[0]} x {plane.shape[1]}"
            )
        pyramid = [_lab(plane)]
        for _ in range(levels - 1):  # half height and width, through a Gaussian of five taps
            smooth = _correlate(_correlate(pyramid[-1], _REDUCE, 0), _REDUCE, 1)
            pyramid.append(smooth[::2, ::2])
        total = np.zeros(plane.shape[:2])
        for clutter, weight in _CLUTTERS:
            maps = [resize(clutter(level), plane.shape[:2]) for level in pyramid]
            total += np.max(maps, axis=0) / weight
        means.append(float(total.mean()))
    return float(np.mean(means))


def subband_entropy(
    image: npt.NDArray[Any],
    *,
    chroma_weight: float = 0.0625,
    axis: int | None = None,
    value_range: Range | None = None,
) -> float:
    """Sub-band entropy: how many nats the coefficients of a steerable pyramid hold.

    Each channel of Lab is taken apart into three scales of four orientations and the rest below
    them. The entropy of a band is that of the histogram of its n coefficients with ``ceil(sqrt n)``
    bins between its least and its largest one; a channel has the mean over its bands, and the image
    ``(L + w a + w b) / (1 + 2 w)``. A grey image has L alone, as in the authors' code. A channel
    that varies by less than 0.008 has 0, so a constant image has. An image too small for three
    scales has as many as fit.

    Args:
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        chroma_weight: w.

    Raises:
        InputError: the image cannot be measured, or is smaller than 8 x 8.
        OptionError: a negative weight, or scikit-image or pyrtools is not installed.

    Source: Rosenholtz, Li, Nakano, Measuring visual clutter, Journal of Vision 7(2):17, 2007; one
        of the candidates of Mishra, Chen, Hu, ACM JETC 2021.
    """
    if chroma_weight < 0:
        raise OptionError(f"chroma_weight: expected 0 or more, got {chroma_weight}")
    values = []
    for plane in planes_of(image, axis=axis, value_range=value_range):
        if min(plane.shape[:2]) < 8:
            raise InputError(
                f"sub-band entropy takes images of 8 x 8 and more, got {plane.shape[0]} x "
                f"{plane.shape[1]}"
            )
        lab = _lab(plane)
        channels = [_entropy_of_channel(lab[..., c]) for c in range(1 if plane.ndim == 2 else 3)]
        weights = [1.0, chroma_weight, chroma_weight][: len(channels)]
        values.append(float(np.average(channels, weights=weights)))
    return float(np.mean(values))


def _entropy_of_channel(channel: Plane) -> float:
    with needed_for("sub-band entropies", "pyrtools"):
        from pyrtools.pyramids import SteerablePyramidFreq
    if np.ptp(channel) < _LEAST_RANGE:
        return 0.0
    # the pyramid ends where a band would be smaller than 4 x 4
    height = min(_LEVELS, int(np.log2(min(channel.shape))) - 2)
    with warnings.catch_warnings():
        # nothing is put together again here
        warnings.filterwarnings("ignore", "Reconstruction will not be perfect", UserWarning)
        pyramid = SteerablePyramidFreq(channel, height=height, order=_ORIENTATIONS - 1)
    bands = [band for key, band in pyramid.pyr_coeffs.items() if key != "residual_highpass"]
    entropies = []
    for band in bands:
        counts, _ = np.histogram(band, bins=int(np.ceil(np.sqrt(band.size))))
        shares = counts[counts > 0] / band.size
        entropies.append(-np.sum(shares * np.log(shares)))
    return float(np.mean(entropies))


def _lab(plane: Plane) -> Plane:
    with needed_for("measures of clutter", "scikit-image"):
        from skimage.color import rgb2xyz, xyz2lab
    colours = plane if plane.ndim == 3 else np.repeat(plane[..., None], 3, axis=2)
    lab: Plane = xyz2lab(rgb2xyz(colours / 255) / 100)
    return lab


def _correlate(
    values: Plane, kernel: npt.NDArray[np.float64], axis: int, mode: str = "mirror"
) -> Plane:
    with needed_for("measures of clutter", "scipy"):
        from scipy.ndimage import correlate1d
    result: Plane = correlate1d(values, kernel, axis=axis, mode=mode)
    return result


class _PoolingWindow:
    """Means over a Gaussian window of two standard deviations; over what lies within the image."""

    def __init__(self, size: tuple[int, ...], sigma: float) -> None:
        self.kernel = _gaussian(sigma, round(2 * sigma))
        within = [_correlate(np.ones(length), self.kernel, 0, "constant") for length in size]
        self.share = np.outer(*within)

    def mean(self, values: Plane) -> Plane:
        down = _correlate(values, self.kernel, 0, "constant")
        result: Plane = _correlate(down, self.kernel, 1, "constant") / self.share
        return result

    def covariance(self, channels: list[Plane]) -> dict[tuple[int, int], Plane]:
        means = [self.mean(channel) for channel in channels]
        return {
            (i, j): self.mean(channels[i] * channels[j]) - means[i] * means[j]
            for i in range(len(channels))
            for j in range(i + 1)
        }


def _colour_clutter(lab: Plane) -> Plane:
    """Return ``det(cov(L, a, b))^(1/6)``: the size of the cloud of colours around each pixel."""
    cov = _PoolingWindow(lab.shape[:2], _POOL).covariance([*np.moveaxis(lab, 2, 0)])
    l, a, b = (cov[i, i] + _COLOUR_NOISE[i] for i in range(3))  # noqa: E741, as in CIELab
    la, lb, ab = cov[1, 0], cov[2, 0], cov[2, 1]
    determinant = l * (a * b - ab**2) - la * (la * b - ab * lb) + lb * (la * ab - a * lb)
    # rounding can leave it a little below 0 where all is flat
    root: Plane = determinant.clip(0) ** (1 / 6)
    return root


def _contrast_clutter(lab: Plane) -> Plane:
    """Return the standard deviation of the local contrast around each pixel."""
    inner, outer = (_gaussian(sigma, 3) for sigma in (0.71, 1.14))
    lightness = lab[..., 0]
    contrast = np.abs(
        _correlate(_correlate(lightness, inner, 0), inner, 1)
        - _correlate(_correlate(lightness, outer, 0), outer, 1)
    )
    variance = _PoolingWindow(lightness.shape, _POOL).covariance([contrast])[0, 0]
    deviation: Plane = np.sqrt(variance.clip(0))
    return deviation


def _orientation_clutter(lab: Plane) -> Plane:
    """Return ``det(cov(c, s))^(1/4)``: how many ways the edges around each pixel run."""
    lightness, middle = lab[..., 0], _blurred(lab[..., 0], 0, 0)
    diagonal = _ORIENTED / 2**0.5
    shifts = ((_ORIENTED, 0), (0, _ORIENTED), (diagonal, diagonal), (diagonal, -diagonal))
    window = _PoolingWindow(lightness.shape, _ENERGY_POOL)
    energies = []
    for down, right in shifts:
        # a second derivative as three Gaussians in a row: less, twice more, less
        sides = _blurred(lightness, down, right) + _blurred(lightness, -down, -right)
        energies.append(window.mean((2 * middle - sides) ** 2))
    total = np.sum(energies, axis=0) + _ENERGY_NOISE
    opponents = [(energies[0] - energies[1]) / total, (energies[3] - energies[2]) / total]
    cov = _PoolingWindow(lightness.shape, _ORIENTATION_POOL).covariance(opponents)
    c, s = cov[0, 0] + _ORIENTATION_NOISE, cov[1, 1] + _ORIENTATION_NOISE
    root: Plane = (c * s - cov[1, 0] ** 2).clip(0) ** (1 / 4)
    return root


def _blurred(values: Plane, down: float, right: float) -> Plane:
    radius = round(3 * _ORIENTED)
    vertical = _correlate(values, _gaussian(_ORIENTED, radius, down), 0)
    return _correlate(vertical, _gaussian(_ORIENTED, radius, right), 1)


def _gaussian(sigma: float, radius: int, centre: float = 0.0) -> npt.NDArray[np.float64]:
    kernel: npt.NDArray[np.float64] = np.exp(
        -((np.arange(-radius, radius + 1) - centre) ** 2) / (2 * sigma**2)
    )
    kernel /= kernel.sum()
    return kernel


# With the weights of colour, contrast and orientation.
_CLUTTERS = (
    (_colour_clutter, 0.2088),
    (_contrast_clutter, 0.0660),
    (_orientation_clutter, 0.0269),
)
