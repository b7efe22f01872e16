"""The order in which a network is computed part by part: sweeps, and operators that run whole.

Most results are never there as a whole: a *sweep* goes over a map tile by tile and computes, for
each tile, whatever it takes from what is stored. Stored are the inputs, what an operator needs
whole (the input of a norm, whose statistics are gathered in the same sweep), small maps, and what
later sweeps read and would be costly to compute again, such as a skip connection.
"""

from __future__ import annotations

__all__ = ["Direct", "Program", "Step", "Sweep", "build_program", "needed_regions", "share"]

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from pocketize.passes.tiling.intervals import Region, hull
from pocketize.passes.tiling.network import TiledGraph


@dataclass(eq=False)
class Sweep:
    """Go over some maps tile by tile.

    Attributes:
        targets: maps that are stored.
        gathers: operators whose sums over their source are gathered.
        order: what is computed for each tile, in the order in which it runs.
        counts: number of tiles along each axis.
        reads: stored results that it reads.
        frees: stored results that nothing reads afterwards.
    """

    targets: tuple[fx.Node, ...]
    gathers: tuple[fx.Node, ...]
    order: tuple[fx.Node, ...]
    counts: tuple[int, ...]
    reads: tuple[fx.Node, ...] = ()
    frees: tuple[fx.Node, ...] = ()


@dataclass(eq=False)
class Direct:
    """Run one operator on stored results.

    Attributes:
        node: the operator.
        reads: stored results that it reads.
        frees: stored results that nothing reads afterwards.
    """

    node: fx.Node
    reads: tuple[fx.Node, ...] = ()
    frees: tuple[fx.Node, ...] = ()


#: Maps that are smaller than this fraction of a part run whole and stay on the device.
_SMALL = 4
#: Of sweeps with no more tiles than this, all are gone through also where some would do.
_FEW = 3

Step: TypeAlias = Sweep | Direct


@dataclass(eq=False)
class Program:
    """Steps that compute the outputs of a network.

    Attributes:
        graph: the network.
        steps: in order.
        outputs: the nodes of the output tensors.
        tile: size of a tile at full resolution.
        limit: maps of no more bytes than this are kept on the device.
        sampled: go only through the tiles that decide the peak; what is computed is then of no use.
    """

    graph: TiledGraph
    steps: tuple[Step, ...]
    outputs: tuple[fx.Node, ...]
    tile: tuple[int, ...]
    limit: int
    sampled: bool = False
    _chosen: dict[Sweep, list[tuple[int, ...]]] = field(default_factory=dict, repr=False)

    def tiles(self, step: Sweep) -> list[tuple[int, ...]]:
        """Return the tiles of a sweep, in order."""
        if not self.sampled or math.prod(step.counts) <= _FEW:
            return list(itertools.product(*(range(count) for count in step.counts)))
        if step not in self._chosen:
            largest = self._largest(step)
            # sums begin with the first tile; what comes later meets them
            self._chosen[step] = [(0,) * len(step.counts), largest, largest]
        return self._chosen[step]

    def regions(self, step: Sweep, tile: Sequence[int]) -> dict[fx.Node, Region]:
        """Return what a sweep computes for one tile."""
        graph, inside = self.graph, set(step.order)
        wanted: dict[fx.Node, Region] = {}
        for node in [*step.targets, *(graph.gathered[node].source for node in step.gathers)]:
            region = share(node.meta["val"].shape[2:], step.counts, tile)
            if node in inside and all(low < high for low, high in region):
                wanted[node] = hull(wanted.get(node), region)
        needed = needed_regions(graph, step.order, wanted)
        return {node: region for node, region in needed.items() if node in inside}

    def _largest(self, step: Sweep) -> tuple[int, ...]:
        """Return the tile that computes most: along each axis, regions depend on it alone."""
        middle = [count // 2 for count in step.counts]

        def entries(axis: int, index: int) -> int:
            tile = [index if a == axis else at for a, at in enumerate(middle)]
            regions = self.regions(step, tile).items()
            return sum(
                math.prod([*node.meta["val"].shape[:2], *(high - low for low, high in region)])
                for node, region in regions
            )

        return tuple(
            max(range(count), key=lambda index: entries(axis, index))
            for axis, count in enumerate(step.counts)
        )


def share(sizes: Sequence[int], counts: Sequence[int], tile: Sequence[int]) -> Region:
    """Return the part of a map that belongs to one tile of a sweep; empty where it has none.

    Args:
        sizes: of the map.
        counts: tiles along each axis.
        tile: number of the tile along each axis.
    """
    return tuple(
        (size * index // count, size * (index + 1) // count)
        for size, count, index in zip(sizes, counts, tile, strict=True)
    )


def needed_regions(
    graph: TiledGraph, order: Sequence[fx.Node], wanted: Mapping[fx.Node, Region]
) -> dict[fx.Node, Region]:
    """Return which regions of which maps it takes to compute some.

    Args:
        graph: the network.
        order: what is computed, in the order in which it runs; all else is stored.
        wanted: regions of maps, computed or stored.

    Returns:
        A region for each map that is computed or read on the way.
    """
    needed = dict(wanted)
    for node in reversed(order):
        if node in needed:
            for source, region in graph.forms[node].needs(needed[node]).items():
                needed[source] = hull(needed.get(source), region)
    return needed


def build_program(graph: TiledGraph, tile: Sequence[int], *, sampled: bool = False) -> Program:
    """Decide what is stored, what is computed for each tile, and in what order.

    Args:
        graph: the network.
        tile: size of a tile at full resolution, one number for each spatial axis.
        sampled: see :class:`Program`.
    """
    builder = _Builder(graph, tuple(tile))
    for node in graph.nodes:
        builder.add(node)
    outputs = tuple(dict.fromkeys(graph.captured.outputs()))
    builder.sweep([node for node in outputs if node in builder.pending])
    return Program(
        graph,
        _freed(builder.steps, outputs),
        outputs,
        builder.tile,
        builder.limit // _SMALL,
        sampled,
    )


@dataclass(eq=False)
class _Builder:
    graph: TiledGraph
    tile: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    #: maps that have a form and are computed where a sweep needs them
    pending: dict[fx.Node, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.graph
        inputs = [n for n in graph.captured.graph.nodes if n.op == "placeholder"]
        full = max((n for n in inputs if graph.is_map(n)), key=graph.voxels)
        self.full = tuple(full.meta["val"].shape[2:])
        self.tile = tuple(min(t, size) for t, size in zip(self.tile, self.full, strict=True))
        self.grid = tuple(-(-size // t) for t, size in zip(self.tile, self.full, strict=True))
        finest = [graph.nbytes(n) for n in graph.forms if graph.voxels(n) >= graph.voxels(full)]
        # what a tile of the widest map at full resolution takes: no more of any map is computed
        # at once
        self.limit: int = max([*finest, graph.nbytes(full)]) // math.prod(self.grid)

    def add(self, node: fx.Node) -> None:
        graph = self.graph
        if node in graph.gathered and not self._small(graph.gathered[node].source):
            source = graph.gathered[node].source
            self.sweep([source] if source in self.pending else [], gathers=[node])
            if node in graph.forms:
                self.pending[node] = None
        elif node in graph.forms and self._keeps_pending(node):
            if self._small(node):
                self.pending[node] = None
                self.sweep([node])
            else:
                self.pending[node] = None
        elif not self._is_cut_up(node):
            self.sweep([n for n in node.all_input_nodes if n in self.pending])
            self.steps.append(Direct(node))

    def _is_cut_up(self, node: fx.Node) -> bool:
        """Whether a node returns several maps, each of which sweeps take from its input."""
        if not isinstance(node.meta["val"], list | tuple) or not node.users:
            return False
        return all(user in self.graph.forms and self._keeps_pending(user) for user in node.users)

    def _keeps_pending(self, node: fx.Node) -> bool:
        """Whether a local operator is to be computed by sweeps: it or an input is large."""
        inputs = _maps(node, self.graph)
        large = not self._small(node) or any(not self._small(n) for n in inputs)
        return large or any(n in self.pending for n in inputs)

    def _small(self, node: fx.Node) -> bool:
        """Whether a result is small beside a part: several of them are there at once."""
        return self.graph.nbytes(node) <= self.limit // _SMALL

    def sweep(self, targets: list[fx.Node], gathers: Sequence[fx.Node] = ()) -> None:
        """Add a sweep that stores maps which are pending, and gathers sums."""
        if not targets and not gathers:
            return
        sources = [self.graph.gathered[node].source for node in gathers]
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
                wanted[node] = None  # later sweeps read it
        finest = math.prod(self.full)
        largest = max(
            [*order, *sources],
            key=lambda n: (self.graph.voxels(n) >= finest, self.graph.nbytes(n)),
        )
        reads = [n for node in order for n in _maps(node, self.graph) if n not in inside]
        reads += [source for source in sources if source not in inside]
        self.steps.append(
            Sweep(
                tuple(wanted),
                tuple(gathers),
                tuple(order),
                self._counts(largest),
                tuple(dict.fromkeys(reads)),
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
        """Return into how many tiles each axis is cut, so that no part is above the limit."""
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
    return list(graph.forms[node].needs(tuple((0, size) for size in sizes)))


def _freed(steps: Sequence[Step], outputs: Sequence[fx.Node]) -> tuple[Step, ...]:
    """Note after which step each stored result is read for the last time.

    Sweeps name the maps that they read; their operators read weights and vectors besides.
    """
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        if isinstance(step, Direct):
            step.reads = tuple(step.node.all_input_nodes)
        order = step.order if isinstance(step, Sweep) else (step.node,)
        read = {source for node in order for source in node.all_input_nodes}
        last.update(dict.fromkeys({*read.difference(order), *step.reads}, index))
    for index, step in enumerate(steps):
        made = step.targets if isinstance(step, Sweep) else (step.node,)
        done = [node for node, at in last.items() if at == index]
        done += [node for node in made if node not in last]
        step.frees = tuple(node for node in done if node not in outputs)
    return tuple(steps)
