"""Compare two networks: :func:`compare` measures, :class:`Comparison` renders and checks limits."""

from __future__ import annotations

__all__ = ["METRICS", "Comparison", "Threshold", "Violation", "build", "compare"]

from pocketize.report.comparison import Comparison, build, compare
from pocketize.report.gate import METRICS, Threshold, Violation
