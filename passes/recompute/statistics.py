"""Normalising again with the statistics of the first time.

Mean and deviation are small and kept, so that a norm is built again in one pass over its input
instead of three, and its running statistics are left alone.
"""

from __future__ import annotations

__all__ = ["Statistics", "normalise", "statistics_of"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a norm found in its input.

    Attributes:
        mean: one number for each row that is normalised on its own: ``(C,)`` of a batch norm, which
            is ``(N * C,)`` of an instance norm, ``(N, G)`` of a group norm.
        rstd: one over the standard deviation, likewise.
        eps: was added to the variance.
        groups: of a group norm, otherwise ``None``.
    """

    mean: Tensor
    rstd: Tensor
    eps: float
    groups: int | None = None


#: Operators that normalise with the statistics of the batch if told to, with the position of that.
_BATCH_NORMS = {
    aten.native_batch_norm.default: 5,
    aten.cudnn_batch_norm.default: 5,
    aten.miopen_batch_norm.default: 5,
    aten._native_batch_norm_legit.default: 5,
    aten._native_batch_norm_legit.no_stats: 3,
}


def statistics_of(func: Any, args: tuple[Any, ...], made: Any) -> Statistics | None:
    """Read the statistics that an operator returns beside its result.

    ``None`` if it has none, or has them in 16 bits, which is less than it worked with.
    """
    groups = None
    if func is aten.native_group_norm.default:
        groups = args[6]
    elif func not in _BATCH_NORMS or args[_BATCH_NORMS[func]] is not True:
        return None
    if made[1].dtype not in (torch.float32, torch.float64):
        return None
    return Statistics(made[1], made[2], args[-1], groups)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    groups: int | None,
) -> Tensor:
    """Normalise with given statistics.

    Args:
        x: shape ``(N, C, ...)``.
        weight: shape ``(C,)``.
        bias: shape ``(C,)``.
        mean: see :class:`Statistics`.
        rstd: likewise.
        eps: likewise.
        groups: likewise.
    """
    if not x.numel():
        return torch.empty_like(x)  # the kernels divide by numbers of elements
    if groups is None:
        var = rstd.pow(-2).sub_(eps)
        made: Tensor = aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return made
    count, channels = x.shape[:2]
    rows = x.reshape(1, count * channels, -1)
    wide = [t.repeat_interleave(channels // groups, 1).flatten() for t in (mean, rstd)]
    scale, shift = (None if t is None else t.repeat(count) for t in (weight, bias))
    return normalise(rows, scale, shift, wide[0], wide[1], eps, None).view(x.shape)
