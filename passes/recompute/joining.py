"""A convolution of a concatenation, differentiated part by part.

``conv(cat(a, b), w) = conv(a, w_a) + conv(b, w_b)`` with ``w`` split along its input channels. The
forward pass stays one convolution. In the backward pass each part has a node of its own, so that
only one part and the gradient of one part are there at a time.
"""

from __future__ import annotations

__all__ = ["join"]

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pocketize.passes.shared.second_order import differentiate

aten = torch.ops.aten


def join(
    func: Any, parts: tuple[Tensor, ...], data: Tensor, args: tuple[Any, ...], kwargs: Any
) -> Tensor | None:
    """Run a convolution of a concatenation.

    Args:
        func: ``torch.conv1d``, ``conv2d`` or ``conv3d``.
        parts: what was concatenated along the channels, shapes ``(N, C_i, ...)``.
        data: the concatenation, shape ``(N, sum of C_i, ...)``.
        args: the call's arguments.
        kwargs: likewise.

    Returns:
        The result; ``None`` for a call that is to be made as it stands.
    """
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight, bias = given.get("weight"), given.get("bias")
    dims = data.ndim - 2
    geometry = [
        given.get(name, default) for name, default in zip(names[3:6], (1, 0, 1), strict=True)
    ]
    if given.get("groups", 1) != 1 or isinstance(geometry[1], str) or len(parts) < 2:
        return None
    if not isinstance(weight, Tensor) or weight.ndim != data.ndim:
        return None
    if any(p.ndim != data.ndim or p.dtype != data.dtype for p in parts):
        return None
    stride, padding, dilation = (_spread(value, dims) for value in geometry)
    like = _Convolution(stride, padding, dilation)
    with torch.no_grad():
        content = func(data, weight, bias, stride, padding, dilation)
    tokens, start = [], 0
    for part in parts:
        width = part.shape[1]
        own = weight.narrow(1, start, width)
        tokens.append(Part.apply(like, content, part, own))  # type: ignore[no-untyped-call]
        start += width
    made: Tensor = Join.apply((content,), bias, *tokens)  # type: ignore[no-untyped-call]
    return made


def _spread(value: Any, dims: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


class _Convolution:
    """The geometry of a convolution."""

    def __init__(self, stride: list[int], padding: list[int], dilation: list[int]) -> None:
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def backward(
        self, gradient: Tensor, data: Tensor, weight: Tensor, needed: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of data and weight, in their dtypes."""
        by_data, by_weight, _ = aten.convolution_backward(
            gradient,
            data.to(gradient.dtype),
            weight.to(gradient.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            1,
            [*needed, False],
        )
        return (
            None if by_data is None else by_data.to(data.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
        )


class Part(torch.autograd.Function):
    """The share of one part of a concatenation in the result."""

    @staticmethod
    def forward(
        ctx: Any, like: _Convolution, content: Tensor, part: Tensor, weight: Tensor
    ) -> Tensor:
        """Return a token of the result's shape, without content: one element, spread."""
        ctx.like = like
        ctx.save_for_backward(part, weight)
        return content.new_empty_strided(content.shape, (0,) * content.ndim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Differentiate by the part and by its slice of the weight."""
        (part, weight), needed = ctx.saved_tensors, list(ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():  # to be differentiated once more
            run = partial(_convolve, like=ctx.like, dtype=gradient.dtype)
            return None, None, *differentiate(run, (part, weight), needed, gradient)
        return None, None, *ctx.like.backward(gradient, part, weight, needed)


class Join(torch.autograd.Function):
    """The result, which was computed in one go, as the sum of the shares and the bias."""

    @staticmethod
    def forward(ctx: Any, content: tuple[Tensor], bias: Tensor | None, *tokens: Tensor) -> Tensor:
        """Return the result."""
        ctx.tokens, ctx.bias = len(tokens), None if bias is None else bias.dtype
        return content[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Hand the gradient on to all shares; the bias gets its sum over all positions."""
        by_bias = None
        if ctx.bias is not None and ctx.needs_input_grad[1]:
            dims = [d for d in range(gradient.ndim) if d != 1]
            by_bias = gradient.sum(dims).to(ctx.bias)
        return None, by_bias, *(gradient,) * ctx.tokens


def _convolve(data: Tensor, weight: Tensor, like: _Convolution, dtype: torch.dtype) -> Tensor:
    dims = len(like.stride)
    made: Tensor = aten.convolution(
        data, weight, None, like.stride, like.padding, like.dilation, False, [0] * dims, 1
    )
    return made.to(dtype)
