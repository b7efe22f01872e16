"""What a swap costs and saves: parameters, and the bytes that a training step keeps."""

from __future__ import annotations

__all__ = ["STATES", "Price", "price"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketize._torch import ConvNd, FakeTensorMode, storage_key
from pocketize.passes.swaps.layers import conv_layer, numbers
from pocketize.passes.swaps.sites import Call
from pocketize.plugin.conversions import find_conversion

#: Tensors of a parameter's size in a training step: itself, its gradient, and Adam's two moments.
STATES = 4


@dataclass(frozen=True)
class Price:
    """A convolution against the block that would stand there.

    Attributes:
        before: parameters of the convolution.
        after: parameters of the block.
        added: bytes of activations that a training step keeps more than before, over all calls.
        element: bytes of one parameter.
    """

    before: int
    after: int
    added: int
    element: int

    @property
    def saved(self) -> int:
        """Bytes of parameters, gradients and Adam's moments that a training step keeps less."""
        return STATES * self.element * (self.before - self.after)


def price(
    conv: ConvNd, calls: Sequence[Call], conversion: str, options: Mapping[str, Any]
) -> Price:
    """Try a swap on tensors without memory.

    Args:
        conv: the convolution; untouched.
        calls: its uses in one forward.
        conversion: the name of the conversion.
        options: what it is told.
    """
    norm = {**(options.get("norm") or {})}
    if norm.get("momentum", 0.1) is None:
        norm["momentum"] = 0.1  # a cumulative average would read a counter, which has no value here
    options = {**options, "norm": norm}
    with torch.inference_mode(False), FakeTensorMode(allow_non_fake_inputs=True):
        # Of the same settings, without anybody's hooks.
        bias = None if conv.bias is None else nn.Parameter(conv.bias.new_zeros(conv.bias.shape))
        ends = (conv.in_channels, conv.out_channels)
        twin = conv_layer(conv, ends, kernel=True, bias=bias)
        block = find_conversion(conversion)(twin, options, twin)
        added = sum(max(0, _kept(block, call) - _kept(twin, call)) for call in calls)
    return Price(numbers(conv), numbers(block), added, conv.weight.element_size())


def _kept(module: nn.Module, call: Call) -> int:
    """Return the bytes of what autograd keeps of one forward, parameters aside."""
    parameters = {storage_key(p) for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_key(storage) not in parameters:
            kept[storage_key(storage)] = storage.nbytes()
        return tensor.detach()  # without its graph, which would refer to itself

    weight = next(module.parameters())
    given = torch.empty(call.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    module.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), hooks:
        output = module(given)  # alive until the count is read, so that identities stay unique
    total = sum(kept.values()) * call.dtype.itemsize // weight.dtype.itemsize
    del output
    return total
