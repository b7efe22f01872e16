"""Gradients of ``activation(norm(x))`` from the norm's input or from the result.

All norms are computed on *cells*, a view (N, G, D, S): for batch and instance norms G are the
channels and D is 1, for a group norm G are the groups and D the channels of one.
"""

from __future__ import annotations

__all__ = [
    "Cells",
    "Elementwise",
    "Gradients",
    "Norm",
    "accumulation",
    "finite_inverse",
    "gradients",
    "sum_over_processes",
    "undo",
]

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pocketize._torch import FakeTensor

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """What a norm layer computes.

    Attributes:
        kind: ``"batch"``, ``"instance"`` or ``"group"``.
        eps: added to the variance.
        groups: number of groups of a group norm.
        from_input: statistics are those of the input; otherwise the running ones are used.
        momentum: weight of the new statistics in the running ones.
        process_group: processes that a batch norm shares its statistics with; None for none.
    """

    kind: str
    eps: float
    groups: int = 0
    from_input: bool = True
    momentum: float = 0.0
    process_group: Any = None

    def cells(self, tensor: Tensor) -> Tensor:
        """View (N, C, ...) as (N, G, D, S); a copy where the strides allow no view."""
        n, channels = tensor.shape[:2]
        groups = self.groups if self.kind == "group" else channels
        return tensor.reshape(n, groups, channels // groups, math.prod(tensor.shape[2:]))

    def affine(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """View a parameter of shape (C,) so that it broadcasts over cells."""
        groups = self.groups if self.kind == "group" else parameter.numel()
        return parameter.to(dtype).view(1, groups, -1, 1)

    def statistics(self, values: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """View statistics, one for each cell or each channel, so that they broadcast over cells."""
        groups = self.groups if self.kind == "group" else channels
        return values.to(dtype).reshape(-1, groups, 1, 1)

    def slopes(self, slopes: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """View the slopes of a PReLU, (1,) or (C,), rounded to a type, to broadcast over cells."""
        return self.affine(slopes.to(dtype).expand(channels), accumulation(dtype))

    def moments(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and ``1 / sqrt(var + eps)`` of cells; they broadcast over them."""
        axes = (0, 2, 3) if self.kind == "batch" else (2, 3)
        var, mean = torch.var_mean(cells, axes, correction=0, keepdim=True)
        return mean, torch.rsqrt(var + self.eps)


class Elementwise:
    """An activation, which acts on each element by itself; slopes are those of a PReLU."""

    def apply(self, z: Tensor, slopes: Tensor | None) -> Tensor:
        """Activate; may write to ``z`` and return that. Autograd differentiates it to any order."""
        raise NotImplementedError

    def inverse(self, y: Tensor, slopes: Tensor | None) -> Tensor:
        """Return what was activated, if the output is kept."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, z: Tensor, y: Tensor | None, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Differentiate the activation on cells.

        Args:
            grad: the gradient after it, (N, G, D, S), in the type of the result.
            z: what was activated, of the same shape.
            y: the result; None where the input was kept.
            slopes: (1, G, D, 1) or None.

        Returns:
            The gradient before it, a new tensor, and that of the slopes, (G, D) or None.
        """
        raise NotImplementedError


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the type that statistics and gradients are computed in."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def finite_inverse(values: Tensor) -> Tensor:
    """Return ``1 / values``, and 0 where that is infinite."""
    inverse = values.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0.0)


class Gradients(NamedTuple):
    """Of the input (N, G, D, S), and of the parameters, each (G, D)."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dslopes: Tensor


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A backward problem on cells (N, G, D, S); parameters and statistics broadcast over them.

    ``source`` is the norm's input, or what it was activated to; ``count`` the number of elements
    that each mean was taken over where processes share them.
    """

    norm: Norm
    activation: Elementwise
    count: Tensor | None
    exact: torch.dtype
    grad: Tensor
    source: Tensor
    is_input: bool
    weight: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None

    def at(
        self, where: Tensor | slice, samples: slice | None = None, kept: Tensor | None = None
    ) -> Cells:
        """Restrict the problem to some slices of axis 1, and to some samples.

        Args:
            where: the slices.
            samples: the samples; None for all.
            kept: the norm's input there, if it is not to be recovered from the output.
        """

        def cut(tensor: Tensor) -> Tensor:
            if samples is not None and tensor.shape[0] > 1:
                tensor = tensor[samples]
            if isinstance(where, slice):
                return tensor[:, where]
            return tensor.index_select(1, where)

        names = ("weight", "bias", "slopes", "mean", "invstd")
        cuts: Any = {name: None if (t := getattr(self, name)) is None else cut(t) for name in names}
        source = cut(self.source) if kept is None else kept
        is_input = self.is_input or kept is not None
        return replace(self, grad=cut(self.grad), source=source, is_input=is_input, **cuts)


def gradients(cells: Cells, dtype: torch.dtype, room: int) -> Gradients:
    """Solve a problem.

    Args:
        cells: the problem.
        dtype: of the gradient of the input; the others are as they are computed.
        room: elements to work on at a time, so that intermediate tensors are small.
    """
    blocks = list(_blocks(cells, room))
    if len(blocks) == 1:
        found = _block(cells)
        return found._replace(dx=found.dx.to(dtype))
    dx = torch.empty_like(cells.source, dtype=dtype)
    shape = cells.grad.shape[1:3]
    sums = [torch.zeros(shape, dtype=cells.exact, device=dx.device) for _ in range(3)]
    if isinstance(dx, FakeTensor):
        blocks[3:-1] = []  # they have no values to compute, and take the memory of those before
    for samples, where in blocks:
        part = _block(cells.at(where, samples))
        dx[samples, where].copy_(part.dx)
        for whole, value in zip(sums, part[1:], strict=True):
            whole[where] += value
    return Gradients(dx, *sums)


def _blocks(cells: Cells, room: int) -> Iterator[tuple[slice, slice]]:
    """Cut a problem into independent ones of about the size that suits the device."""
    n, groups, inner, size = cells.grad.shape
    whole = slice(0, n), slice(0, groups)
    strided = not cells.source.is_contiguous()
    if cells.grad.numel() <= 2 * room or cells.norm.process_group is not None:
        yield whole
    elif cells.norm.kind == "batch":
        # Samples share their means. Slices of channels that lie innermost would be slow.
        step = groups if strided else max(1, room // (n * inner * size))
        for start in range(0, groups, step):
            yield whole[0], slice(start, min(start + step, groups))
    else:
        for sample in range(n):
            step = groups if strided else max(1, room // (inner * size))
            for start in range(0, groups, step):
                yield slice(sample, sample + 1), slice(start, min(start + step, groups))


def _block(cells: Cells) -> Gradients:
    """Solve one problem; its tensors are written to where they are new."""
    norm, activation, weight, bias = cells.norm, cells.activation, cells.weight, cells.bias
    grad, source = cells.grad, cells.source.to(cells.exact)
    mean, invstd = cells.mean, cells.invstd
    if mean is None or invstd is None:
        mean, invstd = norm.moments(source)
    scale = invstd if weight is None else invstd * weight
    if cells.is_input:
        # As torch's kernels do: an activation's kinks are then where they were.
        z = torch.addcmul(-mean * scale if bias is None else bias - mean * scale, source, scale)
        dz, dslopes = activation.backward(grad, z, None, cells.slopes)
        plain = norm.process_group is None and (bias is None or weight is not None)
        if norm.from_input and plain:
            del grad, z
            return _by_kernels(norm, dz, dslopes, source, weight, mean, invstd)
        xhat = source.sub(mean).mul_(invstd)
    else:
        z = activation.inverse(source, cells.slopes)
        xhat = undo(z, weight, bias)
        dz, dslopes = activation.backward(grad, z, source, cells.slopes)
    del grad, source, z
    sum_dz = dz.sum(3, keepdim=True)
    sum_dz_xhat = (dz * xhat).sum(3, keepdim=True)
    dbias, dweight = sum_dz.sum(0).squeeze(-1), sum_dz_xhat.sum(0).squeeze(-1)
    dz = dz.mul_(scale)
    if norm.from_input:
        if weight is not None:
            sum_dz, sum_dz_xhat = sum_dz * weight, sum_dz_xhat * weight
        shared = (0, 2) if norm.kind == "batch" else (2,)
        count = cells.grad.numel() // invstd.numel() if cells.count is None else cells.count
        means = torch.stack([t.sum(shared, keepdim=True) for t in (sum_dz, sum_dz_xhat)])
        if norm.process_group is not None:
            means = sum_over_processes(means, norm.process_group)
        mean_dz, mean_dz_xhat = (means * (invstd / count)).unbind()
        dz = dz.sub_(mean_dz).sub_(xhat.mul_(mean_dz_xhat))
    return Gradients(dz, dweight, dbias, torch.zeros_like(dbias) if dslopes is None else dslopes)


def _by_kernels(
    norm: Norm,
    dz: Tensor,
    dslopes: Tensor | None,
    source: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
) -> Gradients:
    """Differentiate the norm as torch does, from its input, to the last bit."""
    n, groups, inner, size = source.shape
    mask = [True, weight is not None, weight is not None]
    gamma = None if weight is None else weight.flatten()
    dz, source = dz.contiguous(), source.contiguous()
    if norm.kind == "group":
        shape, last = (n, groups * inner, size), (n, groups * inner, size, groups, mask)
        statistics = (t.expand(n, groups, 1, 1).reshape(n, groups) for t in (mean, invstd))
        dx, dweight, dbias = _ATEN.native_group_norm_backward(
            dz.view(shape), source.view(shape), *statistics, gamma, *last
        )
    else:
        samples = n if norm.kind == "instance" else 1  # each with statistics of its own
        shape = (n // samples, samples * groups, size)
        gamma = None if gamma is None else gamma.repeat(samples)
        statistics = (t.flatten() for t in (mean, invstd))
        dx, dweight, dbias = _ATEN.native_batch_norm_backward(
            dz.view(shape), source.view(shape), gamma, None, None, *statistics, True, norm.eps, mask
        )
        if gamma is not None:
            dweight, dbias = (t.view(samples, -1).sum(0) for t in (dweight, dbias))
    zero = dx.new_zeros(groups, inner)
    if weight is not None:
        dweight, dbias = dweight.view(groups, inner), dbias.view(groups, inner)
    else:
        dweight = dbias = zero
    dslopes = zero if dslopes is None else dslopes
    return Gradients(dx.view(n, groups, inner, size), dweight, dbias, dslopes)


def undo(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(z - bias) / weight``; 0 for a weight of 0, whose channel is kept elsewhere."""
    if weight is None:
        return z.clone() if bias is None else z - bias
    inverse = finite_inverse(weight)
    return z * inverse if bias is None else torch.addcmul(-bias * inverse, z, inverse)


def sum_over_processes(values: Tensor, group: Any) -> Tensor:
    """Return the sum of a tensor over the processes of a group."""
    values = values.contiguous()
    dist.all_reduce(values, group=group)  # type: ignore[no-untyped-call, unused-ignore]
    return values
