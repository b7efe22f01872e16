"""Run a network on parts of a volume, each alone: slabs, and what windows share with them.

Source of slabs: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023: slabs of 16
voxels, the last one padded with zeros, and in training a backward pass of its own for each.
"""

from __future__ import annotations

__all__ = ["Assembly", "Layout", "PartForward", "SlabForward", "Volume", "slab_backward"]

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.errors import InputError, RewriteError
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs, as_inputs, as_plain
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.shared.nests import dressed, map_tensors
from pocketize.passes.tiling.forward import (
    OutputReduction,
    PatchForward,
    ProgressBar,
    Tiling,
    is_traced,
    output_reduction,
    spatial_axis,
)
from pocketize.passes.tiling.processes import Shard, TileGroup, group_for
from pocketize.passes.tiling.resume import resume_state_for, storage_for
from pocketize.passes.tiling.storage import Storage, is_channels_last


class Volume:
    """The inputs of a call; those that are as large as the largest are cut.

    Smaller inputs (a time step, a text) go to the network whole, with every part.

    Args:
        inputs: of the call; maps are (N, C, *spatial).
        device: where parts are computed.

    Raises:
        InputError: there is no map, or there are maps of several sizes.
    """

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        largest = max(inputs.tensors(), key=lambda t: (t.ndim, t.numel()), default=None)
        if largest is None or largest.ndim < 3:
            raise InputError("patchwise: no input has spatial axes: expected (N, C, *spatial)")
        self.batch, self.sizes = int(largest.shape[0]), tuple(largest.shape[2:])
        self.rank = len(self.sizes)
        if 0 in self.sizes:
            raise InputError(f"patchwise: the volume is empty: {tuple(largest.shape)}")
        for tensor in inputs.tensors():
            wide = tensor.ndim == largest.ndim and any(size > 1 for size in tensor.shape[2:])
            if wide and not self._is_cut(tensor):
                raise InputError(
                    f"patchwise: inputs of several sizes cannot be cut alike: {self.sizes} and "
                    f"{tuple(tensor.shape[2:])}; resize the smaller, or use mode='exact'"
                )

    def read(self, starts: Sequence[Sequence[int]], sizes: Sequence[int]) -> Inputs:
        """Return parts with some starts, all of some sizes, concatenated along the batch.

        They are on the device. Outside of the volume, as before 0, are zeros.
        """

        def cut(tensor: Tensor) -> Tensor:
            if self._is_cut(tensor):
                return torch.cat([self._part(tensor, start, sizes) for start in starts])
            moved = tensor.to(self.device)
            each = len(starts) > 1 and tensor.ndim > 0 and tensor.shape[0] == self.batch
            return torch.cat([moved] * len(starts)) if each else moved

        return self.inputs.map(lambda t: dressed(cut(as_plain(t)), t))

    def _is_cut(self, tensor: Tensor) -> bool:
        return tuple(tensor.shape[2:]) == self.sizes

    def _part(self, tensor: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        pads: list[int] = []
        for axis, (start, size, whole) in enumerate(zip(starts, sizes, self.sizes, strict=True)):
            low, high = max(0, start), min(whole, start + size)
            tensor = tensor.narrow(axis + 2, low, max(0, high - low))
            pads = [low - start, start + size - high, *pads]  # the last axis comes first
        tensor = tensor.to(self.device)
        return F.pad(tensor, pads) if any(pads) else tensor


class Assembly:
    """One output, put together of consecutive parts along one axis.

    Args:
        axis: the axis, counted from the last, such as -1.
        begins: where in the output each row of parts begins; at last, the length of the output.
        first: the first row that is put into the output; those before are there, or computed by
            another process.
        storage: of outputs that need no gradients.
        finish: applied to a part before it is stored.
        name: of the output.
    """

    def __init__(
        self,
        axis: int,
        begins: Sequence[int],
        first: int,
        *,
        storage: Storage,
        finish: OutputReduction | None,
        name: str = "output",
    ) -> None:
        self.axis, self.begins, self.first, self.length = axis, begins, first, begins[-1]
        self.storage, self.finish, self.name = storage, finish, name
        self.done = begins[first]
        self._whole: Tensor | None = None
        self._parts: list[Tensor] = []

    def add(self, start: Sequence[int], part: Tensor) -> None:
        """Add the output for the part of the volume with some start."""
        self._append(part)

    def end_row(self, row: int) -> None:
        """Called when a row of parts is done."""

    def _append(self, part: Tensor) -> None:
        """Append a part; what is beyond the length is left out."""
        size = min(part.shape[self.axis], self.length - self.done)
        if size <= 0 and self.done:
            return
        part = part.narrow(self.axis, 0, size)
        if self.finish is not None:
            part = self.finish(part)
        if part.requires_grad:
            self._parts.append(part if self.storage.place == "device" else part.cpu())
        else:
            if self._whole is None:
                shape, last = list(part.shape), is_channels_last(part)
                shape[self.axis] = self.length
                self._whole = self.storage.allocate(
                    shape, part.dtype, name=self.name, channels_last=last
                ).tensor
            written = self._whole.narrow(self.axis, self.done, size)
            written.copy_(part)
            self.storage.note_written(self.name, written)
        self.done += size

    def publish(self, group: TileGroup, rows: Sequence[tuple[int, int]]) -> None:
        """Give every process the rows that each has computed, by rank."""
        assert self._whole is not None
        for rank, row in enumerate(rows):
            low, high = (self.begins[each] for each in row)
            group.broadcast(self._whole.narrow(self.axis, low, high - low), rank)

    def result(self) -> Tensor:
        """Return the whole."""
        if self._parts:
            return torch.cat(self._parts, self.axis)
        assert self._whole is not None
        return self._whole


class Layout(abc.ABC):
    """How a volume is cut into parts, which run row by row.

    Attributes:
        volume: the inputs.
        sizes: of a part.
        axis: along which rows follow each other.
        rows: the starts of the parts of each row, in the volume; they may be outside of it.
    """

    volume: Volume
    sizes: tuple[int, ...]
    axis: int
    rows: list[list[tuple[int, ...]]]

    @abc.abstractmethod
    def assembly(self, sample: Tensor, before: Sequence[Any], first: int, **more: Any) -> Assembly:
        """Return the assembly of one output; ``more`` is for :class:`Assembly`.

        Args:
            sample: the output for the first parts.
            before: the assemblies of earlier outputs.
            first: the first row that is put into the result.
        """

    def first_row(self, row: int) -> int:
        """Return the first row that contributes to the output of a row."""
        return row


class PartForward(PatchForward):
    """A model's forward that runs on rows of parts, in inference and in training."""

    @abc.abstractmethod
    def layout(self, volume: Volume) -> Layout:
        """Cut a volume.

        Raises:
            InputError: it has another number of axes.
        """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run every part through the network and put the outputs together."""
        if is_traced():
            return self.original(*args, **kwargs)
        inputs = Inputs(args, kwargs)
        bare = inputs.map(as_plain)
        group = group_for(self, bare)
        with resume_state_for(self, bare) as state:
            layout = self.layout(Volume(inputs, self.device(inputs)))
            storage = storage_for(self, self.tiling.output, layout.volume.device, state)
            return self._run(layout, Shard(len(layout.rows), group, state), storage)

    def _run(self, layout: Layout, shard: Shard, storage: Storage) -> Any:
        volume, rows = layout.volume, layout.rows
        finish = output_reduction(self.tiling.reduce) if self.reduces() else None
        numbers = range(layout.first_row(shard.first), shard.stop)
        total, done = sum(len(rows[number]) for number in numbers), 0
        made: list[Assembly] = []
        bar = ProgressBar(self.tiling.progress)
        output: Any = None
        tensors: list[Tensor] = []
        try:
            for number in numbers:
                for at in range(0, len(rows[number]), self.tiling.batch):
                    some = rows[number][at : at + self.tiling.batch]
                    del output, tensors  # free them before the next parts run
                    tiles = volume.read(some, layout.sizes)
                    output = self.original(*tiles.args, **tiles.kwargs)
                    del tiles
                    tensors = _maps_of(output, volume.batch * len(some), volume.rank)
                    for index, tensor in enumerate(map(as_plain, tensors)):
                        if len(made) == index:
                            more = {"storage": storage, "finish": finish, "name": f"output{index}"}
                            made.append(layout.assembly(tensor, made, shard.first, **more))
                        parts = torch.split(tensor, volume.batch)
                        for start, part in zip(some, parts, strict=True):
                            made[index].add(start, part)
                    done += len(some)
                    bar(done, total)
                for each in made:
                    each.end_row(number)
                shard.note(number)
        finally:
            bar.close()
        if shard.group is not None:
            bounds = [shard.bounds(rank) for rank in range(shard.group.size)]
            for each in made:
                each.publish(shard.group, bounds)
        results = [each.result() for each in made]
        by_identity = {id(t): dressed(r, t) for t, r in zip(tensors, results, strict=True)}
        return map_tensors(output, lambda _: True, lambda t: by_identity[id(t)])


def _maps_of(output: Any, batch: int, rank: int) -> list[Tensor]:
    """Return the tensors of an output, all of which must have spatial axes."""
    tensors = find_tensors(output)
    if not tensors:
        raise InputError(f"patchwise: the model returned no tensor but {type(output).__name__}")
    for index, tensor in enumerate(tensors):
        if tensor.ndim < rank + 1 or tensor.shape[0] != batch:
            raise InputError(
                f"patchwise: output {index} of a tile has shape {tuple(tensor.shape)}; only "
                f"outputs (N, ..., *spatial), here with {rank} spatial axes and N={batch}, can be "
                "put together; return the map from the network, or use mode='exact'"
            )
    return tensors


class SlabForward(PartForward):
    """A model's forward that runs slab by slab."""

    own_options: ClassVar[frozenset[str]] = frozenset({"axis", "batch"})

    def layout(self, volume: Volume) -> Layout:
        """Cut along one axis."""
        return _Slabs(volume, self.tiling)


class _Slabs(Layout):
    """Rows of ``batch`` slabs; the last slab is padded behind the volume."""

    def __init__(self, volume: Volume, tiling: Tiling) -> None:
        self.volume, self.batch, zeros = volume, tiling.batch, (0,) * volume.rank
        self.axis = axis = spatial_axis(tiling.axis, volume.rank)
        self.sizes = tiling.tile(volume.sizes)
        begins = range(0, volume.sizes[axis], self.sizes[axis])
        starts = [(*zeros[:axis], begin, *zeros[axis + 1 :]) for begin in begins]
        self.rows = [starts[at : at + self.batch] for at in range(0, len(starts), self.batch)]

    def assembly(self, sample: Tensor, before: Sequence[Any], first: int, **more: Any) -> Assembly:
        axis, rank = self.axis, self.volume.rank
        length = sample.shape[axis - rank]
        whole = -(-self.volume.sizes[axis] * length // self.sizes[axis])
        begins = [min(row * length * self.batch, whole) for row in range(len(self.rows) + 1)]
        return Assembly(axis - rank, begins, first, **more)


def slab_backward(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: Callable[[Any, Any], Tensor],
    *,
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Run a forward and a backward pass for each slab, and accumulate the gradients.

    The memory is that of one slab. The loss of a slab is weighted by its part of the volume,
    padding left out: for a loss that is a mean over voxels, and a network without batch norm, the
    gradients are those of one backward pass through all slabs::

        optimizer.zero_grad(set_to_none=True)
        value = slab_backward(model, x, y, criterion)
        optimizer.step()

    Args:
        model: a model that ``Patchwise(mode="slab", ...)`` rewrote.
        inputs: of the model, anything that :func:`pocketize.graph.inputs.as_inputs` takes.
        targets: a tensor, or a nest of them, cut like the inputs where they have the volume's size
            as their last axes; on any device.
        loss: takes the output and the targets of a slab and returns a scalar.
        scale: of the loss before its backward pass, such as ``GradScaler.scale``.

    Returns:
        The loss of the volume, detached.

    Raises:
        RewriteError: the model does not run in slabs.
        InputError: the inputs have no volume.
    """
    forward = wrapping(model, SlabForward)
    if forward is None:
        raise RewriteError(
            "slab_backward needs a model that runs in slabs; rewrite it with "
            "Patchwise(mode='slab', size=...) first"
        )
    given = as_inputs(inputs, model)
    layout = forward.layout(Volume(given, forward.device(given)))
    volume, axis, sizes = layout.volume, layout.axis, layout.sizes
    total = torch.zeros((), device=volume.device)
    for start in [start for row in layout.rows for start in row]:
        here = min(sizes[axis], volume.sizes[axis] - start[axis])
        slab = volume.read([start], sizes)
        output = forward.original(*slab.args, **slab.kwargs)
        if here < sizes[axis]:  # the outputs for the padding of the last slab are cut off
            output = _cut(output, axis - volume.rank, here, sizes[axis])
        wanted = _target_slab(targets, axis, start[axis], here, volume)
        value = loss(output, wanted) * (here / volume.sizes[axis])
        if value.numel() != 1:
            raise InputError(f"the loss must be a scalar, got {tuple(value.shape)}")
        torch.autograd.backward(scale(value))
        total = total + value.detach()
        del slab, output, value
    return total


def _cut(output: Any, axis: int, here: int, size: int) -> Any:
    """Cut outputs behind, to the same part of their length as ``here`` is of ``size``."""
    tensors = {id(tensor) for tensor in find_tensors(output)}
    return map_tensors(
        output,
        lambda t: id(t) in tensors,
        lambda t: t.narrow(axis, 0, -(-here * t.shape[axis] // size)),
    )


def _target_slab(targets: Any, axis: int, start: int, here: int, volume: Volume) -> Any:
    """Return the part of the targets that belongs to a slab."""

    def cut(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape[-volume.rank :]) == volume.sizes:
            tensor = tensor.narrow(axis - volume.rank, start, here)
        return tensor.to(volume.device)

    return map_tensors(targets, lambda _: True, cut)
