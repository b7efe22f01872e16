"""Norm and activation as one node of autograd's graph that keeps only the norm's input."""

from __future__ import annotations

__all__ = ["NormAct", "NormCall"]

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize._torch import is_batched
from pocketize.passes.recompute.pieces import piecewise
from pocketize.passes.recompute.statistics import Statistics
from pocketize.passes.shared.second_order import aliases_of_hooked, differentiate

Activation = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class NormCall:
    """A call of ``F.batch_norm``, ``F.instance_norm`` or ``F.group_norm``.

    Attributes:
        func: the function.
        x: its input, shape ``(N, C, ...)``.
        weight: per channel, or ``None``.
        bias: likewise.
        mean: a copy of the running mean, where it normalises with that.
        var: likewise the variance.
        groups: number of groups of channels that are normalised together; ``None`` where channels
            are independent.
        eps: added to the variance.
        dtype: of its result.
        statistics: what it found in ``x``; ``None`` if that is not known, or was not asked for.
    """

    func: Any
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    groups: int | None
    eps: float
    dtype: torch.dtype = torch.float32
    statistics: Statistics | None = None

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
            mean=None if own else _copy(given["running_mean"]),
            var=None if own else _copy(given["running_var"]),
            groups=given.get("num_groups"),
            eps=given["eps"],
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors of the call: ``x``, weight, bias, running statistics, its own statistics."""
        own = self.statistics
        found = (None, None) if own is None else (own.mean, own.rstd)
        return self.x, self.weight, self.bias, self.mean, self.var, *found

    def bare(self) -> NormCall:
        """The call without its tensors, to be kept beside them."""
        nothing = dict.fromkeys(("x", "weight", "bias", "mean", "var", "statistics"))
        return replace(self, **nothing)  # type: ignore[arg-type]

    def run(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Normalise again, with fresh statistics; running statistics stay as they are."""
        x, weight, bias, mean, var = tensors[:5]
        assert x is not None
        own = mean is None
        if self.groups is not None:
            return F.group_norm(x, self.groups, weight, bias, self.eps)
        norm = F.batch_norm if self.func is F.batch_norm else F.instance_norm
        made: Tensor = norm(x, mean, var, weight, bias, own, 0.0, self.eps)
        return made


class NormAct(torch.autograd.Function):
    """``activation(norm(x))`` from a norm that has already run.

    Saved for the backward pass: ``x``, weight and bias, statistics, and parameters of the
    activation.
    """

    @staticmethod
    def run(
        call: NormCall,
        normed: Tensor,
        activation: Activation,
        extra: Sequence[Tensor],
        in_place: Callable[[Tensor], Any] | None,
    ) -> Tensor:
        """Apply the activation.

        Args:
            call: how the input was normalised.
            normed: the result of that.
            activation: a function of a tensor, and of the tensors in ``extra``.
            extra: parameters of the activation, such as the slopes of PReLU: one number, or one for
                each channel.
            in_place: does the same to the memory of a tensor; then ``normed`` is an alias without
                history and becomes the result.
        """
        state = _Autocast.now(normed.device.type)
        what = call.bare(), activation, state, normed, in_place
        given = aliases_of_hooked([*call.tensors, *extra])
        made: Tensor = NormAct.apply(what, *given)  # type: ignore[no-untyped-call]
        return made

    @staticmethod
    def forward(ctx: Any, what: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        """Activate what is already normalised."""
        ctx.call, ctx.activation, ctx.state, normed, in_place = what
        ctx.save_for_backward(*tensors)
        if in_place is not None:
            made: Tensor = normed
            in_place(made)
        else:
            made = ctx.activation(normed, *tensors[7:])
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Differentiate norm and activation, in pieces where the statistics are known."""
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        # Or it is to be differentiated once more, or stands for many.
        if not torch.is_grad_enabled() and not is_batched(gradient):
            with ctx.state.again():
                found = piecewise(ctx.call, ctx.activation, tensors, needed, gradient)
            if found is not None:
                return None, *found

        def run(*given: Tensor | None) -> Tensor:
            with ctx.state.again():
                made: Tensor = ctx.activation(ctx.call.run(given), *given[7:])
            return made

        return None, *differentiate(run, tensors, needed, gradient)


def _copy(tensor: Tensor | None) -> Tensor | None:
    """Copy running statistics: a forward in training mode may write to them before the backward."""
    return None if tensor is None else tensor.detach().clone()


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
