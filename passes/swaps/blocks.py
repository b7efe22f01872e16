"""What stands where a convolution stood: a chain of cheaper layers with the same ends.

The layers run in the order in which they are registered, and the middle one, ``spatial`` or
``depthwise``, has the kernel, stride, padding and dilation. A 1x1 convolution without bias in front
of it commutes with padding of every mode, so a block without norms and activations inside is one
linear map, which can equal the convolution.
"""

from __future__ import annotations

__all__ = ["BottleneckBlock", "CompactConvBlock", "ConvBlock", "SeparableBlock"]

from typing import Any, ClassVar, cast

from torch import nn

from pocketize._torch import ConvNd


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
    # For Python code around the block; TorchScript need not compile them.
    __jit_unused_properties__: ClassVar[list[str]] = [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ]

    def _conv(self, name: str) -> ConvNd:
        return cast(ConvNd, self._modules[name])

    @property
    def in_channels(self) -> int:
        """Channels that the block takes."""
        return self._conv(self.convolutions[0]).in_channels

    @property
    def out_channels(self) -> int:
        """Channels that the block makes."""
        return self._conv(self.convolutions[-1]).out_channels

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """The kernel of the layer that has one."""
        return self._conv(self.kernel).kernel_size

    @property
    def stride(self) -> tuple[int, ...]:
        """The stride of that layer."""
        return self._conv(self.kernel).stride

    @property
    def padding(self) -> Any:
        """The padding of that layer: numbers, or "same" or "valid"."""
        return self._conv(self.kernel).padding

    @property
    def dilation(self) -> tuple[int, ...]:
        """The dilation of that layer."""
        return self._conv(self.kernel).dilation

    @property
    def padding_mode(self) -> str:
        """The padding mode of that layer."""
        return self._conv(self.kernel).padding_mode

    @property
    def groups(self) -> int:
        """Groups of the block as a whole: every input channel reaches every output channel."""
        return 1


class BottleneckBlock(ConvBlock):
    """``reduce`` (1x1), ``spatial`` (with the kernel, between few channels), ``expand`` (1x1).

    Wang, Oda, Mori, "Organ Segmentation From Full-size CT Images Using Memory-Efficient FCN", SPIE
    Medical Imaging 2020, after He et al., "Deep Residual Learning", CVPR 2016.
    """

    convolutions = ("reduce", "spatial", "expand")
    kernel = "spatial"


class SeparableBlock(ConvBlock):
    """``depthwise`` (with the kernel, every channel by itself), ``pointwise`` (1x1).

    Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017.
    """

    convolutions = ("depthwise", "pointwise")
    kernel = "depthwise"


class CompactConvBlock(ConvBlock):
    """``reduce`` (1x1), ``depthwise`` (with the kernel), ``expand`` (1x1): the CCBlock of Wang et
    al.
    """

    convolutions = ("reduce", "depthwise", "expand")
    kernel = "depthwise"
