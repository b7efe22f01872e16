"""Decompositions of a convolution's weight, as a tensor (o, i, k), and how much of it they keep.

* :func:`tucker`: a smaller weight between two matrices, ``W ~= U_o G U_i^T``, Tucker-2. Kim et al.,
  "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
  ICLR 2016, eq. 4 to 6; De Lathauwer, De Moor, Vandewalle, "A Multilinear Singular Value
  Decomposition" and "On the Best Rank-1 and Rank-(R1, ..., RN) Approximation", SIAM J. Matrix Anal.
  Appl. 21, 2000.
* :func:`channelwise`: every input channel's filters as a few products of a kernel and a column.
  Jaderberg, Vedaldi, Zisserman, "Speeding up Convolutional Neural Networks with Low Rank
  Expansions", BMVC 2014; the best approximation of a matrix is its truncated SVD (Eckart, Young,
  Psychometrika 1, 1936).
* :func:`block_terms`: mixed input channels, each with a few kernels, each of those with a column:
  ``W[o, i, k] ~= sum over j, l of P[o, j, l] U[i, j] V[j, l, k]``, the canonical polyadic (CP)
  decomposition where every mixed channel j has one kernel, and one in block terms where it has
  more. It starts from the higher-order SVD along the input channels and the SVD of every mixed
  channel; alternating least squares improve it. Lebedev et al., "Speeding-up Convolutional Neural
  Networks Using Fine-tuned CP-Decomposition", ICLR 2015, eq. 5; De Lathauwer, Nion, "Decompositions
  of a Higher-Order Tensor in Block Terms, Part III", SIAM J. Matrix Anal. Appl. 30, 2008.
"""

from __future__ import annotations

__all__ = [
    "BlockTerms",
    "Channelwise",
    "Tucker",
    "block_terms",
    "block_terms_kept",
    "channelwise",
    "channelwise_kept",
    "folded",
    "principal",
    "relative_error",
    "rounding_of",
    "tucker",
    "tucker_kept",
]

from typing import NamedTuple

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
    """Return the left singular vectors (..., n, n) of (..., n, m) by falling singular value.

    They are the eigenvectors of its Gram matrix, which is small: an unfolding is many times as wide
    as it is high. The largest component of each is positive.
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


_TUCKER_SWEEPS = 10
#: Of the energy; sweeps that gain less are not worth their time.
_TUCKER_GAIN = 1e-6


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

    def weights(self) -> tuple[Tensor, ...]:
        """Return the weights of the layers of a block, in the order in which they run."""
        return self.inner.T, self.core, self.outer


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
    for _ in range(0 if full else _TUCKER_SWEEPS):
        last, energy = energy, float(core.square().sum())
        if energy <= last * (1 + _TUCKER_GAIN):
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
    return _share(_core(weight, left, right).square().sum(dim=2))


def _share(energy: Tensor) -> Tensor:
    """Return, of energies by rank, the share of the whole up to each rank."""
    total = energy.sum()
    for axis in range(energy.ndim):
        energy = energy.cumsum(axis)
    return energy / total if total else torch.ones_like(energy)


def _core(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("aik,ib->abk", torch.einsum("oik,oa->aik", weight, left), right)


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

    def weights(self) -> tuple[Tensor, ...]:
        """Return the weights of the layers of a block, in the order in which they run."""
        return self.kernels, self.columns.permute(1, 0, 2)


def channelwise(weight: Tensor, multiplier: int) -> Channelwise:
    """Return the best approximation by m products for each input channel.

    Args:
        weight: (o, i, k) in float64.
        multiplier: m; at ``min(o, k)`` nothing is lost.
    """
    matrices = weight.transpose(0, 1)  # (i, o, k)
    kernels = principal(matrices.mT)[..., :multiplier]  # (i, k, m)
    columns = matrices @ kernels
    return Channelwise(*_balanced(kernels.mT, columns))


def _balanced(kernels: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Share the size of each product between its unit kernel (..., m, k) and column (..., o, m).

    Columns of zeros keep the unit kernel: two zeros in a row would never learn.
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
    return _share(energies)[: min(len(weight), weight.shape[2])]


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
        mixed = torch.einsum("ojl,jlk->ojk", self.columns, self.kernels)
        return torch.einsum("ojk,ij->oik", mixed, self.mix)

    def weights(self) -> tuple[Tensor, ...]:
        """Return the weights of the layers of a block, in the order in which they run."""
        return self.mix.T, self.kernels, self.columns


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
    kernels, columns = _balanced(kernels, columns.permute(1, 0, 2) / third[:, None, None])
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
    return _share(energies)[:, : min(len(weight), weight.shape[2])]
