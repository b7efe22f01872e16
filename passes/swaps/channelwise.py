"""Every input channel's filters as a few products of a kernel and a column.

Source: Jaderberg, Vedaldi, Zisserman, "Speeding up Convolutional Neural Networks with Low Rank
Expansions", BMVC 2014; the best approximation of a matrix is its truncated SVD (Eckart, Young,
Psychometrika 1, 1936).
"""

from __future__ import annotations

__all__ = ["Channelwise", "balanced", "channelwise", "channelwise_kept"]

from typing import NamedTuple

import torch
from torch import Tensor

from pocketize.passes.swaps.tensors import principal


class Channelwise(NamedTuple):
    """The factors: ``W[o, i, k] ~= sum over l of columns[i, o, l] kernels[i, l, k]``.

    Attributes:
        kernels: (i, m, k).
        columns: (i, o, m).
    """

    kernels: Tensor
    columns: Tensor

    def composed(self) -> Tensor:
        """Return the tensor (o, i, k) that the factors stand for."""
        return torch.einsum("iom,imk->oik", self.columns, self.kernels)


def channelwise(weight: Tensor, multiplier: int) -> Channelwise:
    """Return the best approximation by m products for each input channel.

    Args:
        weight: (o, i, k) in float64.
        multiplier: m; at ``min(o, k)`` nothing is lost.
    """
    matrices = weight.transpose(0, 1)  # (i, o, k)
    kernels = principal(matrices.mT)[..., :multiplier]  # (i, k, m)
    columns = matrices @ kernels
    kernels, columns = balanced(kernels.mT, columns)
    return Channelwise(kernels, columns)


def balanced(kernels: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Share the size of each product between its unit kernel and its column.

    Columns of zeros keep the unit kernel: two zeros in a row would never learn.

    Args:
        kernels: (..., m, k), each of norm 1.
        columns: (..., o, m).
    """
    sizes = torch.linalg.vector_norm(columns, dim=-2).sqrt()
    usable = sizes > 1e-6 * sizes.amax()
    sizes = torch.where(usable, sizes, torch.ones_like(sizes))
    return kernels * sizes[..., None], columns / sizes[..., None, :]


def channelwise_kept(weight: Tensor) -> Tensor:
    """Return the share of the energy that each multiplier keeps.

    Args:
        weight: (o, i, k) in float64.

    Returns:
        (min(o, k)): at index m - 1 the share for m.
    """
    matrices = weight.transpose(0, 1)
    energies = (matrices @ principal(matrices.mT)).square().sum(dim=(0, 1))
    total = energies.sum()
    shares = energies.cumsum(0) / total if total else torch.ones_like(energies)
    return shares[: min(len(weight), weight.shape[2])]
