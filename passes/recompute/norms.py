"""Calls of norms: read from the model's code, made again, and differentiated with the activation.

Mean and deviation are small and kept, so that a norm is computed again in one pass over its input
instead of three, and its running statistics are left alone.
"""

from __future__ import annotations

__all__ = ["NORMS", "NormCall", "RecomputedCall", "Statistics", "normalise", "statistics_of"]

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize._torch import storage_key
from pocketize.passes.shared.norm_activation import FusedCall, NormActivation
from pocketize.passes.shared.norm_gradients import Elementwise, Norm, accumulation

aten = torch.ops.aten

#: The functions that modules call, with the kind of norm.
NORMS: dict[Any, str] = {
    F.batch_norm: "batch",
    F.instance_norm: "instance",
    F.group_norm: "group",
}
#: Operators with an argument that makes them use the statistics of the batch, and its position.
_BATCH_NORMS = {
    aten.native_batch_norm.default: 5,
    aten.cudnn_batch_norm.default: 5,
    aten.miopen_batch_norm.default: 5,
    aten._native_batch_norm_legit.default: 5,
    aten._native_batch_norm_legit.no_stats: 3,
}


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a norm found in its input.

    Attributes:
        mean: one number for each row that is normalised on its own: ``(C,)`` of a batch norm, which
            is ``(N * C,)`` of an instance norm, ``(N, G)`` of a group norm.
        invstd: one over the standard deviation, likewise.
        eps: was added to the variance.
        groups: of a group norm, otherwise ``None``.
    """

    mean: Tensor
    invstd: Tensor
    eps: float
    groups: int | None = None


@dataclass(frozen=True, eq=False)
class NormCall:
    """A call of one of :data:`NORMS`.

    Attributes:
        norm: what it computes.
        x: its input, shape ``(N, C, ...)``.
        weight: per channel, or ``None``.
        bias: likewise.
        mean: of its input, or a copy of the running mean where it normalises with that; ``None``
            if it is not known.
        invstd: likewise, one over the standard deviation.
    """

    norm: Norm
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None = None
    invstd: Tensor | None = None

    @classmethod
    def bind(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall | None:
        """Read a call; ``None`` for arguments that the function refuses, or that are not fused."""
        try:
            bound = inspect.signature(func).bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        given = bound.arguments
        x, eps = given["input"], given["eps"]
        if not isinstance(x, Tensor) or x.ndim < 2 or not x.numel():
            return None
        weight, bias, groups = given["weight"], given["bias"], given.get("num_groups", 0)
        own = given.get("training", given.get("use_input_stats", True))
        if own:
            return cls(Norm(NORMS[func], eps, groups), x, weight, bias)
        exact = accumulation(x.dtype)
        mean, var = given["running_mean"], given["running_var"]
        if mean is None or var is None:
            return None
        # Copies: a forward in training mode may write to them before the backward pass.
        mean, invstd = mean.detach().to(exact, copy=True), (var.detach().to(exact) + eps).rsqrt()
        return cls(Norm("batch", eps, from_input=False), x, weight, bias, mean, invstd)

    def activated(
        self,
        normed: Tensor,
        function: Callable[..., Tensor],
        slopes: Tensor | None,
        write: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """Activate the result of the norm, as one node of autograd's graph.

        Args:
            normed: the result.
            function: the activation, of a tensor and, for a PReLU, of its slopes.
            slopes: those.
            write: does the same to the memory of a tensor; then ``normed`` is an alias without
                history and becomes the result.
        """
        call = RecomputedCall(self.norm, AnyActivation(function, normed), write)
        given = self.x, self.weight, self.bias, slopes, self.mean, self.invstd
        return NormActivation.run(call, normed, *given)


class AnyActivation(Elementwise):
    """An activation that autograd differentiates.

    Args:
        function: the activation, of a tensor and, for a PReLU, of its slopes.
        normed: a tensor of the type that it is called on.
    """

    def __init__(self, function: Callable[..., Tensor], normed: Tensor) -> None:
        self._function, self._dtype = function, normed.dtype
        kind = normed.device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def apply(self, z: Tensor, slopes: Tensor | None) -> Tensor:
        """Activate, out of place, under the autocast of the forward pass."""
        with torch.autocast(*self._autocast):
            z = z.to(self._dtype)
            return self._function(z) if slopes is None else self._function(z, slopes)

    def backward(
        self, grad: Tensor, z: Tensor, y: Tensor | None, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the activation again and let autograd differentiate it."""
        n, groups, inner, size = z.shape
        with torch.enable_grad():
            leaf = z.to(self._dtype).view(n, groups * inner, size).detach().requires_grad_()
            knob = None if slopes is None else slopes.flatten().detach().requires_grad_()
            made = self.apply(leaf, knob)
        leaves = [leaf] if knob is None else [leaf, knob]
        by = torch.autograd.grad(made, leaves, grad.reshape(made.shape).to(made.dtype))
        shared = storage_key(by[0]) == storage_key(grad)
        dz = by[0].view(z.shape).to(z.dtype, copy=shared)
        return dz, None if knob is None else by[1].view(groups, inner)


class RecomputedCall(FusedCall):
    """A norm and an activation that keep the norm's input.

    Args:
        norm: the norm.
        activation: the activation.
        write: does the same to the memory of a tensor; None to leave that alone.
    """

    name: ClassVar[str] = "recompute"
    blocks: ClassVar[dict[str, int]] = {"cpu": 1 << 18, "": 1 << 20}

    def __init__(
        self, norm: Norm, activation: AnyActivation, write: Callable[[Tensor], Any] | None
    ) -> None:
        super().__init__(norm, activation)
        self._write = write

    def activate(self, normed: Tensor, slopes: Tensor | None) -> Tensor:
        """Activate, by the call that the model makes."""
        write, self._write = self._write, None
        if write is None:
            return super().activate(normed, slopes)
        write(normed)
        return normed


def statistics_of(func: Any, args: tuple[Any, ...], made: Any) -> Statistics | None:
    """Read the statistics that an operator returns beside its result.

    ``None`` if it has none, or has them in 16 bits, which is less than it worked with.
    """
    groups = None
    if func is aten.native_group_norm.default:
        groups = args[6]
    elif func not in _BATCH_NORMS or args[_BATCH_NORMS[func]] is not True:
        return None
    if made[1].dtype not in (torch.float32, torch.float64):
        return None
    return Statistics(made[1], made[2], args[-1], groups)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
    groups: int | None,
) -> Tensor:
    """Normalise with given :class:`Statistics`.

    Args:
        x: shape ``(N, C, ...)``.
        weight: shape ``(C,)``.
        bias: shape ``(C,)``.
        mean: see :class:`Statistics`; so are the others.
    """
    if not x.numel():
        return torch.empty_like(x)  # the kernels divide by numbers of elements
    if groups is None:
        var = invstd.pow(-2).sub_(eps)
        made: Tensor = aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return made
    count, channels = x.shape[:2]
    rows = x.reshape(1, count * channels, -1)
    wide = [t.repeat_interleave(channels // groups, 1).flatten() for t in (mean, invstd)]
    scale, shift = (None if t is None else t.repeat(count) for t in (weight, bias))
    return normalise(rows, scale, shift, wide[0], wide[1], eps, None).view(x.shape)
