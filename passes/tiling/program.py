"""The order in which a network is computed by tiles: tile loops, and operators at full size.

Most results never exist as a whole: a *tile loop* goes over a map tile by tile and computes, for
each tile, whatever it takes from stored results. Stored are the inputs, what an operator needs
whole, small maps, and what later loops read and would be costly to compute again, such as a skip
connection. Statistics of a norm are reduced in the loop that stores the norm's input.
"""

from __future__ import annotations

__all__ = ["FullSizeOp", "Program", "Step", "TileLoop", "build_program", "needed_boxes"]

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from pocketize.memory.hints import is_rehearsal
from pocketize.passes.tiling.intervals import Box, hull, is_empty
from pocketize.passes.tiling.tiled_graph import TiledGraph


@dataclass(eq=False)
class _Reading:
    """The stored results that a step reads, and those of them that nothing reads afterwards."""

    reads: tuple[fx.Node, ...] = field(default=(), kw_only=True)
    frees: tuple[fx.Node, ...] = field(default=(), kw_only=True)


@dataclass(eq=False)
class TileLoop(_Reading):
    """Compute some maps tile by tile.

    Attributes:
        targets: maps that are stored.
        reductions: operators whose sums over a map are accumulated.
        order: what is computed for each tile, in the order in which it runs.
        counts: number of tiles along each axis.
    """

    targets: tuple[fx.Node, ...]
    reductions: tuple[fx.Node, ...]
    order: tuple[fx.Node, ...]
    counts: tuple[int, ...]


@dataclass(eq=False)
class FullSizeOp(_Reading):
    """Run one operator on stored results."""

    node: fx.Node


#: Maps that are smaller than this fraction of a part run whole and stay on the device.
_SMALL = 4
#: Loops with no more tiles than this are never sampled.
_FEW = 3

Step: TypeAlias = TileLoop | FullSizeOp


@dataclass(eq=False)
class Program:
    """Steps that compute the outputs of a network.

    Attributes:
        graph: the network.
        steps: in order.
        outputs: the nodes of the output tensors.
        tile: size of a tile at full resolution.
        limit: maps of no more bytes than this are kept on the device.
        sampled: compute only the tiles that decide the peak, for an estimate.
    """

    graph: TiledGraph
    steps: tuple[Step, ...]
    outputs: tuple[fx.Node, ...]
    tile: tuple[int, ...]
    limit: int
    sampled: bool = False
    _chosen: dict[TileLoop, list[tuple[int, ...]]] = field(default_factory=dict, repr=False)

    def tiles(self, step: TileLoop) -> list[tuple[int, ...]]:
        """Return the tiles of a loop, in order."""
        if is_rehearsal():  # the last one is never empty
            return [tuple(count - 1 for count in step.counts)]
        if not self.sampled or math.prod(step.counts) <= _FEW:
            return list(itertools.product(*(range(count) for count in step.counts)))
        if step not in self._chosen:
            largest = self._largest(step)
            # sums are allocated with the first tile, and are alive at later ones
            self._chosen[step] = [(0,) * len(step.counts), largest, largest]
        return self._chosen[step]

    def wanted(self, step: TileLoop, tile: Sequence[int]) -> dict[fx.Node, Box]:
        """Return the boxes of maps that one tile stores or measures; empty ones are left out."""
        sources = [self.graph.reductions[node].source for node in step.reductions]
        found = {}
        for node in [*step.targets, *sources]:
            rows = zip(node.meta["val"].shape[2:], step.counts, tile, strict=True)
            box = tuple((size * at // count, size * (at + 1) // count) for size, count, at in rows)
            if not is_empty(box):
                found[node] = box
        return found

    def boxes(self, step: TileLoop, tile: Sequence[int]) -> dict[fx.Node, Box]:
        """Return the boxes that a loop computes for one tile."""
        needed = needed_boxes(self.graph, step.order, self.wanted(step, tile))
        return {node: needed[node] for node in step.order if node in needed}

    def _largest(self, step: TileLoop) -> tuple[int, ...]:
        """Return the tile that computes most; axes are independent of each other."""
        middle = [count // 2 for count in step.counts]

        def entries(axis: int, index: int) -> int:
            tile = [index if a == axis else at for a, at in enumerate(middle)]
            boxes = self.boxes(step, tile).items()
            return sum(
                math.prod([*node.meta["val"].shape[:2], *(high - low for low, high in box)])
                for node, box in boxes
            )

        return tuple(
            max(range(count), key=lambda index: entries(axis, index))
            for axis, count in enumerate(step.counts)
        )


def needed_boxes(
    graph: TiledGraph, order: Sequence[fx.Node], wanted: Mapping[fx.Node, Box]
) -> dict[fx.Node, Box]:
    """Return a box of each map that is computed or read to compute some boxes.

    What is in ``order`` is computed, in that order; all else is stored.
    """
    needed = dict(wanted)
    for node in reversed(order):
        if node in needed:
            for source, box in graph.forms[node].input_boxes(needed[node]).items():
                needed[source] = hull(needed.get(source), box)
    return needed


def build_program(graph: TiledGraph, tile: Sequence[int], *, sampled: bool = False) -> Program:
    """Decide what is stored, what is computed for each tile of a size, and in what order."""
    builder = _Builder(graph, tile)
    for node in graph.nodes:
        builder.add(node)
    outputs = tuple(dict.fromkeys(graph.traced.outputs()))
    builder.tile_loop([node for node in outputs if node in builder.pending])
    steps = _freed(builder.steps, outputs)
    return Program(graph, steps, outputs, builder.tile, builder.limit // _SMALL, sampled)


class _Builder:
    def __init__(self, graph: TiledGraph, tile: Sequence[int]) -> None:
        self.graph, self.full = graph, graph.volume
        self.steps: list[Step] = []
        #: maps that have a form and are computed where a loop needs them
        self.pending: dict[fx.Node, None] = {}
        self.tile = tuple(min(pair) for pair in zip(tile, self.full, strict=True))
        self.grid = tuple(-(-size // t) for t, size in zip(self.tile, self.full, strict=True))
        whole = graph.largest_input
        finest = [graph.nbytes(n) for n in graph.forms if graph.voxels(n) >= graph.voxels(whole)]
        # bytes of a tile of the widest map at full resolution: the limit for the tile of any map
        self.limit: int = max([*finest, graph.nbytes(whole)]) // math.prod(self.grid)

    def add(self, node: fx.Node) -> None:
        graph = self.graph
        if node in graph.reductions and not self._small(graph.reductions[node].source):
            source = graph.reductions[node].source
            self.tile_loop([source] if source in self.pending else [], reductions=[node])
            if node in graph.forms:
                self.pending[node] = None
        elif node in graph.forms and self._keeps_pending(node):
            self.pending[node] = None
            if self._small(node):
                self.tile_loop([node])
        else:
            self.tile_loop([n for n in node.all_input_nodes if n in self.pending])
            self.steps.append(FullSizeOp(node))

    def _keeps_pending(self, node: fx.Node) -> bool:
        """Whether a local operator is to be computed in loops: it or an input is large."""
        inputs = _maps(node, self.graph)
        large = not self._small(node) or any(not self._small(n) for n in inputs)
        return large or any(n in self.pending for n in inputs)

    def _small(self, node: fx.Node) -> bool:
        """Whether a result is small compared with a tile, so that several fit beside one."""
        return self.graph.nbytes(node) <= self.limit // _SMALL

    def tile_loop(self, targets: list[fx.Node], reductions: Sequence[fx.Node] = ()) -> None:
        """Add a loop that stores pending maps, and accumulates reductions."""
        if not targets and not reductions:
            return
        sources = [self.graph.reductions[node].source for node in reductions]
        order = self._ancestors([*targets, *sources])
        inside = set(order)
        wanted = dict.fromkeys(targets)
        cheap: set[fx.Node] = set()
        for node in order:
            form = self.graph.forms[node]
            pending = [n for n in _maps(node, self.graph) if n in inside and n not in wanted]
            if form.cheap and all(n in cheap for n in pending):
                cheap.add(node)
            elif node not in wanted and any(user not in inside for user in self._users(node)):
                wanted[node] = None  # later loops read it
        finest = math.prod(self.full)
        largest = max(
            [*order, *sources],
            key=lambda n: (self.graph.voxels(n) >= finest, self.graph.nbytes(n)),
        )
        reads = [n for node in order for n in _maps(node, self.graph) if n not in inside]
        reads += [source for source in sources if source not in inside]
        self.steps.append(
            TileLoop(
                tuple(wanted),
                tuple(reductions),
                tuple(order),
                self._counts(largest),
                reads=tuple(dict.fromkeys(reads)),
            )
        )
        for node in wanted:
            del self.pending[node]

    def _users(self, node: fx.Node) -> list[fx.Node]:
        known = set(self.graph.nodes)
        return [user for user in node.users if user in known or user.op == "output"]

    def _ancestors(self, targets: Iterable[fx.Node]) -> list[fx.Node]:
        """Return the pending nodes that some depend on, themselves included, in order."""
        found: set[fx.Node] = set()
        stack = [node for node in targets if node in self.pending]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += [n for n in _maps(node, self.graph) if n in self.pending]
        return [node for node in self.pending if node in found]

    def _counts(self, largest: fx.Node) -> tuple[int, ...]:
        """Return into how many tiles each axis is cut, so that no tile is above the limit."""
        sizes = largest.meta["val"].shape[2:]
        if self.graph.voxels(largest) >= math.prod(self.full):
            return self.grid
        wanted = -(-self.graph.nbytes(largest) // max(1, self.limit))
        counts = [1] * self.graph.rank
        most = [min(count, size) for count, size in zip(self.grid, sizes, strict=True)]
        while math.prod(counts) < wanted and counts != most:
            axes = [axis for axis in range(self.graph.rank) if counts[axis] < most[axis]]
            axis = max(axes, key=lambda a: self.grid[a] / counts[a])
            counts[axis] += 1
        return tuple(counts)


def _maps(node: fx.Node, graph: TiledGraph) -> list[fx.Node]:
    """Return the maps that the local form of a node reads."""
    sizes = node.meta["val"].shape[2:]
    return list(graph.forms[node].input_boxes(tuple((0, size) for size in sizes)))


def _freed(steps: Sequence[Step], outputs: Sequence[fx.Node]) -> tuple[Step, ...]:
    """Set for each step the stored results that it reads as the last.

    The operators of loops also read weights and vectors, which are not among ``reads``.
    """
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        if isinstance(step, FullSizeOp):
            step.reads = tuple(step.node.all_input_nodes)
        order = step.order if isinstance(step, TileLoop) else (step.node,)
        read = {source for node in order for source in node.all_input_nodes}
        last.update(dict.fromkeys({*read.difference(order), *step.reads}, index))
    for index, step in enumerate(steps):
        made = step.targets if isinstance(step, TileLoop) else (step.node,)
        done = [node for node, at in last.items() if at == index]
        done += [node for node in made if node not in last]
        step.frees = tuple(node for node in done if node not in outputs)
    return tuple(steps)
