"""From the planner's solution to the plan that a reader gets."""

from __future__ import annotations

__all__ = ["Setting", "Solution", "describe"]

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pocketize.channels.groups import ChannelGroup
from pocketize.passes.planning.budgets import Budgets
from pocketize.passes.planning.equations import ROUNDING, Degradation, RoundingRule
from pocketize.passes.planning.network import Network, Sizes
from pocketize.passes.planning.plan import PlannedLevel, WidthPlan
from pocketize.units import bytes_text, count_text


@dataclass(frozen=True)
class Setting:
    """What a plan is made from, checked."""

    budgets: Budgets
    stored_as: str
    degradation: Degradation | None
    complexities: tuple[float, ...]
    layerwise: bool
    slopes: tuple[float, ...]
    method: str
    rule: RoundingRule


@dataclass(frozen=True)
class Solution:
    """Multipliers and the units that they round to."""

    decline: float
    multipliers: tuple[float, ...]
    wanted: Mapping[ChannelGroup, int]

    @property
    def changes(self) -> bool:
        """Whether any group becomes narrower."""
        return any(units < group.units for group, units in self.wanted.items())


def describe(network: Network, setting: Setting, solution: Solution) -> WidthPlan:
    """Return the plan of a solution."""
    after = network.count(solution.wanted)
    asked_peak = setting.budgets.max_peak is not None
    levels = tuple(_levels(network, setting, solution, after))
    drop = _drop(setting, levels, network.sizes, after)
    return WidthPlan(
        model=type(network.model).__name__,
        inputs=network.inputs.describe(),
        layerwise=setting.layerwise,
        asked=tuple(_asked(setting)),
        equation=_equation(setting),
        rounding=_rounding(setting.rule),
        levels=levels,
        before=network.sizes,
        after=after,
        bytes_per_weight=setting.budgets.bytes_per_weight,
        stored_as=setting.stored_as,
        degradation=setting.degradation if setting.complexities else None,
        drop=drop,
        peak_before=network.peak({}) if asked_peak else None,
        peak_after=network.peak(solution.wanted) if asked_peak else None,
        peak_of=network.step if asked_peak else None,
        options=network.width(solution.wanted).options() if solution.changes else {},
        notes=tuple(_notes(network, setting, solution, after, drop)),
    )


def _levels(
    network: Network, setting: Setting, solution: Solution, after: Sizes
) -> Iterator[PlannedLevel]:
    known = bool(setting.complexities)
    for number, level in enumerate(network.levels):
        free = network.free[number]
        complexity = None
        if known:
            complexity = setting.complexities[number if setting.layerwise else 0]
        yield PlannedLevel(
            size=str(level),
            before=tuple(group.channels for group in free),
            after=tuple(solution.wanted[group] * group.step for group in free),
            multiplier=solution.multipliers[number],
            complexity=complexity,
            slope=setting.slopes[number] if known else None,
            theta_before=network.sizes.levels[number],
            theta_after=after.levels[number],
        )


def _drop(
    setting: Setting, levels: Sequence[PlannedLevel], before: Sizes, after: Sizes
) -> float | None:
    """Return the predicted drop: by eq. 16 over all weights, or the worst level's by eq. 17."""
    if not setting.complexities or setting.degradation is None:
        return None
    if setting.layerwise:
        return max((drop for level in levels if (drop := level.drop) is not None), default=0.0)
    decades = math.log10(before.theta / after.theta) if after.theta else 0.0
    return setting.degradation.relative_drop(setting.complexities[0], decades)


def _asked(setting: Setting) -> Iterator[str]:
    budgets = setting.budgets
    of = {"conv": " of convolution weights", "stored": " with buffers"}.get(budgets.count, "")
    if budgets.max_bytes is not None:
        size = count_text(math.floor(budgets.max_bytes))
        yield f"at most {size} B{of} at {setting.stored_as}"
    if budgets.max_parameters is not None:
        what = {"conv": "convolution weights", "stored": "parameters and buffers"}
        number = count_text(math.floor(budgets.max_parameters))
        yield f"at most {number} {what.get(budgets.count, 'parameters')}"
    if budgets.max_peak is not None:
        yield f"a peak of at most {bytes_text(int(budgets.max_peak))}"
    if budgets.max_drop is not None:
        yield f"a predicted drop of at most {100 * budgets.max_drop:g} % of the accuracy"


def _equation(setting: Setting) -> str:
    budgets, layerwise = setting.budgets, setting.layerwise
    parts = []
    if layerwise:
        parts.append("k_i log alpha_i equal, k_i = lambda C_i + delta (eq. 11)")
    if budgets.weights is not None:
        parts.append(
            "sum alpha_i^2 theta_i = theta* (eq. 13)"
            if layerwise
            else "alpha = sqrt(theta* / theta) (eq. 6)"
        )
    if budgets.max_peak is not None:
        parts.append(
            "sum alpha_i theta_i = theta* (eq. 14)"
            if layerwise
            else "alpha = theta* / theta (eq. 7)"
        )
    if budgets.weights is None and budgets.max_peak is None:
        parts.append(
            "log10 theta_i - log10 theta_i* = drop / k_i (eq. 17)"
            if layerwise
            else "log10 theta - log10 theta* = drop / k (eq. 16)"
        )
        return "; ".join(parts)
    searched = "the weights are counted" if budgets.max_peak is None else "the peak is estimated"
    how = "as the equations say" if setting.method == "closed-form" else f"by search: {searched}"
    return f"{'; '.join(parts)}, {how}"


def _rounding(rule: RoundingRule) -> str:
    text = ROUNDING[rule.rounding]
    text += f", to multiples of {rule.round_to}" if rule.round_to > 1 else ""
    return text + (f", at least {rule.minimum}" if rule.minimum > 1 else "")


def _notes(
    network: Network,
    setting: Setting,
    solution: Solution,
    after: Sizes,
    drop: float | None,
) -> Iterator[str]:
    budgets = setting.budgets
    if not solution.changes:
        yield "the model meets this as it is: nothing changes"
    counted = budgets.counted(after)
    if budgets.weights is not None and counted > budgets.weights:
        over = counted - budgets.weights
        yield (
            f"the closed form misses the budget by {count_text(over)} weights: it assumes "
            "that they are proportional to the squared multiplier. method='search' counts them"
        )
    if budgets.max_peak is not None and network.peak(solution.wanted) > budgets.max_peak:
        yield (
            "the closed form misses the budget: the peak is not proportional to the multiplier. "
            "method='search' estimates it"
        )
    if budgets.max_bytes is not None and budgets.count == "conv":
        everything = math.ceil(after.stored * budgets.bytes_per_weight)
        if everything > budgets.max_bytes:
            yield (
                f"with biases, norms and buffers it is {count_text(everything)} B; count='stored' "
                "plans for all of it"
            )
    if drop is not None and budgets.max_drop is not None and drop > budgets.max_drop:
        yield (
            f"rounding takes the predicted drop to {100 * drop:.2f} %; "
            "rounding='up' keeps it within"
        )
    if network.stuck:
        yield f"the check found that these cannot change: {', '.join(network.stuck)}"
    frozen = [
        f"{level} ({', '.join(str(group.channels) for group in level.groups) or 'none'})"
        for level, free in zip(network.levels, network.free, strict=True)
        if not free
    ]
    if frozen:
        yield f"no width can change at {'; '.join(frozen)}"
    if any(traced.real for traced in network.channels.traces):
        yield "a branch of the forward depends on values; only the branch taken was seen"
