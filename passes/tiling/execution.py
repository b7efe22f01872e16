"""Run a program on real tensors."""

from __future__ import annotations

__all__ = ["Execution"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pocketize._torch import OpOverload, schema_of
from pocketize.memory.hints import note_followed
from pocketize.passes.tiling.intervals import Box, box_of, cut
from pocketize.passes.tiling.program import FullSizeOp, Program, TileLoop, needed_boxes
from pocketize.passes.tiling.storage import Buffer, Storage, is_channels_last


class Execution:
    """One forward, tile by tile; the context that the network's forms read from.

    Args:
        program: the steps.
        tensors: parameters and buffers by name.
        inputs: the input tensors by placeholder, on any device, or buffers that read them; not kept
            once nothing reads them.
        storage: of results between tile loops.
        outputs: storage of the outputs; the same by default.
        retain: free nothing, for the backward pass.
        finish: applied to an output before it is stored: takes a part (N, C, *spatial) and returns
            (N, K, *spatial).
        progress: called after each tile with the number of tiles that are done, and of all.
    """

    def __init__(
        self,
        program: Program,
        *,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[fx.Node, Tensor | Buffer],
        storage: Storage,
        outputs: Storage | None = None,
        retain: bool = False,
        finish: Callable[[Tensor], Tensor] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.program, self.graph, self.tensors = program, program.graph, tensors
        self.storage, self.output_storage = storage, outputs or storage
        self.retain, self.finish, self.progress = retain, finish, progress
        self.stored: dict[fx.Node, Any] = {}
        self.finished: dict[fx.Node, Buffer] = {}
        self.norms: dict[fx.Node, Tensor] = {}
        device = storage.device
        for node, tensor in inputs.items():
            if isinstance(tensor, Tensor):
                is_map = self.graph.is_map(node)
                tensor = Buffer(tensor, device) if is_map else tensor.to(device)
            self.stored[node] = tensor
        self._local: dict[fx.Node, Buffer] = {}
        self._measures: dict[fx.Node, tuple[Any, ...]] = {}
        self._done = self._total = 0

    def run(self) -> dict[fx.Node, Tensor]:
        """Return the outputs, after ``finish``."""
        steps = self.program.steps
        self._total = sum(len(self._tiles(s)) if isinstance(s, TileLoop) else 1 for s in steps)
        try:
            for number in range(self._begin(), len(steps)):
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
        held = self._local.get(node, self.stored.get(node))
        if isinstance(held, Buffer):
            return held.read(box)
        return cut(self.value(node) if held is None else held, box)

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
            wanted = self.program.wanted(step, tile)
            self._compute(step, wanted)
            for node, buffer in buffers.items():
                if node in wanted:
                    self._write(buffer, node, wanted[node])
            for node in step.reductions:
                reduction = self.graph.reductions[node]
                box = wanted.get(reduction.source)
                if box is not None:  # no name for the part, which would outlive the tile
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

    def _compute(self, step: TileLoop, wanted: Mapping[fx.Node, Box]) -> None:
        """Compute boxes, and what they read: boxes from the last operator back, then values."""
        note_followed(1)
        forms, needed = self.graph.forms, needed_boxes(self.graph, step.order, wanted)
        order = [node for node in step.order if node in needed]
        last: dict[fx.Node, fx.Node] = {}
        for node in reversed(order):
            for source in forms[node].input_boxes(needed[node]):
                last.setdefault(source, node)
        for node in order:
            self._local[node] = Buffer(
                self._run_form(step, node, needed[node]), origin=[low for low, _ in needed[node]]
            )
            for source in [s for s in self._local if last.get(s) is node and s not in wanted]:
                del self._local[source]

    def _run_form(self, step: TileLoop, node: fx.Node, box: Box) -> Tensor:
        return self.graph.forms[node].run(box, self)

    def _is_finished(self, node: fx.Node) -> bool:
        """Whether ``finish`` is applied before storing: to an output that nothing else reads."""
        if self.finish is None or node not in self.program.outputs:
            return False
        return all(user.op == "output" for user in node.users)

    def _allocate(self, node: fx.Node) -> Buffer:
        value = node.meta["val"]
        if node not in self.program.outputs:
            return self._allocate_between(node, value.shape)
        shape, dtype, last = value.shape, value.dtype, is_channels_last(value)
        if self._is_finished(node):
            assert self.finish is not None
            sample = torch.zeros((1, shape[1], *(1 for _ in shape[2:])))
            made = self.finish(sample.to(dtype))
            shape, dtype, last = (shape[0], *made.shape[1:2], *shape[2:]), made.dtype, False
        return self.output_storage.allocate(shape, dtype, name=node.name, channels_last=last)

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
