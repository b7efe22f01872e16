"""What replaces a convolution: a chain of cheaper layers with the same ends, and its conversions.

The layers run in the order in which they are registered, and the middle one, ``spatial`` or
``depthwise``, has the kernel, stride, padding and dilation. A 1x1 convolution without bias in front
of it commutes with padding of every mode, so a block without norms and activations inside is one
linear map, which can equal the convolution.

Where the convolution has values and they are to be carried over, the conversion computes the
decomposition itself, so that an edit needs to name the ranks only. Layers get their tensors from
the weight that they replace: they are on its device, of its dtype and memory format, and without
memory where it has none. Nothing is drawn at random.
"""

from __future__ import annotations

__all__ = ["BottleneckBlock", "CompactConvBlock", "ConvBlock", "SeparableBlock", "conv_layer"]

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from pocketize._torch import ConvNd
from pocketize.errors import RewriteError
from pocketize.initial.parameters import has_values
from pocketize.passes.swaps.decompositions import (
    BlockTerms,
    Channelwise,
    Tucker,
    block_terms,
    channelwise,
    folded,
    tucker,
)
from pocketize.passes.swaps.intermediate import activation_layer, norm_layer
from pocketize.plugin.conversions import conversion

_CONVS: dict[int, type[ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
#: Attributes that every convolution has; all others were added by a user.
_STANDARD = frozenset(vars(nn.Conv1d(1, 1, 1, device="meta")))
_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
#: Settings of the layer that has the kernel.
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
_Sizes: TypeAlias = tuple[tuple[int, int, int], ...]


def _of_kernel(name: str) -> Any:
    return property(
        lambda block: getattr(block._modules[block.kernel], name),
        doc=f"The {name} of the layer that has the kernel.",
    )


class ConvBlock(nn.Sequential):
    """A chain of layers in place of a convolution, which answers for it when asked for its sizes.

    Shape:
        as the convolution: (N, in_channels, *spatial) or (in_channels, *spatial) to the same with
        ``out_channels``.
    """

    #: Names of the convolutions, in the order in which they run.
    convolutions: ClassVar[tuple[str, ...]] = ()
    #: Which of them has the kernel.
    kernel: ClassVar[str] = ""
    #: Decomposes a weight (o, i, k) by ranks.
    decompose: ClassVar[Callable[..., Tucker | Channelwise | BlockTerms]]
    # For Python code around the block; TorchScript need not compile them.
    __jit_unused_properties__: ClassVar[list[str]] = [
        *("in_channels", "out_channels", "groups"),
        *_GEOMETRY,
    ]

    @staticmethod
    def layers(i: int, o: int, *ranks: int) -> _Sizes:
        """Return channels in and out and the groups of each convolution."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """Channels that the block takes."""
        return cast(ConvNd, self._modules[self.convolutions[0]]).in_channels

    @property
    def out_channels(self) -> int:
        """Channels that the block makes."""
        return cast(ConvNd, self._modules[self.convolutions[-1]]).out_channels

    @property
    def groups(self) -> int:
        """Groups of the block as a whole: every input channel reaches every output channel."""
        return 1

    kernel_size = _of_kernel("kernel_size")
    stride = _of_kernel("stride")
    padding = _of_kernel("padding")
    dilation = _of_kernel("dilation")
    padding_mode = _of_kernel("padding_mode")


class BottleneckBlock(ConvBlock):
    """``reduce`` (1x1), ``spatial`` (with the kernel, between few channels), ``expand`` (1x1).

    Its ranks are r_o and r_i.

    Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN", SPIE
    Medical Imaging 2020, after He et al., "Deep Residual Learning", CVPR 2016.
    """

    convolutions = ("reduce", "spatial", "expand")
    kernel = "spatial"
    decompose = staticmethod(tucker)

    @staticmethod
    def layers(i: int, o: int, *ranks: int) -> _Sizes:
        """Return the sizes of three convolutions."""
        outer, inner = ranks
        return (i, inner, 1), (inner, outer, 1), (outer, o, 1)


class SeparableBlock(ConvBlock):
    """``depthwise`` (with the kernel, every channel by itself), ``pointwise`` (1x1).

    Its rank is the depth multiplier.

    Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017.
    """

    convolutions = ("depthwise", "pointwise")
    kernel = "depthwise"
    decompose = staticmethod(channelwise)

    @staticmethod
    def layers(i: int, o: int, *ranks: int) -> _Sizes:
        """Return channels in and out and the groups of each convolution."""
        (multiplier,) = ranks
        return (i, i * multiplier, i), (i * multiplier, o, 1)


class CompactConvBlock(ConvBlock):
    """``reduce`` (1x1), ``depthwise`` (with the kernel), ``expand`` (1x1): the CCBlock of Wang et
    al.

    Its ranks are the channels inside and the depth multiplier.
    """

    convolutions = ("reduce", "depthwise", "expand")
    kernel = "depthwise"
    decompose = staticmethod(block_terms)

    @staticmethod
    def layers(i: int, o: int, *ranks: int) -> _Sizes:
        """Return channels in and out and the groups of each convolution."""
        channels, multiplier = ranks
        wide = channels * multiplier
        return (i, channels, 1), (channels, wide, channels), (wide, o, 1)


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
    arguments: dict[str, Any] = {"kernel_size": 1}
    if kernel:
        arguments = {name: getattr(like, name) for name in _GEOMETRY}
    made = _CONVS[len(like.kernel_size)](
        *channels, **arguments, groups=groups, bias=False, device="meta"
    )
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


@conversion("bottleneck")
def _to_bottleneck(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    return _to_block(BottleneckBlock, "bottleneck", module, options)


@conversion("separable")
def _to_separable(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    return _to_block(SeparableBlock, "separable", module, options)


@conversion("compact-block")
def _to_compact(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    return _to_block(CompactConvBlock, "compact-block", module, options)


@torch.inference_mode(False)
@torch.no_grad()
def _to_block(
    kind: type[ConvBlock], name: str, module: nn.Module, options: Mapping[str, Any]
) -> nn.Module:
    """Make a block that has what the convolution had.

    The options are "ranks"; "shape", the weight's; "weights", "decompose" or "reset"; "norm" and
    "activation" inside, empty for none.
    """
    *inside, last = kind.convolutions
    conv, ranks = _checked(module, options, name, len(inside))
    values: Sequence[Tensor | None] = (None,) * len(kind.convolutions)
    if options.get("weights") == "decompose" and has_values(conv.weight):
        values = kind.decompose(folded(conv.weight), *ranks).weights()
    sizes = kind.layers(conv.in_channels, conv.out_channels, *ranks)
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for layer, (i, o, groups), value in zip(kind.convolutions, sizes, values, strict=True):
        bias = conv._parameters["bias"] if layer == last else None
        chain[layer] = conv_layer(
            conv, (i, o), values=value, kernel=layer == kind.kernel, groups=groups, bias=bias
        )
        if layer != last and options.get("norm"):
            chain[f"{layer}_norm"] = norm_layer(options["norm"], o, conv)
        if layer != last and options.get("activation"):
            chain[f"{layer}_activation"] = activation_layer(options["activation"], o, conv)
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
    other = "the model was built with other settings than the one that was rewritten"
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or module.groups != 1:
        raise RewriteError(
            f"{name}: expected a convolution without groups, got {type(module).__name__}; {other}"
        )
    ranks, shape = tuple(options.get("ranks", ())), tuple(options.get("shape", ()))
    if tuple(module.weight.shape) != shape:
        raise RewriteError(
            f"{name}: expected a convolution with a weight of shape {shape}, got "
            f"{tuple(module.weight.shape)}; {other}"
        )
    if len(ranks) != wanted or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise RewriteError(f"{name}: expected {wanted} ranks of at least 1, got {ranks}")
    return module, ranks
