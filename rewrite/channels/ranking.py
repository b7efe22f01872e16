"""Which channels of a group matter most: by the norm of the weights that make them."""

from __future__ import annotations

__all__ = ["rank_units", "strongest"]

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def rank_units(
    weights: Sequence[tuple[Tensor, int, NDArray[np.integer]]],
) -> NDArray[np.float64]:
    """Score each unit of a channel group by the L2 norm of its weights.

    Li et al., "Pruning filters for efficient ConvNets" (2017), with the L2 instead of the L1 norm
    and over all the tensors that a group ties together. Linear in the number of weights.

    Args:
        weights: Tensors with an axis and positions ``[units, count]``: the indices on that axis
            that belong to each unit. A group's tensors agree in the number of units.

    Returns:
        ``[units]``: root of the sum of squares over all listed slices, summed in float64. NaN for
        units with a NaN among their weights.

    Raises:
        ValueError: If there are no weights, or they disagree in the number of units.
    """
    counts = {len(positions) for _, _, positions in weights}
    if len(counts) != 1:
        raise ValueError(
            f"cannot rank channels: expected weights with one number of units, got {sorted(counts)}"
        )
    total = np.zeros(counts.pop())
    for tensor, axis, positions in weights:
        total += _squares(tensor, axis)[positions].sum(axis=1)
    scores: NDArray[np.float64] = np.sqrt(total)
    return scores


def _squares(tensor: Tensor, axis: int) -> NDArray[np.float64]:
    """Sum of squares of every slice along an axis."""
    values = tensor.detach()
    if values.is_complex():
        # an axis counted from the end would meet the parts of the numbers
        axis, values = axis % values.dim(), torch.view_as_real(values)
    if not values.is_floating_point():
        values = values.double()
    rows = values.movedim(axis, 0).reshape(values.shape[axis], -1).cpu()
    # a dtype for the reduction spares a float64 copy of the whole weight
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    squares: NDArray[np.float64] = norms.square().numpy()
    return squares


def strongest(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Find the ``k`` largest scores.

    Args:
        scores: ``[units]``; NaN ranks last.
        k: How many, at most as many as there are scores.

    Returns:
        ``[k]``: their indices, ascending. Of equal scores those with lower indices are taken.

    Raises:
        ValueError: If ``k`` is negative or larger than the number of scores.
    """
    if not 0 <= k <= len(scores):
        raise ValueError(f"cannot choose {k} of {len(scores)} channels")
    # sorting puts NaN at the end, and a stable sort keeps the order of equal scores
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:k]).astype(np.int64)
