"""The forward of every norm by torch's own kernels, with the statistics that a backward needs."""

from __future__ import annotations

__all__ = ["Normalised", "normalise", "sum_over_processes"]

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pocketize.errors import ExecutionError

if TYPE_CHECKING:
    from pocketize.passes.inplace.functions import Norm

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Normalised:
    """What a norm has computed.

    Attributes:
        output: the normalised tensor, a new one.
        mean: mean of each channel, instance or group, in at least float32.
        invstd: ``1 / sqrt(var + eps)`` of the same.
        count: how many elements each mean was taken over.
        running_mean: the new running mean; None if there is none or it does not change.
        running_var: the new running variance, which counts one element less, as torch's does.
    """

    output: Tensor
    mean: Tensor
    invstd: Tensor
    count: Tensor | float
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
) -> Normalised:
    """Run a norm as torch does, with statistics in float32 where the input has 16 bits.

    Args:
        x: (N, C, ...).
        weight: gamma of shape (C,), or None.
        bias: beta of shape (C,), or None.
        running_mean: of shape (C,), or None; not written to.
        running_var: of shape (C,), or None; not written to.
        norm: the norm.
    """
    if x.dtype.itemsize < 4:
        # torch keeps statistics in the input's type unless some parameter has a wider one.
        ones = x.new_ones(x.shape[1], dtype=torch.float32)
        weight = ones if weight is None else weight.float()
        bias = torch.zeros_like(ones) if bias is None else bias.float()
        running_mean = None if running_mean is None else running_mean.float()
        running_var = None if running_var is None else running_var.float()
    if not norm.from_input:
        return _with_running(x, weight, bias, running_mean, running_var, norm)
    if norm.kind == "group":
        return _group(x, weight, bias, norm)
    if norm.process_group is not None:
        return _over_processes(x, weight, bias, running_mean, running_var, norm)
    if norm.kind == "instance":
        return _instance(x, weight, bias, running_mean, running_var, norm)
    return _batch(x, weight, bias, running_mean, running_var, norm)


def _batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
) -> Normalised:
    count = float(x.shape[0] * math.prod(x.shape[2:]))
    if running_mean is None:
        output, mean, invstd = _ATEN._native_batch_norm_legit.no_stats(
            x, weight, bias, True, norm.momentum, norm.eps
        )
        return Normalised(output, mean, invstd, count)
    output, mean, invstd, new_mean, new_var = _ATEN._native_batch_norm_legit_functional(
        x, weight, bias, running_mean, running_var, True, norm.momentum, norm.eps
    )
    return Normalised(output, mean, invstd, count, new_mean, new_var)


def _instance(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
) -> Normalised:
    """Every channel of every sample is a channel of one sample; running ones are averaged."""
    n, channels = x.shape[:2]
    w, b, mean, var = (
        None if t is None else t.repeat(n) for t in (weight, bias, running_mean, running_var)
    )
    done = _batch(x.contiguous().view(1, n * channels, *x.shape[2:]), w, b, mean, var, norm)
    mean, var = (
        None if t is None else t.view(n, channels).mean(0)
        for t in (done.running_mean, done.running_var)
    )
    # No view: autograd would not let anybody write into one that a function of ours returns.
    output = _ATEN._unsafe_view(done.output, x.shape)
    return replace(done, output=output, running_mean=mean, running_var=var)


def _group(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Normalised:
    n, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    if x.device.type != "cpu" or not _channels_last(x):
        x = x.contiguous()
    output, mean, invstd = _ATEN.native_group_norm(
        x, weight, bias, n, channels, size, norm.groups, norm.eps
    )
    return Normalised(output, mean, invstd, float(size * (channels // norm.groups)))


def _channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and x.is_contiguous(memory_format=formats[x.ndim])


def _with_running(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    norm: Norm,
) -> Normalised:
    if mean is None or var is None:
        raise ExecutionError("in-place-norm: this norm has no running statistics to use")
    output = _ATEN.native_batch_norm(x, weight, bias, mean, var, False, 0.0, norm.eps)[0]
    # Copies: a step in training mode may write to the buffers before this one's backward runs.
    return Normalised(output, mean.clone(), torch.rsqrt(var + norm.eps), 1.0)


def _over_processes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
) -> Normalised:
    """Batch statistics of all processes; a batch may be larger here than there, or empty."""
    exact = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    axes = [0, *range(2, x.ndim)]
    size = x.shape[0] * math.prod(x.shape[2:])
    if size:
        local_var, local_mean = torch.var_mean(x.to(exact), axes, correction=0)
    else:
        local_mean = torch.zeros(x.shape[1], dtype=exact, device=x.device)
        local_var = torch.zeros_like(local_mean)
    count = local_mean.new_full((1,), size)
    total, sums = _split(
        sum_over_processes(torch.cat([count, local_mean * size]), norm.process_group)
    )
    mean = sums / total
    squares = (local_var + (local_mean - mean).square()) * size
    squares = sum_over_processes(squares, norm.process_group)
    var = squares / total
    output = _ATEN.native_batch_norm(x, weight, bias, mean, var, False, 0.0, norm.eps)[0]
    done = Normalised(output, mean, torch.rsqrt(var + norm.eps), total)
    if running_mean is None or running_var is None:
        return done
    unbiased = squares / (total - 1)
    return replace(
        done,
        running_mean=torch.lerp(running_mean.to(exact), mean, norm.momentum),
        running_var=torch.lerp(running_var.to(exact), unbiased, norm.momentum),
    )


def _split(joined: Tensor) -> tuple[Tensor, Tensor]:
    return joined[:1], joined[1:]


def sum_over_processes(values: Tensor, group: Any) -> Tensor:
    """Return the sum of a tensor over the processes of a group."""
    values = values.contiguous()
    dist.all_reduce(values, group=group)  # type: ignore[no-untyped-call, unused-ignore]
    return values
