"""A recorded network as something that can be computed part by part."""

from __future__ import annotations

__all__ = ["TiledGraph", "TilingError"]

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from pocketize.capture import Captured
from pocketize.errors import RewriteError
from pocketize.passes.runtime.tiling.forms import Form
from pocketize.passes.runtime.tiling.statistics import (
    Gathered,
    Moments,
    Normalised,
    gather_form,
)
from pocketize.passes.runtime.tiling.table import NotLocal, local_form
from pocketize.rules import bind

#: Operators whose results share memory with their inputs.
_VIEWS = {"slice", "select", "narrow", "chunk", "split", "split_with_sizes", "unbind", "view"}
_VIEWS |= {
    "expand",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "reshape",
    "flatten",
    "getitem",
}


class TilingError(RewriteError):
    """A network cannot be computed part by part; the text says where and why."""


@dataclass(eq=False)
class TiledGraph:
    """What is known of every node of a recorded forward in evaluation mode.

    Attributes:
        captured: the recording.
        rank: number of spatial axes.
        nodes: operators that the outputs depend on, in the order in which they ran.
        forms: local forms; norms of whole maps have one that asks for their statistics.
        gathered: what operators ask of whole maps.
        obstacles: why the others need their inputs whole.
    """

    captured: Captured
    rank: int = 0
    nodes: list[fx.Node] = field(default_factory=list)
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    gathered: dict[fx.Node, Gathered] = field(default_factory=dict)
    obstacles: dict[fx.Node, str] = field(default_factory=dict)
    #: what depends on the input: a weight (out, in, *kernel) that is computed does not
    _data: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Find the form of every operator.

        Raises:
            TilingError: the recording cannot be trusted for other parts of the input.
        """
        if self.captured.real:
            raise TilingError(
                "a branch of the forward depends on values, which differ from part to part; run "
                "the model whole"
            )
        shapes = [_shape(node) for node in self.captured.graph.nodes if node.op == "placeholder"]
        maps = [shape for shape in shapes if shape is not None and len(shape) > 2]
        if not maps:
            raise TilingError("no input has spatial axes: expected (N, C, *spatial)")
        self.rank = max(len(shape) for shape in maps) - 2
        for node in self.captured.graph.nodes:
            if node.op == "placeholder" or not self._data.isdisjoint(node.all_input_nodes):
                self._data.add(node)
        used: set[fx.Node] = set(self.captured.outputs())
        for node in reversed(self.captured.graph.nodes):
            if node in used:
                used.update(node.all_input_nodes)
        self.nodes = [node for node in self.captured.operators() if node in used]
        for node in self.captured.operators():
            self._check_memory(node)  # also where, by the recording, nothing depends on it
        for node in self.nodes:
            self._classify(node)

    def is_map(self, node: fx.Node) -> bool:
        """Whether a result is (N, C, *spatial) and depends on the input."""
        shape = _shape(node)
        return node in self._data and shape is not None and len(shape) == self.rank + 2

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
                self.forms[node] = local_form(node, self.rank)
            except NotLocal as error:
                self.obstacles[node] = str(error)
            else:
                return
        try:
            gathered = gather_form(node, self.rank)
        except NotLocal as error:
            self.obstacles.setdefault(node, str(error))
            return
        self.gathered[node] = gathered
        if isinstance(gathered, Moments):
            bound = bind(node.target, node.args, node.kwargs)
            self.forms[node] = Normalised(node, bound, gathered)

    def _check_memory(self, node: fx.Node) -> None:
        """Refuse writing into a part of a tensor that is read as a whole later.

        A recording says what operators read and returned, and not that one of them changed the
        result of another.
        """
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable):
            return
        written = node.all_input_nodes[0] if node.all_input_nodes else None
        while written is not None and _is_view(written):
            base = written.all_input_nodes[0] if written.all_input_nodes else None
            if base is not None and any(_later(node, user) for user in base.users):
                raise TilingError(
                    f"{target} at {node.meta.get('source') or node.meta['module']} writes into a "
                    "part of a tensor that is read again later"
                )
            written = base


def _is_view(node: fx.Node) -> bool:
    name = str(getattr(node.target, "_schema", node.target)).partition("(")[0]
    name = name.rpartition("::")[2].partition(".")[0]
    return node.op == "call_function" and (name in _VIEWS or "getitem" in str(node.target))


def _later(node: fx.Node, user: fx.Node) -> bool:
    return user > node


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None
