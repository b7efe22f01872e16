"""Which convolutions of a recorded net could be a block, what that saves, and why others cannot."""

from __future__ import annotations

__all__ = [
    "SIDES",
    "STATES",
    "ConvCall",
    "ConvSite",
    "SwapCost",
    "find_sites",
    "matching",
    "on_side",
    "swap_cost",
]

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from pocketize._torch import ConvNd, ConvTransposeNd, FakeTensorMode, same_convolution
from pocketize.channels.levels import find_sides
from pocketize.graph.capture import TracedGraph
from pocketize.initial.parameters import has_values
from pocketize.memory.saved import SavedTensors
from pocketize.ops import is_convolution
from pocketize.passes.shared.forwards import obstacle
from pocketize.passes.shared.patterns import matching
from pocketize.passes.swaps.blocks import ConvBlock
from pocketize.passes.swaps.conversions import conv_layer, numbers
from pocketize.plugin.conversions import find_conversion

#: Words of the option ``where`` that are no patterns.
SIDES = ("all", "encoder", "decoder")


def on_side(traced: TracedGraph, where: Sequence[str]) -> set[str]:
    """Return the paths of the layers on the sides of a network that are named."""
    wanted = set(where) & {"encoder", "decoder"}
    return {path for path, side in find_sides(traced).items() if side in wanted}


_STOCK = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ConvCall:
    """One use of a convolution in a forward.

    Attributes:
        shape: of what comes in, (N, i, *spatial) or (i, *spatial).
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class ConvSite:
    """A convolution with a kernel, or a block that was one.

    Attributes:
        path: its path.
        conv: the module; None where it is of another kind.
        calls: its uses in one forward, in training.
        refused: why it has to stay; ``""`` if it has not.
    """

    path: str
    conv: ConvNd | None = None
    calls: tuple[ConvCall, ...] = ()
    refused: str = ""


def find_sites(model: nn.Module, evaluated: TracedGraph, trained: TracedGraph) -> list[ConvSite]:
    """Find every convolution that has a kernel.

    Args:
        model: the model that was recorded.
        evaluated: the trace in evaluation mode.
        trained: the trace in training mode.

    Returns:
        Sites in the order of registration. Convolutions with a kernel of one voxel are none, and of
        blocks from an earlier swap only the block itself is one.
    """
    reader = _ConvUses(model, evaluated, trained)
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
            why = reader.obstacle(path, module)
            sites.append(ConvSite(path, module, reader.calls(path, module), why))
    return sites


class _ConvUses:
    """Reads both traces of a model."""

    def __init__(self, model: nn.Module, evaluated: TracedGraph, trained: TracedGraph) -> None:
        self.model = model
        self.uses: dict[bool, dict[str, list[fx.Node]]] = {}
        for traced in (evaluated, trained):
            uses = self.uses[traced.train] = defaultdict(list)
            for node in traced.operators():
                if is_convolution(node):
                    uses[str(node.meta["module"])].append(node)
        self.readers: dict[str, list[fx.Node]] = defaultdict(list)
        for traced in (evaluated, trained):
            for node in traced.graph.find_nodes(op="get_attr"):
                if node.meta.get("tensor"):
                    self.readers[node.meta["tensor"]] += node.users
        self.owners: dict[int, set[int]] = defaultdict(set)
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners[id(parameter)].add(id(module))

    def calls(self, path: str, conv: ConvNd) -> tuple[ConvCall, ...]:
        """Return the uses of a convolution in a forward in training."""
        return tuple(_call(node, conv) for node in self.uses[True][path])

    def obstacle(self, path: str, conv: ConvNd) -> str:
        """Say why a convolution has to stay, by what it is and by how it is used."""
        return next((why for why in self._obstacles(path, conv) if why), "")

    def _obstacles(self, path: str, conv: ConvNd) -> Iterator[str]:
        yield _kind_obstacle(conv)
        if conv is self.model:
            yield "it is the model itself, which stays the object it is; wrap it in nn.Sequential"
        for name, parameter in conv._parameters.items():
            if parameter is not None and len(self.owners[id(parameter)]) > 1:
                yield f"its {name} is shared with another module"
        nodes = [*self.uses[False][path], *self.uses[True][path]]
        if not nodes:
            yield "the forward never calls it"
        for name in conv._parameters:
            readers = self.readers[f"{path}.{name}"]
            if any(str(reader.meta.get("module")) != path for reader in readers):
                yield f"the forward reads its {name} elsewhere too"
        yield _value_obstacle(conv.weight)


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


def _value_obstacle(weight: Tensor) -> str:
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if has_values(weight) and not bool(weight.isfinite().all()):
        return "its weight is not finite"
    return ""


def _call(node: fx.Node, conv: ConvNd) -> ConvCall:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value: Tensor = source.meta["val"]
    shape = list(value.shape)
    if conv.padding_mode != "zeros":  # what was recorded is padded already
        pads = conv._reversed_padding_repeated_twice
        for axis, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            shape[-1 - axis] -= low + high
    return ConvCall(tuple(shape), value.dtype)


#: Tensors of a parameter's size in a training step: itself, its gradient, and Adam's two moments.
STATES = 4


@dataclass(frozen=True)
class SwapCost:
    """What a convolution has, and what the block that replaces it would have.

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


def swap_cost(
    conv: ConvNd, calls: Sequence[ConvCall], conversion: str, options: Mapping[str, Any]
) -> SwapCost:
    """Try a swap on tensors without memory.

    Args:
        conv: the convolution; untouched.
        calls: its uses in one forward.
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
        added = sum(max(0, _kept(block, call) - _kept(twin, call)) for call in calls)
    return SwapCost(numbers(conv), numbers(block), added, conv.weight.element_size())


def _kept(module: nn.Module, call: ConvCall) -> int:
    """Return the bytes of what autograd keeps of one forward, parameters aside."""
    weight = next(module.parameters())
    given = torch.empty(call.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    module.train()
    saved = SavedTensors(module.parameters())
    with torch.enable_grad(), saved.hooks():
        module(given)
    return saved.bytes() * call.dtype.itemsize // weight.dtype.itemsize
