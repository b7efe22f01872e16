"""Norm and activation as one node of autograd's graph that keeps only the norm's input."""

from __future__ import annotations

__all__ = ["NormAct", "NormCall"]

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[..., Tensor]

#: A gradient larger than this is worked out in pieces, of which there are at most so many.
_PIECE_BYTES = 4 * 2**20
_PIECES = 16


@dataclass(frozen=True, eq=False)
class NormCall:
    """A call of ``F.batch_norm``, ``F.instance_norm`` or ``F.group_norm``.

    Attributes:
        func: the function.
        x: its input, shape ``(N, C, ...)``.
        weight: per channel, or ``None``.
        bias: likewise.
        mean: running mean, where it normalises with that.
        var: likewise the variance.
        groups: number of groups of channels that are normalised together; ``None`` where channels
            are independent.
        eps: added to the variance.
    """

    func: Any
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    groups: int | None
    eps: float

    @classmethod
    def bind(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall | None:
        """Read a call; ``None`` where its arguments do not fit (the function will say so)."""
        try:
            bound = inspect.signature(func).bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        given = bound.arguments
        x = given["input"]
        if not isinstance(x, Tensor) or x.ndim < 2:
            return None
        own = given.get("training", given.get("use_input_stats", True))
        return cls(
            func=func,
            x=x,
            weight=given["weight"],
            bias=given["bias"],
            mean=None if own else given["running_mean"],
            var=None if own else given["running_var"],
            groups=given.get("num_groups"),
            eps=given["eps"],
        )

    def run(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        groups: int | None,
    ) -> Tensor:
        """Normalise some channels again; running statistics stay as they are."""
        own = mean is None
        if self.func is F.batch_norm:
            return F.batch_norm(x, mean, var, weight, bias, own, 0.0, self.eps)
        if self.func is F.instance_norm:
            return F.instance_norm(x, mean, var, weight, bias, own, 0.0, self.eps)
        assert groups is not None
        return F.group_norm(x, groups, weight, bias, self.eps)


class NormAct(torch.autograd.Function):
    """``activation(norm(x))`` from a norm that has already run.

    Saved for the backward pass: ``x``, weight and bias, the running statistics where they are used,
    and parameters of the activation.
    """

    @staticmethod
    def run(
        call: NormCall, normed: Tensor, activation: Activation, extra: Sequence[Tensor]
    ) -> Tensor:
        """Apply the activation.

        Args:
            call: how the input was normalised.
            normed: the result of that.
            activation: a function of a tensor, and of the tensors in ``extra``.
            extra: parameters of the activation, such as the slopes of PReLU: one number, or one for
                each channel.
        """
        state = _Autocast.now(normed.device.type)
        made: Tensor = NormAct.apply(
            (call, activation, state, normed),
            call.x,
            call.weight,
            call.bias,
            call.mean,
            call.var,
            *extra,
        )
        return made

    @staticmethod
    def forward(ctx: Any, what: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        """Activate what is already normalised."""
        call, activation, ctx.state, normed = what
        # The call holds tensors; what is kept of it must not.
        ctx.call = NormCall(call.func, *(None,) * 5, call.groups, call.eps)  # type: ignore[arg-type]
        ctx.activation = activation
        ctx.save_for_backward(*tensors)
        made: Tensor = activation(normed, *tensors[5:])
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Differentiate norm and activation, some channels at a time."""
        tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # to be differentiated once more
            return None, *_whole(ctx, tensors, needed, gradient)
        x = tensors[0]
        units = ctx.call.groups or x.shape[1]
        width = x.shape[1] // units
        count = 1
        if x.is_contiguous():
            size = x.numel() * x.element_size()
            count = max(1, min(units, _PIECES, size // _PIECE_BYTES))
        whole = torch.empty_like(x) if needed[0] else None
        parts: list[tuple[Tensor | None, ...]] = []
        bounds = [units * i // count for i in range(count + 1)]
        for low, high in zip(bounds, bounds[1:], strict=False):
            rows = slice(low * width, high * width)
            piece = [_rows(t, rows, x.shape[1], first=t is x) for t in tensors]
            groups = None if ctx.call.groups is None else high - low
            grads = _differentiate(ctx, piece, needed, gradient[:, rows], groups)
            if whole is not None:
                whole[:, rows] = grads[0]
            parts.append(grads[1:])
        rest = [
            _together(tensors[i + 1], [part[i] for part in parts], x.shape[1])
            for i in range(len(tensors) - 1)
        ]
        return None, whole, *rest


def _rows(tensor: Tensor | None, rows: slice, channels: int, *, first: bool) -> Tensor | None:
    if tensor is None or first:
        return None if tensor is None else tensor[:, rows]
    return tensor[rows] if tensor.numel() == channels else tensor


def _together(whole: Tensor | None, parts: list[Tensor | None], channels: int) -> Tensor | None:
    """Join the gradients of the pieces of a parameter: one after the other, or added up."""
    given = [part for part in parts if part is not None]
    if whole is None or not given:
        return None
    if whole.numel() == channels and len(given) > 1:
        return torch.cat(given)
    total = given[0]
    for part in given[1:]:
        total = total + part
    return total


def _differentiate(
    ctx: Any,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradient: Tensor,
    groups: int | None,
) -> tuple[Tensor | None, ...]:
    leaves = [
        None if t is None else t.detach().requires_grad_(n)
        for t, n in zip(tensors, needed, strict=True)
    ]
    with torch.enable_grad(), ctx.state.again():
        normed = ctx.call.run(*leaves[:5], groups)
        made = ctx.activation(normed, *leaves[5:])
    asked = [leaf for leaf, n in zip(leaves, needed, strict=True) if n and leaf is not None]
    found = iter(torch.autograd.grad(made, asked, gradient, allow_unused=True))
    return tuple(
        next(found) if n and leaf is not None else None
        for leaf, n in zip(leaves, needed, strict=True)
    )


def _whole(
    ctx: Any, tensors: Sequence[Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    with ctx.state.again():
        normed = ctx.call.run(*tensors[:5], ctx.call.groups)
        made = ctx.activation(normed, *tensors[5:])
    asked = [t for t, n in zip(tensors, needed, strict=True) if n and t is not None]
    found = iter(torch.autograd.grad(made, asked, gradient, allow_unused=True, create_graph=True))
    return tuple(
        next(found) if n and t is not None else None for t, n in zip(tensors, needed, strict=True)
    )


@dataclass(frozen=True)
class _Autocast:
    """The state of autocast for one type of device, to be had again in the backward pass."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> _Autocast:
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def again(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, self.enabled)
