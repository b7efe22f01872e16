"""``activation(norm(x))`` as one node of autograd's graph that keeps one large tensor.

An ordinary norm keeps its input for the backward pass and the next convolution keeps the activated
tensor. A pass keeps one of the two: the input, from which the rest is computed again, or the
output, from which the input is recovered where that is exact. The backward pass is the same::

    xhat = (x - mean) / sqrt(var + eps)        y = act(gamma * xhat + beta)
    dz = act'(z) dy      dbeta = sum dz        dgamma = sum dz * xhat
    dx = gamma / sqrt(var + eps) * (dz - mean(dz) - xhat * mean(dz * xhat))

with ``xhat = (act^-1(y) - beta) / gamma`` from the output; for groups gamma goes inside the means.

Source: Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018, equations 8 to 12; here without writing into the user's memory, for every norm
whose statistics are a mean and a variance, and with gammas of either sign.
"""

from __future__ import annotations

__all__ = ["FusedCall", "KeptInput", "NormActivation"]

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

from pocketize._torch import is_batched
from pocketize.errors import ExecutionError
from pocketize.passes.shared.forwards import refuse_exchanged
from pocketize.passes.shared.norm_gradients import (
    Cells,
    Elementwise,
    Norm,
    accumulation,
    gradients,
    undo,
)
from pocketize.passes.shared.second_order import (
    HistoryOf,
    aliases_of_hooked,
    differentiate,
    refuse_second,
)


@dataclass(frozen=True)
class KeptInput:
    """What is kept of a norm's input.

    Attributes:
        everything: the whole input, and not the output.
        index: int64 of shape (K,), the slices that are kept on axis 1 of the cells; None for none.
    """

    everything: bool = False
    index: Tensor | None = None


class FusedCall:
    """One call of a norm and an activation, without its tensors. Passes derive classes from it.

    Args:
        norm: the norm.
        activation: the activation.
        layer: what an error calls the layer.
    """

    #: Name of the pass, for errors.
    name: ClassVar[str] = ""
    #: Elements that the backward pass works on at a time, so that its intermediate tensors are
    #: small, by the type of device: what fits into a processor's cache, and on an accelerator what
    #: keeps it busy.
    blocks: ClassVar[dict[str, int]] = {"cpu": 1 << 18, "": 1 << 24}
    #: Elements that each mean was taken over where processes share them.
    count: Tensor | None = None

    def __init__(self, norm: Norm, activation: Elementwise, layer: str = "a norm") -> None:
        self.norm, self.activation, self.layer = norm, activation, layer

    def activate(self, normed: Tensor, slopes: Tensor | None) -> Tensor:
        """Activate in the forward pass; may write to ``normed``."""
        return self.activation.apply(normed, slopes)

    def keep(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None
    ) -> KeptInput:
        """Choose what is kept of the input, by the output and the parameters."""
        return KeptInput(everything=True)

    def check(self) -> None:
        """Run at the start of each backward pass."""


class NormActivation(Function):
    """``activation(norm(x))`` of a norm that has run, which keeps input or output, not both.

    Second derivatives are those of torch's own operators; there are none where processes share
    statistics.
    """

    @staticmethod
    def run(call: FusedCall, normed: Tensor, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """Activate.

        Args:
            call: the call.
            normed: the result of the norm, without history.
            x: the norm's input, (N, C, ...), floating point.
            parameters: gamma and beta, each of shape (C,) or None; slopes of a PReLU, (1,) or
                (C,), None for other activations; the mean of each channel, instance or group, and
                ``1 / sqrt(var + eps)``, None to compute them again.
        """
        given = aliases_of_hooked((x, *parameters))
        # In a tuple autograd leaves it alone: it may be written to and returned.
        made: Any = NormActivation.apply(call, (normed,), *given)  # type: ignore[no-untyped-call]
        if x.requires_grad and not made.grad_fn.kept.everything:
            made.grad_fn.history = HistoryOf.of(x)
        return cast(Tensor, made)

    @staticmethod
    def forward(
        ctx: Any,
        call: FusedCall,
        normed: tuple[Tensor],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        mean: Tensor | None,
        invstd: Tensor | None,
    ) -> Tensor:
        """Activate, and keep what the call says; see :meth:`run`."""
        y = call.activate(normed[0], slopes)
        kept = call.keep(y, weight, bias, slopes)
        ctx.call, ctx.kept, ctx.history = call, replace(kept, index=None), None
        ctx.shape, ctx.dtype = x.shape, x.dtype
        aside = None if kept.index is None else call.norm.cells(x).index_select(1, kept.index)
        parameters = weight, bias, slopes
        ctx.parameters = [None if t is None else t.detach() for t in parameters]
        source = x if kept.everything else y
        ctx.save_for_backward(source, aside, kept.index, *parameters, mean, invstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of input, weight, bias and slopes; ``grad`` is only read."""
        call: FusedCall = ctx.call
        call.check()
        saved = _untouched(ctx)
        if call.norm.process_group is None and (torch.is_grad_enabled() or is_batched(grad)):
            found = _differentiably(ctx, saved, grad)
        else:
            with torch.no_grad():
                found = _gradients(ctx, saved, grad)
            sources = (grad, saved[0], *saved[3:6])
            advice = "Processes share the statistics of this norm; leave it out with keep=(...)"
            found = refuse_second(call.name, found, sources, advice)
        return None, None, *found, None, None


def _untouched(ctx: Any) -> Any:
    """Return what was saved; an ExecutionError if it has been written to, or exchanged, since."""
    call: FusedCall = ctx.call
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ExecutionError(
            f"{call.name}: a tensor that the backward of {call.layer} needs (its weight, bias, "
            "slopes or output) has been written to since the forward pass; clone it before "
            f"writing. torch says: {error}"
        ) from error
    for now, before in zip(saved[3:6], ctx.parameters, strict=True):
        if now is not None and before is not None:
            refuse_exchanged(call.name, now, before)
    return saved


def _gradients(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cells = _cells(ctx, saved, grad)
    room = ctx.call.blocks.get(grad.device.type, ctx.call.blocks[""])
    found = gradients(cells, ctx.dtype, room)
    _, aside, index, weight, bias, slopes, *_ = saved
    if index is not None:
        # Slices share nothing, so the kept ones are a small norm of their own.
        parts = gradients(cells.at(index, kept=aside), ctx.dtype, room)
        found.dx.index_copy_(1, index, parts.dx)
        for whole, part in zip(found[1:], parts[1:], strict=True):
            whole.index_copy_(0, index, part)
    needs = ctx.needs_input_grad[2:]
    dslopes = found.dslopes.reshape(-1)
    if slopes is not None and slopes.numel() == 1:
        dslopes = dslopes.sum(0, keepdim=True)
    return (
        found.dx.reshape(ctx.shape) if needs[0] else None,
        found.dweight.reshape(-1).to(weight.dtype) if needs[1] else None,
        found.dbias.reshape(-1).to(bias.dtype) if needs[2] else None,
        dslopes.view(slopes.shape).to(slopes.dtype) if needs[3] else None,
    )


def _cells(ctx: Any, saved: Any, grad: Tensor) -> Cells:
    source, _, _, weight, bias, slopes, mean, invstd = saved
    norm, channels, exact = ctx.call.norm, ctx.shape[1], accumulation(source.dtype)
    return Cells(
        norm=norm,
        activation=ctx.call.activation,
        count=ctx.call.count,
        exact=exact,
        grad=norm.cells(grad),
        source=norm.cells(source),
        is_input=ctx.kept.everything,
        weight=None if weight is None else norm.affine(weight, exact),
        bias=None if bias is None else norm.affine(bias, exact),
        slopes=None if slopes is None else norm.slopes(slopes, channels, source.dtype),
        mean=None if mean is None else norm.statistics(mean, channels, exact),
        invstd=None if invstd is None else norm.statistics(invstd, channels, exact),
    )


def _differentiably(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients with a graph, by torch's own operators."""
    call: FusedCall = ctx.call
    norm, channels = call.norm, ctx.shape[1]
    _, _, _, weight, bias, slopes, mean, invstd = saved
    exact = accumulation(ctx.dtype)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
        cells = norm.cells(x).to(exact)
        if norm.from_input:
            middle, scale = norm.moments(cells)
        else:
            middle, scale = (norm.statistics(t, channels, exact) for t in (mean, invstd))
        z = (cells - middle) * scale
        z = z if weight is None else z * norm.affine(weight, exact)
        z = z if bias is None else z + norm.affine(bias, exact)
        return call.activation.apply(z.reshape(ctx.shape).to(grad.dtype), slopes)

    given = _input(ctx, saved, grad), weight, bias, slopes
    return differentiate(run, given, ctx.needs_input_grad[2:6], grad)


def _input(ctx: Any, saved: Any, grad: Tensor) -> Tensor:
    """Return the norm's input, with its history, recovered from the output if it was not kept."""
    if ctx.kept.everything:
        return cast(Tensor, saved[0])
    with torch.no_grad():
        cells = _cells(ctx, saved, grad)
        y = cells.source.to(cells.exact)
        xhat = undo(ctx.call.activation.inverse(y, cells.slopes), cells.weight, cells.bias)
        assert cells.mean is not None
        assert cells.invstd is not None
        x = (xhat / cells.invstd + cells.mean).to(ctx.dtype)
        if saved[2] is not None:
            x.index_copy_(1, saved[2], saved[1])
        x = x.reshape(ctx.shape)
    return x if ctx.history is None else HistoryOf.give(ctx.history, x)
