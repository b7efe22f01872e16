"""The paper's equations for multipliers, which take a layer's weights to go with the width squared.

They do not count: input and output layers keep one side, and widths are whole numbers. The planner
searches on the real count by default; the equations give the start, the comparison, and the plan
where ``method="closed-form"`` asks for them.

Source: Mishra, Chen, Hu, ACM JETC 2021, equations 6, 7, 11, 13, 14, 16 and 17.
"""

from __future__ import annotations

__all__ = ["at_decline", "decline_for", "floor_decline", "uniform_multiplier"]

import math
from collections.abc import Sequence

from pocketize.errors import PlanningError


def uniform_multiplier(share: float, *, power: int) -> float:
    """Return the one multiplier that leaves a share of the weights, or of the memory.

    ``alpha = sqrt(theta* / theta)`` under a storage budget (eq. 6, ``power=2``);
    ``alpha = theta* / theta`` under a memory budget, where feature maps dominate, of which a layer
    has as many as it is wide (eq. 7, ``power=1``).

    Args:
        share: what is allowed over what there is; more than 1 is 1.
        power: 2 for storage, 1 for memory.
    """
    return float(min(1.0, share) ** (1 / power))


def at_decline(decline: float, slopes: Sequence[float]) -> tuple[float, ...]:
    """Return the multipliers of the levels that lose equally: ``k_i log10 alpha_i = -decline``.

    Eq. 11: the levels degrade alike when every multiplier, weighted by its level's degree of
    degradation, declines alike. With equal slopes all multipliers are equal: the uniform plan.

    Args:
        decline: at least 0; 0 leaves all widths.
        slopes: ``k_i = lambda C_i + delta``, positive.
    """
    return tuple(float(10.0 ** (-decline / slope)) for slope in slopes)


def decline_for(share: float, slopes: Sequence[float], thetas: Sequence[int], power: int) -> float:
    """Return the decline at which the closed form leaves a share of the weights.

    Solves ``sum alpha_i^power theta_i = share sum theta_i`` with :func:`at_decline`: eq. 13 for
    storage (``power=2``), eq. 14 for memory (``power=1``).

    Args:
        share: between 0 and 1.
        slopes: those of the levels, positive.
        thetas: convolution weights of the levels, as they are.
        power: 2 for storage, 1 for memory.

    Raises:
        PlanningError: the share is not between 0 and 1, or there are no weights.
    """
    whole = sum(thetas)
    if not 0 < share <= 1 or whole <= 0:
        raise PlanningError(f"expected a share between 0 and 1 of some weights, got {share!r}")

    def left(decline: float) -> float:
        multipliers = at_decline(decline, slopes)
        return sum(a**power * theta for a, theta in zip(multipliers, thetas, strict=True)) / whole

    # every level is at 10^(-decline / k): at the steepest slope times the digits, all are below
    low, high = 0.0, -math.log10(share) * max(slopes) / power
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if left(middle) > share else (low, middle)
    return high


def floor_decline(drop: float) -> float:
    """Return the decline that costs a relative drop in accuracy.

    ``log10 theta_i - log10 theta_i* = drop / k_i`` (eq. 16, 17) and
    ``alpha_i = sqrt(theta_i* / theta_i)``, hence ``k_i log10 alpha_i = -drop / 2``.

    Args:
        drop: the share of the accuracy that may be lost.
    """
    return drop / 2
