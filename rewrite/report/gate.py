"""Thresholds on a comparison, for checks in continuous integration."""

from __future__ import annotations

__all__ = ["METRICS", "LimitCheck", "Metric", "Threshold", "judge"]

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocketize.errors import ReportError, nearest
from pocketize.memory import MemoryProfile
from pocketize.units import UNITS, bytes_text, count_text, large_text, quantity, seconds_text

if TYPE_CHECKING:
    from pocketize.report.measurement import Measurement


@dataclass(frozen=True)
class Metric:
    """A figure of a network that can have a limit.

    Attributes:
        label: what reports call it.
        kind: of its unit: ``"bytes"``, ``"count"`` or ``"seconds"``.
        write: how reports write it.
        read: where a measurement has it; ``None`` if it was not taken.
    """

    label: str
    kind: str
    write: Callable[[Any], str]
    read: Callable[[Measurement], float | None]


def _of(
    mode: str, read: Callable[[MemoryProfile], float | None]
) -> Callable[[Measurement], float | None]:
    def figure(side: Measurement) -> float | None:
        profile: MemoryProfile | None = getattr(side, mode)
        return None if profile is None else read(profile)

    return figure


def _seconds(profile: MemoryProfile) -> float | None:
    return profile.step_seconds[0] if profile.step_seconds else None


def _part(name: str) -> Metric:
    label = f"{name.replace('_', ' ')} at the training peak"
    return Metric(label, "bytes", bytes_text, _of("train", lambda p: p.categories.get(name, 0)))


#: What a threshold can be on: first what every report shows.
METRICS: dict[str, Metric] = {
    "peak": Metric("training peak", "bytes", bytes_text, _of("train", lambda p: p.peak)),
    "inference-peak": Metric("inference peak", "bytes", bytes_text, _of("infer", lambda p: p.peak)),
    "parameters": Metric("parameters", "count", count_text, lambda m: m.profiles[0].parameters),
    "macs": Metric("MACs of a forward", "count", large_text, lambda m: m.profiles[0].macs),
    "flops": Metric(
        "FLOPs of a training step", "count", large_text, _of("train", lambda p: p.flops)
    ),
    "time": Metric("time of a training step", "seconds", seconds_text, _of("train", _seconds)),
    "inference-time": Metric("time of a forward", "seconds", seconds_text, _of("infer", _seconds)),
    "weights": Metric(
        "bytes of weights", "bytes", bytes_text, lambda m: m.profiles[0].weight_bytes
    ),
    "activations": _part("activations"),
    "temporaries": _part("temporaries"),
    "gradients": _part("gradients"),
    "optimizer-state": _part("optimizer_state"),
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
        if not all(math.isfinite(value) for value in (percent or 0, amount or 0)):
            raise ReportError(f"threshold {text!r:.100}: the allowance is too large a number")
        return cls(metric, percent, amount)

    def limit(self, before: float) -> float:
        """Give the largest figure that is allowed where it was ``before``."""
        limits = []
        if self.percent is not None:
            limits.append(before * (1 + self.percent / 100))
        if self.amount is not None:
            limits.append(before + self.amount)
        return max(limits)

    def __str__(self) -> str:
        """Return a text that :meth:`parse` reads as this threshold."""
        parts = [self.metric]
        if self.percent is not None:
            parts.append(f"{_digits(self.percent)}%")
        if self.amount is not None:
            units = UNITS[METRICS[self.metric].kind]
            whole = [unit for unit, size in units.items() if self.amount % size == 0]
            unit = max(whole or [min(units, key=units.__getitem__)], key=units.__getitem__)
            parts.append(f"{_digits(self.amount / units[unit])}{unit}")
        return " ".join(parts)


def _digits(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class LimitCheck:
    """A threshold, and the figures that it was checked on: bytes, counts or seconds.

    ``str()`` is one line.
    """

    threshold: Threshold
    before: float
    after: float
    limit: float

    @property
    def over(self) -> bool:
        """Whether the threshold is exceeded."""
        return self.after > self.limit

    @property
    def allowed(self) -> str:
        """The limit as text, with all digits where fewer do not tell it from the figure."""
        metric = METRICS[self.threshold.metric]
        short = metric.write(self._round(self.limit))
        if self.over and short == metric.write(self._round(self.after)):
            return self._exact(self.limit)
        return short

    def __str__(self) -> str:
        write = METRICS[self.threshold.metric].write
        before, after = write(self._round(self.before)), write(self._round(self.after))
        if self.over and write(self._round(self.limit)) == after:
            before, after = self._exact(self.before), self._exact(self.after)
        return (
            f"{self.threshold.metric}: expected at most {self.allowed}, got {after} "
            f"(before: {before})."
        )

    def _round(self, value: float) -> float:
        return value if METRICS[self.threshold.metric].kind == "seconds" else round(value)

    def _exact(self, value: float) -> str:
        unit = {"bytes": " B", "count": "", "seconds": " s"}[METRICS[self.threshold.metric].kind]
        return f"{value:,.6f}".rstrip("0").rstrip(".") + unit


def judge(
    before: Measurement, after: Measurement, thresholds: Iterable[Threshold | str]
) -> list[LimitCheck]:
    """Check thresholds on two measurements, in their order; see ``Comparison.check``."""
    checks = []
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
        checks.append(LimitCheck(threshold, old, new, threshold.limit(old)))
    return checks
