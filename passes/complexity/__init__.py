"""How complex the images of a data set are: one number, or one per level of a network.

The complexity-guided planning of widths (Mishra, Chen, Hu, ACM JETC 2021) rests on it: the more
complex the images, the more accuracy is lost with the weights. What a plan needs is::

    from pocketize.passes.complexity import complexity_of

    complexity_of(images, measure="jpeg", scales=5, size="raw", **options) -> array of [scales]

where ``images`` is a folder, a file, an array, or a sequence of files and arrays. The measures are
functions of images, too; :func:`measure_dataset` also keeps the numbers of every image.

The packages that read and measure images are optional: ``pip install 'pocketize[complexity]'``.
They are imported when they are used.
"""

from __future__ import annotations

__all__ = [
    "JB_WEIGHTS",
    "MEASURES",
    "Complexity",
    "JBFit",
    "Measure",
    "by_scale",
    "complexity_of",
    "edge_information",
    "feature_congestion",
    "fit_jb_weight",
    "foreground_density",
    "jb",
    "jpeg_complexity",
    "keypoints",
    "measure_dataset",
    "signal_energy",
    "subband_entropy",
]

from typing import TYPE_CHECKING

from pocketize.lazy import attach

if TYPE_CHECKING:
    from pocketize.passes.complexity.clutter import feature_congestion, subband_entropy
    from pocketize.passes.complexity.dataset import Complexity, complexity_of, measure_dataset
    from pocketize.passes.complexity.foreground import (
        JB_WEIGHTS,
        JBFit,
        fit_jb_weight,
        foreground_density,
        jb,
    )
    from pocketize.passes.complexity.measures import (
        edge_information,
        jpeg_complexity,
        keypoints,
        signal_energy,
    )
    from pocketize.passes.complexity.registry import MEASURES, Measure, by_scale

attach(
    __name__,
    {
        "dataset": "Complexity complexity_of measure_dataset",
        "foreground": "JBFit JB_WEIGHTS fit_jb_weight foreground_density jb",
        "registry": "MEASURES Measure by_scale",
        "measures": "edge_information jpeg_complexity keypoints signal_energy",
        "clutter": "feature_congestion subband_entropy",
    },
)
