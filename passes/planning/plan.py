"""A plan of widths: what it changes, what it predicts, and the pass that carries it out."""

from __future__ import annotations

__all__ = ["PlannedLevel", "WidthPlan"]

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from pocketize.passes.planning.equations import Degradation
from pocketize.passes.planning.network import Sizes
from pocketize.passes.widths.width import Width
from pocketize.plugin.recipe import dump_recipe
from pocketize.units import bytes_text, count_text, percent_text


@dataclass(frozen=True)
class PlannedLevel:
    """One resolution level of a plan.

    Attributes:
        size: spatial size, as ``"32x32"``, at the inputs that were planned with.
        before: channels of each group that can be resized; empty where none can.
        after: channels of the same groups in the plan.
        multiplier: what the equations gave, before rounding.
        complexity: that of the images at this scale, if it was given.
        slope: ``k = lambda C + delta``, if there is a complexity.
        theta_before: convolution weights of the level.
        theta_after: the same in the plan.
    """

    size: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    multiplier: float
    complexity: float | None
    slope: float | None
    theta_before: int
    theta_after: int

    @property
    def drop(self) -> float | None:
        """The relative drop in accuracy that the level's rounded widths cost (eq. 16)."""
        if self.slope is None or not self.before:
            return None
        return 2 * self.slope * math.log10(sum(self.before) / sum(self.after))

    def widths(self) -> str:
        """``"64 -> 20"``; several groups with different widths have them all."""
        pairs = dict.fromkeys(zip(self.before, self.after, strict=True))
        return ", ".join(f"{a} -> {b}" if a != b else f"{a}" for a, b in pairs) or "-"


@dataclass(frozen=True)
class WidthPlan:
    """Widths that meet what was asked for.

    Attributes:
        model: name of the model's class.
        inputs: the inputs that sizes of levels and peaks are for.
        layerwise: each level has its own multiplier.
        asked: what was asked for, in words.
        equation: what the multipliers come from.
        rounding: the rule that made whole numbers of them, in words.
        levels: the resolution levels, finest first.
        before: sizes of the model.
        after: sizes of the plan.
        bytes_per_weight: bytes that one weight takes.
        stored_as: what these are, ``"float32"``.
        degradation: what drops are predicted with, if given.
        drop: predicted relative drop in accuracy, of the rounded widths; of a layer-wise plan that
            of the level which loses most; ``None`` without complexity or degradation.
        peak_before: estimated peak of the model in bytes, where a peak was asked for.
        peak_after: estimated peak of the plan.
        peak_of: what the peak is of, ``"training step, adam"``.
        options: options of the pass :class:`~pocketize.passes.Width`; empty if nothing changes.
        notes: what else is to be known.
    """

    model: str
    inputs: str
    layerwise: bool
    asked: tuple[str, ...]
    equation: str
    rounding: str
    levels: tuple[PlannedLevel, ...]
    before: Sizes
    after: Sizes
    bytes_per_weight: float
    stored_as: str
    degradation: Degradation | None
    drop: float | None
    peak_before: int | None
    peak_after: int | None
    peak_of: str | None
    options: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def widths(self) -> tuple[int | tuple[int, ...], ...]:
        """The width of each level; a tuple of them where its layers differ."""
        distinct = [tuple(dict.fromkeys(level.after)) for level in self.levels]
        return tuple(found[0] if len(found) == 1 else found for found in distinct)

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The multiplier of each level, before rounding."""
        return tuple(level.multiplier for level in self.levels)

    @property
    def theta(self) -> int:
        """Convolution weights of the plan."""
        return self.after.theta

    @property
    def bytes(self) -> int:
        """Bytes of the plan's parameters."""
        return math.ceil(self.after.parameters * self.bytes_per_weight)

    def width_options(self) -> dict[str, Any]:
        """Return the options of :class:`~pocketize.passes.Width`; see its ``from_plan``.

        Where nothing changes, they are ``scale=1``.
        """
        return dict(self.options) or {"scale": 1.0}

    def recipe(self, **options: Any) -> str:
        """Return the plan as TOML that ``pocketize apply --recipe`` takes.

        Args:
            options: further options of the pass, such as ``weights="reset"``.
        """
        return dump_recipe([Width.from_plan(self, **options)])

    def to_json(self) -> dict[str, Any]:
        """Return the plan as what ``json.dumps`` takes."""
        data = dataclasses.asdict(self)
        data["degradation"] = None if self.degradation is None else self.degradation.to_json()
        for row, level in zip(data["levels"], self.levels, strict=True):
            row["drop"] = level.drop
        return {**data, "bytes": self.bytes}

    def __str__(self) -> str:
        """Return the plan as text."""
        return self._render("simple")

    def to_markdown(self) -> str:
        """Return the plan as Markdown."""
        return self._render("github")

    def _render(self, style: str) -> str:
        kind = "layer-wise" if self.layerwise else "uniform"
        heading = f"{kind} widths of {self.model} for {', '.join(self.asked)}"
        parts = [f"### {heading}" if style == "github" else heading]
        parts.append(f"{self.equation}\nrounding: {self.rounding}")
        if self.degradation is not None:
            parts[-1] += f"\ndegradation: {self.degradation}"
        parts += [self._levels(style), self._sizes(style)]
        parts += [f"note: {text}" for text in self.notes]
        return "\n\n".join(parts)

    def _levels(self, style: str) -> str:
        rows = []
        for level in self.levels:
            row = [level.size, level.widths(), f"{level.multiplier:.4f}"]
            if self.degradation is not None:
                row += [_number(level.complexity), _number(level.slope)]
            row += [count_text(level.theta_before), count_text(level.theta_after)]
            rows.append(row)
        known = ["complexity", "k"] if self.degradation is not None else []
        headers = ["level", "channels", "multiplier", *known, "conv weights", "after"]
        aligned = ("left", "left", *["right"] * (len(headers) - 2))
        return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=aligned)

    def _sizes(self, style: str) -> str:
        old, new = self.before, self.after
        each = self.bytes_per_weight
        held = math.ceil(old.parameters * each), self.bytes
        rows = [
            ("convolution weights", *map(count_text, (old.theta, new.theta))),
            ("parameters", *map(count_text, (old.parameters, new.parameters))),
            (f"their size ({self.stored_as})", *map(bytes_text, held)),
        ]
        changes = [(old.theta, new.theta), (old.parameters, new.parameters), held]
        if old.stored != old.parameters:
            rows.append(("parameters and buffers", *map(count_text, (old.stored, new.stored))))
            changes.append((old.stored, new.stored))
        if self.peak_before is not None and self.peak_after is not None:
            peaks = self.peak_before, self.peak_after
            rows.append((f"peak, estimated ({self.peak_of})", *map(bytes_text, peaks)))
            changes.append(peaks)
        told = [(*row, percent_text(*pair)) for row, pair in zip(rows, changes, strict=True)]
        if self.drop is not None:
            told.append(("accuracy, predicted", "", "", f"{-100 * self.drop + 0.0:+.1f} %"))
        headers = ["", "before", "after", "change"]
        aligned = ("left", "right", "right", "right")
        return tabulate(told, headers, tablefmt=style, disable_numparse=True, colalign=aligned)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
