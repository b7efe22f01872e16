"""Foreground density, and JB, which mixes it with the JPEG complexity."""

from __future__ import annotations

__all__ = ["JB_WEIGHTS", "JBFit", "fit_jb_weight", "foreground_density", "jb"]

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from pocketize.errors import InputError, OptionError, nearest
from pocketize.passes.complexity.planes import check_image

JB_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"unet": 0.7, "cumedvision": 0.775, "ucunet": 0.95}
)
"""The paper's w of JB per architecture."""

Numbers = npt.NDArray[np.float64]


def foreground_density(mask: npt.NDArray[Any], *, foreground: float | None = None) -> float:
    """Foreground density: ``B = foreground pixels / pixels``, of a mask of any dimension.

    Args:
        mask: one number per pixel or voxel.
        foreground: the value that is foreground; by default every value but 0. A data set whose
            objects are black takes ``foreground=0``.

    Raises:
        InputError: the mask is empty, has NaN, or is no array.

    Source: Mishra, Chen, Hu, ACM JETC 2021.
    """
    check_image(mask)
    return float(np.mean(mask != 0 if foreground is None else mask == foreground))


@overload
def jb(j: float, b: float, w: float | str) -> float: ...
@overload
def jb(j: Numbers, b: float | Numbers, w: float | str) -> Numbers: ...
def jb(j: float | Numbers, b: float | Numbers, w: float | str) -> float | Numbers:
    """Mix JPEG complexity and foreground density: ``JB = w J + (1 - w) B``.

    It is the measure that tracks the drop of the IU (intersection over union).

    Args:
        j: JPEG complexity, a number or one per scale.
        b: foreground density.
        w: the weight, from 0 to 1, or an architecture of :data:`JB_WEIGHTS`.

    Raises:
        OptionError: no such weight.

    Source: Mishra, Chen, Hu, ACM JETC 2021.
    """
    weight = jb_weight(w)
    return weight * j + (1 - weight) * b


def jb_weight(w: float | str) -> float:
    """Return a weight from 0 to 1, given as such or by an architecture.

    Raises:
        OptionError: no such weight.
    """
    if isinstance(w, str):
        if w not in JB_WEIGHTS:
            raise OptionError(
                f"w: no architecture is called {w!r}.{nearest(w, JB_WEIGHTS)} Known are "
                f"{', '.join(JB_WEIGHTS)}; or give a number from 0 to 1"
            )
        return JB_WEIGHTS[w]
    if not 0 <= w <= 1:
        raise OptionError(f"w: expected a number from 0 to 1, got {w}")
    return w


class JBFit(NamedTuple):
    """The weight of JB that explains the drops best.

    Attributes:
        w: the weight.
        r_squared: of the line below; 1 explains all.
        slope: drop per unit of JB.
        intercept: the line's drop at JB = 0.
    """

    w: float
    r_squared: float
    slope: float
    intercept: float


def fit_jb_weight(
    j: Sequence[float], b: Sequence[float], drops: Sequence[float], *, step: float = 0.025
) -> JBFit:
    """Find w of JB by the best regression: the line of ``drops`` over JB with the largest R^2.

    Args:
        j: JPEG complexity of each data set.
        b: foreground density of each data set.
        drops: how fast the accuracy falls on each, ``d(accuracy)/d(log10 weights)``.
        step: w is tried from 0 to 1 in steps of this; the paper's .775 and .95 are multiples of
            .025. Of equally good ones the largest is taken, the nearest to plain J.

    Raises:
        OptionError: the three differ in length, or the step is not in (0, 1].
        InputError: fewer than three data sets, or all have the same drop: any w explains them.

    Source: Mishra, Chen, Hu, ACM JETC 2021.
    """
    if not len(j) == len(b) == len(drops):
        raise OptionError(
            f"expected as many j, b and drops, got {len(j)}, {len(b)} and {len(drops)}"
        )
    if not 0 < step <= 1:
        raise OptionError(f"step: expected a number above 0 and up to 1, got {step}")
    y = np.asarray(drops, dtype=np.float64)
    if len(y) < 3 or np.ptp(y) == 0:
        raise InputError(
            f"the weight of JB takes three data sets or more, with drops that differ; got {len(y)} "
            f"with drops {y.tolist()}: a line through fewer fits with any weight"
        )
    best = None
    for w in np.linspace(1, 0, round(1 / step) + 1):
        x = w * np.asarray(j, dtype=np.float64) + (1 - w) * np.asarray(b, dtype=np.float64)
        if np.ptp(x) == 0:
            continue
        slope, intercept = np.polyfit(x, y, 1)
        r_squared = 1 - np.sum((y - slope * x - intercept) ** 2) / np.sum((y - y.mean()) ** 2)
        # rounding must not decide between equals
        if best is None or r_squared > best.r_squared + 1e-12:
            best = JBFit(float(w), float(r_squared), float(slope), float(intercept))
    if best is None:
        raise InputError("all data sets have the same JPEG complexity and foreground density")
    return best
