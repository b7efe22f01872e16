"""Several processes share the tiles of a volume, and each stores its shard of every map.

The tiles of a loop are divided into blocks along one axis. A process stores its block of each
result, and as much of its neighbours' as its later tiles read; that is sent after the loop. What is
reduced over whole maps is measured tile by tile and joined by every process in the order in which a
single one would, so that the results are bit-identical.
"""

from __future__ import annotations

__all__ = [
    "Shard",
    "ShardLayout",
    "ShardedExecution",
    "TileGroup",
    "group_for",
    "group_name",
]

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from pocketize._torch import process_group, pytree
from pocketize.errors import InputError
from pocketize.graph.inputs import Inputs
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.forward import PatchForward, is_fake
from pocketize.passes.tiling.intervals import Box, box_of, cut, hull, is_empty
from pocketize.passes.tiling.program import FullSizeOp, Program, TileLoop, needed_boxes
from pocketize.passes.tiling.resume import ResumeState
from pocketize.passes.tiling.storage import Buffer
from pocketize.passes.tiling.tracing import tensors_by_name

#: The name of the group of all processes.
WORLD = "world"


class TileGroup:
    """A process group, as much of it as tiles need."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # gloo sends what is in host memory, NCCL what is on the GPU
        nccl = f"{device.type}:nccl" in dist.get_backend_config(group)
        self.device = device if nccl else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave, in the order of their ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, what: str, value: Any) -> None:
        """Check that all processes gave the same.

        Raises:
            InputError: one gave something else; all processes raise.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise InputError(
                    f"patchwise: rank 0 and rank {rank} of the group have different {what}: "
                    f"{_difference(values[0], other)}; every process calls the same network with "
                    "the same volume"
                )

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send tensors to other ranks and overwrite others by what these send, in their order."""
        rows = [(rank, target, self._row_like(target)) for rank, target in receives]
        every: list[tuple[Any, int, Tensor]] = [
            (dist.isend, rank, self._bytes(tensor)) for rank, tensor in sends
        ]
        every += [(dist.irecv, rank, row) for rank, _, row in rows]
        operations = [
            dist.P2POp(kind, row, dist.get_global_rank(self.group, rank), group=self.group)
            for kind, rank, row in every
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for _, target, row in rows:
            target.copy_(row.view(target.dtype).reshape(target.shape))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give all processes the tensor of one; it is overwritten elsewhere."""
        mine = self.rank == source
        row = self._bytes(tensor) if mine else self._row_like(tensor)
        if not row.numel():
            return
        dist.broadcast(row, dist.get_global_rank(self.group, source), group=self.group)
        if not mine:
            tensor.copy_(row.view(tensor.dtype).reshape(tensor.shape))

    def _bytes(self, tensor: Tensor) -> Tensor:
        """Return the bytes of a tensor: not every backend knows every dtype."""
        return tensor.contiguous().to(self.device).reshape(-1).view(torch.uint8)

    def _row_like(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def group_name(group: Any) -> Any:
    """Return the name by which a process group is found again; anything else as it is."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return group
    return WORLD if group is dist.group.WORLD else group.group_name


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = next((one, two) for one, two in zip(a, b, strict=True) if one != two)
    return f"{a} and {b}"


def group_for(forward: PatchForward, inputs: Inputs) -> TileGroup | None:
    """Return the group that shares the tiles of a call; None where gradients are enabled.

    Raises:
        InputError: there is no such group, this process is not in it, or its processes do not run
            the same; the values of inputs are not compared.
    """
    name = forward.tiling.group
    if name is None or is_fake(inputs) or torch.is_grad_enabled():
        return None
    group = TileGroup(_resolved(name), forward.device(inputs))
    shapes = [list(tensor.shape) for tensor in inputs.tensors()]
    alike = replace(forward.tiling, folder=None, progress=False)  # these may differ
    group.agree("inputs or tiles", [*shapes, alike])
    sums = {
        path: str(float(tensor.detach().sum(dtype=torch.float64)))
        for path, tensor in tensors_by_name(forward.module).items()
        if tensor.is_floating_point()
    }
    group.agree("weights", sorted(sums.items()))
    return group


def _resolved(name: str) -> dist.ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"patchwise: group={name!r} needs an initialised process group; start the processes "
            "with torchrun and call torch.distributed.init_process_group() first, or rewrite "
            "without group"
        )
    if name == WORLD:
        world = dist.group.WORLD
        assert world is not None  # it is initialised
        return world
    try:
        found: dist.ProcessGroup = process_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"patchwise: this process is in no process group named {name!r}; say group='world', "
            "or the group_name of a group that torch.distributed.new_group made here"
        ) from error
    return found


class Shard:
    """The parts of a volume that a call computes: those that no other process does, or did before.

    Consecutive numbers, at least one. A process that has none computes the nearest part, to know
    what the network returns; another process computes the same values.
    """

    def __init__(self, count: int, group: TileGroup | None, state: ResumeState | None) -> None:
        self.count, self.group, self.state = count, group, state
        first, stop = self.bounds(group.rank) if group is not None else (0, count)
        if state is not None:
            first = int(state.progress.get("done", 0))
        self.first = min(first, count - 1)
        self.stop = max(stop, self.first + 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.stop))

    def bounds(self, rank: int) -> tuple[int, int]:
        """Return the first part of a process, and the one after its last."""
        assert self.group is not None
        size = self.group.size
        return self.count * rank // size, self.count * (rank + 1) // size

    def note(self, number: int) -> None:
        """Note that a part is done, and all before it."""
        if self.state is not None and number >= self.first and self.state.is_due():
            self.state.commit({"done": number + 1})


class ShardLayout:
    """Which process computes which boxes, and which it stores; the same in all processes.

    Attributes:
        axis: along which tiles are divided.
        owned: the boxes of a stored map that each process computes, by rank.
        held: the boxes that each stores, by rank: what it computes and what it reads.
    """

    def __init__(self, program: Program, count: int) -> None:
        self.count = count
        loops = [step for step in program.steps if isinstance(step, TileLoop)]
        self.axis = max(
            range(program.graph.rank), key=lambda axis: max(step.counts[axis] for step in loops)
        )
        self.owned: dict[fx.Node, list[Box]] = {}
        self.held: dict[fx.Node, list[Box]] = {}
        for step in program.steps:
            if isinstance(step, FullSizeOp):
                for node in step.reads:
                    if node in self.held:  # every process runs it
                        self.held[node] = [box_of(_shape(node))] * count
                continue
            for node in step.targets:
                self.owned[node] = [self.block(node, step, rank) for rank in range(count)]
                self.held[node] = list(self.owned[node])
            for rank in range(count):
                self._add_reads(program, step, rank)
        for node in program.outputs:
            if node in self.held:
                self.held[node] = [box_of(_shape(node))] * count

    def range(self, step: TileLoop, rank: int) -> range:
        """Return the tiles of a process along the axis."""
        tiles = step.counts[self.axis]
        return range(tiles * rank // self.count, tiles * (rank + 1) // self.count)

    def block(self, node: fx.Node, step: TileLoop, rank: int) -> Box:
        """Return the part of a map that the tiles of a process cover."""
        tiles, count = self.range(step, rank), step.counts[self.axis]
        box = list(box_of(_shape(node)))
        size = box[self.axis][1]
        box[self.axis] = (size * tiles.start // count, size * tiles.stop // count)
        return tuple(box)

    def _add_reads(self, program: Program, step: TileLoop, rank: int) -> None:
        """Add what the tiles of a process read of the results of earlier steps."""
        graph = program.graph
        sources = [graph.reductions[node].source for node in step.reductions]
        wanted = {node: self.block(node, step, rank) for node in (*step.targets, *sources)}
        wanted = {node: box for node, box in wanted.items() if not is_empty(box)}
        inside = set(step.order)
        for node, box in needed_boxes(graph, step.order, wanted).items():
            if node not in inside and node in self.held:
                held = self.held[node][rank]
                self.held[node][rank] = box if is_empty(held) else hull(held, box)


class ShardedExecution(Execution):
    """One forward, of which this process computes its shard; all processes return the results.

    Program and tensors are the same in all processes, and the inputs are whole in each.
    """

    def __init__(self, program: Program, *, group: TileGroup, **settings: Any) -> None:
        super().__init__(program, **settings)
        self.group, self.layout = group, ShardLayout(program, group.size)
        self._parts: dict[fx.Node, dict[tuple[int, ...], tuple[Any, ...]]] = {}

    def _begin(self) -> int:
        self.group.agree("tiles", [self.program.tile, len(self.program.steps)])
        return 0

    def _tiles(self, step: TileLoop) -> Sequence[tuple[int, ...]]:
        ranges = [range(count) for count in step.counts]
        ranges[self.layout.axis] = self.layout.range(step, self.group.rank)
        return list(itertools.product(*ranges))

    def _allocate(self, node: fx.Node) -> Buffer:
        if node in self.program.outputs:
            return super()._allocate(node)
        value, box = node.meta["val"], self.layout.held[node][self.group.rank]
        shape = [*value.shape[:2], *(high - low for low, high in box)]
        buffer = self._allocate_between(node, shape)
        buffer.origin = [low for low, _ in box]
        return buffer

    def _join(self, node: fx.Node, tile: tuple[int, ...], more: tuple[Any, ...]) -> None:
        self._parts.setdefault(node, {})[tile] = more

    def _joined(self, node: fx.Node) -> tuple[Any, ...]:
        """Join the measures of the tiles of all processes, in the order of the tiles."""
        mine = pytree.tree_map_only(Tensor, Tensor.cpu, self._parts.pop(node, {}))
        everything: dict[tuple[int, ...], tuple[Any, ...]] = {}
        for each in self.group.gather(mine):
            everything |= each
        device = self.storage.device
        for tile in sorted(everything):
            more = pytree.tree_map_only(Tensor, lambda t: t.to(device), everything[tile])
            super()._join(node, tile, more)
        return super()._joined(node)

    def _tile_loop(self, step: TileLoop) -> None:
        super()._tile_loop(step)
        for node in step.targets:
            buffer = self.finished[node] if node in self.finished else self.stored[node]
            if node not in self.program.outputs:
                self._exchange(node, buffer)
            elif not buffer.shared:
                self._publish(node, buffer, step)

    def _publish(self, node: fx.Node, buffer: Buffer, step: TileLoop) -> None:
        """Give every process the whole of an output, tile by tile."""
        count, axis = step.counts[self.layout.axis], self.layout.axis
        box = list(box_of(_shape(node)))
        size = box[axis][1]
        for rank in range(self.group.size):
            for index in self.layout.range(step, rank):
                box[axis] = (size * index // count, size * (index + 1) // count)
                self.group.broadcast(cut(buffer.tensor, tuple(box)), rank)

    def _exchange(self, node: fx.Node, buffer: Buffer) -> None:
        """Send the others what they will read, and receive what this process will read."""
        owned, held = self.layout.owned[node], self.layout.held[node]
        me = self.group.rank
        others = [rank for rank in range(self.group.size) if rank != me]
        given = [(rank, _common(owned[me], held[rank])) for rank in others]
        taken = [(rank, _common(owned[rank], held[me])) for rank in others]
        self.group.exchange(
            [(rank, buffer.view(box)) for rank, box in given if not is_empty(box)],
            [(rank, buffer.view(box)) for rank, box in taken if not is_empty(box)],
        )


def _shape(node: fx.Node) -> Sequence[int]:
    shape: Sequence[int] = node.meta["val"].shape
    return shape


def _common(a: Box, b: Box) -> Box:
    return tuple(
        (max(low, other[0]), min(high, other[1])) for (low, high), other in zip(a, b, strict=True)
    )
