"""Local keypoints: corners and blobs that a detector finds again in another view.

The detectors are those that come with OpenCV from PyPI. The paper's group also speaks of SURF: it
is patented, OpenCV keeps it among its non-free parts, and the packages of PyPI are built without
it, so a user could not run it from an installation by pip. SIFT, whose patent ended in 2020, finds
the same kind of points.
"""

from __future__ import annotations

__all__ = ["keypoints", "keypoints_of_plane"]

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketize.errors import OptionError
from pocketize.passes.complexity.packages import needed_for
from pocketize.passes.complexity.planes import Plane, Range, grey, mean_over_planes, to_8_bit

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
        image: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        detector: ``"sift"`` or ``"orb"``, which is faster and blind within 31 pixels of the border.
        by: ``"count"`` or ``"strength"``.
        axis: see :func:`~pocketize.passes.complexity.planes.planes_of`.
        value_range: see there.

    Raises:
        InputError: the image cannot be measured.
        OptionError: another detector, or OpenCV is not installed.

    Source: Mishra, Chen, Hu, ACM JETC 2021, keypoints.
    """

    def of_plane(plane: Plane) -> float:
        return keypoints_of_plane(plane, detector=detector, by=by)

    return mean_over_planes(image, of_plane, axis=axis, value_range=value_range)


def keypoints_of_plane(plane: Plane, *, detector: str = "sift", by: str = "count") -> float:
    """Keypoints of one plane per 1000 pixels; see :func:`keypoints`."""
    with needed_for("keypoints", "opencv-python-headless"):
        import cv2
    if detector not in ("sift", "orb"):
        raise OptionError(
            f"detector: expected 'sift' or 'orb', got {detector!r}"
            + (": SURF is patented, OpenCV's packages lack it" if detector == "surf" else "")
        )
    if by not in ("count", "strength"):
        raise OptionError(f"by: expected 'count' or 'strength', got {by!r}")
    made = cv2.SIFT_create() if detector == "sift" else cv2.ORB_create(nfeatures=_MOST_OF_ORB)
    found = made.detect(np.ascontiguousarray(to_8_bit(grey(plane))), None)
    # threads find them in any order; fsum is the same in every order
    total = len(found) if by == "count" else math.fsum(point.response for point in found)
    return float(1000 * total / (plane.shape[0] * plane.shape[1]))
