"""Figures of one network (:func:`take`) or of two side by side (:func:`compare`), for a review."""

from __future__ import annotations

__all__ = [
    "METRICS",
    "Comparison",
    "LimitCheck",
    "Measurement",
    "Threshold",
    "compare",
    "compare_measurements",
    "take",
]

from pocketize.report.comparison import Comparison, compare, compare_measurements
from pocketize.report.gate import METRICS, LimitCheck, Threshold
from pocketize.report.measurement import Measurement, take
