"""Figures of one network (:func:`take`) or of two side by side (:func:`compare`), for a review."""

from __future__ import annotations

__all__ = [
    "METRICS",
    "Comparison",
    "Measurement",
    "Threshold",
    "Violation",
    "compare",
    "compare_measurements",
    "take",
]

from pocketize.report.comparison import Comparison, compare, compare_measurements
from pocketize.report.gate import METRICS, Threshold, Violation
from pocketize.report.measurement import Measurement, take
