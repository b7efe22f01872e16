"""The conversions that the swaps propose: a block of cheaper layers replaces a convolution.

Where the convolution has values and they are to be carried over, the conversion computes the
decomposition itself, so that an edit needs to name the ranks only. Layers get their tensors from
the weight that they replace: they are on its device, of its dtype and memory format, and without
memory where it has none. Nothing is drawn at random.
"""

from __future__ import annotations

__all__ = [
    "ACTIVATIONS",
    "BOTTLENECK",
    "COMPACT",
    "NORMS",
    "SEPARABLE",
    "activation_layer",
    "conv_layer",
    "groups_for",
    "norm_layer",
    "numbers",
]

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from pocketize._torch import ConvNd
from pocketize.errors import RewriteError
from pocketize.initial.parameters import has_values
from pocketize.passes.swaps.blocks import (
    BottleneckBlock,
    CompactConvBlock,
    ConvBlock,
    SeparableBlock,
)
from pocketize.passes.swaps.decompositions import block_terms, channelwise, folded, tucker
from pocketize.plugin.conversions import conversion

_M = TypeVar("_M", bound=nn.Module)

_CONVS: dict[int, type[ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

_RUNNING = ("eps", "momentum", "affine", "track_running_stats")
#: Kind of a norm -> its classes by spatial rank, and the settings that are copied.
NORMS: dict[str, tuple[tuple[type[nn.Module], ...], tuple[str, ...]]] = {
    "BatchNorm": ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _RUNNING),
    "SyncBatchNorm": ((nn.SyncBatchNorm,) * 3, _RUNNING),
    "InstanceNorm": ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _RUNNING),
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


BOTTLENECK = "bottleneck"
SEPARABLE = "separable"
COMPACT = "compact-block"

_Sizes: TypeAlias = tuple[tuple[int, int, int], ...]
#: Attributes that every convolution has; all others were added by a user.
_STANDARD = frozenset(vars(nn.Conv1d(1, 1, 1, device="meta")))
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


@conversion(BOTTLENECK)
def to_bottleneck(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Put a bottleneck in the place of a convolution; its ranks are r_o and r_i."""

    def sizes(i: int, o: int, outer: int, inner: int) -> _Sizes:
        return (i, inner, 1), (inner, outer, 1), (outer, o, 1)

    def factors(weight: Tensor, outer: int, inner: int) -> Sequence[Tensor]:
        found = tucker(weight, outer, inner)
        return found.inner.T, found.core, found.outer

    return _to_block(BottleneckBlock, BOTTLENECK, module, options, sizes, factors)


@conversion(SEPARABLE)
def to_separable(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Put a separable block in the place of a convolution; its rank is the depth multiplier."""

    def sizes(i: int, o: int, multiplier: int) -> _Sizes:
        return (i, i * multiplier, i), (i * multiplier, o, 1)

    def factors(weight: Tensor, multiplier: int) -> Sequence[Tensor]:
        found = channelwise(weight, multiplier)
        return found.kernels, found.columns.permute(1, 0, 2)

    return _to_block(SeparableBlock, SEPARABLE, module, options, sizes, factors)


@conversion(COMPACT)
def to_compact(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Put a compact block in the place of a convolution; its ranks are channels and multiplier."""

    def sizes(i: int, o: int, channels: int, multiplier: int) -> _Sizes:
        wide = channels * multiplier
        return (i, channels, 1), (channels, wide, channels), (wide, o, 1)

    def factors(weight: Tensor, channels: int, multiplier: int) -> Sequence[Tensor]:
        found = block_terms(weight, channels, multiplier)
        return found.mix.T, found.kernels, found.columns

    return _to_block(CompactConvBlock, COMPACT, module, options, sizes, factors)


@torch.inference_mode(False)
@torch.no_grad()
def _to_block(
    kind: type[ConvBlock],
    name: str,
    module: nn.Module,
    options: Mapping[str, Any],
    sizes: Callable[..., _Sizes],
    factors: Callable[..., Sequence[Tensor]],
) -> nn.Module:
    """Make a block that has what the convolution had.

    Args:
        kind: the block's class.
        name: of the conversion.
        module: a convolution of 1 to 3 dimensions without groups.
        options: "ranks"; "shape", the weight's; "weights", "decompose" or "reset"; "norm" and
            "activation" inside, empty for none.
        sizes: from channels in and out and the ranks to those of each layer, and its groups.
        factors: from the weight (o, i, k) and the ranks to the weight of each layer.

    Raises:
        RewriteError: the module is no convolution of the shape that was planned for.
    """
    conv, ranks = _checked(module, options, name, 1 if name == SEPARABLE else 2)
    values: Sequence[Tensor | None] = (None,) * len(kind.convolutions)
    if options.get("weights") == "decompose" and has_values(conv.weight):
        values = factors(folded(conv.weight), *ranks)
    norm, activation = options.get("norm") or {}, options.get("activation") or {}
    layers = sizes(conv.in_channels, conv.out_channels, *ranks)
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for layer, (i, o, groups), value in zip(kind.convolutions, layers, values, strict=True):
        last = layer == kind.convolutions[-1]
        bias = conv._parameters["bias"] if last else None
        kernel = layer == kind.kernel
        chain[layer] = conv_layer(
            conv, (i, o), values=value, kernel=kernel, groups=groups, bias=bias
        )
        if norm and not last:
            chain[f"{layer}_norm"] = norm_layer(norm, o, conv)
        if activation and not last:
            chain[f"{layer}_activation"] = activation_layer(activation, o, conv)
    block = kind(chain)
    block.train(conv.training)
    for attribute, held in vars(conv).items():
        # The same tables: the handles that a user holds remove from them.
        if attribute in _HOOKS or attribute not in _STANDARD:
            vars(block)[attribute] = held
    return block


def _checked(
    module: nn.Module, options: Mapping[str, Any], name: str, wanted: int
) -> tuple[ConvNd, Sequence[int]]:
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
    if len(ranks) != wanted or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise RewriteError(f"{name}: expected {wanted} ranks of at least 1, got {ranks}")
    return module, ranks
