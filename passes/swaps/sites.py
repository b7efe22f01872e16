"""Which convolutions of a recorded net could be a block, what that saves, and why others cannot."""

from __future__ import annotations

__all__ = ["ConvSite", "SwapCost", "find_sites", "swap_cost"]

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from pocketize._torch import ConvNd, ConvTransposeNd, FakeTensorMode, same_convolution
from pocketize.graph.capture import TracedGraph
from pocketize.initial.parameters import has_values
from pocketize.memory.saved import SavedTensors
from pocketize.ops import is_convolution
from pocketize.passes.shared.forwards import obstacle
from pocketize.passes.swaps.blocks import ConvBlock, conv_layer
from pocketize.plugin.conversions import find_conversion

_STOCK = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Tensors of a parameter's size in a training step: itself, its gradient, and Adam's two moments.
_STATES = 4


@dataclass(frozen=True)
class ConvSite:
    """A convolution with a kernel, or a block that was one.

    Attributes:
        path: its path.
        conv: the module; None where it is of another kind.
        calls: shape, (N, i, *spatial) or (i, *spatial), and dtype of its inputs in one forward, in
            training.
        refused: why it has to stay; ``""`` if it has not.
    """

    path: str
    conv: ConvNd | None = None
    calls: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    refused: str = ""


def find_sites(model: nn.Module, traces: Sequence[TracedGraph]) -> list[ConvSite]:
    """Find every convolution that has a kernel.

    Args:
        model: the model that was recorded.
        traces: in evaluation mode, in training mode, and of variants.

    Returns:
        Sites in the order of registration. Convolutions with a kernel of one voxel are none, and of
        blocks from an earlier swap only the block itself is one.
    """
    uses = _ConvUses(model, traces)
    sites: list[ConvSite] = []
    blocks: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in blocks:
            continue
        if isinstance(module, ConvBlock):
            blocks |= {id(part) for part in module.modules()}
            sites.append(ConvSite(path, refused="it is a block already"))
        elif isinstance(module, torch.jit.ScriptModule):
            if "Conv" in str(getattr(module, "original_name", "")):
                sites.append(ConvSite(path, refused=obstacle(module)))
        elif isinstance(module, ConvNd) and max(module.kernel_size) > 1:
            calls = tuple(_call(node, module) for node in uses.trained[path])
            why = next((why for why in uses.obstacles(path, module) if why), "")
            sites.append(ConvSite(path, module, calls, why))
    return sites


class _ConvUses:
    """Who calls and who reads convolutions, in all traces of a model."""

    def __init__(self, model: nn.Module, traces: Sequence[TracedGraph]) -> None:
        self.model = model
        evaluated, trained, *_ = traces
        self.evaluated, self.trained = _convolutions(evaluated), _convolutions(trained)
        self.readers: dict[str, list[fx.Node]] = defaultdict(list)
        for traced in traces:
            for node in traced.graph.find_nodes(op="get_attr"):
                if node.meta.get("tensor"):
                    self.readers[node.meta["tensor"]] += node.users
        self.owners: dict[int, set[int]] = defaultdict(set)
        for module in model.modules():
            for parameter in module._parameters.values():
                self.owners[id(parameter)].add(id(module))

    def obstacles(self, path: str, conv: ConvNd) -> Iterator[str]:
        """Say why a convolution has to stay, by what it is and by how it is used."""
        yield _kind_obstacle(conv)
        if conv is self.model:
            yield "it is the model itself, which stays the object it is; wrap it in nn.Sequential"
        for name, parameter in conv._parameters.items():
            if parameter is not None and len(self.owners[id(parameter)]) > 1:
                yield f"its {name} is shared with another module"
        if not self.evaluated[path] and not self.trained[path]:
            yield "the forward never calls it"
        for name in conv._parameters:
            readers = self.readers[f"{path}.{name}"]
            if any(str(reader.meta.get("module")) != path for reader in readers):
                yield f"the forward reads its {name} elsewhere too"
        if not conv.weight.is_floating_point():
            yield f"its weight is {str(conv.weight.dtype).removeprefix('torch.')}"
        elif has_values(conv.weight) and not bool(conv.weight.isfinite().all()):
            yield "its weight is not finite"


def _convolutions(traced: TracedGraph) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in filter(is_convolution, traced.operators()):
        found[str(node.meta["module"])].append(node)
    return found


def _kind_obstacle(conv: ConvNd) -> str:
    """Say why a block could not do what a convolution does."""
    if isinstance(conv, ConvTransposeNd):
        return "it is transposed; only forward convolutions are swapped"
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if parametrize.is_parametrized(conv) or "weight" not in conv._parameters:
        return "its weight is computed from other tensors; remove the parametrization before"
    stock = next((kind for kind in _STOCK if isinstance(conv, kind)), None)
    if stock is None or not same_convolution(type(conv), stock):
        return f"{type(conv).__name__} has a forward of its own"
    if "forward" in vars(conv):
        return "its forward was replaced on the instance"
    if conv._modules or conv._buffers or conv._parameters.keys() - {"weight", "bias"}:
        return f"{type(conv).__name__} holds more than a weight and a bias"
    return ""


def _call(node: fx.Node, conv: ConvNd) -> tuple[tuple[int, ...], torch.dtype]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = source.meta["val"]
    shape = list(value.shape)
    if conv.padding_mode != "zeros":  # what was recorded is padded already
        pads = conv._reversed_padding_repeated_twice
        for axis, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            shape[-1 - axis] -= low + high
    return tuple(shape), value.dtype


@dataclass(frozen=True)
class SwapCost:
    """What a convolution has, and what the block that replaces it would have.

    Attributes:
        before: parameters of the convolution.
        after: parameters of the block.
        added: bytes of activations that a training step keeps more than before, over all calls.
        saved: bytes of parameters, gradients and Adam's moments that it keeps less.
    """

    before: int
    after: int
    added: int
    saved: int


def swap_cost(
    conv: ConvNd,
    calls: tuple[tuple[tuple[int, ...], torch.dtype], ...],
    conversion: str,
    options: Mapping[str, Any],
) -> SwapCost:
    """Try a swap on tensors without memory.

    Args:
        conv: the convolution; untouched.
        calls: its uses in one forward, see :class:`ConvSite`.
        conversion: the name of the conversion.
        options: its options.
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
        added = sum(max(0, _kept(block, *call) - _kept(twin, *call)) for call in calls)
    before, after = (sum(p.numel() for p in module.parameters()) for module in (conv, block))
    saved = _STATES * conv.weight.element_size() * (before - after)
    return SwapCost(before, after, added, saved)


def _kept(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of what autograd keeps of one forward, parameters aside."""
    weight = next(module.parameters())
    given = torch.empty(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    module.train()
    saved = SavedTensors(module.parameters())
    with torch.enable_grad(), saved.hooks():
        module(given)
    return saved.bytes() * dtype.itemsize // weight.dtype.itemsize
