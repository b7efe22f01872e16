"""The volume among a model's inputs, read part by part; and where parts of outputs are put."""

from __future__ import annotations

__all__ = ["Parts", "Volume", "maps_of", "nest_of"]

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize.errors import InputError
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs, as_plain
from pocketize.passes.shared.nests import dressed, map_tensors
from pocketize.passes.tiling.keeping import Keeper, is_channels_last
from pocketize.passes.tiling.peers import Peers
from pocketize.passes.tiling.reduce import Reduction


class Volume:
    """The inputs of a call, of which those that are as large as the largest are cut.

    What is smaller (a time step, a text) goes to the network whole, with every tile.

    Args:
        inputs: of the call; maps are (N, C, *spatial).
        device: where tiles are computed.

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
        """Return tiles on the device, behind each other along the batch; zeros lie outside.

        Args:
            starts: of each tile, along every axis; what is below 0 lies outside.
            sizes: of all tiles.
        """

        def cut(tensor: Tensor) -> Tensor:
            if self._is_cut(tensor):
                return torch.cat([self._tile(tensor, start, sizes) for start in starts])
            moved = tensor.to(self.device)
            each = len(starts) > 1 and tensor.ndim > 0 and tensor.shape[0] == self.batch
            return torch.cat([moved] * len(starts)) if each else moved

        return self.inputs.map(lambda t: dressed(cut(as_plain(t)), t))

    def _is_cut(self, tensor: Tensor) -> bool:
        return tuple(tensor.shape[2:]) == self.sizes

    def _tile(self, tensor: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        pads: list[int] = []
        for axis, (start, size, whole) in enumerate(zip(starts, sizes, self.sizes, strict=True)):
            low, high = max(0, start), min(whole, start + size)
            tensor = tensor.narrow(axis + 2, low, max(0, high - low))
            pads = [low - start, start + size - high, *pads]  # the last axis comes first
        tensor = tensor.to(self.device)
        return F.pad(tensor, pads) if any(pads) else tensor


def maps_of(output: Any, batch: int, rank: int) -> list[Tensor]:
    """Return the tensors of an output, all of which have spatial axes.

    Args:
        output: what a network returned for a tile, or for several along the batch.
        batch: samples that it was given.
        rank: number of spatial axes, the last of each tensor.

    Raises:
        InputError: there is none, or one of them cannot be put together.
    """
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


class Parts:
    """One output, put together of parts along one axis, in order.

    Args:
        axis: the axis, counted from the last, such as -1.
        length: of the whole along it.
        keeper: makes room for outputs that nothing is differentiated through.
        finish: what is stored of a part.
        name: of the output.
        done: how much of it is there already, or is another's affair.
    """

    def __init__(
        self,
        axis: int,
        length: int,
        keeper: Keeper,
        finish: Reduction | None,
        *,
        name: str = "output",
        done: int = 0,
    ) -> None:
        self.axis, self.length, self.keeper, self.finish = axis, length, keeper, finish
        self.name, self.done = name, min(done, length)
        self._room: Tensor | None = None
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        """Put a part behind those before; what is beyond the length is left out."""
        size = min(part.shape[self.axis], self.length - self.done)
        if size <= 0 and self.done:
            return
        part = part.narrow(self.axis, 0, size)
        if self.finish is not None:
            part = self.finish(part)
        if part.requires_grad:
            self._parts.append(part if self.keeper.place == "device" else part.cpu())
        else:
            if self._room is None:
                shape = list(part.shape)
                shape[self.axis] = self.length
                last = is_channels_last(part)
                kept = self.keeper.room(shape, part.dtype, name=self.name, channels_last=last)
                self._room = kept.tensor
            written = self._room.narrow(self.axis, self.done, size)
            written.copy_(part)
            self.keeper.wrote(self.name, written)
        self.done += size

    def publish(self, peers: Peers, bounds: Sequence[tuple[int, int]]) -> None:
        """Give every process what each has computed.

        Args:
            peers: the processes.
            bounds: from where to where each has, by rank.
        """
        assert self._room is not None
        for rank, (low, high) in enumerate(bounds):
            low, high = min(low, self.length), min(high, self.length)
            peers.broadcast(self._room.narrow(self.axis, low, high - low), rank)

    def result(self) -> Tensor:
        """Return the whole."""
        if self._parts:
            return torch.cat(self._parts, self.axis)
        assert self._room is not None
        return self._room


def nest_of(template: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Any:
    """Put results into the nest of a tile's output, each for the tensor in its place."""
    by_identity = {id(t): dressed(made, t) for t, made in zip(tensors, results, strict=True)}
    return map_tensors(template, lambda _: True, lambda t: by_identity[id(t)])
