"""Plan widths from a budget: how many channels each resolution level can keep.

Source: Mishra, Chen, Hu, "Image Complexity Guided Network Compression for Biomedical Image
Segmentation", ACM JETC 2021; the docstrings say which equation. Sizes are counted on the network as
it would be, through its channel groups; the equations assume that weights are proportional to the
square of the multiplier, which is wrong for input and output layers.
"""

from __future__ import annotations

__all__ = ["plan_widths"]

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from pocketize.channels.groups import ChannelGroup
from pocketize.errors import BudgetError, OptionError, PlanningError
from pocketize.passes.planning.budgets import (
    Budgets,
    Count,
    read_bytes_per_weight,
    read_drop,
    read_quantity,
)
from pocketize.passes.planning.equations import (
    Degradation,
    Rounding,
    RoundingRule,
    at_decline,
    decline_for,
    degradation_of,
    smallest_decline,
)
from pocketize.passes.planning.fitting import DegradationFit
from pocketize.passes.planning.network import Network
from pocketize.passes.planning.outcome import Setting, Solution, describe
from pocketize.passes.planning.plan import WidthPlan
from pocketize.units import bytes_text, count_text

Method: TypeAlias = Literal["search", "closed-form"]

_DRY_RUNS = 20


def plan_widths(
    model: nn.Module,
    *,
    inputs: Any = None,
    complexity: float | Sequence[float] | None = None,
    degradation: Degradation | DegradationFit | str | None = None,
    layerwise: bool | None = None,
    max_bytes: float | str | None = None,
    dtype: torch.dtype | str | None = None,
    bytes_per_weight: float | None = None,
    max_parameters: float | str | None = None,
    max_peak: float | str | None = None,
    mode: Literal["train", "infer"] = "train",
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    accuracy: float = 1.0,
    count: Count = "parameters",
    method: Method = "search",
    rounding: Rounding | None = None,
    round_to: int = 1,
    minimum: int = 1,
    keep: str | Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> WidthPlan:
    """Find the widest network that meets a budget, or the narrowest that keeps an accuracy.

    *Uniform*: one multiplier for all levels; ``sqrt(theta* / theta)`` for storage (eq. 6),
    ``theta* / theta`` for memory (eq. 7). *Layer-wise*: ``k_i log alpha_i`` equal over the levels
    with ``k_i = lambda C_i + delta`` (eq. 11), so that levels whose images are simpler give more;
    ``sum alpha_i^2 theta_i = theta*`` for storage (eq. 13), ``sum alpha_i theta_i = theta*`` for
    memory (eq. 14). *Accuracy floor*: ``log10 theta - log10 theta* = drop / k`` (eq. 16), per level
    with ``k_i`` (eq. 17). Several budgets hold together.

    Args:
        model: any module; unchanged.
        inputs: example inputs; ``None`` guesses. Peaks are for these: give them with ``max_peak``.
        complexity: of the images at the scale of each level, finest first; or one number, for a
            uniform plan. Needed for layer-wise plans, accuracy floors and predicted drops.
        degradation: lambda and delta: of :func:`degradation_of`, of :func:`fit_degradation`, or an
            architecture of the paper's table (its F1 row). Needed with ``complexity``.
        layerwise: a multiplier per level instead of one; by default where a complexity per level
            is given.
        max_bytes: budget for storage: bytes, or a text such as ``"1MB"`` (10^6) or ``"1MiB"``.
        dtype: what weights are stored as; by default what they are.
        bytes_per_weight: the same as a number: 8 in the paper.
        max_parameters: budget for the number of weights: a number, or ``"500k"``.
        max_peak: budget for the peak memory of a step; met by the peak that :func:`measure` with
            ``estimate=True`` counts on the rewritten model.
        mode: the step: ``"train"`` or ``"infer"``.
        optimizer: the optimizer of a training step.
        max_drop: accuracy floor: the share of the accuracy that may be lost, 0.05 for a twentieth.
        min_accuracy: the same as an accuracy.
        accuracy: the accuracy of the model as it is, which ``min_accuracy`` is compared with.
        count: what ``max_bytes`` and ``max_parameters`` count: ``"parameters"``, ``"conv"``
            (convolution weights only: the paper's theta) or ``"stored"`` (buffers too).
        method: ``"search"`` counts each candidate; ``"closed-form"`` solves the paper's equations,
            which may miss the budget (the plan says by how much), and which for ``max_peak`` is the
            paper's assumption that memory is proportional to the multiplier.
        rounding: a rule of :data:`~pocketize.passes.planning.equations.ROUNDING`; by default
            ``"nearest"`` for uniform budgets and ``"up"`` otherwise. The paper's plans for an
            accuracy floor are ``"doubling"`` (uniform) and ``"shared"`` (layer-wise).
        round_to: widths become multiples of this.
        minimum: no width is made narrower than this.
        keep: patterns of module paths (fnmatch) whose channels stay, or one.
        progress: called with a line of text for each candidate; for plans that take long.

    Returns:
        The plan; ``print()`` it, or hand it to ``Width.from_plan``.

    Raises:
        BudgetError: no widths meet the budget; the message names the smallest that can be met.
        OptionError: an option is out of range, or two exclude each other.
        PlanningError: there are not as many complexities as levels, a slope is not positive, or no
            width can change.
        PatternError: a pattern in ``keep`` matches nothing.
        CaptureError, InputError: the model does not run on the inputs, or none could be guessed.
    """
    each, stored_as = read_bytes_per_weight(model, dtype, bytes_per_weight)
    budgets = Budgets(
        max_bytes=read_quantity(max_bytes, "max_bytes", "bytes"),
        bytes_per_weight=each,
        max_parameters=read_quantity(max_parameters, "max_parameters", "count"),
        max_peak=read_quantity(max_peak, "max_peak", "bytes"),
        max_drop=read_drop(max_drop, min_accuracy, accuracy),
        count=count,
    )
    if method not in ("search", "closed-form"):
        raise OptionError(f"method must be 'search' or 'closed-form', not {method!r}")
    given = _as_degradation(degradation)
    complexities = _as_complexities(complexity)
    if layerwise is None:
        layerwise = len(complexities) > 1
    _check_knowledge(budgets, given, complexities, layerwise)
    if rounding is None:
        rounding = "nearest" if not layerwise and budgets.max_drop is None else "up"
    if rounding == "doubling" and layerwise:
        raise OptionError("rounding='doubling' is for uniform plans: layer-wise widths do not")
    rule = RoundingRule(rounding, round_to, minimum)

    network = Network(model, inputs, keep, mode, optimizer, progress)
    slopes = _slopes(network, given, complexities, layerwise)
    setting = Setting(budgets, stored_as, given, complexities, layerwise, slopes, method, rule)
    for _ in range(_DRY_RUNS):
        solution = _solve(network, setting)
        if not solution.changes:
            break
        stuck = network.immovable(solution.wanted)
        if not stuck:
            break
        network.freeze(stuck)
    return describe(network, setting, solution)


def _solve(network: Network, setting: Setting) -> Solution:
    """Return the multipliers and units that meet the budgets; a BudgetError if there are none."""
    budgets = setting.budgets
    made: dict[float, Solution] = {}

    def at(decline: float) -> Solution:
        if decline not in made:
            multipliers = at_decline(decline, setting.slopes)
            wanted = setting.rule.units(network.free, multipliers)
            made[decline] = Solution(decline, multipliers, wanted)
        return made[decline]

    def fits(decline: float) -> bool:
        wanted = at(decline).wanted
        if _too_large(network, budgets, wanted):
            return False
        return budgets.max_peak is None or network.peak(wanted) <= budgets.max_peak

    # log10 theta_i - log10 theta_i* = drop / k_i (eq. 16, 17) and alpha_i = sqrt(theta_i* /
    # theta_i), hence k_i log10 alpha_i = -drop / 2
    floor = None if budgets.max_drop is None else budgets.max_drop / 2
    if budgets.weights is None and budgets.max_peak is None:
        return at(floor or 0.0)
    if setting.method == "closed-form":
        decline: float | None = _closed_form(network, setting)
    else:
        decline = smallest_decline(fits, max(setting.slopes))
    if decline is None:
        raise BudgetError(_infeasible(network, setting))
    if floor is not None and decline > floor:
        raise BudgetError(
            f"the budget costs a predicted {200 * decline:.2f} % of the accuracy, and "
            f"{200 * floor:.2f} % may be lost. Allow max_drop={2 * decline:.4f}, or a larger budget"
        )
    return at(decline)


def _too_large(network: Network, budgets: Budgets, wanted: Mapping[ChannelGroup, int]) -> bool:
    return budgets.weights is not None and budgets.counted(network.count(wanted)) > budgets.weights


def _closed_form(network: Network, setting: Setting) -> float:
    """Return the decline by the equations: 6 or 13 for storage, 7 or 14 for memory."""
    budgets, declines = setting.budgets, [0.0]
    if budgets.weights is not None:
        share = budgets.weights / budgets.counted(network.sizes)
        declines.append(_decline(share, network, setting, power=2))
    if budgets.max_peak is not None:
        declines.append(_decline(budgets.max_peak / network.peak({}), network, setting, power=1))
    return max(declines)


def _decline(share: float, network: Network, setting: Setting, *, power: int) -> float:
    if share >= 1:
        return 0.0
    if share <= 0:
        raise BudgetError(_smallest_storage(network, setting))
    return decline_for(share, setting.slopes, network.sizes.levels, power)


def _narrowest(network: Network, setting: Setting) -> dict[ChannelGroup, int]:
    return setting.rule.units(network.free, [0.0] * len(network.free))


def _infeasible(network: Network, setting: Setting) -> str:
    """Tell which budget fails at the narrowest widths, and what the smallest feasible one is."""
    budgets = setting.budgets
    wanted = _narrowest(network, setting)
    if _too_large(network, budgets, wanted):
        return _smallest_storage(network, setting)
    smallest = network.peak(wanted)
    return (
        f"max_peak: no widths bring the peak to {bytes_text(int(budgets.max_peak or 0))}: with all "
        f"widths at their minimum ({setting.rule.minimum}) it is {bytes_text(smallest)} "
        f"(max_peak={smallest}), {network.step}, estimated. Plan for a smaller input or batch, or "
        "combine Width with a pass that saves activations, such as recompute or checkpoint"
    )


def _smallest_storage(network: Network, setting: Setting) -> str:
    budgets = setting.budgets
    smallest = budgets.counted(network.count(_narrowest(network, setting)))
    counted = {"conv": "convolution weights", "parameters": "parameters"}.get(
        budgets.count, "parameters and buffers"
    )
    size = smallest * budgets.bytes_per_weight
    stuck = f" ({', '.join(network.stuck[:5])} cannot change)" if network.stuck else ""
    return (
        f"no widths bring {type(network.model).__name__} to {count_text(budgets.weights or 0)} "
        f"{counted}: with all widths at their minimum ({setting.rule.minimum}){stuck} "
        f"it has {count_text(smallest)}, {bytes_text(int(size))} at {setting.stored_as} "
        f"(max_parameters={smallest}, max_bytes={size:g}). Allow that much, lower minimum= or "
        "round_to=, or leave less out with keep="
    )


def _as_degradation(given: Degradation | DegradationFit | str | None) -> Degradation | None:
    if isinstance(given, str):
        return degradation_of(given)
    if isinstance(given, DegradationFit):
        return given.degradation
    if given is None or isinstance(given, Degradation):
        return given
    raise OptionError(
        "degradation: expected a Degradation, a fit, or an architecture of the paper, "
        f"got {given!r}"
    )


def _as_complexities(given: float | Sequence[float] | None) -> tuple[float, ...]:
    values = () if given is None else (given,) if isinstance(given, int | float) else tuple(given)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):  # Real: also those of numpy
            raise OptionError(f"complexity: expected numbers, got {value!r}")
    return tuple(float(value) for value in values)


def _check_knowledge(
    budgets: Budgets, given: Degradation | None, complexities: Sequence[float], layerwise: bool
) -> None:
    """Check that what the plan needs to know was said."""
    if complexities and given is None:
        raise OptionError(
            "a complexity needs a degradation: add degradation='unet' for the "
            "paper's, or fit one (fit_degradation)"
        )
    needs = "a layer-wise plan" if layerwise else "an accuracy floor"
    if (layerwise or budgets.max_drop is not None) and not complexities:
        raise OptionError(
            f"{needs} needs the complexity of the images"
            f"{' at the scale of each level' if layerwise else ''}: complexity=..., which "
            "`pocketize complexity DIR` measures"
        )


def _slopes(
    network: Network, given: Degradation | None, complexities: Sequence[float], layerwise: bool
) -> tuple[float, ...]:
    """Return ``k_i = lambda C_i + delta`` for each level; all the same for a uniform plan."""
    number = len(network.levels)
    if len(complexities) != number and (layerwise or len(complexities) > 1):
        found = ", ".join(map(str, network.levels))
        raise PlanningError(
            f"{len(complexities)} complexities are given, and {type(network.model).__name__} has "
            f"{number} resolution levels: {found} (finest first, at {network.inputs.describe()}). "
            "Give one for each, measured at its scale"
        )
    if given is None or not complexities:
        return (1.0,) * number  # any slope gives the same uniform plan
    used = tuple(complexities) if layerwise else (complexities[0],) * number
    slopes = tuple(given.slope(value) for value in used)
    for value, slope in zip(used, slopes, strict=True):
        if slope <= 0:
            raise PlanningError(
                f"at complexity {value:g} the slope lambda C + delta is {slope:.4g}: {given} says "
                "that a smaller network is not worse there, so nothing limits the plan. Take "
                "another degradation, or plan without one"
            )
    return slopes
