"""A recorded graph with fewer kinds of operators, and the same results."""

from __future__ import annotations

__all__ = ["simplify"]

from typing import Any

import torch
from torch import Tensor, fx

from pocketize.ops.schema import bind, operator_name

_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split"}


def simplify(graph: fx.Graph) -> None:
    """Take dropouts out that do nothing, and tell splits as slices, one for each part.

    Args:
        graph: recorded in evaluation mode; changed in place.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = operator_name(node.target).rpartition(".")[2].rstrip("_")
        if name in _DROPOUTS:
            _without(graph, node)
        elif name in _SPLITS:
            _as_slices(graph, node)


def _without(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node.target, node.args, node.kwargs)
    if bound.get("train") is False or bound.get("p") == 0:
        source = node.all_input_nodes[0]
        # recorded without memory it made a copy, but it returns its input
        source.meta.setdefault("aliases", []).append(node.meta["val"])
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _as_slices(graph: fx.Graph, node: fx.Node) -> None:
    parts = list(node.users)
    value: Any = node.meta["val"]
    if not isinstance(value, tuple | list) or not all(isinstance(v, Tensor) for v in value):
        return
    if any(operator_name(part.target) != "getitem" for part in parts):
        return
    bound = bind(node.target, node.args, node.kwargs)
    dim = int(bound["dim"])
    starts = [0]
    for each in value:
        starts.append(starts[-1] + each.shape[dim])
    for part in parts:
        index = int(part.args[1])  # type: ignore[arg-type]
        start, length = starts[index], value[index].shape[dim]
        with graph.inserting_before(part):
            made = graph.call_function(
                torch.ops.aten.narrow.default, (node.all_input_nodes[0], dim, start, length)
            )
        made.meta.update(part.meta)
        part.replace_all_uses_with(made)
        graph.erase_node(part)
    graph.erase_node(node)
