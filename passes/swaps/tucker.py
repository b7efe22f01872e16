"""Tucker-2: a weight as a smaller one between two matrices, ``W ~= U_o G U_i^T``.

Source: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", ICLR 2016, eq. 4 to 6; De Lathauwer, De Moor, Vandewalle, "A Multilinear Singular
Value Decomposition" and "On the Best Rank-1 and Rank-(R1, ..., RN) Approximation", SIAM J. Matrix
Anal. Appl. 21, 2000.
"""

from __future__ import annotations

__all__ = ["Tucker", "tucker", "tucker_kept"]

from typing import NamedTuple

import torch
from torch import Tensor

from pocketize.passes.swaps.tensors import principal

_SWEEPS = 10
#: Of the energy; sweeps that gain less are not worth their time.
_GAIN = 1e-6


class Tucker(NamedTuple):
    """The factors.

    Attributes:
        outer: (o, r_o), orthonormal columns.
        core: (r_o, r_i, k).
        inner: (i, r_i), orthonormal columns.
    """

    outer: Tensor
    core: Tensor
    inner: Tensor

    def composed(self) -> Tensor:
        """Return the tensor (o, i, k) that the factors stand for."""
        wide = torch.einsum("abk,ib->aik", self.core, self.inner)
        return torch.einsum("oa,aik->oik", self.outer, wide)


def tucker(weight: Tensor, outer: int, inner: int) -> Tucker:
    """Return the truncated higher-order SVD, improved by a few sweeps of orthogonal iteration.

    Args:
        weight: (o, i, k) in float64.
        outer: r_o, at most o.
        inner: r_i, at most i.
    """
    left = principal(weight.flatten(1))[:, :outer]
    right = principal(weight.transpose(0, 1).flatten(1))[:, :inner]
    core, energy = _core(weight, left, right), 0.0
    full = outer == len(weight) and inner == weight.shape[1]
    for _ in range(0 if full else _SWEEPS):
        last, energy = energy, float(core.square().sum())
        if energy <= last * (1 + _GAIN):
            break
        left = principal(torch.einsum("oik,ib->obk", weight, right).flatten(1))[:, :outer]
        thin = torch.einsum("oik,oa->iak", weight, left)
        right = principal(thin.flatten(1))[:, :inner]
        core = torch.einsum("iak,ib->abk", thin, right)
    return Tucker(left, core, right)


def tucker_kept(weight: Tensor) -> Tensor:
    """Return the share of the energy that the truncated SVD of ranks (r_o, r_i) keeps.

    Args:
        weight: (o, i, k) in float64.

    Returns:
        (o, i): at index [r_o - 1, r_i - 1] the share for these ranks.
    """
    left = principal(weight.flatten(1))
    right = principal(weight.transpose(0, 1).flatten(1))
    energy = _core(weight, left, right).square().sum(dim=2)
    total = energy.sum()
    return energy.cumsum(0).cumsum(1) / total if total else torch.ones_like(energy)


def _core(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("aik,ib->abk", torch.einsum("oik,oa->aik", weight, left), right)
