"""Carrying out a program on real tensors."""

from __future__ import annotations

__all__ = ["Execution"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import OpOverload, schema_of
from pocketize.passes.tiling.intervals import Region, cut, hull, region_of
from pocketize.passes.tiling.keeping import Keeper, Kept, is_channels_last
from pocketize.passes.tiling.program import Direct, Program, Sweep, needed_regions, share


class Execution:
    """One forward, part by part; a context for the forms of the network.

    Args:
        program: what to do.
        tensors: parameters and buffers by name.
        inputs: the input tensors by placeholder, on any device.
        keeper: where results are kept between sweeps.
        outputs: where outputs are kept; the same by default.
        retain: free nothing, for the way back.
        finish: what is stored of an output instead of itself: takes a part (N, C, *spatial) and
            returns (N, K, *spatial).
        progress: is told after each tile how many are done, and of how many.
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[fx.Node, Tensor],
        keeper: Keeper,
        *,
        outputs: Keeper | None = None,
        retain: bool = False,
        finish: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.program, self.graph = program, program.graph
        self.tensors, self.keeper = tensors, keeper
        self.output_keeper = outputs or keeper
        self.finish, self.progress, self.retain = finish, progress, retain
        self.stored: dict[fx.Node, Any] = {}
        self.finished: dict[fx.Node, Kept] = {}
        self.norms: dict[fx.Node, Tensor] = {}
        for node, tensor in inputs.items():
            is_map = self.graph.is_map(node)
            self.stored[node] = (
                Kept(tensor, keeper.device, tensor.dtype) if is_map else tensor.to(keeper.device)
            )
        self._local: dict[fx.Node, tuple[Tensor, Region]] = {}
        self._measures: dict[fx.Node, tuple[Any, ...]] = {}
        self._done = self._total = 0

    def run(self) -> dict[fx.Node, Tensor]:
        """Return the outputs, or what ``finish`` makes of them."""
        self._total = sum(
            len(self._tiles(step)) if isinstance(step, Sweep) else 1 for step in self.program.steps
        )
        try:
            for number in range(self._begin(), len(self.program.steps)):
                self._step(number)
            results = {}
            for node in self.program.outputs:
                held = self.finished.pop(node, None) or self.stored[node]
                results[node] = held.tensor if isinstance(held, Kept) else held
        except BaseException:
            self.close()
            raise
        self._local.clear()
        if not self.retain:
            self.close()
        return results

    def hold_alias(self, node: fx.Node) -> Tensor:
        """Hold an alias of an output instead of itself, to which autograd gives a history."""
        held = self.stored[node]
        alias: Tensor = (held.tensor if isinstance(held, Kept) else held).detach()
        if isinstance(held, Kept):
            held.tensor = alias
        else:
            self.stored[node] = alias
        return alias

    def close(self) -> None:
        """Give back all that is stored."""
        self._local.clear()
        for held in [*self.stored.values(), *self.finished.values()]:
            if isinstance(held, Kept):
                held.close()
        self.stored.clear()

    # -- what forms read --------------------------------------------------------------------------

    def part(self, node: fx.Node, region: Region) -> Tensor:
        """Return a region of a result."""
        if node in self._local:
            tensor, have = self._local[node]
            inside = tuple(
                (low - start, high - start)
                for (low, high), (start, _) in zip(region, have, strict=True)
            )
            return cut(tensor, inside)
        held = self.stored[node] if node in self.stored else self.value(node)
        if isinstance(held, Kept):
            return held.read(region)
        return cut(held, region)

    def value(self, node: fx.Node) -> Any:
        """Return a result that is no map, or a map as a whole."""
        if node.op == "get_attr":
            name = node.meta["tensor"]
            return self.tensors[name] if name else node.meta["val"]
        held = self.stored[node]
        return held.read(region_of(node.meta["val"].shape)) if isinstance(held, Kept) else held

    def statistics(self, node: fx.Node) -> Tensor:
        """Return what was gathered for a norm."""
        return self.norms[node]

    # -- steps ------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """Return the step to begin with."""
        return 0

    def _step(self, number: int) -> None:
        step = self.program.steps[number]
        if isinstance(step, Direct):
            self.stored[step.node] = self._direct(step.node)
            self._tell()
        else:
            self._sweep(step)
        if not self.retain:
            self._free(step.frees)

    def _free(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            held = self.stored.pop(node, None)
            if isinstance(held, Kept):
                held.close()

    def _direct(self, node: fx.Node) -> Any:
        read: Any = fx.node.map_arg((node.args, node.kwargs), self.value)
        args, kwargs = read
        target: Any = node.target
        if isinstance(target, OpOverload) and schema_of(target).is_mutable:
            args = (args[0].clone(), *args[1:])  # stored results stay as they are
        return target(*args, **kwargs)

    def _sweep(self, step: Sweep) -> None:
        rooms = {node: self._room(node) for node in step.targets}
        for tile in self._tiles(step):
            shares = {node: self._share(node, step, tile) for node in step.targets}
            sources = {
                node: self._share(self.graph.gathered[node].source, step, tile)
                for node in step.gathers
            }
            self._compute(step, shares, sources)
            for node, region in shares.items():
                if region is not None:
                    self._write(rooms[node], node, region)
            for node, region in sources.items():
                if region is not None:
                    gathered = self.graph.gathered[node]
                    more = gathered.measure(self.part(gathered.source, region))
                    self._gather(node, tile, more)
            self._local.clear()
            self._tell()
        for node, room in rooms.items():
            (self.finished if self._is_finished(node) else self.stored)[node] = room
        for node in step.gathers:
            made = self.norms if node in self.graph.forms else self.stored
            made[node] = self.graph.gathered[node].finish(self._gathered(node))

    def _tiles(self, step: Sweep) -> Sequence[tuple[int, ...]]:
        """Return the tiles of a sweep that are computed, in order."""
        return self.program.tiles(step)

    def _gather(self, node: fx.Node, tile: tuple[int, ...], more: tuple[Any, ...]) -> None:
        """Join what a tile says of a whole map to what others said."""
        held = self._measures.get(node)
        self._measures[node] = more if held is None else self.graph.gathered[node].join(held, more)

    def _gathered(self, node: fx.Node) -> tuple[Any, ...]:
        """Return what all tiles of a sweep say of a whole map."""
        return self._measures.pop(node)

    def _compute(
        self,
        step: Sweep,
        shares: Mapping[fx.Node, Region | None],
        sources: Mapping[fx.Node, Region | None],
    ) -> None:
        """Compute all that a tile takes: first which regions, from the end; then their values."""
        inside = set(step.order)
        wanted = {node: region for node, region in shares.items() if region is not None}
        for node, region in sources.items():
            source = self.graph.gathered[node].source
            if region is not None and source in inside:
                wanted[source] = hull(wanted.get(source), region)
        needed = needed_regions(self.graph, step.order, wanted)
        last: dict[fx.Node, fx.Node] = {}
        for node in reversed(step.order):
            if node in needed:
                for source in self.graph.forms[node].needs(needed[node]):
                    last.setdefault(source, node)
        kept = {*shares, *(self.graph.gathered[node].source for node in sources)}
        for node in step.order:
            if node not in needed:
                continue
            self._local[node] = self.graph.forms[node].run(needed[node], self), needed[node]
            for source in [s for s in self._local if last.get(s) is node and s not in kept]:
                del self._local[source]

    def _share(self, node: fx.Node, step: Sweep, tile: tuple[int, ...]) -> Region | None:
        region = share(node.meta["val"].shape[2:], step.counts, tile)
        return region if all(low < high for low, high in region) else None

    def _is_finished(self, node: fx.Node) -> bool:
        """Whether a node is stored as ``finish`` leaves it: an output that nothing else reads."""
        if self.finish is None or node not in self.program.outputs:
            return False
        return all(user.op == "output" for user in node.users)

    def _room(self, node: fx.Node) -> Kept:
        value = node.meta["val"]
        if self._is_finished(node):
            assert self.finish is not None
            sample = torch.zeros((1, value.shape[1], *(1 for _ in value.shape[2:])))
            made = self.finish(sample.to(value.dtype))
            shape = (value.shape[0], *made.shape[1:2], *value.shape[2:])
            return self.output_keeper.room(shape, made.dtype, name=node.name)
        if node in self.program.outputs:
            return self.output_keeper.room(
                value.shape, value.dtype, name=node.name, channels_last=is_channels_last(value)
            )
        return self._room_between(node, value.shape)

    def _room_between(self, node: fx.Node, shape: Sequence[int]) -> Kept:
        """Return room for a map that waits between sweeps, or for a region of it."""
        value = node.meta["val"]
        small = self.graph.nbytes(node) <= self.program.limit or 0 in shape
        return self.keeper.room(
            shape, value.dtype, small=small, name=node.name, channels_last=is_channels_last(value)
        )

    def _write(self, room: Kept, node: fx.Node, region: Region) -> None:
        part = self.part(node, region)
        if self._is_finished(node):
            assert self.finish is not None
            part = self.finish(part)
        room.write(region, part)

    def _tell(self) -> None:
        """Say that one more tile is done."""
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self._total)
