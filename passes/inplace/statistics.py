"""The forward of every norm by torch's own kernels, with the statistics that a backward needs."""

from __future__ import annotations

__all__ = ["NormResult", "normalise"]

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from pocketize.errors import ExecutionError
from pocketize.passes.shared.norm_gradients import Norm, accumulation, sum_over_processes

_ATEN = torch.ops.aten
#: Weight, bias, running mean and running variance.
_Parameters: TypeAlias = "tuple[Tensor | None, ...]"


@dataclass(frozen=True)
class NormResult:
    """What a norm has computed.

    Attributes:
        output: the normalised tensor, a new one.
        mean: mean of each channel, instance or group, in at least float32.
        invstd: ``1 / sqrt(var + eps)`` of the same.
        count: over how many elements of all processes each mean was taken; None for one process.
        running_mean: the new running mean; None if there is none or it does not change.
        running_var: the new running variance, which counts one element less, as torch's does.
    """

    output: Tensor
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    count: Tensor | None = None


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Norm,
) -> NormResult:
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
        weight = ones if weight is None else weight
        bias = torch.zeros_like(ones) if bias is None else bias
        given = (weight, bias, running_mean, running_var)
        weight, bias, running_mean, running_var = (None if t is None else t.float() for t in given)
    kinds = {"batch": _batch, "instance": _instance, "group": _group}
    run = kinds[norm.kind] if norm.process_group is None else _over_processes
    run = run if norm.from_input else _with_running
    return run(x, (weight, bias, running_mean, running_var), norm)


def _batch(x: Tensor, parameters: _Parameters, norm: Norm) -> NormResult:
    weight, bias, running_mean, running_var = parameters
    if running_mean is None:
        made = _ATEN._native_batch_norm_legit.no_stats(
            x, weight, bias, True, norm.momentum, norm.eps
        )
        return NormResult(*made)
    output, mean, invstd, new_mean, new_var = _ATEN._native_batch_norm_legit_functional(
        x, weight, bias, running_mean, running_var, True, norm.momentum, norm.eps
    )
    return NormResult(output, mean, invstd, new_mean, new_var)


def _instance(x: Tensor, parameters: _Parameters, norm: Norm) -> NormResult:
    """Every channel of every sample is a channel of one sample; running ones are averaged."""
    n, channels = x.shape[:2]
    many = tuple(None if t is None else t.repeat(n) for t in parameters)
    done = _batch(x.contiguous().view(1, n * channels, *x.shape[2:]), many, norm)
    mean, var = (
        None if t is None else t.view(n, channels).mean(0)
        for t in (done.running_mean, done.running_var)
    )
    # No view: autograd would not let anybody write into one that a function of ours returns.
    output = _ATEN._unsafe_view(done.output, x.shape)
    return replace(done, output=output, running_mean=mean, running_var=var)


def _group(x: Tensor, parameters: _Parameters, norm: Norm) -> NormResult:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if x.device.type != "cpu" or last is None or not x.is_contiguous(memory_format=last):
        x = x.contiguous()
    n, channels, *sizes = x.shape
    made = _ATEN.native_group_norm(
        x, *parameters[:2], n, channels, math.prod(sizes), norm.groups, norm.eps
    )
    return NormResult(*made)


def _with_running(x: Tensor, parameters: _Parameters, norm: Norm) -> NormResult:
    weight, bias, mean, var = parameters
    if mean is None or var is None:
        raise ExecutionError("in-place-norm: this norm has no running statistics to use")
    output = _ATEN.native_batch_norm(x, weight, bias, mean, var, False, 0.0, norm.eps)[0]
    # Copies: a step in training mode may write to the buffers before this one's backward runs.
    return NormResult(output, mean.clone(), torch.rsqrt(var + norm.eps))


def _over_processes(x: Tensor, parameters: _Parameters, norm: Norm) -> NormResult:
    """Batch statistics of all processes; a batch may be larger here than there, or empty."""
    weight, bias, running_mean, running_var = parameters
    exact = accumulation(x.dtype)
    size = x.shape[0] * math.prod(x.shape[2:])
    if size:
        axes = [0, *range(2, x.ndim)]
        local_var, local_mean = torch.var_mean(x.to(exact), axes, correction=0)
    else:
        local_mean = torch.zeros(x.shape[1], dtype=exact, device=x.device)
        local_var = torch.zeros_like(local_mean)
    count = local_mean.new_full((1,), size)
    sums = sum_over_processes(torch.cat([count, local_mean * size]), norm.process_group)
    total, mean = sums[:1], sums[1:] / sums[:1]
    squares = (local_var + (local_mean - mean).square()) * size
    squares = sum_over_processes(squares, norm.process_group)
    var = squares / total
    output = _ATEN.native_batch_norm(x, weight, bias, mean, var, False, 0.0, norm.eps)[0]
    done = NormResult(output, mean, torch.rsqrt(var + norm.eps), count=total)
    if running_mean is None or running_var is None:
        return done
    unbiased = squares / (total - 1)
    return replace(
        done,
        running_mean=torch.lerp(running_mean.to(exact), mean, norm.momentum),
        running_var=torch.lerp(running_var.to(exact), unbiased, norm.momentum),
    )
