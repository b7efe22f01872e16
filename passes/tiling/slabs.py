"""Run a network on parts of a volume, each alone: slabs, and what windows share with them.

Source of slabs: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023: slabs of 16
voxels, the last one padded with zeros, and in training a backward pass of its own for each.
"""

from __future__ import annotations

__all__ = ["Assembly", "OutputParts", "PartForward", "SlabForward", "Volume", "slab_backward"]

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
    is_traced,
    output_reduction,
    plain,
    spatial_axis,
)
from pocketize.passes.tiling.processes import Shard, TileGroup, group_for, output_storage
from pocketize.passes.tiling.resume import ResumeState, resume_state_for
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


class OutputParts:
    """One output, put together of consecutive parts along one axis.

    Args:
        axis: the axis, counted from the last, such as -1.
        length: of the whole along it.
        storage: of outputs that need no gradients.
        finish: applied to a part before it is stored.
        name: of the output.
        done: how much of it is stored already, or computed by another process.
    """

    def __init__(
        self,
        axis: int,
        length: int,
        storage: Storage,
        finish: OutputReduction | None,
        *,
        name: str = "output",
        done: int = 0,
    ) -> None:
        self.axis, self.length, self.storage, self.finish = axis, length, storage, finish
        self.name, self.done = name, min(done, length)
        self._whole: Tensor | None = None
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
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

    def publish(self, group: TileGroup, bounds: Sequence[tuple[int, int]]) -> None:
        """Give every process what each has computed, by rank from start to end of its bounds."""
        assert self._whole is not None
        for rank, (low, high) in enumerate(bounds):
            low, high = min(low, self.length), min(high, self.length)
            group.broadcast(self._whole.narrow(self.axis, low, high - low), rank)

    def result(self) -> Tensor:
        """Return the whole."""
        if self._parts:
            return torch.cat(self._parts, self.axis)
        assert self._whole is not None
        return self._whole


class Assembly(abc.ABC):
    """Makes one output of the network of its outputs for parts; ``parts`` has the result."""

    parts: OutputParts

    @abc.abstractmethod
    def add(self, start: Sequence[int], part: Tensor) -> None:
        """Add the output for the part of the volume with some start."""

    @abc.abstractmethod
    def begin(self, row: int) -> int:
        """Return where in the output a row begins; of the row after the last, the end."""

    def end_row(self, row: int) -> None:  # noqa: B027  (rows of slabs need nothing)
        """Called when a row of parts is done."""


class PartForward(PatchForward):
    """A model's forward that runs on rows of parts, in inference and in training."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run every part through the network and put the outputs together."""
        if is_traced():
            return self.original(*args, **kwargs)
        inputs = Inputs(args, kwargs)
        group = group_for(self, plain(inputs))
        with resume_state_for(self, plain(inputs)) as state:
            volume = Volume(inputs, self.device(inputs))
            rows, sizes = self.rows(volume)
            return self._run(volume, rows, sizes, Shard(len(rows), group, state), state)

    @abc.abstractmethod
    def rows(self, volume: Volume) -> tuple[list[list[tuple[int, ...]]], tuple[int, ...]]:
        """Return the starts of the parts of each row, and the sizes of a part."""

    @abc.abstractmethod
    def assembly(
        self, volume: Volume, sample: Tensor, before: Sequence[Any], first: int, **more: Any
    ) -> Assembly:
        """Return the assembly of one output.

        Args:
            volume: of the call.
            sample: the output for the first parts.
            before: the assemblies of earlier outputs.
            first: the first row that is put into the result.
            more: storage, finish and name for :class:`OutputParts`.
        """

    def first_row(self, volume: Volume, row: int) -> int:
        """Return the first row that contributes to the output of a row."""
        return row

    def _run(
        self,
        volume: Volume,
        rows: list[list[tuple[int, ...]]],
        sizes: tuple[int, ...],
        shard: Shard,
        state: ResumeState | None,
    ) -> Any:
        more: dict[str, Any] = {"storage": output_storage(self, volume.device, state)}
        more["finish"] = output_reduction(self.tiling.reduce) if self.reduces() else None
        numbers = range(self.first_row(volume, shard.first), shard.stop)
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
                    tiles = volume.read(some, sizes)
                    output = self.original(*tiles.args, **tiles.kwargs)
                    del tiles
                    tensors = _maps_of(output, volume.batch * len(some), volume.rank)
                    for index, tensor in enumerate(map(as_plain, tensors)):
                        if len(made) == index:
                            more["name"] = f"output{index}"
                            made.append(self.assembly(volume, tensor, made, shard.first, **more))
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
            ends = [shard.bounds(rank) for rank in range(shard.group.size)]
            for each in made:
                bounds = [(each.begin(low), each.begin(high)) for low, high in ends]
                each.parts.publish(shard.group, bounds)
        results = [each.parts.result() for each in made]
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

    def slabs(self, volume: Volume) -> tuple[int, tuple[int, ...], list[tuple[int, ...]]]:
        """Return the axis that is cut, the sizes of a slab and the start of each.

        Raises:
            InputError: there is no such axis.
        """
        axis = spatial_axis(self.tiling.axis, volume.rank)
        sizes = self.tiling.tile(volume.sizes)
        begins = range(0, volume.sizes[axis], sizes[axis])
        zeros = (0,) * volume.rank
        return axis, sizes, [(*zeros[:axis], begin, *zeros[axis + 1 :]) for begin in begins]

    def rows(self, volume: Volume) -> tuple[list[list[tuple[int, ...]]], tuple[int, ...]]:
        """Return rows of ``batch`` slabs."""
        _, sizes, starts = self.slabs(volume)
        batch = self.tiling.batch
        return [starts[at : at + batch] for at in range(0, len(starts), batch)], sizes

    def assembly(
        self, volume: Volume, sample: Tensor, before: Sequence[Any], first: int, **more: Any
    ) -> Assembly:
        """Concatenate the outputs."""
        axis, sizes, _ = self.slabs(volume)
        length = sample.shape[axis - volume.rank]
        whole = -(-volume.sizes[axis] * length // sizes[axis])
        return _SlabAssembly(axis - volume.rank, whole, length * self.tiling.batch, first, **more)


class _SlabAssembly(Assembly):
    def __init__(self, axis: int, whole: int, row: int, first: int, **more: Any) -> None:
        self.row = row
        self.parts = OutputParts(axis, whole, done=first * row, **more)

    def add(self, start: Sequence[int], part: Tensor) -> None:
        self.parts.add(part)

    def begin(self, row: int) -> int:
        return row * self.row


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
    volume = Volume(given, forward.device(given))
    axis, sizes, starts = forward.slabs(volume)
    total = torch.zeros((), device=volume.device)
    for start in starts:
        here = min(sizes[axis], volume.sizes[axis] - start[axis])
        slab = volume.read([start], sizes)
        output = forward.original(*slab.args, **slab.kwargs)
        output = _without_padding(output, axis - volume.rank, sizes[axis], here)
        wanted = _target_slab(targets, axis, start[axis], here, volume)
        value = loss(output, wanted) * (here / volume.sizes[axis])
        if value.numel() != 1:
            raise InputError(f"the loss must be a scalar, got {tuple(value.shape)}")
        torch.autograd.backward(scale(value))
        total = total + value.detach()
        del slab, output, value
    return total


def _without_padding(output: Any, axis: int, size: int, here: int) -> Any:
    """Cut off the outputs for the padding of the last slab."""
    if here == size:
        return output
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
