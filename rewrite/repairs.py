"""What may have to follow when an operator departs from the prediction.

A size that the code of a module holds, as a Python attribute or, in an exported program, as a
literal in its graph. Nothing here decides: the planner tries each candidate and keeps those with
which the recording gets further.
"""

from __future__ import annotations

__all__ = ["candidates"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from pocketize.capture import Captured
from pocketize.edits import Edit, SetArgument, SetAttribute
from pocketize.literals import numbers_in
from pocketize.rules import bind, operator_name
from pocketize.verify import Mismatch


def candidates(model: nn.Module, captured: Captured, at: Mismatch) -> Iterator[tuple[Edit, ...]]:
    """Yield edits that may let an operator follow, the likeliest first.

    Args:
        model: the model, unchanged.
        captured: the recording in which the mismatch was found.
        at: the mismatch.
    """
    if isinstance(model, fx.GraphModule):
        edits = _literals(model, captured, at)
        if edits:
            yield edits
        if len(edits) > 1:
            yield from ((edit,) for edit in edits)
    yield from ((edit,) for edit in _attributes(model, at))


def _attributes(model: nn.Module, at: Mismatch) -> Iterator[SetAttribute]:
    """Yield attributes of the module at fault and its owners that hold a size that changed."""
    path = str(at.node.meta["module"])
    sizes = dict(sorted(at.sizes))
    while True:
        for name, value in vars(model.get_submodule(path)).items():
            numbers = () if name.startswith("_") else numbers_in(value) or ()
            for index, number in enumerate(numbers):
                suffix = f".{index}" if isinstance(value, list | tuple) else ""
                if number in sizes:
                    yield SetAttribute(path, f"{name}{suffix}", number, sizes[number])
        if not path:
            return
        path = path.rpartition(".")[0]


def _literals(model: fx.GraphModule, captured: Captured, at: Mismatch) -> tuple[SetArgument, ...]:
    """Return edits of the literals of one operator of an exported program.

    A recording of such a module has the very operators of its graph, in the same order.
    """
    recorded, written = _operators(captured.graph), _operators(model.graph)
    if [n.target for n in recorded] != [n.target for n in written] or at.node not in recorded:
        return ()
    node = written[recorded.index(at.node)]
    bound = bind(node.target, node.args, node.kwargs)
    edits = []
    for name, value in bound.items():
        old = numbers_in(value)
        if old is None:
            continue
        new = _followed(at, name, value, old, bound)
        if new != old:
            edits.append(SetArgument("", node.name, name, old, new))
    return tuple(edits)


def _followed(
    at: Mismatch, name: str, value: Any, old: tuple[int, ...], bound: dict[str, Any]
) -> tuple[int, ...]:
    """Return what the numbers of an argument should be."""
    if name in at.arguments:
        return (at.arguments[name],)
    if operator_name(at.node.target) == "aten.slice":
        if name != "end" or old[0] < 0 or old[0] >= 2**62:
            return old
        start = at.arguments.get("start", bound["start"] or 0)
        return (start + at.expected[0][bound["dim"]],)
    if name == "split_sizes":
        return tuple(part[bound["dim"]] for part in at.expected)
    out = at.node.meta["val"]
    is_shape = isinstance(value, list | tuple) and isinstance(out, torch.Tensor)
    if is_shape and len(old) == out.ndim and at.expected:
        pairs = list(zip(old, out.shape, at.expected[0], strict=True))
        if all(a in (-1, before) for a, before, _ in pairs):
            return tuple(a if -1 in (a, after) else after for a, _, after in pairs)
    sizes = dict(sorted(at.sizes))
    return tuple(sizes.get(n, n) for n in old)


def _operators(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    ]
