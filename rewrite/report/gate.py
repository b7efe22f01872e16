"""Thresholds on a comparison, for checks in continuous integration."""

from __future__ import annotations

__all__ = ["METRICS", "Threshold", "Violation", "check"]

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pocketize.errors import ReportError, nearest
from pocketize.memory import MemoryProfile
from pocketize.report.measurement import Measurement
from pocketize.units import UNITS, bytes_text, count_text, quantity, seconds_text


@dataclass(frozen=True)
class Metric:
    """A figure that can be guarded: the kind of its unit, and where a side has it."""

    kind: str
    read: Callable[[Measurement], float | None]


def _figure(kind: str, mode: str, read: Callable[[MemoryProfile], float | None]) -> Metric:
    def of(side: Measurement) -> float | None:
        profile: MemoryProfile | None = getattr(side, mode)
        return None if profile is None else read(profile)

    return Metric(kind, of)


def _category(name: str) -> Metric:
    return _figure("bytes", "train", lambda profile: profile.categories.get(name, 0))


def _time(profile: MemoryProfile) -> float | None:
    return profile.step_seconds[0] if profile.step_seconds else None


#: What a threshold can be on. The parts are those of the training peak.
METRICS: dict[str, Metric] = {
    "peak": _figure("bytes", "train", lambda profile: profile.peak),
    "inference-peak": _figure("bytes", "infer", lambda profile: profile.peak),
    "activations": _category("activations"),
    "temporaries": _category("temporaries"),
    "gradients": _category("gradients"),
    "optimizer-state": _category("optimizer_state"),
    "parameters": Metric("count", lambda side: side.profiles[0].parameters),
    "weights": Metric("bytes", lambda side: side.profiles[0].weight_bytes),
    "macs": Metric("count", lambda side: side.profiles[0].macs),
    "flops": _figure("count", "train", lambda profile: profile.flops),
    "time": _figure("seconds", "train", _time),
    "inference-time": _figure("seconds", "infer", _time),
}


@dataclass(frozen=True)
class Threshold:
    """How much more than before a figure may be.

    With both a percentage and an amount the *larger* allowance counts, so a threshold fires only on
    what is over both: the amount silences jitter on small networks, the percentage on large ones.
    A negative allowance asks for a decrease: ``"peak -30%"`` fires unless the peak fell by 30 %.

    Attributes:
        metric: A name in :data:`METRICS`.
        percent: Allowed increase, in percent of the figure before.
        amount: Allowed increase, in bytes, a count or seconds.
    """

    metric: str
    percent: float | None = None
    amount: float | None = None

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Read ``"METRIC [PERCENT%] [AMOUNT]"``, as in ``"peak 2% 16MiB"`` or ``"time 10%"``.

        Args:
            text: A metric's name and at least one of a percentage and an amount with its unit
                (bytes: ``B``, ``KiB``, ``MiB``, ``GiB``, ``MB``; time: ``s``, ``ms``; counts:
                ``k``, ``M``, ``G`` or none).

        Raises:
            ReportError: The metric is unknown, or an allowance is missing, repeated or unreadable.
        """
        metric, *allowances = text.split() or [""]
        if metric not in METRICS:
            raise ReportError(
                f"threshold {text!r}: expected one of {', '.join(METRICS)} first, got "
                f"{metric!r}.{nearest(metric, METRICS)}"
            )
        percent: float | None = None
        amount: float | None = None
        kind = METRICS[metric].kind
        for allowance in allowances:
            if match := re.fullmatch(r"([+-]?\d+(?:\.\d+)?)%", allowance):
                if percent is not None:
                    raise ReportError(f"threshold {text!r}: two percentages, expected at most one.")
                percent = float(match[1])
                continue
            read = quantity(allowance, kind)
            if read is None or amount is not None:
                units = ", ".join(unit for unit in UNITS[kind] if unit)
                raise ReportError(
                    f"threshold {text!r}: expected at most one percentage and one amount "
                    f"({units}) after {metric!r}, got {allowance!r}. For example: peak 2% 16MiB."
                )
            amount = read
        if percent is None and amount is None:
            raise ReportError(
                f"threshold {text!r}: no allowance given. For example: {metric} 2% allows "
                f"it to grow by 2 percent, {metric} 0% not at all."
            )
        return cls(metric, percent, amount)

    def limit(self, before: float) -> float:
        """Give the largest figure that is allowed where it was ``before``."""
        limits = []
        if self.percent is not None:
            limits.append(before * (1 + self.percent / 100))
        if self.amount is not None:
            limits.append(before + self.amount)
        return max(limits)


@dataclass(frozen=True)
class Violation:
    """A threshold that a comparison exceeds, with figures in bytes, counts or seconds.

    ``str()`` is one line.
    """

    threshold: Threshold
    before: float
    after: float
    limit: float

    def __str__(self) -> str:
        kind = METRICS[self.threshold.metric].kind
        before, after, limit = (
            _write(kind, value) for value in (self.before, self.after, self.limit)
        )
        return f"{self.threshold.metric}: expected at most {limit}, got {after} (before: {before})."


def check(
    before: Measurement, after: Measurement, thresholds: Iterable[Threshold | str]
) -> list[Violation]:
    """Find the thresholds that a comparison exceeds; see ``Comparison.check``."""
    violations = []
    for given in thresholds:
        threshold = Threshold.parse(given) if isinstance(given, str) else given
        read = METRICS[threshold.metric].read
        old, new = read(before), read(after)
        if old is None or new is None:
            raise ReportError(
                f"threshold on {threshold.metric!r}: the comparison has no such figure. Its mode "
                "was not measured, or it is a time, which is taken only with time_steps above 0 "
                "and not in an estimate."
            )
        limit = threshold.limit(old)
        if new > limit:
            violations.append(Violation(threshold, old, new, limit))
    return violations


def _write(kind: str, value: float) -> str:
    if kind == "seconds":
        return seconds_text(value)
    return bytes_text(round(value)) if kind == "bytes" else count_text(round(value))
