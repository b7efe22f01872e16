"""The traced graph of a network, with the tile form of every operator."""

from __future__ import annotations

__all__ = [
    "AliasSets",
    "TiledGraph",
    "TilingError",
    "leave_views_out",
    "simplify",
    "viewed",
]

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import OpOverload, schema_of, storage_key
from pocketize.errors import RewriteError
from pocketize.graph.capture import TracedGraph
from pocketize.ops import Kind, bind, operator_name, operator_of
from pocketize.ops.effects import written_nodes
from pocketize.passes.tiling.forms import Convolution, Form, Transposed
from pocketize.passes.tiling.operators import NotLocal, local_form
from pocketize.passes.tiling.statistics import (
    MapReduction,
    Normalised,
    NormMoments,
    reduction_form,
)


class TilingError(RewriteError):
    """A network cannot be computed part by part; the text says where and why."""


@dataclass(eq=False)
class TiledGraph:
    """A traced forward in evaluation mode, and how each node is computed by tiles.

    Attributes:
        traced: the traced graph.
        rank: number of spatial axes.
        nodes: operators that the outputs depend on, in the order in which they ran.
        forms: local forms; a norm of whole maps has one that reads its statistics.
        reductions: what operators read of whole maps.
        obstacles: why the other operators need their inputs whole.
    """

    traced: TracedGraph
    rank: int = 0
    nodes: list[fx.Node] = field(default_factory=list)
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    reductions: dict[fx.Node, MapReduction] = field(default_factory=dict)
    obstacles: dict[fx.Node, str] = field(default_factory=dict)
    #: what depends on the input: a weight (out, in, *kernel) that is computed does not
    _data: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Find the form of every operator.

        Raises:
            TilingError: the trace does not hold for other parts of the input.
        """
        if self.traced.real:
            raise TilingError(
                "a branch of the forward depends on values, which differ from part to part; run "
                "the model whole"
            )
        shapes = [_shape(node) for node in self.traced.graph.nodes if node.op == "placeholder"]
        maps = [shape for shape in shapes if shape is not None and len(shape) > 2]
        if not maps:
            raise TilingError("no input has spatial axes: expected (N, C, *spatial)")
        self.rank = max(len(shape) for shape in maps) - 2
        for node in self.traced.graph.nodes:
            if node.op == "placeholder" or not self._data.isdisjoint(node.all_input_nodes):
                self._data.add(node)
        used: set[fx.Node] = set(self.traced.outputs())
        for node in reversed(self.traced.graph.nodes):
            if node in used:
                used.update(node.all_input_nodes)
        self.nodes = [node for node in self.traced.operators() if node in used]
        self._check_writes()
        for node in self.nodes:
            self._classify(node)

    def is_map(self, node: fx.Node) -> bool:
        """Whether a result is (N, C, *spatial) and depends on the input."""
        shape = _shape(node)
        return node in self._data and shape is not None and len(shape) == self.rank + 2

    @property
    def largest_input(self) -> fx.Node:
        """The input map with most voxels."""
        inputs = [node for node in self.traced.graph.nodes if node.op == "placeholder"]
        found: fx.Node = max((node for node in inputs if self.is_map(node)), key=self.voxels)
        return found

    @property
    def volume(self) -> tuple[int, ...]:
        """The spatial sizes of the largest input."""
        return tuple(self.largest_input.meta["val"].shape[2:])

    def nbytes(self, node: fx.Node) -> int:
        """Return the size of a result in bytes."""
        value = node.meta["val"]
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    def voxels(self, node: fx.Node) -> int:
        """Return the number of voxels of a map."""
        shape = _shape(node)
        return math.prod(shape[2:]) if shape is not None else 0

    def _classify(self, node: fx.Node) -> None:
        if isinstance(node.meta["val"], Tensor) and self.is_map(node):
            try:
                form = local_form(node, self.rank)
                if isinstance(form, Convolution | Transposed) and form.weight in self._data:
                    raise NotLocal("its weight depends on the volume")
            except NotLocal as error:
                if error.hopeless:
                    where = node.meta.get("module") or "the model itself"
                    raise TilingError(f"{node.target} in {where}: {error}") from None
                self.obstacles[node] = str(error)
            else:
                self.forms[node] = form
                return
        try:
            reduction = reduction_form(node, self.rank)
        except NotLocal as error:
            self.obstacles.setdefault(node, str(error))
            return
        self.reductions[node] = reduction
        if isinstance(reduction, NormMoments):
            bound = bind(node.target, node.args, node.kwargs)
            self.forms[node] = Normalised(node, bound, reduction)

    def _check_writes(self) -> None:
        """Refuse writing into memory that is read later as another tensor.

        A trace has what operators read and returned, and not that one of them changed the result of
        another.
        """
        aliases = AliasSets(self.traced.graph)
        for node in self.traced.operators():  # also where, by the trace, nothing uses it
            for written in written_nodes(node):
                reader = aliases.read_after(node, written)
                if reader is not None:
                    larger = reader.meta["val"].numel() > written.meta["val"].numel()
                    part = "a part of a tensor" if larger else "memory"
                    raise TilingError(
                        f"{node.target} at {node.meta.get('source') or node.meta['module']} writes "
                        f"into {part} that is read again later"
                    )


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


# -- shared memory -------------------------------------------------------------------------------


class AliasSets:
    """The tensors of a traced graph, by the memory that they share.

    Args:
        graph: the traced graph, all tensors of which are alive.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes: dict[int, list[fx.Node]] = {}
        self._same: dict[int, int] = {}
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for alias in node.meta.get("aliases", ()):
                    self._same[storage_key(alias)] = self._key(value)
                self._nodes.setdefault(self._key(value), []).append(node)

    def aliases_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that share memory with one, itself among them."""
        value: Tensor = node.meta["val"]
        others = self._nodes[self._key(value)]
        return [other for other in others if not _disjoint(value, other.meta["val"])]

    def _key(self, tensor: Tensor) -> int:
        key = storage_key(tensor)
        return self._same.get(key, key)

    def read_after(self, node: fx.Node, written: fx.Node) -> fx.Node | None:
        """Return an older tensor in written memory that is read later; None if there is none.

        The written tensor itself is read as the operator's result afterwards.

        Args:
            node: the operator that writes.
            written: what it writes into.
        """
        for other in self.aliases_of(written):
            if other < node and any(user > node for user in other.users):
                return other
        return None


def viewed(node: fx.Node) -> fx.Node | None:
    """Return the base of a view that an operator returns; None where it returns none."""
    target, base = node.target, next(iter(node.args), None)
    if not isinstance(target, OpOverload) or schema_of(target).is_mutable:
        return None
    if not isinstance(base, fx.Node) or node.all_input_nodes != [base]:
        return None
    values = node.meta["val"], base.meta["val"]
    if not all(isinstance(value, Tensor) for value in values):
        return None
    return base if storage_key(values[0]) == storage_key(values[1]) else None


def leave_views_out(graph: fx.Graph) -> None:
    """Remove from a graph's outputs those that are inputs, or views of other outputs.

    Writing into one has to change the other, so that they are not computed by tiles, but made of
    each other by the operators that return views.
    """
    (end,) = graph.find_nodes(op="output")
    outputs = list(end.args[0])
    given = {node for node in [*outputs, *graph.nodes] if node.op == "placeholder"}
    left = []
    for node in outputs:
        base = None if node in given else viewed(node)
        while base is not None and base not in given and base not in outputs:
            base = viewed(base)
        if base is None and node not in given:
            left.append(node)
    if left:
        end.args = (left,)


def _disjoint(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are boxes in a dense one that have no entry in common."""
    if x.dtype != y.dtype or x.stride() != y.stride() or storage_key(x) != storage_key(y):
        return False
    axes = sorted(range(x.ndim), key=x.stride, reverse=True)
    starts, rests, limit = [], [x.storage_offset(), y.storage_offset()], None
    for axis in axes:
        step = x.stride(axis)
        if step == 0:
            return False
        begin = [rest // step for rest in rests]
        ends = [begin[0] + x.shape[axis], begin[1] + y.shape[axis]]
        if limit is not None and max(ends) * step > limit:
            return False  # a row runs over into the next
        rests = [rest % step for rest in rests]
        starts.append((begin, ends))
        limit = step
    return any(e[0] <= b[1] or e[1] <= b[0] for b, e in starts)


# -- simplification --------------------------------------------------------------------------------


def simplify(graph: fx.Graph) -> None:
    """Remove dropouts that do nothing, and replace splits by slices; changes the graph in place."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        kind = operator_of(node.target).kind
        if kind is Kind.DROPOUT and isinstance(node.meta["val"], Tensor):
            _remove_dropout(graph, node)
        elif kind is Kind.SPLIT:
            _replace_by_slices(graph, node)


def _remove_dropout(graph: fx.Graph, node: fx.Node) -> None:
    bound = bind(node.target, node.args, node.kwargs)
    if bound.get("train") is False or bound.get("p") == 0:
        source = node.all_input_nodes[0]
        # traced without memory it made a copy, but it returns its input
        source.meta.setdefault("aliases", []).append(node.meta["val"])
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _replace_by_slices(graph: fx.Graph, node: fx.Node) -> None:
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
