"""Run a program on real tensors."""

from __future__ import annotations

__all__ = ["Execution", "ExecutionSettings"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import OpOverload, schema_of
from pocketize.passes.tiling.intervals import Box, box_of, cut, hull
from pocketize.passes.tiling.program import FullSizeOp, Program, TileLoop, needed_boxes, share
from pocketize.passes.tiling.storage import Buffer, Storage, is_channels_last


@dataclass(frozen=True, kw_only=True, eq=False)
class ExecutionSettings:
    """What a program runs on, and where results go.

    Attributes:
        program: the steps.
        tensors: parameters and buffers by name.
        inputs: the input tensors by placeholder, on any device.
        storage: of results between tile loops.
        outputs: storage of the outputs; the same by default.
        retain: free nothing, for the backward pass.
        finish: applied to an output before it is stored: takes a part (N, C, *spatial) and returns
            (N, K, *spatial).
        progress: called after each tile with the number of tiles that are done, and of all.
    """

    program: Program
    tensors: Mapping[str, Tensor]
    inputs: Mapping[fx.Node, Tensor]
    storage: Storage
    outputs: Storage | None = None
    retain: bool = False
    finish: Callable[[Tensor], Tensor] | None = None
    progress: Callable[[int, int], None] | None = None


class Execution:
    """One forward, tile by tile; the context that the network's forms read from.

    The settings themselves are not kept, as they would keep the inputs alive.
    """

    def __init__(self, settings: ExecutionSettings) -> None:
        self.program, self.graph = settings.program, settings.program.graph
        self.tensors, self.storage = settings.tensors, settings.storage
        self.output_storage = settings.outputs or settings.storage
        self.finish, self.progress, self.retain = (
            settings.finish,
            settings.progress,
            settings.retain,
        )
        self.stored: dict[fx.Node, Any] = {}
        self.finished: dict[fx.Node, Buffer] = {}
        self.norms: dict[fx.Node, Tensor] = {}
        device = self.storage.device
        for node, tensor in settings.inputs.items():
            is_map = self.graph.is_map(node)
            self.stored[node] = (
                Buffer(tensor, device, tensor.dtype) if is_map else tensor.to(device)
            )
        self._local: dict[fx.Node, tuple[Tensor, Box]] = {}
        self._measures: dict[fx.Node, tuple[Any, ...]] = {}
        self._done = self._total = 0

    def run(self) -> dict[fx.Node, Tensor]:
        """Return the outputs, after ``finish``."""
        self._total = sum(
            len(self._tiles(step)) if isinstance(step, TileLoop) else 1
            for step in self.program.steps
        )
        try:
            for number in range(self._begin(), len(self.program.steps)):
                self._step(number)
            results = {}
            for node in self.program.outputs:
                held = self.finished.pop(node, None) or self.stored[node]
                results[node] = held.tensor if isinstance(held, Buffer) else held
        except BaseException:
            self.close()
            raise
        self._local.clear()
        if not self.retain:
            self.close()
        return results

    def hold_alias(self, node: fx.Node) -> Tensor:
        """Store an alias of an output instead of itself, to which autograd gives a history."""
        held = self.stored[node]
        alias: Tensor = (held.tensor if isinstance(held, Buffer) else held).detach()
        if isinstance(held, Buffer):
            held.tensor = alias
        else:
            self.stored[node] = alias
        return alias

    def close(self) -> None:
        """Free all that is stored."""
        self._local.clear()
        for held in [*self.stored.values(), *self.finished.values()]:
            if isinstance(held, Buffer):
                held.close()
        self.stored.clear()

    # -- what forms read --------------------------------------------------------------------------

    def part(self, node: fx.Node, box: Box) -> Tensor:
        """Return a box of a result."""
        if node in self._local:
            tensor, have = self._local[node]
            inside = tuple(
                (low - start, high - start)
                for (low, high), (start, _) in zip(box, have, strict=True)
            )
            return cut(tensor, inside)
        held = self.stored[node] if node in self.stored else self.value(node)
        if isinstance(held, Buffer):
            return held.read(box)
        return cut(held, box)

    def value(self, node: fx.Node) -> Any:
        """Return a result that is no map, or a map as a whole."""
        if node.op == "get_attr":
            name = node.meta["tensor"]
            return self.tensors[name] if name else node.meta["val"]
        held = self.stored[node]
        return held.read(box_of(node.meta["val"].shape)) if isinstance(held, Buffer) else held

    def statistics(self, node: fx.Node) -> Tensor:
        """Return the statistics of a norm."""
        return self.norms[node]

    # -- steps ------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """Return the number of the first step."""
        return 0

    def _step(self, number: int) -> None:
        step = self.program.steps[number]
        if isinstance(step, FullSizeOp):
            self.stored[step.node] = self._full_size(step.node)
            self._tell()
        else:
            self._tile_loop(step)
        if not self.retain:
            self._free(step.frees)

    def _free(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            held = self.stored.pop(node, None)
            if isinstance(held, Buffer):
                held.close()

    def _full_size(self, node: fx.Node) -> Any:
        read: Any = fx.node.map_arg((node.args, node.kwargs), self.value)
        args, kwargs = read
        target: Any = node.target
        if isinstance(target, OpOverload) and schema_of(target).is_mutable:
            args = (args[0].clone(), *args[1:])  # stored results stay as they are
        return target(*args, **kwargs)

    def _tile_loop(self, step: TileLoop) -> None:
        buffers = {node: self._allocate(node) for node in step.targets}
        for tile in self._tiles(step):
            shares = {node: self._share(node, step, tile) for node in step.targets}
            sources = {
                node: self._share(self.graph.reductions[node].source, step, tile)
                for node in step.reductions
            }
            self._compute(step, shares, sources)
            for node, box in shares.items():
                if box is not None:
                    self._write(buffers[node], node, box)
            for node, box in sources.items():
                if box is not None:
                    reduction = self.graph.reductions[node]
                    self._join(node, tile, reduction.measure(self.part(reduction.source, box)))
            self._local.clear()
            self._tell()
        for node, buffer in buffers.items():
            (self.finished if self._is_finished(node) else self.stored)[node] = buffer
        for node in step.reductions:
            made = self.norms if node in self.graph.forms else self.stored
            made[node] = self.graph.reductions[node].finish(self._joined(node))

    def _tiles(self, step: TileLoop) -> Sequence[tuple[int, ...]]:
        """Return the tiles that are computed, in order."""
        return self.program.tiles(step)

    def _join(self, node: fx.Node, tile: tuple[int, ...], more: tuple[Any, ...]) -> None:
        """Join the measure of a tile with that of the tiles before."""
        held = self._measures.get(node)
        reduction = self.graph.reductions[node]
        self._measures[node] = more if held is None else reduction.join(held, more)

    def _joined(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the measure of all tiles."""
        return self._measures.pop(node)

    def _compute(
        self,
        step: TileLoop,
        shares: Mapping[fx.Node, Box | None],
        sources: Mapping[fx.Node, Box | None],
    ) -> None:
        """Compute all that a tile takes: the boxes, from the last operator back; then values."""
        inside = set(step.order)
        wanted = {node: box for node, box in shares.items() if box is not None}
        for node, box in sources.items():
            source = self.graph.reductions[node].source
            if box is not None and source in inside:
                wanted[source] = hull(wanted.get(source), box)
        needed = needed_boxes(self.graph, step.order, wanted)
        last: dict[fx.Node, fx.Node] = {}
        for node in reversed(step.order):
            if node in needed:
                for source in self.graph.forms[node].input_boxes(needed[node]):
                    last.setdefault(source, node)
        kept = {*shares, *(self.graph.reductions[node].source for node in sources)}
        for node in step.order:
            if node not in needed:
                continue
            self._local[node] = self.graph.forms[node].run(needed[node], self), needed[node]
            for source in [s for s in self._local if last.get(s) is node and s not in kept]:
                del self._local[source]

    def _share(self, node: fx.Node, step: TileLoop, tile: tuple[int, ...]) -> Box | None:
        box = share(node.meta["val"].shape[2:], step.counts, tile)
        return box if all(low < high for low, high in box) else None

    def _is_finished(self, node: fx.Node) -> bool:
        """Whether ``finish`` is applied before storing: to an output that nothing else reads."""
        if self.finish is None or node not in self.program.outputs:
            return False
        return all(user.op == "output" for user in node.users)

    def _allocate(self, node: fx.Node) -> Buffer:
        value = node.meta["val"]
        if self._is_finished(node):
            assert self.finish is not None
            sample = torch.zeros((1, value.shape[1], *(1 for _ in value.shape[2:])))
            made = self.finish(sample.to(value.dtype))
            shape = (value.shape[0], *made.shape[1:2], *value.shape[2:])
            return self.output_storage.allocate(shape, made.dtype, name=node.name)
        if node in self.program.outputs:
            return self.output_storage.allocate(
                value.shape, value.dtype, name=node.name, channels_last=is_channels_last(value)
            )
        return self._allocate_between(node, value.shape)

    def _allocate_between(self, node: fx.Node, shape: Sequence[int]) -> Buffer:
        """Return a buffer between tile loops, for a map or for a box of it."""
        value = node.meta["val"]
        small = self.graph.nbytes(node) <= self.program.limit or 0 in shape
        return self.storage.allocate(
            shape, value.dtype, small=small, name=node.name, channels_last=is_channels_last(value)
        )

    def _write(self, buffer: Buffer, node: fx.Node, box: Box) -> None:
        part = self.part(node, box)
        if self._is_finished(node):
            assert self.finish is not None
            part = self.finish(part)
        buffer.write(box, part)

    def _tell(self) -> None:
        """Report one more tile."""
        self._done += 1
        if self.progress is not None:
            self.progress(self._done, self._total)
