"""What an output element of a linear layer is a linear function of: the rows of a regression."""

from __future__ import annotations

__all__ = ["LAYERS", "groups_of", "matrix_of", "rows", "set_matrix"]

from collections.abc import Iterable
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)


def rows(layer: nn.Module, x: Tensor, places: Tensor, channels: slice, group: int) -> Tensor:
    """Return what the outputs at some places are computed of.

    Args:
        layer: a convolution, a transposed one, or a linear layer.
        x: its input: ``(N, C, *spatial)``, or ``(..., C)`` of a linear layer.
        places: ``(S,)``, indices into the flattened batch and spatial axes of the output.
        channels: which input channels, of those of the group.
        group: of the layer's groups.

    Returns:
        ``(S, channels * kernel)``: with :func:`matrix_of`, ``rows @ matrix`` and the bias are the
        layer's outputs there.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[places][:, channels]
    conv = cast(nn.Conv2d, layer)
    size = conv.in_channels // conv.groups
    x = x[:, group * size : (group + 1) * size][:, channels]
    flat, index = (
        _transposed(conv, x, places) if isinstance(layer, TRANSPOSED) else _plain(conv, x, places)
    )
    return flat[:, index].movedim(0, 1).flatten(1)


def _plain(conv: nn.Conv2d, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the padded input as ``(C, positions)``, and ``(S, kernel)`` indices into it."""
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        pads = [(span // 2, span - span // 2) for span in spans]
    elif conv.padding == "valid":
        pads = [(0, 0)] * len(spans)
    else:
        pads = [(int(p), int(p)) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
    sizes = [
        (length - span - 1) // s + 1
        for length, span, s in zip(x.shape[2:], spans, conv.stride, strict=True)
    ]
    batch, *at = torch.unravel_index(places, (x.shape[0], *sizes))
    index = batch[:, None]
    for axis, kernel in enumerate(_offsets(conv)):
        along = at[axis][:, None] * conv.stride[axis] + kernel * conv.dilation[axis]
        index = index * x.shape[2 + axis] + along
    return x.movedim(1, 0).flatten(1), index


def _transposed(conv: nn.Conv2d, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a transposed convolution; where nothing is read, the index is that of a zero."""
    sizes = [
        (length - 1) * s - 2 * int(p) + d * (k - 1) + int(more) + 1
        for length, s, p, d, k, more in zip(
            x.shape[2:],
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.kernel_size,
            cast(nn.ConvTranspose2d, conv).output_padding,
            strict=True,
        )
    ]
    batch, *at = torch.unravel_index(places, (x.shape[0], *sizes))
    index, inside = batch[:, None], torch.ones(1, dtype=torch.bool, device=x.device)
    for axis, kernel in enumerate(_offsets(conv)):
        along = at[axis][:, None] + int(conv.padding[axis]) - kernel * conv.dilation[axis]
        steps = along // conv.stride[axis]
        inside = inside & (along % conv.stride[axis] == 0) & (steps >= 0)
        inside = inside & (steps < x.shape[2 + axis])
        index = index * x.shape[2 + axis] + steps
    flat = x.movedim(1, 0).flatten(1)
    index = torch.where(inside, index, flat.shape[1])
    return F.pad(flat, (0, 1)), index


def _offsets(conv: nn.Conv2d) -> Iterable[Tensor]:
    """For each axis, where each element of the kernel lies on it: ``(kernel,)``."""
    grid = torch.tensor(list(product(*map(range, conv.kernel_size))), device=conv.weight.device)
    return grid.unbind(1)


def matrix_of(layer: nn.Module, group: int, channels: slice) -> Tensor:
    """Return a layer's weight as ``(channels * kernel, outputs of the group)``."""
    part = _part(layer, group, channels)
    if isinstance(layer, TRANSPOSED):
        return part.flatten(2).transpose(1, 2).flatten(0, 1)
    return part.flatten(1).T


def set_matrix(layer: nn.Module, group: int, channels: slice, matrix: Tensor) -> None:
    """Write what :func:`matrix_of` returns."""
    part = _part(layer, group, channels)
    if isinstance(layer, TRANSPOSED):
        inputs, outputs = part.shape[:2]
        part.copy_(matrix.reshape(inputs, -1, outputs).transpose(1, 2).reshape(part.shape))
    else:
        part.copy_(matrix.T.reshape(part.shape))


def _part(layer: nn.Module, group: int, channels: slice) -> Tensor:
    """Return the weight of some input channels of a group, as a view."""
    weight = cast(Tensor, layer.weight).detach()
    size = weight.shape[0] // groups_of(layer)
    own = weight[group * size : (group + 1) * size]  # outputs, or inputs of a transposed one
    return own[channels] if isinstance(layer, TRANSPOSED) else own[:, channels]


def groups_of(layer: nn.Module) -> int:
    """Return the groups of a layer; 1 of a linear one."""
    groups: int = getattr(layer, "groups", 1)
    return groups
