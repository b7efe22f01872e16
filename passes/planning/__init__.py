"""Widths from a budget: how far a network can shrink, and where, before accuracy suffers.

::

    plan = plan_widths(model, max_bytes="1MB", complexity=(.1518, .0857, .0655, .0496, .0375),
                       degradation=degradation_of("unet"))
    print(plan)
    small = rewrite(model, Width.from_plan(plan))

Source: Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image
Segmentation", ACM JETC 2021.
"""

from __future__ import annotations

__all__ = [
    "DEGRADATION",
    "DatasetFit",
    "Degradation",
    "DegradationFit",
    "PlannedLevel",
    "Point",
    "WidthPlan",
    "degradation_of",
    "fit_degradation",
    "level_scales",
    "plan_widths",
    "train_points",
]

from typing import TYPE_CHECKING

from pocketize.lazy import attach

if TYPE_CHECKING:
    from pocketize.passes.planning.equations import DEGRADATION, Degradation, degradation_of
    from pocketize.passes.planning.fitting import (
        DatasetFit,
        DegradationFit,
        Point,
        fit_degradation,
    )
    from pocketize.passes.planning.network import level_scales
    from pocketize.passes.planning.plan import PlannedLevel, WidthPlan
    from pocketize.passes.planning.planner import plan_widths
    from pocketize.passes.planning.runner import train_points

attach(
    __name__,
    {
        "equations": "DEGRADATION Degradation degradation_of",
        "fitting": "DatasetFit DegradationFit Point fit_degradation",
        "plan": "PlannedLevel WidthPlan",
        "network": "level_scales",
        "planner": "plan_widths",
        "runner": "train_points",
    },
)
