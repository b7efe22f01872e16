"""Every value of a recorded forward, computed whole: what parts are compared with."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize.graph.capture import TracedGraph, capture
from pocketize.passes.tiling.intervals import Box

__all__ = ["Whole", "crop", "is_map", "run_whole"]


def crop(x: Tensor, region: Box) -> Tensor:
    return x[(slice(None), slice(None), *(slice(low, high) for low, high in region))]


def is_map(node: fx.Node, rank: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == rank + 2


class Whole:
    """A forward with all its values; a context for forms that hands out crops of them."""

    def __init__(self, traced: TracedGraph, values: dict[fx.Node, Any]) -> None:
        self.traced, self.values = traced, values

    def part(self, node: fx.Node, region: Box) -> Tensor:
        return crop(self.values[node], region)

    def value(self, node: fx.Node) -> Any:
        return self.values[node]


def run_whole(model: nn.Module, *inputs: Tensor) -> Whole:
    traced = capture(model, inputs)
    given = iter(inputs)
    values: dict[fx.Node, Any] = {}
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                held = node.meta["tensor"]
                values[node] = tensors[held] if held else node.meta["val"]
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                # what later operators write in place must not change what is compared
                args = args if node.target is operator.getitem else _copied(args)
                values[node] = node.target(*args, **kwargs)
    return Whole(traced, values)


def _copied(args: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, args)
