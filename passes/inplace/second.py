"""What a norm in place saved, checked, and its gradient by torch's own operators.

They can be differentiated again, which the backward that :mod:`.inplace_functions` has of its own
cannot. It runs where a graph of the backward is asked for (``create_graph=True``).
"""

from __future__ import annotations

__all__ = ["differentiably", "untouched"]

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pocketize.errors import ExecutionError
from pocketize.passes.shared.forwards import refuse_exchanged
from pocketize.passes.shared.second_order import differentiate

if TYPE_CHECKING:
    from pocketize.passes.inplace.functions import Norm


def untouched(ctx: Any) -> Any:
    """Return the tensors that a forward saved.

    Raises:
        ExecutionError: one of them has been written to, or exchanged, since the forward.
    """
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ExecutionError(
            f"in-place-norm: a tensor that the backward of {ctx.mark.layer} needs (its weight, "
            "bias, slopes or output) has been written to since the forward pass; clone it before "
            f"writing. torch says: {error}"
        ) from error
    for now, before in zip(saved[3:6], ctx.parameters, strict=True):
        if now is not None and before is not None:
            refuse_exchanged("in-place-norm", now, before)
    return saved


def differentiably(ctx: Any, x: Tensor, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of input, weight, bias and slopes.

    Args:
        ctx: autograd's context of the forward.
        x: the norm's input.
        saved: what :func:`untouched` returns.
        grad: of the output.
    """
    _, _, _, weight, bias, slopes, mean, invstd = saved
    norm: Norm = ctx.norm
    exact = invstd.dtype
    mean, invstd = (norm.statistics(t, ctx.shape[1], exact) for t in (mean, invstd))

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
        cells, middle, scale = norm.cells(x).to(exact), mean, invstd
        if norm.from_input:
            axes = (0, 2, 3) if norm.kind == "batch" else (2, 3)
            var, middle = torch.var_mean(cells, axes, correction=0, keepdim=True)
            scale = torch.rsqrt(var + norm.eps)
        z = (cells - middle) * scale
        z = z if weight is None else z * norm.affine(weight, exact)
        z = z if bias is None else z + norm.affine(bias, exact)
        z = z.reshape(ctx.shape).to(grad.dtype)
        made: Tensor = ctx.mark.activation.apply_(z, None if slopes is None else slopes.to(z.dtype))
        return made

    return differentiate(run, (x, weight, bias, slopes), ctx.needs_input_grad[:4], grad)
