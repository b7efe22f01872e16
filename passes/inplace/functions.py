"""Norm and activation as one autograd function that keeps the activated output only.

An ordinary norm keeps its input for the backward and the next convolution keeps the activated
tensor: two tensors of one size. The second determines the first but for the statistics, which are
small, so this function keeps the second alone and undoes activation and affine map in backward::

    xhat = (x - mean) / sqrt(var + eps)        y = act(gamma * xhat + beta)
    dz = act'(z) dy      dbeta = sum dz        dgamma = sum dz * xhat
    dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat))

with ``xhat = (act^-1(y) - beta) / gamma``; for groups gamma goes inside the means. Where that loses
digits (:mod:`~pocketize.passes.inplace.invertibility`) the channel's input is kept instead.

Source: Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018, equations 8 to 12; here without writing into anybody's memory, for every norm
whose statistics are a mean and a variance, and with gammas of either sign.

All norms are computed on *cells*, a view (N, G, D, S): for batch and instance norms G are the
channels and D is 1, for a group norm G are the groups and D the channels of one.
"""

from __future__ import annotations

__all__ = ["Norm", "NormActivation"]

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from pocketize._torch import is_batched
from pocketize.passes.inplace.activations import Activation, Mark, finite_inverse
from pocketize.passes.inplace.invertibility import Guard, Kept, unsafe_channels
from pocketize.passes.inplace.second import differentiably, untouched
from pocketize.passes.inplace.statistics import normalise, sum_over_processes
from pocketize.passes.shared.second_order import Stand, aliases_of_hooked, refuse_second

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
        return tensor.reshape(n, groups, channels // groups, math.prod(tensor.shape[2:]))

    def affine(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """View a parameter of shape (C,) so that it broadcasts over cells."""
        groups = self.groups if self.kind == "group" else parameter.numel()
        return parameter.to(dtype).view(1, groups, -1, 1)

    def statistics(self, values: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """View statistics, one for each cell or each channel, so that they broadcast over cells."""
        groups = self.groups if self.kind == "group" else channels
        return values.to(dtype).reshape(-1, groups, 1, 1)


class NormActivation(Function):
    """``activation(norm(x))``, which keeps its output instead of its input.

    :meth:`run` takes what :meth:`forward` takes after ``ctx``. Second derivatives are those of
    torch's own operators; there are none where processes share statistics.
    """

    @staticmethod
    def run(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalise and activate; see :meth:`forward`."""
        made: Any = NormActivation.apply(x, *aliases_of_hooked(rest))  # type: ignore[no-untyped-call]
        if x.requires_grad:
            made[0].grad_fn.stand = Stand.of(x)
        return made  # type: ignore[no-any-return]

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
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
            slopes: of a PReLU, (1,) or (C,); None for other activations.
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
        rounded = None if slopes is None else slopes.to(done.output.dtype)
        y = mark.activation.apply_(done.output, rounded)
        ctx.norm, ctx.mark, ctx.guard = norm, mark, guard
        ctx.shape, ctx.dtype, ctx.count = x.shape, x.dtype, done.count
        kept = _choose(y, weight, bias, slopes, norm, mark, guard)
        ctx.everything, ctx.stand = kept.everything, None
        if kept.everything:
            source, aside = x, None
        else:
            source = y
            aside = None if kept.index is None else norm.cells(x).index_select(1, kept.index)
        parameters = weight, bias, slopes
        ctx.parameters = [None if t is None else t.detach() for t in parameters]
        ctx.save_for_backward(source, aside, kept.index, *parameters, done.mean, done.invstd)
        new = [t for t in (done.running_mean, done.running_var) if t is not None]
        ctx.mark_non_differentiable(*new)
        return y, done.running_mean, done.running_var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight, bias and slopes; ``grad`` is only read."""
        ctx.mark.check()
        ctx.guard.stepped()
        saved = untouched(ctx)
        if ctx.norm.process_group is None and (torch.is_grad_enabled() or is_batched(grad)):
            found = differentiably(ctx, _input(ctx, saved), saved, grad)
        else:
            with torch.no_grad():
                found = NormActivation._gradients(ctx, saved, grad)
            sources = (grad, saved[0], *saved[3:6])
            advice = "Processes share the statistics of this norm; leave it out with keep=(...)"
            found = refuse_second("in-place-norm", found, sources, advice)
        return *found, *(None,) * 5

    @staticmethod
    def _gradients(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, aside, index, weight, bias, slopes, mean, invstd = saved
        norm: Norm = ctx.norm
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
            slopes=_slopes(slopes, channels, norm, source.dtype),
            mean=norm.statistics(mean, channels, exact),
            invstd=norm.statistics(invstd, channels, exact),
            count=ctx.count,
        )
        found = _backward(cells, ctx.dtype)
        if index is not None:
            # Slices share nothing, so the kept ones are a small norm of their own.
            parts = _backward(cells.at(index, kept=aside), ctx.dtype)
            found.dx.index_copy_(1, index, parts.dx)
            for whole, part in zip(found[1:], parts[1:], strict=True):
                whole.index_copy_(0, index, part)
        needs = ctx.needs_input_grad
        dslopes = found.dslopes.reshape(-1)
        if slopes is not None and slopes.numel() == 1:
            dslopes = dslopes.sum(0, keepdim=True)
        return (
            found.dx.reshape(ctx.shape) if needs[0] else None,
            found.dweight.reshape(-1).to(weight.dtype) if needs[1] else None,
            found.dbias.reshape(-1).to(bias.dtype) if needs[2] else None,
            dslopes.to(slopes.dtype) if needs[3] else None,
        )


def _input(ctx: Any, saved: Any) -> Tensor:
    """Return the norm's input, with its history, found from the output where it was not kept."""
    source, aside, index, weight, bias, slopes, mean, invstd = saved
    if ctx.everything:
        return cast(Tensor, source)
    norm, exact, channels = ctx.norm, invstd.dtype, ctx.shape[1]
    with torch.no_grad():
        over = _slopes(slopes, channels, norm, source.dtype)
        z = ctx.mark.activation.inverse(norm.cells(source).to(exact), over)
        xhat = _undo(z, *(None if t is None else norm.affine(t, exact) for t in (weight, bias)))
        mean, invstd = (norm.statistics(t, channels, exact) for t in (mean, invstd))
        x = (xhat / invstd + mean).to(ctx.dtype)
        if index is not None:
            x.index_copy_(1, index, aside)
        x = x.reshape(ctx.shape)
    return x if ctx.stand is None else Stand.give(ctx.stand, x)


class _Gradients(NamedTuple):
    """Of the input (N, G, D, S), and of the parameters, each (G, D)."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dslopes: Tensor


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
    slopes: Tensor | None
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
            slopes=None if self.slopes is None else cut(self.slopes),
            mean=cut(self.mean),
            invstd=cut(self.invstd),
        )


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _slopes(slopes: Tensor | None, channels: int, norm: Norm, dtype: torch.dtype) -> Tensor | None:
    """View the slopes of a PReLU, as it rounds them, so that they broadcast over cells."""
    if slopes is None:
        return None
    return norm.affine(slopes.to(dtype).expand(channels), _accumulation(dtype))


def _choose(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    norm: Norm,
    mark: Mark,
    guard: Guard,
) -> Kept:
    """Find out which slices of the input have to be kept."""
    exact = _accumulation(y.dtype)
    parameters = (weight, bias, slopes)
    lowest = None
    if mark.activation.kind == "elu" and y.numel():
        lowest = norm.cells(y).amin((0, 3), keepdim=True).to(exact)
    if weight is None:
        weight = torch.ones(y.shape[1], dtype=exact, device=y.device)
    gamma = norm.affine(weight, exact)
    beta = None if bias is None else norm.affine(bias, exact)
    over = _slopes(slopes, y.shape[1], norm, y.dtype)
    unsafe, nearly = (
        unsafe_channels(gamma, beta, mark.activation, lowest, y.dtype, slopes=over, margin=margin)
        .any(2)  # a group is kept whole: its channels share the means
        .flatten()
        for margin in (False, True)
    )
    kept = guard.select(unsafe, nearly, parameters, mark.layer)
    if kept.index is not None and norm.process_group is not None:
        # Processes may choose differently, but must exchange the same sums in the same order.
        return Kept(everything=True)
    return kept


def _backward(cells: _Cells, dtype: torch.dtype) -> _Gradients:
    """Solve a problem; the gradient of the input is of a type, the others as they are computed."""
    blocks = list(_blocks(cells))
    if len(blocks) == 1:
        found = _block(cells)
        return found._replace(dx=found.dx.to(dtype))
    dx = torch.empty_like(cells.source, dtype=dtype)
    sums = [cells.invstd.new_zeros(cells.grad.shape[1:3]) for _ in range(3)]
    for samples, where in blocks:
        part = _block(cells.at(where, samples))
        dx[samples, where].copy_(part.dx)
        for whole, value in zip(sums, part[1:], strict=True):
            whole[where] += value
    return _Gradients(dx, *sums)


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


def _block(cells: _Cells) -> _Gradients:
    """Solve one problem; its tensors are written to where they are new."""
    norm, weight, slopes = cells.norm, cells.weight, cells.slopes
    exact = cells.invstd.dtype
    grad, source = cells.grad.to(exact), cells.source.to(exact)
    if cells.is_input:
        xhat = source.sub(cells.mean).mul_(cells.invstd)
        z = xhat if weight is None else xhat * weight
        z = z if cells.bias is None else z + cells.bias
        dz = cells.activation.backward(grad, z, activated=False, slopes=slopes)
    else:
        dz = cells.activation.backward(grad, source, activated=True, slopes=slopes)
        z = cells.activation.inverse(source, slopes)
        xhat = _undo(z, weight, cells.bias)
    dslopes = None if slopes is None else (grad * z.clamp(max=0)).sum((0, 3))
    del grad, source, z
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
    return _Gradients(dz, dweight, dbias, torch.zeros_like(dbias) if dslopes is None else dslopes)


def _undo(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(z - bias) / weight``; 0 for a weight of 0, whose channel is kept elsewhere."""
    if weight is None:
        return z.clone() if bias is None else z - bias
    inverse = finite_inverse(weight)
    return z * inverse if bias is None else torch.addcmul(-bias * inverse, z, inverse)
