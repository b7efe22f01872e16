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


class TiledGraph:
    """A traced forward in evaluation mode, and how each node is computed by tiles.

    Attributes:
        traced: the traced graph.
        rank: number of spatial axes.
        nodes: operators that the outputs depend on, in the order in which they ran.
        forms: local forms; a norm of whole maps has one that reads its statistics.
        reductions: what operators read of whole maps.
        obstacles: why the other operators need their inputs whole.
        largest_input: the input map with most voxels.

    Raises:
        TilingError: the trace does not hold for other parts of the input.
    """

    def __init__(self, traced: TracedGraph) -> None:
        if traced.real:
            raise TilingError(
                "a branch of the forward depends on values, which differ from part to part; run "
                "the model whole"
            )
        self.traced = traced
        inputs = traced.graph.find_nodes(op="placeholder")
        ranks = [len(shape) - 2 for node in inputs if (shape := _shape(node)) is not None]
        self.rank = max(ranks, default=0)
        if self.rank < 1:
            raise TilingError("no input has spatial axes: expected (N, C, *spatial)")
        #: what depends on the input: a weight (out, in, *kernel) that is computed does not
        self._data: set[fx.Node] = set()
        for node in traced.graph.nodes:
            if node.op == "placeholder" or not self._data.isdisjoint(node.all_input_nodes):
                self._data.add(node)
        self.largest_input: fx.Node = max(filter(self.is_map, inputs), key=self.voxels)
        used = set(traced.outputs())
        for node in reversed(traced.graph.nodes):
            if node in used:
                used.update(node.all_input_nodes)
        self.nodes = [node for node in traced.operators() if node in used]
        self.forms: dict[fx.Node, Form] = {}
        self.reductions: dict[fx.Node, MapReduction] = {}
        self.obstacles: dict[fx.Node, str] = {}
        self._check_writes()
        for node in self.nodes:
            self._classify(node)

    def depends_on_input(self, node: fx.Node) -> bool:
        """Whether a result depends on the input: a weight, also a computed one, does not."""
        return node in self._data

    def is_map(self, node: fx.Node) -> bool:
        """Whether a result is (N, C, *spatial) and depends on the input."""
        shape = _shape(node)
        return node in self._data and shape is not None and len(shape) == self.rank + 2

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
        """Return an older tensor in memory that an operator writes, and that is read later, if any.

        The written tensor itself is read as the operator's result afterwards.
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
        kind = operator_of(node.target).kind if node.op == "call_function" else None
        if kind not in (Kind.DROPOUT, Kind.SPLIT):
            continue
        bound, value = bind(node.target, node.args, node.kwargs), node.meta["val"]
        if kind is Kind.DROPOUT and isinstance(value, Tensor):
            if bound.get("train") is False or bound.get("p") == 0:
                source = node.all_input_nodes[0]
                # traced without memory it made a copy, but it returns its input
                source.meta.setdefault("aliases", []).append(value)
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        elif (
            isinstance(value, tuple | list)
            and all(isinstance(each, Tensor) for each in value)
            and all(operator_name(part.target) == "getitem" for part in node.users)
        ):
            _replace_by_slices(graph, node, int(bound["dim"]))


def _replace_by_slices(graph: fx.Graph, node: fx.Node, dim: int) -> None:
    lengths = [each.shape[dim] for each in node.meta["val"]]
    for part in list(node.users):
        index = int(part.args[1])  # type: ignore[arg-type]
        source, start = node.all_input_nodes[0], sum(lengths[:index])
        with graph.inserting_before(part):
            made = graph.call_function(
                torch.ops.aten.narrow.default, (source, dim, start, lengths[index])
            )
        made.meta.update(part.meta)
        part.replace_all_uses_with(made)
        graph.erase_node(part)
    graph.erase_node(node)
