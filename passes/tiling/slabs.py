"""Slabs: the volume is cut along one axis and the network sees each slab alone.

Source: Wehen, "Patch-wise U-Net and cascade", bachelor's thesis, HPI 2023: slabs of 16 voxels, the
last one padded with zeros, and in training a backward pass of its own for each.
"""

from __future__ import annotations

__all__ = ["SlabForward", "slab_backward"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.errors import InputError, RewriteError
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs, as_inputs, as_plain
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.shared.nests import map_tensors
from pocketize.passes.tiling.cutting import PatchForward, is_recorded, plain, spatial_axis
from pocketize.passes.tiling.peers import Peers
from pocketize.passes.tiling.reduce import ProgressBar, reduction
from pocketize.passes.tiling.resuming import Journal, journal_for
from pocketize.passes.tiling.stretches import Stretch, output_keeper, peers_for
from pocketize.passes.tiling.volumes import Parts, Volume, maps_of, nest_of


class SlabForward(PatchForward):
    """A model's forward that runs slab by slab, in inference and in training."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run every slab through the network and put the outputs together."""
        if is_recorded():
            return self.original(*args, **kwargs)
        inputs = Inputs(args, kwargs)
        peers = peers_for(self, plain(inputs))
        with journal_for(self, plain(inputs)) as journal:
            return self._run(inputs, peers, journal)

    def _run(self, inputs: Inputs, peers: Peers | None, journal: Journal | None) -> Any:
        volume = Volume(inputs, self.device(inputs))
        axis, sizes, starts = self.slabs(volume)
        keeper = output_keeper(self, volume.device, journal)
        finish = reduction(self.tiling.reduce) if self.reduces() else None
        batch = self.tiling.batch
        groups = [starts[first : first + batch] for first in range(0, len(starts), batch)]
        stretch = Stretch(len(groups), peers, journal)
        parts: list[Parts] = []
        bar = ProgressBar(self.tiling.progress)
        output: Any = None
        tensors: list[Tensor] = []
        try:
            for number in stretch:
                some = groups[number]
                del output, tensors  # the next slabs need their room
                output = self.run(volume, some, sizes)
                tensors = maps_of(output, volume.batch * len(some), volume.rank)
                for index, tensor in enumerate(map(as_plain, tensors)):
                    if len(parts) == index:
                        length = _length(tensor, axis, volume, sizes)
                        each = batch * tensor.shape[axis - volume.rank]
                        parts.append(
                            Parts(
                                axis - volume.rank,
                                length,
                                keeper,
                                finish,
                                name=f"output{index}",
                                done=stretch.first * each,
                            )
                        )
                    for part in torch.split(tensor, volume.batch):
                        parts[index].add(part)
                stretch.note(number)
                bar(number + 1 - stretch.first, stretch.stop - stretch.first)
        finally:
            bar.close()
        for tensor, whole in zip(tensors, parts, strict=True):
            if peers is not None:
                each = batch * tensor.shape[axis - volume.rank]
                ends = [stretch.bounds(rank) for rank in range(peers.size)]
                whole.publish(peers, [(low * each, high * each) for low, high in ends])
        return nest_of(output, tensors, [whole.result() for whole in parts])

    def slabs(self, volume: Volume) -> tuple[int, tuple[int, ...], list[tuple[int, ...]]]:
        """Return the axis that is cut, the sizes of a slab and where each begins.

        Args:
            volume: of the call.

        Raises:
            InputError: there is no such axis.
        """
        axis = spatial_axis(self.tiling.axis, volume.rank)
        sizes = self.tiling.tile(volume.sizes)
        begins = range(0, volume.sizes[axis], sizes[axis])
        zeros = (0,) * volume.rank
        return axis, sizes, [(*zeros[:axis], begin, *zeros[axis + 1 :]) for begin in begins]

    def run(self, volume: Volume, starts: Sequence[Sequence[int]], sizes: Sequence[int]) -> Any:
        """Return what the network says of some slabs, behind each other along the batch."""
        tiles = volume.read(starts, sizes)
        return self.original(*tiles.args, **tiles.kwargs)


def _length(tensor: Tensor, axis: int, volume: Volume, sizes: Sequence[int]) -> int:
    """Return how long the output of the whole volume is, by the scale of a slab's."""
    return -(-volume.sizes[axis] * tensor.shape[axis - volume.rank] // sizes[axis])


def slab_backward(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: Callable[[Any, Any], Tensor],
    *,
    scale: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Give every slab its own forward and backward pass, and add up the gradients.

    The memory is that of one slab. The loss of a slab counts by its part of the volume, padding
    left out: for a loss that is a mean over voxels, and a network without batch norm, the gradients
    are those of one backward pass through all slabs::

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
        output = _cropped(forward.run(volume, [start], sizes), axis, sizes, here, volume)
        wanted = _target_slab(targets, axis, start[axis], here, volume)
        value = loss(output, wanted) * (here / volume.sizes[axis])
        if value.numel() != 1:
            raise InputError(f"the loss must be a scalar, got {tuple(value.shape)}")
        torch.autograd.backward(scale(value))
        total = total + value.detach()
        del output, value
    return total


def _cropped(output: Any, axis: int, sizes: Sequence[int], here: int, volume: Volume) -> Any:
    """Cut the padding of the last slab off."""
    if here == sizes[axis]:
        return output
    tensors = {id(tensor) for tensor in find_tensors(output)}

    def cut(tensor: Tensor) -> Tensor:
        length = -(-here * tensor.shape[axis - volume.rank] // sizes[axis])
        return tensor.narrow(axis - volume.rank, 0, length)

    return map_tensors(output, lambda t: id(t) in tensors, cut)


def _target_slab(targets: Any, axis: int, start: int, here: int, volume: Volume) -> Any:
    """Return the part of the targets that belongs to a slab."""

    def cut(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape[-volume.rank :]) == volume.sizes:
            tensor = tensor.narrow(axis - volume.rank, start, here)
        return tensor.to(volume.device)

    return map_tensors(targets, lambda _: True, cut)
