"""A convolution's weight as a tensor of three axes, and how much of it a decomposition keeps."""

from __future__ import annotations

__all__ = ["cheapest", "folded", "principal", "relative_error", "rounding_of"]

import torch
from torch import Tensor

#: Energy below this share of the whole is rounding of the decomposition itself.
_ROUNDING = 1e-13


def folded(weight: Tensor) -> Tensor:
    """Return a weight (o, i, *kernel) as (o, i, k) in float64, k running over the kernel."""
    values = weight.detach()
    if values.device.type == "mps":  # which has no float64
        values = values.cpu()
    return values.to(torch.float64).flatten(2)


def rounding_of(dtype: torch.dtype) -> float:
    """Return the share of the energy that the rounding of a weight to its dtype can make."""
    return max(_ROUNDING, torch.finfo(dtype).eps ** 2)


def principal(matrix: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix by falling singular value.

    They are the eigenvectors of its Gram matrix, which is small: an unfolding is many times as wide
    as it is high.

    Args:
        matrix: (..., n, m).

    Returns:
        (..., n, n), orthonormal columns whose largest component is positive.
    """
    _, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    vectors = vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    signed: Tensor = vectors * torch.where(largest < 0, -1.0, 1.0)
    return signed


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """Return ``||W - W~|| / ||W||`` in the Frobenius norm; 0 for a weight of zeros."""
    size = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(weight - approximation)) / size if size else 0.0


def cheapest(kept: Tensor, cost: Tensor, share: float, rounding: float) -> tuple[int, ...]:
    """Return the ranks with the fewest parameters among those that keep enough.

    Args:
        kept: share of the energy that ranks keep: at index [a - 1, b - 1] those of ranks (a, b).
        cost: their parameters, of the same shape.
        share: how much is to be kept.
        rounding: how much less than that is still enough.
    """
    enough = (kept >= share - rounding).contiguous()
    enough.view(-1)[-1] = True  # all ranks keep everything, up to rounding
    priced = torch.where(enough, cost.to(torch.float64), torch.inf)
    place = torch.unravel_index(priced.argmin(), kept.shape)
    return tuple(int(index) + 1 for index in place)
