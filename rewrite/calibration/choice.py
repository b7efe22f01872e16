"""Which channels stay, chosen on images: by least reconstruction error, by energy, or at random.

Reconstruction: a group of channels is read by linear layers. Dropping a channel, and solving these
layers for what is left, raises the squared error of their outputs by an amount that the normal
equations tell (Hassibi, Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
Surgeon", NIPS 1992, with a block of weights for each channel). The channel that costs least goes,
again and again, group by group from the last to the first, so that only outputs count which are
still there. Errors of each output channel are taken relative to its variance, as a norm behind it
would.

Energy: the channels with the largest variance stay, as the linear layers read them.
"""

from __future__ import annotations

__all__ = ["choose_channels"]

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, cast
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketize.calibration.options import call_with
from pocketize.calibration.solver import channel_axis, outputs_at, takes_batch
from pocketize.calibration.windows import LAYERS, TRANSPOSED, rows
from pocketize.channels.analysis import analyse
from pocketize.channels.groups import ChannelGroup
from pocketize.channels.ranking import strongest
from pocketize.graph.inputs import Inputs
from pocketize.plugin.edits import Edit, Resize

#: Added to the diagonal of a normal matrix, as a share of its mean.
_RIDGE = 1e-3


def choose_channels(
    model: nn.Module,
    edits: Sequence[Edit],
    inputs: Inputs,
    images: Sequence[Inputs],
    *,
    by: str,
    variants: Sequence[Mapping[str, Any]] = (),
    samples: int,
    memory: int,
    seed: int,
) -> tuple[Edit, ...] | None:
    """Return edits that resize as these do, and keep the channels that are chosen on images.

    None if the edits resize something else than whole groups.

    Args:
        model: the network that the edits are for, in evaluation mode.
        edits: of a pass. Groups of channels that no linear layer reads keep what they say.
        inputs: what the pass was planned with.
        images: what the network takes.
        by: ``"reconstruction"``, ``"energy"`` or ``"random"``.
        variants: settings of attributes that the pass was planned with.
        samples: positions of a layer in each image.
        memory: bytes for normal equations.
        seed: which positions are drawn.
    """
    sizes = {(each.tensor, each.axis): each for each in edits if isinstance(each, Resize)}
    if not sizes:
        return tuple(edits)
    channels = analyse(model, inputs, variants=variants)
    kept: dict[ChannelGroup, NDArray[np.int64]] = {}
    for group in channels.groups:
        for member in group.members:
            if (edit := sizes.get((member.tensor, member.axis))) is not None:
                stays = np.isin(member.positions, edit.keep).all(axis=1)
                if not stays.all():
                    kept[group] = np.flatnonzero(stays)
                break
    choice = _ChannelChoice(model, images, by, samples, memory, seed)
    selection = choice.choose({group: len(units) for group, units in kept.items()})
    made = channels.resize({**kept, **selection})
    new = {(each.tensor, each.axis): each for each in made if isinstance(each, Resize)}
    same = new.keys() == sizes.keys()
    if not same or any(len(new[at].keep) != len(each.keep) for at, each in sizes.items()):
        return None
    return tuple(
        replace(each, keep=new[each.tensor, each.axis].keep) if isinstance(each, Resize) else each
        for each in edits
    )


@dataclass
class _Moments:
    """Sums over positions of a layer's inputs a, ``(S, D)``, and outputs y, ``(S, o)``."""

    aa: Tensor
    ay: Tensor
    a: Tensor
    y: Tensor
    yy: Tensor
    count: int = 0

    def add(self, a: Tensor, y: Tensor) -> None:
        self.aa.addmm_(a.T, a)
        self.ay.addmm_(a.T, y)
        self.a += a.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.count += len(a)

    def equations(self, live: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normal matrix and the right side, centred, of some inputs and outputs."""
        n = self.count
        a, y = self.a[live] / n, self.y[outputs] / n
        normal = self.aa[live][:, live].div_(n).addr_(a, a, alpha=-1)
        right = self.ay[live][:, outputs].div_(n).addr_(a, y, alpha=-1)
        variance = self.yy[outputs] / n - y * y
        right /= variance.clamp(min=1e-12 * float(variance.max()) + 1e-300).sqrt()
        normal.diagonal().add_(_RIDGE * normal.diagonal().mean() + 1e-300)
        return normal, right


@dataclass
class _ReadingLayer:
    """A linear layer that reads a group.

    Attributes:
        path: of the layer.
        positions: ``(units, count)``, its input channels of each unit.
    """

    path: str
    positions: Tensor


@dataclass
class _ChannelChoice:
    model: nn.Module
    images: Sequence[Inputs]
    by: str
    samples: int
    memory: int
    seed: int
    moments: dict[str, _Moments] = field(default_factory=dict)
    #: Layers that the forward does not call.
    unseen: set[str] = field(default_factory=set)
    #: Of layers, which inputs of the moments, and which outputs, are dropped already.
    dropped: dict[str, set[int]] = field(default_factory=dict)
    silent: dict[str, set[int]] = field(default_factory=dict)

    def choose(self, wanted: Mapping[ChannelGroup, int]) -> dict[ChannelGroup, NDArray[np.int64]]:
        """Return the units that stay, of groups that a linear layer reads; at random, of all."""
        if self.by == "random":
            draw = np.random.default_rng(self.seed)
            return {group: strongest(draw.random(group.units), k) for group, k in wanted.items()}
        order = list(wanted)[::-1]
        readers = {group: self._readers(group) for group in order}
        found = {}
        for number, group in enumerate(order):
            self._collect([readers[each] for each in order[number:]])
            seen = [reader for reader in readers[group] if reader.path not in self.unseen]
            if seen and self.by == "energy":
                energy = torch.stack([self._energy(reader) for reader in seen]).sum(0)
                found[group] = strongest(energy.cpu().numpy(), wanted[group])
            elif seen:
                problems = [self._problem(reader) for reader in seen]
                found[group] = _least_needed_dropped(problems, group.units, wanted[group])
                self._drop(group, seen, found[group])
        return found

    def _energy(self, reader: _ReadingLayer) -> Tensor:
        """Return the share of each unit in the variance of what a layer reads: ``(units,)``."""
        moments = self.moments[reader.path]
        mean = moments.a / moments.count
        variance = moments.aa.diagonal() / moments.count - mean * mean
        each = variance[self._inputs(reader, len(mean)).to(mean.device)].sum(1)
        return each / each.sum().clamp(min=1e-300)

    def _readers(self, group: ChannelGroup) -> list[_ReadingLayer]:
        """Return the layers that read a group, as many as there is room for."""
        found: list[_ReadingLayer] = []
        room = self.memory / 2
        for member in group.members:
            path, _, name = member.tensor.rpartition(".")
            layer: Any = self.model.get_submodule(path)
            plain = type(layer) in LAYERS and getattr(layer, "groups", 1) == 1
            axis = 0 if isinstance(layer, TRANSPOSED) else 1
            if plain and name == "weight" and member.axis == axis and self._taps(layer):
                room -= self._size(path)
                if not found or room >= 0:
                    found.append(_ReadingLayer(path, torch.from_numpy(member.positions)))
        return found

    def _size(self, path: str) -> int:
        """Return the bytes of a layer's normal matrix and of its inverse."""
        layer: Any = self.model.get_submodule(path)
        return 16 * (len(self._taps(layer)) * _inputs_of(layer)) ** 2

    def _taps(self, layer: Any) -> list[int]:
        """Return the elements of the kernel that count: those nearest to its middle that fit."""
        kernel = () if isinstance(layer, nn.Linear) else layer.kernel_size
        grid = np.array(list(product(*map(range, kernel))), dtype=float)
        away = np.square(grid - (np.array(kernel) - 1) / 2).sum(1)
        order = np.argsort(away, kind="stable")
        # a quarter of the memory for the matrix and its inverse
        most = int(math.sqrt(self.memory / 64)) // _inputs_of(layer)
        return sorted(int(tap) for tap in order[:most])

    def _collect(self, groups: Sequence[list[_ReadingLayer]]) -> None:
        """Run the network for what the first group needs, and more groups if there is room."""
        if all(reader.path in {*self.moments, *self.unseen} for reader in groups[0]):
            return
        room, wanted = self.memory / 2, list[str]()
        for number, readers in enumerate(groups):
            new = [reader.path for reader in readers if reader.path not in wanted]
            room -= sum(map(self._size, new))
            if number and room < 0:
                break
            wanted += new
        self._run(wanted)

    def _run(self, paths: Sequence[str]) -> None:
        self.moments.clear()
        for inputs in self.images:
            with contextlib.ExitStack() as stack:
                for path in paths:
                    layer = self.model.get_submodule(path)
                    see = functools.partial(self._see, path)
                    hook = layer.register_forward_hook(see, prepend=True, with_kwargs=True)
                    stack.callback(hook.remove)
                call_with(self.model, inputs)
        self.unseen |= set(paths) - self.moments.keys()

    def _see(
        self,
        path: str,
        layer: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        if not takes_batch(layer, args, kwargs):
            return
        count = self.moments[path].count if path in self.moments else 0
        draw = torch.Generator().manual_seed(crc32(f"{self.seed} {path} {count}".encode()))
        total = output.numel() // output.shape[channel_axis(layer)]
        places = torch.randperm(total, generator=draw)[: self.samples].to(output.device)
        taps = self._taps(layer)
        kernel = math.prod(cast(Any, layer).kernel_size) if hasattr(layer, "kernel_size") else 1
        step = max(1, self.memory // 4 // (24 * kernel * _inputs_of(layer)))
        for part in (places[at : at + step] for at in range(0, len(places), step)):
            y = outputs_at(layer, output, part).double()
            a = rows(layer, args[0], part, slice(None), 0)
            a = a.reshape(len(a), -1, kernel)[:, :, taps].flatten(1).double()
            if path not in self.moments:
                d, o = a.shape[1], y.shape[1]
                aa, ay, a0, y0, yy = map(y.new_zeros, ((d, d), (d, o), (d,), (o,), (o,)))
                self.moments[path] = _Moments(aa, ay, a0, y0, yy)
            self.moments[path].add(a, y)

    def _problem(self, reader: _ReadingLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Return inverse normal matrix, solution, and each unit's places: ``(units, t)``."""
        moments = self.moments[reader.path]
        size, outputs = moments.ay.shape
        live = _without(size, self.dropped.get(reader.path, set()))
        heard = _without(outputs, self.silent.get(reader.path, set()))
        normal, right = moments.equations(live.to(moments.a.device), heard.to(moments.a.device))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(normal))
        where = torch.full((size,), -1)
        where[live] = torch.arange(len(live))
        places = where[self._inputs(reader, size)].to(inverse.device)
        return inverse, inverse @ right, places

    def _inputs(self, reader: _ReadingLayer, size: int) -> Tensor:
        """Return which inputs of the moments belong to each unit: ``(units, t)``."""
        layer: Any = self.model.get_submodule(reader.path)
        taps = size // _inputs_of(layer)
        return (reader.positions[:, :, None] * taps + torch.arange(taps)).flatten(1)

    def _drop(
        self, group: ChannelGroup, readers: list[_ReadingLayer], units: NDArray[np.int64]
    ) -> None:
        off = np.setdiff1d(np.arange(group.units), units)
        for reader in readers:
            gone = self._inputs(reader, len(self.moments[reader.path].a))[torch.from_numpy(off)]
            self.dropped.setdefault(reader.path, set()).update(gone.flatten().tolist())
        for member in group.members:
            path, _, name = member.tensor.rpartition(".")
            axis = 1 if isinstance(self.model.get_submodule(path), TRANSPOSED) else 0
            if name == "weight" and member.axis == axis:
                gone_outputs = member.positions[off].flatten().tolist()
                self.silent.setdefault(path, set()).update(gone_outputs)


def _without(count: int, gone: set[int]) -> Tensor:
    return torch.tensor([index for index in range(count) if index not in gone])


def _inputs_of(layer: Any) -> int:
    size: int = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return size


def _least_needed_dropped(
    problems: Sequence[tuple[Tensor, Tensor, Tensor]], units: int, keep: int
) -> NDArray[np.int64]:
    """Drop units one by one, the one that raises the summed errors least first."""
    left = list(range(units))
    for _ in range(units - keep):
        cost = torch.zeros(len(left), dtype=torch.float64)
        for inverse, solution, places in problems:
            at = places[left]
            weights = solution[at]
            blocks = inverse[at[:, :, None], at[:, None, :]]
            cost += (weights * torch.linalg.solve(blocks, weights)).sum((1, 2)).cpu()
        unit = left.pop(int(cost.argmin()))
        for inverse, solution, places in problems:
            at = places[unit]
            column = inverse[:, at].clone()
            both = torch.cat([column.T, solution[at]], 1)
            step = torch.linalg.solve(inverse[at][:, at], both)
            inverse.addmm_(column, step[:, : len(inverse)], alpha=-1)
            solution.addmm_(column, step[:, len(inverse) :], alpha=-1)
    return np.array(left, dtype=np.int64)
