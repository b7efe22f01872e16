"""A weight as mixed input channels, each with a few kernels, each of those with a column.

``W[o, i, k] ~= sum over j, l of P[o, j, l] U[i, j] V[j, l, k]``: the canonical polyadic (CP)
decomposition where every mixed channel j has one kernel, and one in block terms where it has more.
It starts from the higher-order SVD along the input channels and the SVD of every mixed channel, and
is improved by alternating least squares.

Source: Lebedev et al., "Speeding-up Convolutional Neural Networks Using Fine-tuned
CP-Decomposition", ICLR 2015, eq. 5; De Lathauwer, Nion, "Decompositions of a Higher-Order Tensor in
Block Terms, Part III", SIAM J. Matrix Anal. Appl. 30, 2008.
"""

from __future__ import annotations

__all__ = ["BlockTerms", "block_terms", "block_terms_kept"]

from typing import NamedTuple

import torch
from torch import Tensor

from pocketize.passes.swaps.channelwise import balanced
from pocketize.passes.swaps.tensors import principal

_SWEEPS = 40
#: Terms (r m) up to which there are so many; a sweep solves equations in all terms, which takes the
#: cube of their number, and the more there are the less is left to improve.
_TERMS = 512
#: A sweep that lowers the residual's energy by less than this share of it is the last.
_GAIN = 1e-3
#: How much a step is held back, as a share of the mean of the normal equations' diagonal: without
#: it, terms that nearly cancel would grow apart, and be lost to rounding in the weight's own dtype.
_DAMPING = 1e-6
#: Shares of the energy below this are as good as nothing.
_NOTHING = 1e-14


class BlockTerms(NamedTuple):
    """The factors.

    Attributes:
        mix: U, (i, r).
        kernels: V, (r, m, k).
        columns: P, (o, r, m).
    """

    mix: Tensor
    kernels: Tensor
    columns: Tensor

    def composed(self) -> Tensor:
        """Return the tensor (o, i, k) that the factors stand for."""
        return torch.einsum("ojk,ij->oik", self._mixed(), self.mix)

    def _mixed(self) -> Tensor:
        return torch.einsum("ojl,jlk->ojk", self.columns, self.kernels)


def block_terms(
    weight: Tensor, channels: int, multiplier: int, sweeps: int = _SWEEPS
) -> BlockTerms:
    """Return the decomposition.

    Args:
        weight: (o, i, k) in float64.
        channels: r, at most i.
        multiplier: m, at most ``min(o, k)``; with r = i as well, nothing is lost.
        sweeps: of alternating least squares, at most.
    """
    mix = principal(weight.transpose(0, 1).flatten(1))[:, :channels]
    mixed = torch.einsum("oik,ij->jok", weight, mix)
    kernels = principal(mixed.mT)[..., :multiplier].mT
    columns = (mixed @ kernels.mT).permute(1, 0, 2)
    found = BlockTerms(mix, kernels, columns)
    total = float(weight.square().sum())
    residual = float((weight - found.composed()).square().sum())
    most = int(_SWEEPS * min(1.0, _TERMS / (channels * multiplier)) ** 3)
    for _ in range(min(sweeps, max(1, most))):
        if residual <= _NOTHING * total:
            break
        better, now = _sweep(weight, found, total)
        if not now < residual:
            break
        found, last, residual = better, residual, now
        if residual > (1 - _GAIN) * last:
            break
    return _scaled(found)


def _sweep(weight: Tensor, found: BlockTerms, total: float) -> tuple[BlockTerms, float]:
    """Solve for columns, kernels and mix in turn, each the best for the other two.

    Returns:
        The factors, and the energy of the residual, which the last step's equations tell.
    """
    mix, kernels, columns = found
    o, r, m = columns.shape
    thin = torch.einsum("oik,ij->ojk", weight, mix)
    alike = (mix.T @ mix).repeat_interleave(m, 0).repeat_interleave(m, 1)

    flat = kernels.reshape(r * m, -1)
    right = torch.einsum("ojk,jlk->ojl", thin, kernels).reshape(o, r * m)
    old = columns.reshape(o, r * m)
    columns = _solved(alike * (flat @ flat.T), right.T, old.T).T.reshape(o, r, m)

    flat = columns.reshape(o, r * m)
    right = torch.einsum("ojk,ojl->jlk", thin, columns).reshape(r * m, -1)
    old = kernels.reshape(r * m, -1)
    kernels = _solved(alike * (flat.T @ flat), right, old).reshape(kernels.shape)

    mixed = torch.einsum("ojl,jlk->ojk", columns, kernels)
    gram = torch.einsum("ojk,ohk->jh", mixed, mixed)
    right = torch.einsum("oik,ojk->ji", weight, mixed)
    mix = _solved(gram, right, mix.T).T
    residual = total - 2 * float((mix * right.T).sum()) + float((mix.T @ mix * gram).sum())
    return BlockTerms(mix, kernels, columns), residual


def _solved(gram: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """Solve ``gram x = right``, held back towards the old solution."""
    size = gram.diagonal().mean()
    damping = torch.where(size > 0, _DAMPING * size, 1.0)
    step = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(step, right + damping * old)
    return solution


def _scaled(found: BlockTerms) -> BlockTerms:
    """Share the size of each term among its three factors."""
    lengths = torch.linalg.vector_norm(found.mix, dim=0)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    heights = torch.linalg.vector_norm(found.kernels, dim=2)
    heights = torch.where(heights > 0, heights, torch.ones_like(heights))
    kernels = found.kernels / heights[..., None]
    columns = found.columns * heights * lengths[:, None]
    sizes = torch.linalg.vector_norm(columns, dim=0).mean(dim=1)  # of each mixed channel
    usable = sizes > 1e-6 * sizes.amax()
    third = torch.where(usable, sizes, torch.ones_like(sizes)) ** (1 / 3)
    kernels, columns = balanced(kernels, columns.permute(1, 0, 2) / third[:, None, None])
    return BlockTerms(found.mix / lengths * third, kernels, columns.permute(1, 0, 2))


def block_terms_kept(weight: Tensor) -> Tensor:
    """Return the share of the energy that is kept before any improvement.

    Args:
        weight: (o, i, k) in float64.

    Returns:
        (i, min(o, k)): at index [r - 1, m - 1] the share for r mixed channels with m kernels each.
    """
    mix = principal(weight.transpose(0, 1).flatten(1))
    mixed = torch.einsum("oik,ij->jok", weight, mix)
    energies = (mixed @ principal(mixed.mT)).square().sum(dim=1)  # (i, k)
    total = energies.sum()
    shares = energies.cumsum(0).cumsum(1) / total if total else torch.ones_like(energies)
    return shares[:, : min(len(weight), weight.shape[2])]
