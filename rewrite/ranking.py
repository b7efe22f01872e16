"""Which channels of a group matter most."""

from __future__ import annotations

__all__ = ["rank_units", "strongest"]

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def rank_units(
    weights: Sequence[tuple[Tensor, int, NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return the L2 norm of each unit over slices of weights."""
    total = 0.0
    for tensor, axis, positions in weights:
        others = [a for a in range(tensor.ndim) if a != axis]
        squares = tensor.detach().double().square()
        along = (squares.sum(others) if others else squares).cpu().numpy()
        total = total + along[positions].sum(axis=1)
    return np.sqrt(total)


def strongest(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Return the indices of the k largest scores, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])
