"""A recorded network as something that can be computed part by part."""

from __future__ import annotations

__all__ = ["TiledGraph", "TilingError"]

import math
from dataclasses import dataclass, field

from torch import Tensor, fx

from pocketize.errors import RewriteError
from pocketize.graph.capture import Captured
from pocketize.ops.schema import bind
from pocketize.passes.tiling.aliasing import Memory, written_by
from pocketize.passes.tiling.arguments import NotLocal
from pocketize.passes.tiling.forms import Convolution, Form, Transposed
from pocketize.passes.tiling.statistics import Gathered, Moments, Normalised, gather_form
from pocketize.passes.tiling.table import local_form


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
        self._check_memory()
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
                self.forms[node] = self._checked(local_form(node, self.rank))
            except NotLocal as error:
                if error.hopeless:
                    where = node.meta.get("module") or "the model itself"
                    raise TilingError(f"{node.target} in {where}: {error}") from None
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

    def _checked(self, form: Form) -> Form:
        """Refuse weights that are made of the volume: they are needed whole, as no map is.

        Raises:
            NotLocal: they are.
        """
        if isinstance(form, Convolution | Transposed) and form.weight in self._data:
            raise NotLocal("its weight depends on the volume")
        return form

    def _check_memory(self) -> None:
        """Refuse writing into memory that is read later as another tensor.

        A recording says what operators read and returned, and not that one of them changed the
        result of another.
        """
        memory = Memory(self.captured.graph)
        for node in self.captured.operators():  # also where, by the recording, nothing uses it
            for written in written_by(node):
                reader = memory.read_after(node, written)
                if reader is not None:
                    part = "a part of a tensor" if _larger(reader, written) else "memory"
                    raise TilingError(
                        f"{node.target} at {node.meta.get('source') or node.meta['module']} writes "
                        f"into {part} that is read again later"
                    )


def _larger(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].numel() > b.meta["val"].numel())


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None
