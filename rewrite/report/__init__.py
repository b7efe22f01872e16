"""Before and after, side by side: :func:`compare`, and what its result can do.

``compare`` measures, :class:`Comparison` renders (terminal, Markdown, JSON, HTML) and guards
(:class:`Threshold`).
"""

from __future__ import annotations

__all__ = ["METRICS", "Comparison", "Threshold", "Violation", "build", "compare"]

from pocketize.report.comparison import Comparison, build, compare
from pocketize.report.gate import METRICS, Threshold, Violation
