"""The measures by name, and any of them at the scales of a network's levels."""

from __future__ import annotations

__all__ = ["MEASURES", "Measure", "by_scale", "get_measure"]

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError, nearest
from pocketize.passes.complexity.clutter import feature_congestion, subband_entropy
from pocketize.passes.complexity.measures import (
    edge_information,
    jpeg_complexity,
    keypoints,
    signal_energy,
)
from pocketize.passes.complexity.planes import Plane, Range, check_count, degrade, planes_of


@dataclass(frozen=True)
class Measure:
    """A measure of complexity.

    Attributes:
        name: what the command line calls it.
        summary: what it measures, in one line.
        at_scale: its number for a plane at a scale, ``(plane, scale, **options) -> float``; None
            for a measure that needs masks, which :func:`measure_dataset` works out.
        options: the names of its options.
    """

    name: str
    summary: str
    at_scale: Callable[..., float] | None
    options: tuple[str, ...] = ()

    @property
    def needs_masks(self) -> bool:
        """Whether it looks at masks as well as, or instead of, images."""
        return self.at_scale is None


def get_measure(measure: str | Callable[[Plane], float] | Measure) -> Measure:
    """Return a measure by its name, or make one of a function of planes.

    A function gets float64 arrays ``[height, width]`` or ``[height, width, 3]`` with values from 0
    to 255, and returns a number.

    Raises:
        OptionError: no measure has the name.
    """
    if isinstance(measure, Measure):
        return measure
    if not isinstance(measure, str):
        return _of_degraded(getattr(measure, "__name__", "custom"), "a user's own", measure)
    if measure not in MEASURES:
        raise OptionError(
            f"no measure is called {measure!r}.{nearest(measure, MEASURES)} "
            f"Measures: {', '.join(MEASURES)}"
        )
    return MEASURES[measure]


def by_scale(
    measure: str | Callable[[Plane], float] | Measure,
    image: npt.NDArray[Any],
    scales: int = 5,
    *,
    axis: int | None = None,
    value_range: Range | None = None,
    **options: Any,
) -> npt.NDArray[np.float64]:
    """Measure an image layer-wise: at the scales 1, 1/2, 1/4, ... of a network's levels.

    At scale s the image is subsampled by ``2^s`` and brought back to full size, then measured; JPEG
    complexity also compresses it in between. A volume is measured slice by slice, and the mean
    taken.

    Args:
        measure: a name of :data:`MEASURES` that needs no masks, or a function of planes.
        image, axis, value_range: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        scales: how many; 1 is the plain measure only.
        **options: the measure's own, such as ``quality`` of ``"jpeg"``.

    Returns:
        One number per scale, the finest first.

    Raises:
        InputError: the image cannot be measured, or is too small for so many scales.
        OptionError: unknown measure or option, or no positive number of scales.

    Source: Mishra, Chen, Hu, ACM JETC 2021, eq. 2.
    """
    chosen = get_measure(measure)
    check_count("scales", scales)
    check_options(chosen, options)
    if chosen.at_scale is None:
        raise InputError(f"{chosen.name} needs masks: use measure_dataset(images, masks=...)")
    planes = planes_of(image, axis=axis, value_range=value_range)
    measured = chosen.at_scale
    values = [[measured(plane, s, **options) for s in range(scales)] for plane in planes]
    mean: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64).mean(axis=0)
    return mean


def check_options(measure: Measure, options: Mapping[str, object]) -> None:
    """Check that a measure has the options.

    Raises:
        OptionError: it has not; the message lists those it has.
    """
    for option in options:
        if option not in measure.options:
            has = ", ".join(measure.options) or "none"
            raise OptionError(
                f"{measure.name}: unknown option {option!r}.{nearest(option, measure.options)} "
                f"Options of {measure.name}: {has}"
            )


def _of_degraded(name: str, summary: str, measure: Callable[..., float]) -> Measure:
    parameters = inspect.signature(measure).parameters.values()
    options = tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)

    def at_scale(plane: Plane, scale: int, **options: Any) -> float:
        return measure(degrade(plane, scale), **options)

    return Measure(name, summary, at_scale, options)


def _of_image(name: str, summary: str, measure: Callable[..., float]) -> Measure:
    made = _of_degraded(name, summary, partial(measure, value_range=_PLANE))
    own = tuple(option for option in made.options if option not in ("axis", "value_range"))
    return replace(made, options=own)


def _jpeg(plane: Plane, scale: int, **options: Any) -> float:
    return jpeg_complexity(plane, scale=scale, value_range=_PLANE, **options)


# a plane is an image of which this is the range
_PLANE = (0.0, 255.0)

MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        measure.name: measure
        for measure in (
            Measure("jpeg", "size of a JPEG over that of the image", _jpeg, ("quality",)),
            _of_image("energy", "variance of the pixels, from their spectrum", signal_energy),
            _of_image("edges", "squared derivatives, mean over scales", edge_information),
            _of_image("keypoints", "SIFT or ORB keypoints per 1000 pixels", keypoints),
            _of_image("congestion", "feature congestion: visual clutter", feature_congestion),
            _of_image("subbands", "sub-band entropy: visual clutter", subband_entropy),
            Measure("foreground", "foreground pixels over pixels", None, ("foreground",)),
            Measure("jb", "w jpeg + (1 - w) foreground", None, ("w", "foreground", "quality")),
        )
    }
)
"""Every measure, by name."""
