"""A convolution of which only the gradients are computed."""

from __future__ import annotations

__all__ = ["NotConvolved"]

from typing import Any

import torch
from torch import Tensor


class NotConvolved(torch.autograd.Function):
    """A convolution whose result nobody reads: it is empty, and its gradients are torch's own.

    ``apply`` takes the arguments of ``torch.nn.functional.conv1d`` to ``conv3d`` in their order; x
    is (N, C, *spatial).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        """Return an empty result of the right shape, without memory."""
        stride, padding, dilation, groups = options
        ctx.save_for_backward(x, weight)
        sizes = None if bias is None else list(bias.shape)
        ctx.options = sizes, stride, padding, dilation, False, [0] * len(stride), groups
        rows = zip(x.shape[2:], weight.shape[2:], *options[:3], strict=True)
        out = [(n + 2 * pad - step * (k - 1) - 1) // s + 1 for n, k, s, pad, step in rows]
        return x.new_zeros(()).expand(x.shape[0], weight.shape[0], *out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        mask = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(
            gradient, *ctx.saved_tensors, *ctx.options, mask
        )
        return *found, None, None, None, None
