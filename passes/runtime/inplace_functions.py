"""Norm and activation as one autograd function that keeps the activated output only.

An ordinary norm keeps its input for the backward and the next convolution keeps the activated
tensor: two tensors of one size. The second determines the first but for the statistics, which are
small, so this function keeps the second alone and undoes activation and affine map in backward::

    xhat = (x - mean) / sqrt(var + eps)        y = act(gamma * xhat + beta)
    dz = act'(z) dy      dbeta = sum dz        dgamma = sum dz * xhat
    dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat))

with ``xhat = (act^-1(y) - beta) / gamma``; for groups gamma goes inside the means. Where that loses
digits (:mod:`~pocketize.passes.runtime.inplace_guard`) the channel's input is kept instead.

Source: Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018, equations 8 to 12; here without writing into anybody's memory, for every norm
whose statistics are a mean and a variance, and with gammas of either sign.

All norms are computed on *cells*, a view (N, G, D, S): for batch and instance norms G are the
channels and D is 1, for a group norm G are the groups and D the channels of one.
"""

from __future__ import annotations

__all__ = ["Norm", "NormActivation"]

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pocketize.passes.runtime.inplace_activations import Activation, Mark
from pocketize.passes.runtime.inplace_guard import Guard, Kept, unsafe_channels
from pocketize.passes.runtime.inplace_statistics import normalise, sum_over_processes

#: Elements that the backward works on at a time, so that its intermediate tensors are small: what
#: fits into a processor's cache, and on an accelerator what keeps it busy.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Norm:
    """What a norm layer does.

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
        return tensor.reshape(n, groups, channels // groups, -1)

    def affine(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """View a parameter of shape (C,) so that it broadcasts over cells."""
        groups = self.groups if self.kind == "group" else parameter.numel()
        return parameter.detach().to(dtype).view(1, groups, -1, 1)

    def statistics(self, values: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """View statistics, one for each cell or each channel, so that they broadcast over cells."""
        groups = self.groups if self.kind == "group" else channels
        return values.to(dtype).reshape(-1, groups, 1, 1)


class NormActivation(Function):
    """``activation(norm(x))``, which keeps its output instead of its input.

    :meth:`apply` takes what :meth:`forward` takes after ``ctx``. There is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        norm: Norm,
        mark: Mark,
        guard: Guard,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalise and activate.

        Args:
            ctx: autograd's context.
            x: (N, C, ...), floating point.
            weight: gamma of shape (C,), or None.
            bias: beta of shape (C,), or None.
            running_mean: of shape (C,), or None; not written to.
            running_var: of shape (C,), or None; not written to.
            norm: the norm.
            mark: tells the activation; the caller puts it on the output.
            guard: decides what is kept.

        Returns:
            The activated tensor, shaped and laid out as torch's own norm would, and the new running
            mean and variance, None where there are none.
        """
        done = normalise(x, weight, bias, running_mean, running_var, norm)
        activation = mark.activation
        y = activation.apply_(done.output)
        ctx.norm, ctx.mark, ctx.guard = norm, mark, guard
        ctx.shape, ctx.dtype, ctx.count = x.shape, x.dtype, done.count
        kept = _choose(y, weight, bias, norm, activation, guard, mark.layer)
        ctx.everything = kept.everything
        if kept.everything:
            source, aside = x, None
        else:
            source = y
            aside = None if kept.index is None else norm.cells(x).index_select(1, kept.index)
        ctx.save_for_backward(source, aside, kept.index, weight, bias, done.mean, done.invstd)
        new = [t for t in (done.running_mean, done.running_var) if t is not None]
        ctx.mark_non_differentiable(*new)
        return y, done.running_mean, done.running_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias; ``grad`` is only read."""
        source, aside, index, weight, bias, mean, invstd = ctx.saved_tensors
        norm: Norm = ctx.norm
        ctx.mark.check()
        ctx.guard.stepped()
        exact = _accumulation(source.dtype)
        channels = ctx.shape[1]
        cells = _Cells(
            norm=norm,
            activation=ctx.mark.activation,
            grad=norm.cells(grad),
            source=norm.cells(source),
            is_input=ctx.everything,
            weight=None if weight is None else norm.affine(weight, exact),
            bias=None if bias is None else norm.affine(bias, exact),
            mean=norm.statistics(mean, channels, exact),
            invstd=norm.statistics(invstd, channels, exact),
            count=ctx.count,
        )
        dx, dweight, dbias = _backward(cells, ctx.dtype)
        if index is not None:
            # Slices share nothing, so the kept ones are a small norm of their own.
            parts = _backward(cells.at(index, kept=aside), ctx.dtype)
            dx = dx.index_copy_(1, index, parts[0])
            dweight = dweight.index_copy_(0, index, parts[1])
            dbias = dbias.index_copy_(0, index, parts[2])
        needs = ctx.needs_input_grad
        return (
            dx.reshape(ctx.shape) if needs[0] else None,
            dweight.reshape(-1).to(weight.dtype) if needs[1] else None,
            dbias.reshape(-1).to(bias.dtype) if needs[2] else None,
            *(None,) * 5,
        )


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """A backward problem on cells (N, G, D, S); parameters and statistics broadcast over them.

    ``source`` is the norm's input, or what it was activated to; ``count`` the number of elements
    that one mean was taken over, in all processes together.
    """

    norm: Norm
    activation: Activation
    grad: Tensor
    source: Tensor
    is_input: bool
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    count: Tensor | float

    def at(
        self, where: Tensor | slice, samples: slice | None = None, kept: Tensor | None = None
    ) -> _Cells:
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

        return replace(
            self,
            grad=cut(self.grad),
            source=cut(self.source) if kept is None else kept,
            is_input=self.is_input or kept is not None,
            weight=None if self.weight is None else cut(self.weight),
            bias=None if self.bias is None else cut(self.bias),
            mean=cut(self.mean),
            invstd=cut(self.invstd),
        )


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _choose(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    activation: Activation,
    guard: Guard,
    name: str,
) -> Kept:
    """Find out which slices of the input have to be kept."""
    exact = _accumulation(y.dtype)
    parameters = (weight, bias)
    lowest = None
    if activation.kind == "elu":
        lowest = norm.cells(y).amin((0, 3), keepdim=True).to(exact)
    if weight is None:
        weight = torch.ones(y.shape[1], dtype=exact, device=y.device)
    gamma = norm.affine(weight, exact)
    beta = None if bias is None else norm.affine(bias, exact)
    unsafe, nearly = (
        unsafe_channels(gamma, beta, activation, lowest, y.dtype, margin=margin)
        .any(2)  # a group is kept whole: its channels share the means
        .flatten()
        for margin in (False, True)
    )
    return guard.select(unsafe, nearly, parameters, name)


def _backward(cells: _Cells, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input (N, G, D, S), weight and bias (both (G, D))."""
    blocks = list(_blocks(cells))
    if len(blocks) == 1:
        dx, dweight, dbias = _block(cells)
        return dx.to(dtype), dweight, dbias
    dx = torch.empty_like(cells.source, dtype=dtype)
    dweight = cells.invstd.new_zeros(cells.grad.shape[1:3])
    dbias = torch.zeros_like(dweight)
    for samples, where in blocks:
        part = cells.at(where, samples)
        parts = _block(part)
        dx[samples, where].copy_(parts[0])
        dweight[where] += parts[1]
        dbias[where] += parts[2]
    return dx, dweight, dbias


def _blocks(cells: _Cells) -> Iterator[tuple[slice, slice]]:
    """Cut a problem into independent ones of about the size that suits the device."""
    n, groups, inner, size = cells.grad.shape
    whole = slice(0, n), slice(0, groups)
    room = _BLOCK.get(cells.grad.device.type, _BLOCK_ELSEWHERE)
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


def _block(cells: _Cells) -> tuple[Tensor, Tensor, Tensor]:
    """Solve one problem; its tensors are written to where they are new."""
    norm, weight = cells.norm, cells.weight
    exact = cells.invstd.dtype
    grad, source = cells.grad.to(exact), cells.source.to(exact)
    if cells.is_input:
        xhat = source.sub(cells.mean).mul_(cells.invstd)
        z = xhat if weight is None else xhat * weight
        z = z if cells.bias is None else z + cells.bias
        dz = cells.activation.backward(grad, z, activated=False)
        del z
    else:
        dz = cells.activation.backward(grad, source, activated=True)
        xhat = _undo(cells.activation.inverse(source), weight, cells.bias)
    del grad, source
    sum_dz = dz.sum(3, keepdim=True)
    sum_dz_xhat = (dz * xhat).sum(3, keepdim=True)
    dbias, dweight = sum_dz.sum(0).squeeze(-1), sum_dz_xhat.sum(0).squeeze(-1)
    scale = cells.invstd if weight is None else cells.invstd * weight
    dz = dz.mul_(scale)
    if norm.from_input:
        if weight is not None:
            sum_dz, sum_dz_xhat = sum_dz * weight, sum_dz_xhat * weight
        shared = (0, 2) if norm.kind == "batch" else (2,)
        means = torch.stack([t.sum(shared, keepdim=True) for t in (sum_dz, sum_dz_xhat)])
        if norm.process_group is not None:
            means = sum_over_processes(means, norm.process_group)
        mean_dz, mean_dz_xhat = (means * (cells.invstd / cells.count)).unbind()
        dz = dz.sub_(mean_dz).sub_(xhat.mul_(mean_dz_xhat))
    return dz, dweight, dbias


def _undo(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(z - bias) / weight``; 0 for a weight of 0, whose channel is kept elsewhere."""
    if weight is None:
        return z.clone() if bias is None else z - bias
    inverse = weight.reciprocal()
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    return z * inverse if bias is None else torch.addcmul(-bias * inverse, z, inverse)
