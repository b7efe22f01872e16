"""The gradient of ``activation(norm(x))``, some channels at a time.

Channels (of a group norm: groups) do not depend on each other. So norm and activation are built
again for a few of them, differentiated, and what that took is used again for the next few. Beside
the gradient itself nothing is ever there at full size.
"""

from __future__ import annotations

__all__ = ["piecewise"]

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize.passes.recompute.statistics import normalise

aten = torch.ops.aten
Gradients = tuple[Tensor | None, ...]

#: Pieces are not larger than this, as far as channels allow.
_PIECE_BYTES = 2 * 2**20


def piecewise(
    call: Any,
    activation: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradient: Tensor,
) -> Gradients | None:
    """Differentiate.

    Args:
        call: the norm, a ``NormCall`` without tensors.
        activation: elementwise, with the parameters below.
        tensors: ``x`` of shape ``(N, C, ...)``, weight, bias, running mean and variance (or
            ``None``), mean and rstd (or ``None``), parameters of the activation.
        needed: which of them need a gradient.
        gradient: of the result, shape of ``x``.

    Sixteen bits are worked on in float32, as the norms themselves do.

    Returns:
        The gradients; ``None`` where this way is not open.
    """
    x, weight, bias, mean, var, found_mean, found_rstd, *extra = tensors
    if x is None or not x.is_contiguous() or not x.numel():
        return None  # of no elements: the kernels divide by their number
    if any(p.numel() not in (1, x.shape[1]) for p in extra if p is not None):
        return None
    count, channels = x.shape[:2]
    by_sample = call.func is F.instance_norm
    times = count if by_sample else 1
    rows = x.view(1, count * channels, *x.shape[2:]) if by_sample else x
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    total = rows.shape[1]
    unit = channels // call.groups if call.groups else 1
    steps = total // unit
    pieces = max(1, min(steps, x.numel() * kind.itemsize // _PIECE_BYTES))
    grads = gradient.reshape(rows.shape)
    whole = torch.empty_like(rows) if needed[0] else None
    wide = [_spread(t, times, channels) for t in (weight, bias, mean, var)]
    wide_extra = [_spread(t, times, channels) for t in extra]
    want = [needed[0], needed[1], needed[2]]
    parts: list[Gradients] = []
    for low, high in pairwise(steps * i // pieces for i in range(pieces + 1)):
        here = slice(low * unit, high * unit)
        piece = rows[:, here].to(kind).contiguous()
        own = [_cut(t, here, total, kind) for t in wide]
        knobs = [_cut(t, here, total) for t in wide_extra]
        stats = None
        if mean is None:
            stats = _cut_statistics(call, found_mean, found_rstd, slice(low, high), here)
            stats = stats or _statistics(call, piece, high - low)
        normed = _normed(call, piece, own, stats, high - low).to(call.dtype)
        by_normed, by_knobs = _activated(activation, normed, knobs, needed[7:], grads[:, here])
        del normed
        by_normed = by_normed.to(kind).contiguous()
        by_piece, by_weight, by_bias = _back(call, by_normed, piece, own, stats, high - low, want)
        if whole is not None and by_piece is not None:
            whole[:, here] = by_piece
        parts.append((by_weight, by_bias, *by_knobs))
    by_weight, by_bias, *by_extra = (
        _joined(t, [part[i] for part in parts], times, total)
        for i, t in enumerate((weight, bias, *extra))
    )
    by_x = None if whole is None else whole.view(x.shape)
    return by_x, by_weight, by_bias, None, None, None, None, *by_extra


def _spread(tensor: Tensor | None, times: int, channels: int) -> Tensor | None:
    """Repeat what there is one of for each channel, once for each sample."""
    if tensor is None or times == 1 or tensor.numel() != channels:
        return tensor
    return tensor.repeat(times)


def _cut(
    tensor: Tensor | None, here: slice, total: int, kind: torch.dtype | None = None
) -> Tensor | None:
    if tensor is None:
        return None
    part = tensor[here] if tensor.numel() == total else tensor
    return part if kind is None else part.to(kind)


def _statistics(call: Any, piece: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Find the statistics of a few channels, shapes as :class:`Statistics` has them."""
    if call.groups:
        grouped = piece.view(piece.shape[0], groups, -1)
        var, mean = torch.var_mean(grouped, 2, correction=0)
    else:
        dims = [d for d in range(piece.ndim) if d != 1]
        var, mean = torch.var_mean(piece, dims, correction=0)
    return mean, var.add_(call.eps).rsqrt_()


def _cut_statistics(
    call: Any, mean: Tensor | None, rstd: Tensor | None, steps: slice, here: slice
) -> tuple[Tensor, Tensor] | None:
    if mean is None or rstd is None:
        return None
    if call.groups:
        return mean[:, steps].contiguous(), rstd[:, steps].contiguous()
    return mean[here], rstd[here]


def _normed(
    call: Any,
    piece: Tensor,
    own: Sequence[Tensor | None],
    stats: tuple[Tensor, Tensor] | None,
    groups: int,
) -> Tensor:
    weight, bias, mean, var = own
    if stats is None:
        made: Tensor = aten.native_batch_norm(piece, weight, bias, mean, var, False, 0.0, call.eps)[
            0
        ]
        return made
    return normalise(piece, weight, bias, *stats, call.eps, groups if call.groups else None)


def _activated(
    activation: Callable[..., Tensor],
    normed: Tensor,
    knobs: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradient: Tensor,
) -> tuple[Tensor, Gradients]:
    with torch.enable_grad():
        leaf = normed.detach().requires_grad_()
        given = [
            None if k is None else k.detach().requires_grad_(n)
            for k, n in zip(knobs, needed, strict=True)
        ]
        made = activation(leaf, *given)
    asked = [k for k, n in zip(given, needed, strict=True) if n and k is not None]
    by_normed, *found = torch.autograd.grad(made, [leaf, *asked], gradient)
    left = iter(found)
    return by_normed, tuple(
        next(left) if n and k is not None else None for k, n in zip(given, needed, strict=True)
    )


def _back(
    call: Any,
    gradient: Tensor,
    piece: Tensor,
    own: Sequence[Tensor | None],
    stats: tuple[Tensor, Tensor] | None,
    groups: int,
    want: list[bool],
) -> Gradients:
    weight, _, mean, var = own
    if call.groups and stats is not None:
        count, channels = piece.shape[:2]
        positions = piece.shape[2:].numel()
        made: Gradients = aten.native_group_norm_backward(
            gradient, piece, *stats, weight, count, channels, positions, groups, want
        )
        return made
    train = stats is not None
    saved = stats or (None, None)
    found: Gradients = aten.native_batch_norm_backward(
        gradient, piece, weight, mean, var, *saved, train, call.eps, want
    )
    return found


def _joined(
    whole: Tensor | None, parts: Sequence[Tensor | None], times: int, total: int
) -> Tensor | None:
    """Join the gradients of the pieces of a parameter: one after the other, or added up."""
    given = [part for part in parts if part is not None]
    if whole is None or not given:
        return None
    if whole.numel() * times == total:
        joined = torch.cat(given) if len(given) > 1 else given[0]
        return (joined.view(times, -1).sum(0) if times > 1 else joined).to(whole.dtype)
    return torch.stack(given).sum(0).to(whole.dtype)
