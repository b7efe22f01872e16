"""A forward by tiles that several processes share, each of which holds its part of every map.

The tiles of a sweep are dealt out in blocks along one axis. A process keeps its block of what a
sweep stores, and as much of its neighbours' as its later tiles read; that is sent after the sweep.
What is asked of whole maps is measured tile by tile and joined by every process in the order in
which a single one would, so that the results are the same to the last bit.
"""

from __future__ import annotations

__all__ = ["SharedExecution", "Shares"]

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from pocketize._torch import pytree
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.intervals import Region, cut, hull, region_of
from pocketize.passes.tiling.keeping import Keeper, Kept
from pocketize.passes.tiling.peers import Peers
from pocketize.passes.tiling.program import Direct, Program, Sweep, needed_regions


class Shares:
    """Which process computes what, and which regions it holds; the same for all to see.

    Attributes:
        axis: along which tiles are dealt out.
        owned: the regions of a stored map that each process computes, by rank.
        reach: the regions that each holds, by rank: what it owns and what it reads.
    """

    def __init__(self, program: Program, count: int) -> None:
        self.count = count
        sweeps = [step for step in program.steps if isinstance(step, Sweep)]
        self.axis = max(
            range(program.graph.rank), key=lambda axis: max(step.counts[axis] for step in sweeps)
        )
        self.owned: dict[fx.Node, list[Region]] = {}
        self.reach: dict[fx.Node, list[Region]] = {}
        for step in program.steps:
            if isinstance(step, Direct):
                for node in step.reads:
                    if node in self.reach:  # every process runs it
                        self.reach[node] = [region_of(_shape(node))] * count
                continue
            for node in step.targets:
                self.owned[node] = [self.block(node, step, rank) for rank in range(count)]
                self.reach[node] = list(self.owned[node])
            for rank in range(count):
                self._read(program, step, rank)
        for node in program.outputs:
            if node in self.reach:
                self.reach[node] = [region_of(_shape(node))] * count

    def range(self, step: Sweep, rank: int) -> range:
        """Return the tiles of a process along the axis."""
        tiles = step.counts[self.axis]
        return range(tiles * rank // self.count, tiles * (rank + 1) // self.count)

    def block(self, node: fx.Node, step: Sweep, rank: int) -> Region:
        """Return the part of a map that the tiles of a process cover."""
        tiles, count = self.range(step, rank), step.counts[self.axis]
        region = list(region_of(_shape(node)))
        size = region[self.axis][1]
        region[self.axis] = (size * tiles.start // count, size * tiles.stop // count)
        return tuple(region)

    def _read(self, program: Program, step: Sweep, rank: int) -> None:
        """Note what the tiles of a process read of what earlier sweeps stored."""
        graph = program.graph
        sources = [graph.gathered[node].source for node in step.gathers]
        wanted = {node: self.block(node, step, rank) for node in (*step.targets, *sources)}
        wanted = {node: region for node, region in wanted.items() if not _empty(region)}
        inside = set(step.order)
        for node, region in needed_regions(graph, step.order, wanted).items():
            if node not in inside and node in self.reach:
                held = self.reach[node][rank]
                self.reach[node][rank] = region if _empty(held) else hull(held, region)


class SharedExecution(Execution):
    """One forward, of which this process computes its share; all processes return the results.

    Args:
        program: what to do; the same in all processes.
        tensors: parameters and buffers by name; the same in all.
        inputs: the input tensors by placeholder, on any device, whole in each process, of which it
            reads its share.
        keeper: where results are kept between sweeps.
        peers: the processes.
        outputs: where outputs are put together, in each process.
        finish: what is stored of an output; see :class:`Execution`.
        progress: is told how many of this process's tiles are done.
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[fx.Node, Tensor],
        keeper: Keeper,
        *,
        peers: Peers,
        outputs: Keeper | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            program, tensors, inputs, keeper, outputs=outputs, finish=finish, progress=progress
        )
        self.peers, self.shares = peers, Shares(program, peers.size)
        self._parts: dict[fx.Node, dict[tuple[int, ...], tuple[Any, ...]]] = {}

    def _begin(self) -> int:
        self.peers.agree("tiles", [self.program.tile, len(self.program.steps)])
        return 0

    def _tiles(self, step: Sweep) -> Sequence[tuple[int, ...]]:
        ranges = [range(count) for count in step.counts]
        ranges[self.shares.axis] = self.shares.range(step, self.peers.rank)
        return list(itertools.product(*ranges))

    def _room(self, node: fx.Node) -> Kept:
        if node in self.program.outputs:
            return super()._room(node)
        value, region = node.meta["val"], self.shares.reach[node][self.peers.rank]
        shape = [*value.shape[:2], *(high - low for low, high in region)]
        kept = self._room_between(node, shape)
        kept.origin = [low for low, _ in region]
        return kept

    def _gather(self, node: fx.Node, tile: tuple[int, ...], more: tuple[Any, ...]) -> None:
        self._parts.setdefault(node, {})[tile] = more

    def _gathered(self, node: fx.Node) -> tuple[Any, ...]:
        """Join what the tiles of all processes say, in the order of the tiles."""
        mine = pytree.tree_map_only(Tensor, Tensor.cpu, self._parts.pop(node, {}))
        everything: dict[tuple[int, ...], tuple[Any, ...]] = {}
        for each in self.peers.gather(mine):
            everything |= each
        device = self.keeper.device
        for tile in sorted(everything):
            more = pytree.tree_map_only(Tensor, lambda t: t.to(device), everything[tile])
            super()._gather(node, tile, more)
        return super()._gathered(node)

    def _sweep(self, step: Sweep) -> None:
        super()._sweep(step)
        for node in step.targets:
            room = self.finished[node] if node in self.finished else self.stored[node]
            if node in self.program.outputs:
                self._publish(node, room, step)
            else:
                self._trade(node, room)

    def _publish(self, node: fx.Node, room: Kept, step: Sweep) -> None:
        """Give every process what each has of an output, tile by tile."""
        count, axis = step.counts[self.shares.axis], self.shares.axis
        region = list(region_of(_shape(node)))
        size = region[axis][1]
        for rank in range(self.peers.size):
            for index in self.shares.range(step, rank):
                region[axis] = (size * index // count, size * (index + 1) // count)
                self.peers.broadcast(cut(room.tensor, tuple(region)), rank)

    def _trade(self, node: fx.Node, room: Kept) -> None:
        """Give the others what they will read, and take what this process will."""
        owned, reach = self.shares.owned[node], self.shares.reach[node]
        me = self.peers.rank
        others = [rank for rank in range(self.peers.size) if rank != me]
        given = [(rank, _common(owned[me], reach[rank])) for rank in others]
        taken = [(rank, _common(owned[rank], reach[me])) for rank in others]
        self.peers.exchange(
            [(rank, room.view(region)) for rank, region in given if not _empty(region)],
            [(rank, room.view(region)) for rank, region in taken if not _empty(region)],
        )


def _shape(node: fx.Node) -> Sequence[int]:
    shape: Sequence[int] = node.meta["val"].shape
    return shape


def _common(a: Region, b: Region) -> Region:
    return tuple(
        (max(low, other[0]), min(high, other[1])) for (low, high), other in zip(a, b, strict=True)
    )


def _empty(region: Region) -> bool:
    return any(low >= high for low, high in region)
