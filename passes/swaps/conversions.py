"""The conversions that the swaps propose: a convolution makes place for a block.

Where the convolution has values and they are to be carried over, the conversion computes the
decomposition itself, so that an edit needs to name the ranks only.
"""

from __future__ import annotations

__all__ = ["BOTTLENECK", "COMPACT", "SEPARABLE"]

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from pocketize._torch import ConvNd
from pocketize.errors import RewriteError
from pocketize.initial.parameters import has_values
from pocketize.passes.swaps.blocks import BottleneckBlock, CompactBlock, ConvBlock, SeparableBlock
from pocketize.passes.swaps.blockterms import block_terms
from pocketize.passes.swaps.channelwise import channelwise
from pocketize.passes.swaps.layers import activation_layer, conv_layer, norm_layer
from pocketize.passes.swaps.tensors import folded
from pocketize.passes.swaps.tucker import tucker
from pocketize.plugin.conversions import conversion

BOTTLENECK = "bottleneck"
SEPARABLE = "separable"
COMPACT = "compact-block"

_B = TypeVar("_B", bound=ConvBlock)
#: Attributes that every convolution has; others are somebody's own.
_STANDARD = frozenset(vars(nn.Conv1d(1, 1, 1, device="meta")))
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


@conversion(BOTTLENECK)
@torch.inference_mode(False)
@torch.no_grad()
def to_bottleneck(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Put a bottleneck in the place of a convolution.

    Args:
        module: a convolution of 1 to 3 dimensions without groups.
        options: "ranks" r_o and r_i; "shape", the weight's; "weights", "decompose" or "reset";
            "norm" and "activation" inside, empty for none.
        root: the model.
    """
    conv, (outer, inner) = _checked(module, options, BOTTLENECK)
    reduce = spatial = expand = None
    if _carries(conv, options):
        factors = tucker(folded(conv.weight), outer, inner)
        reduce, spatial = factors.inner.T, factors.core
        expand = factors.outer
    i, o = conv.in_channels, conv.out_channels
    layers = OrderedDict(
        reduce=conv_layer(conv, (i, inner), values=reduce),
        spatial=conv_layer(conv, (inner, outer), values=spatial, kernel=True),
        expand=conv_layer(conv, (outer, o), values=expand, bias=_bias(conv)),
    )
    return _block(BottleneckBlock, layers, conv, options)


@conversion(SEPARABLE)
@torch.inference_mode(False)
@torch.no_grad()
def to_separable(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Put a depthwise separable convolution in the place of a convolution.

    Args:
        module: as for :func:`to_bottleneck`.
        options: as there; "ranks" is the depth multiplier alone.
        root: the model.
    """
    conv, (multiplier,) = _checked(module, options, SEPARABLE)
    depthwise = pointwise = None
    if _carries(conv, options):
        factors = channelwise(folded(conv.weight), multiplier)
        depthwise = factors.kernels
        pointwise = factors.columns.permute(1, 0, 2)
    i, o = conv.in_channels, conv.out_channels
    layers = OrderedDict(
        depthwise=conv_layer(conv, (i, i * multiplier), values=depthwise, kernel=True, groups=i),
        pointwise=conv_layer(conv, (i * multiplier, o), values=pointwise, bias=_bias(conv)),
    )
    return _block(SeparableBlock, layers, conv, options)


@conversion(COMPACT)
@torch.inference_mode(False)
@torch.no_grad()
def to_compact(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Put a compact block in the place of a convolution.

    Args:
        module: as for :func:`to_bottleneck`.
        options: as there; "ranks" are the channels between and the depth multiplier.
        root: the model.
    """
    conv, (channels, multiplier) = _checked(module, options, COMPACT)
    reduce = depthwise = expand = None
    if _carries(conv, options):
        factors = block_terms(folded(conv.weight), channels, multiplier)
        reduce, depthwise, expand = factors.mix.T, factors.kernels, factors.columns
    i, o, wide = conv.in_channels, conv.out_channels, channels * multiplier
    layers = OrderedDict(
        reduce=conv_layer(conv, (i, channels), values=reduce),
        depthwise=conv_layer(
            conv, (channels, wide), values=depthwise, kernel=True, groups=channels
        ),
        expand=conv_layer(conv, (wide, o), values=expand, bias=_bias(conv)),
    )
    return _block(CompactBlock, layers, conv, options)


def _checked(
    module: nn.Module, options: Mapping[str, Any], name: str
) -> tuple[ConvNd, Sequence[int]]:
    """Return the convolution and the ranks.

    Raises:
        RewriteError: the module is no convolution of the shape that was planned for.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups != 1:
        raise RewriteError(
            f"{name}: expected a convolution without groups, got {type(module).__name__}; the "
            "model was built with other settings than the one that was rewritten"
        )
    ranks, shape = tuple(options.get("ranks", ())), tuple(options.get("shape", ()))
    if tuple(module.weight.shape) != shape:
        raise RewriteError(
            f"{name}: expected a convolution with a weight of shape {shape}, got "
            f"{tuple(module.weight.shape)}; the model was built with other settings than the one "
            "that was rewritten"
        )
    wanted = 1 if name == SEPARABLE else 2
    if len(ranks) != wanted or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise RewriteError(f"{name}: expected {wanted} ranks of at least 1, got {ranks}")
    return module, ranks


def _bias(conv: ConvNd) -> nn.Parameter | None:
    return conv._parameters["bias"]


def _carries(conv: ConvNd, options: Mapping[str, Any]) -> bool:
    return options.get("weights") == "decompose" and has_values(conv.weight)


def _block(
    kind: type[_B], layers: OrderedDict[str, nn.Module], conv: ConvNd, options: Mapping[str, Any]
) -> _B:
    """Put norms and activations in between, and give the block what the convolution had."""
    norm, activation = options.get("norm") or {}, options.get("activation") or {}
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for name, layer in layers.items():
        chain[name] = layer
        if name == kind.convolutions[-1]:
            break
        width = int(getattr(layer, "out_channels", 0))
        if norm:
            chain[f"{name}_norm"] = norm_layer(norm, width, conv)
        if activation:
            chain[f"{name}_activation"] = activation_layer(activation, width, conv)
    block = kind(chain)
    block.train(conv.training)
    for name, value in vars(conv).items():
        # The same tables: the handles that a user holds remove from them.
        if name in _HOOKS or name not in _STANDARD:
            vars(block)[name] = value
    return block
