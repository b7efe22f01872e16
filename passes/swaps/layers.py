"""Layers for the inside of a block, made from data: convolutions, norms, activations by kind.

A layer gets its tensors from the weight that it replaces, so that it is on that weight's device, of
its dtype and memory format, and without memory where that has none. Nothing is drawn at random.
"""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "activation_layer",
    "conv_layer",
    "groups_for",
    "norm_layer",
    "numbers",
]

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from pocketize._torch import ConvNd
from pocketize.errors import RewriteError

_M = TypeVar("_M", bound=nn.Module)

_CONVS: dict[int, type[ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

#: Kind of a norm -> its classes by spatial rank, and the settings that are copied.
NORMS: dict[str, tuple[tuple[type[nn.Module], ...], tuple[str, ...]]] = {
    "BatchNorm": (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        ("eps", "momentum", "affine", "track_running_stats"),
    ),
    "SyncBatchNorm": (
        (nn.SyncBatchNorm,) * 3,
        ("eps", "momentum", "affine", "track_running_stats"),
    ),
    "InstanceNorm": (
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ("eps", "momentum", "affine", "track_running_stats"),
    ),
    "GroupNorm": ((nn.GroupNorm,) * 3, ("num_groups", "eps", "affine")),
}

#: Kind of an activation -> its class, and the settings that are copied.
ACTIVATIONS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "CELU": (nn.CELU, ("alpha", "inplace")),
    "ELU": (nn.ELU, ("alpha", "inplace")),
    "GELU": (nn.GELU, ("approximate",)),
    "Hardsigmoid": (nn.Hardsigmoid, ("inplace",)),
    "Hardswish": (nn.Hardswish, ("inplace",)),
    "Hardtanh": (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope", "inplace")),
    "Mish": (nn.Mish, ("inplace",)),
    "PReLU": (nn.PReLU, ("shared", "init")),
    "ReLU": (nn.ReLU, ("inplace",)),
    "SELU": (nn.SELU, ("inplace",)),
    "SiLU": (nn.SiLU, ("inplace",)),
    "Sigmoid": (nn.Sigmoid, ()),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
    "Tanh": (nn.Tanh, ()),
}


def conv_layer(
    like: ConvNd,
    channels: tuple[int, int],
    *,
    values: Tensor | None = None,
    kernel: bool = False,
    groups: int = 1,
    bias: nn.Parameter | None = None,
) -> nn.Module:
    """Return a convolution for the inside of a block.

    Args:
        like: the convolution that is replaced.
        channels: in and out.
        values: the weight, in any dtype and of any shape with as many elements; None for zeros.
        kernel: it has the kernel, stride, padding and dilation, and is not 1x1.
        groups: its groups.
        bias: its bias, the very parameter.
    """
    rank = len(like.kernel_size)
    arguments: dict[str, Any] = {"kernel_size": 1}
    if kernel:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        arguments = {name: getattr(like, name) for name in names}
    made = _CONVS[rank](*channels, **arguments, groups=groups, bias=False, device="meta")
    old = like.weight
    new = old.new_zeros(made.weight.shape)
    if values is not None:
        new.copy_(values.reshape(new.shape))
    last = _LAST.get(old.ndim)
    if last is not None and old.is_contiguous(memory_format=last) and not old.is_contiguous():
        new = new.contiguous(memory_format=last)
    made.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    made.register_parameter("bias", bias)
    return made


def norm_layer(settings: Mapping[str, Any], channels: int, like: ConvNd) -> nn.Module:
    """Return a norm.

    Args:
        settings: "kind" and the settings in :data:`NORMS`; of a group norm as many groups as
            divide the channels, at most as many as are set.
        channels: how many it norms.
        like: the convolution that is replaced.

    Raises:
        RewriteError: there is no such kind.
    """
    kind = settings.get("kind")
    if kind not in NORMS:
        raise RewriteError(f"expected a norm out of {', '.join(NORMS)}, got {kind!r}")
    classes, names = NORMS[kind]
    options = {name: settings[name] for name in names if name in settings}
    if kind == "GroupNorm":
        groups = groups_for(int(options.pop("num_groups", 1)), channels)
        made: nn.Module = nn.GroupNorm(groups, channels, **options, device="meta")
    else:
        made = classes[len(like.kernel_size) - 1](channels, **options, device="meta")
    return _with_tensors(made, like)


def groups_for(groups: int, channels: int) -> int:
    """Return the largest number of groups that divides the channels, at most the one given."""
    return next(n for n in range(min(groups, channels), 0, -1) if channels % n == 0)


def activation_layer(settings: Mapping[str, Any], channels: int, like: ConvNd) -> nn.Module:
    """Return an activation.

    Args:
        settings: "kind" and the settings in :data:`ACTIVATIONS`; a PReLU that is not "shared" has a
            slope for every channel.
        channels: how many come in.
        like: the convolution that is replaced.

    Raises:
        RewriteError: there is no such kind.
    """
    kind = settings.get("kind")
    if kind not in ACTIVATIONS:
        raise RewriteError(f"expected an activation out of {', '.join(ACTIVATIONS)}, got {kind!r}")
    made_by, names = ACTIVATIONS[kind]
    options = {name: settings[name] for name in names if name in settings}
    if kind == "PReLU":
        slopes = 1 if options.pop("shared", True) else channels
        return _with_tensors(nn.PReLU(slopes, **options, device="meta"), like)
    return made_by(**options)


def _with_tensors(made: _M, like: ConvNd) -> _M:
    """Give a layer that was built without memory tensors beside the weight, as they begin."""
    for tables in (made._parameters, made._buffers):
        held = cast(dict[str, Tensor | None], tables)
        for name, tensor in held.items():
            if tensor is None:
                continue
            dtype = like.weight.dtype if tensor.is_floating_point() else tensor.dtype
            new = like.weight.new_empty(tensor.shape, dtype=dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=like.weight.requires_grad)
            held[name] = new
    cast(Any, made).reset_parameters()
    return made


def numbers(module: nn.Module) -> int:
    """Return how many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())
