"""Initial values that are not independent samples: constants, identities, orthogonal matrices."""

from __future__ import annotations

__all__ = ["find_repeats", "find_structure", "is_lone_orthogonal"]

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pocketize.initial.laws import Blocks, Constant, Diagonal, Law, Orthogonal, Replicated
from pocketize.initial.moments import Array, sample

#: Rows or columns whose products decide whether a matrix is orthogonal.
_ROWS = 16


def find_structure(values: Tensor, elements: Array, groups: int = 1, gates: int = 1) -> Law | None:
    """The law of a tensor whose elements determine one another, if it is one of those known here.

    Args:
        values: The whole tensor, real and finite.
        elements: A sample of it (see :func:`pocketize.initial.moments.sample`), to look at first.
        groups: Groups of its convolution.
        gates: Equal blocks along the first axis that may have been initialised one by one.
    """
    if elements.min() == elements.max() and bool((values == values.reshape(-1)[0]).all()):
        return Constant(float(elements[0]))
    if values.dim() < 2:
        return _constant_blocks(values)
    if (elements == 0).mean() > 0.4:
        diagonal = _diagonal(values, groups)
        if diagonal is not None:
            return diagonal
    replicated = _replicated(values)
    if replicated is not None:
        return replicated
    # blocks first: orthogonal blocks of one gain are, stacked, orthogonal columns as well
    if gates > 1 and len(values) % gates == 0:
        blocks = values.chunk(gates)
        laws = [find_structure(block, sample(block)) for block in blocks]
        known = tuple(law for law in laws if law is not None)
        if len(known) == gates:
            return Blocks(known)
    gain = _orthogonal_gain(values)
    return None if gain is None else Orthogonal(gain)


def _constant_blocks(values: Tensor) -> Law | None:
    """Blocks of constants: the biases of an LSTM whose forget gates start open."""
    for count in (2, 3, 4):
        if values.dim() == 1 and len(values) % count == 0 and len(values) > count:
            blocks = values.view(count, -1)
            if bool((blocks == blocks[:, :1]).all()):
                return Blocks(tuple(Constant(value) for value in blocks[:, 0].tolist()))
    return None


def _diagonal(values: Tensor, groups: int) -> Law | None:
    if min(values.shape[:2]) < 2 and groups == 1:
        return None
    kernel = values[0, 0].detach().clone()
    if not bool(kernel.any()):
        return None
    for by_groups in (False, True) if groups > 1 else (False,):
        if values.shape[0] % (groups if by_groups else 1):
            continue
        law = Diagonal(kernel, by_groups)
        shaped = torch.empty_like(values, memory_format=torch.contiguous_format)
        expected = law.fill(shaped, groups)
        if torch.equal(expected, values):
            return law
    return None


def _replicated(values: Tensor) -> Law | None:
    """Constant along whole axes. A corner of the tensor tells at little cost if not."""
    kernel = values.detach()
    for axis in range(values.dim()):
        corner = kernel[tuple(slice(4) for _ in range(values.dim()))]
        for part in (corner, kernel):
            first = part.narrow(axis, 0, 1)
            if part.shape[axis] < 2 or not bool((part == first).all()):
                break
        else:
            kernel = kernel.narrow(axis, 0, 1)
    return Replicated(kernel.clone()) if kernel.shape != values.shape else None


def find_repeats(values: Tensor) -> int:
    """How many neighbouring slices of the first axis are equal throughout; 1 for none."""
    count = len(values) if values.dim() > 1 else 0
    if count < 4 or not torch.equal(values[0], values[1]):
        return 1
    same = (values == values[:1]).flatten(1).all(dim=1).tolist()
    times = same.index(False) if False in same else count
    if count % times or times == count:
        return 1
    blocks = values.reshape(-1, times, *values.shape[1:])
    return times if bool((blocks == blocks[:, :1]).all()) else 1


def _orthogonal_gain(values: Tensor) -> float | None:
    matrix = values.detach().flatten(1)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if len(matrix) < 2:
        return None
    rounding = torch.finfo(values.dtype).eps
    # independent rows have products of about 1 / sqrt(length)
    tolerance = 1e-5 + 4 * rounding / math.sqrt(matrix.shape[1])
    # two rows are enough to exclude most others
    for count in (2, _ROWS):
        rows = matrix[:count].cpu().double().numpy()
        products = rows @ rows.T
        square = products.diagonal()
        gain = math.sqrt(float(square.mean()))
        if gain == 0 or np.abs(products - np.diag(square)).max() > tolerance * gain**2:
            return None
    return gain if np.abs(square / gain**2 - 1).max() < 1e-4 + 4 * rounding else None


def is_lone_orthogonal(values: Tensor, gains: Iterable[float]) -> float | None:
    """A single row or column shows orthogonality only by its norm: is it one of ``gains``?"""
    matrix = values.detach().flatten(1) if values.dim() > 1 else values.detach()[None]
    precise = values.dtype in (torch.float32, torch.float64)
    if min(matrix.shape) != 1 or matrix.numel() < 2 or not precise:
        return None
    norm = float(matrix.cpu().double().norm())
    return next((gain for gain in gains if abs(norm / gain - 1) < 1e-5), None)
