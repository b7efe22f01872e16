"""Overlapping windows, whose outputs are averaged where they overlap.

The results are those of MONAI's ``SlidingWindowInferer`` (Cardoso et al., "MONAI: An open-source
framework for deep learning in healthcare", 2022) on the same settings, to rounding. Its functions
place and weigh the windows where it is installed; ours do where it is not.
"""

from __future__ import annotations

__all__ = ["Layout", "WindowForward", "importance", "window_starts"]

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketize._torch import without_dispatch_modes
from pocketize.errors import InputError
from pocketize.graph.inputs import Inputs, as_plain
from pocketize.passes.tiling.cutting import PatchForward, is_recorded, plain
from pocketize.passes.tiling.keeping import Keeper
from pocketize.passes.tiling.peers import Peers
from pocketize.passes.tiling.reduce import ProgressBar, reduction
from pocketize.passes.tiling.resuming import Journal, journal_for
from pocketize.passes.tiling.stretches import Stretch, output_keeper, peers_for
from pocketize.passes.tiling.volumes import Parts, Volume, maps_of, nest_of

#: Standard deviation of the Gaussian, as a part of the window.
_SIGMA = 0.125


class WindowForward(PatchForward):
    """A model's forward that runs in overlapping windows, in inference and in training.

    Windows are taken row by row along the axis that is cut most often. What no later row reaches is
    divided by its weights, reduced and put away, so that no more than a row of the outputs is
    there before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run every window through the network and average the outputs."""
        if is_recorded():
            return self.original(*args, **kwargs)
        inputs = Inputs(args, kwargs)
        peers = peers_for(self, plain(inputs))
        with journal_for(self, plain(inputs)) as journal:
            return self._average(inputs, peers, journal)

    def _average(self, inputs: Inputs, peers: Peers | None, journal: Journal | None) -> Any:
        volume = Volume(inputs, self.device(inputs))
        plan = self.layout(volume)
        keeper = output_keeper(self, volume.device, journal)
        finish = reduction(self.tiling.reduce) if self.reduces() else None
        weights = _importance(plan.window, self.tiling.weights)
        stretch = Stretch(len(plan.rows), peers, journal)
        numbers = range(plan.reaching(stretch.first), stretch.stop)
        total = sum(len(plan.rows[number]) for number in numbers)
        rows: list[_Rows] = []
        bar = ProgressBar(self.tiling.progress)
        output: Any = None
        tensors: list[Tensor] = []
        done = 0
        try:
            for number in numbers:
                row = plan.rows[number]
                for first in range(0, len(row), self.tiling.batch):
                    some = row[first : first + self.tiling.batch]
                    del output, tensors
                    output = self._run(volume, plan, some)
                    tensors = maps_of(output, volume.batch * len(some), volume.rank)
                    weighed = weights
                    for index, tensor in enumerate(map(as_plain, tensors)):
                        weighed = _fitted(weighed, weights, tensor.shape[-volume.rank :])
                        if len(rows) == index:
                            rows.append(
                                _Rows(
                                    plan,
                                    tensor,
                                    keeper,
                                    finish,
                                    name=f"output{index}",
                                    at=number,
                                    first=stretch.first,
                                )
                            )
                        for start, part in zip(
                            some, torch.split(tensor, volume.batch), strict=True
                        ):
                            rows[index].add(start, part, weighed)
                    done += len(some)
                    bar(done, total)
                for each in rows:
                    each.end_row(number)
                stretch.note(number)
        finally:
            bar.close()
        for each in rows if peers is not None else ():
            assert peers is not None
            ends = [stretch.bounds(rank) for rank in range(peers.size)]
            each.parts.publish(peers, [(each.begin(low), each.begin(high)) for low, high in ends])
        return nest_of(output, tensors, [each.parts.result() for each in rows])

    def _run(self, volume: Volume, plan: Layout, starts: Sequence[tuple[int, ...]]) -> Any:
        moved = [
            tuple(at - pad for at, pad in zip(start, plan.pads, strict=True)) for start in starts
        ]
        tiles = volume.read(moved, plan.window)
        return self.original(*tiles.args, **tiles.kwargs)

    def layout(self, volume: Volume) -> Layout:
        """Return where the windows of a volume lie.

        Raises:
            InputError: it has another number of axes.
        """
        size = self.tiling.size
        assert size is not None
        window = _per_axis("size", size, volume.rank)
        return Layout(volume, window, _per_axis("overlap", self.tiling.overlap, volume.rank))


def _per_axis(name: str, given: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    if len(given) not in (1, rank):
        raise InputError(
            f"patchwise: {name} has {len(given)} numbers and the input {rank} spatial axes; give "
            "one number for each, or a single one for all"
        )
    return given * rank if len(given) == 1 else given


class Layout:
    """Where the windows lie, in a volume that is padded to at least one window.

    Attributes:
        window: size of a window.
        image: size of the padded volume.
        pads: voxels of padding before the volume.
        axis: the axis along which rows follow each other.
        rows: starts of the windows of each row.
        count: number of windows.
    """

    def __init__(self, volume: Volume, window: tuple[int, ...], overlap: Sequence[float]) -> None:
        self.rank, self.sizes, self.window = volume.rank, volume.sizes, window
        pairs = list(zip(window, volume.sizes, strict=True))
        self.image = tuple(max(pair) for pair in pairs)
        self.pads = tuple(max(0, a - b) // 2 for a, b in pairs)
        steps = [
            a if a == b else max(1, int(a * (1 - part)))
            for a, b, part in zip(window, self.image, overlap, strict=True)
        ]
        starts = window_starts(self.image, window, steps)
        self.axis = max(range(self.rank), key=lambda a: len({start[a] for start in starts}))
        begins = sorted({start[self.axis] for start in starts})
        self.rows = [[s for s in starts if s[self.axis] == begin] for begin in begins]
        self.count = len(starts)

    def reaching(self, number: int) -> int:
        """Return the first row whose windows reach into another."""
        begins = [row[0][self.axis] for row in self.rows]
        size = self.window[self.axis]
        return next(row for row, begin in enumerate(begins) if begin + size > begins[number])


class _Rows:
    """One output of the network, averaged row by row.

    Args:
        plan: where the windows lie.
        sample: what the network returned for a window.
        keeper: makes room for what is finished.
        finish: what is stored of it.
        name: of the output.
        at: the row that comes first.
        first: the first row of which something is put away; what is before, is there already.
    """

    def __init__(
        self,
        plan: Layout,
        sample: Tensor,
        keeper: Keeper,
        finish: Any,
        *,
        name: str,
        at: int,
        first: int,
    ) -> None:
        if not sample.is_floating_point():
            raise InputError(
                f"patchwise: windows that overlap are averaged, and an output of {sample.dtype} "
                "cannot be; return logits, and say reduce='argmax' for labels"
            )
        self.plan, self.dtype = plan, sample.dtype
        self.wide = torch.promote_types(sample.dtype, torch.float32)
        self.tile = tuple(sample.shape[-plan.rank :])
        sizes = zip(plan.image, self.tile, plan.window, strict=True)
        self.whole = tuple(size * out // window for size, out, window in sizes)
        self.lead = list(sample.shape[: -plan.rank])
        self.crops = [self._crop(axis) for axis in range(plan.rank)]
        self.begins = [self._place(row[0][plan.axis], plan.axis) for row in plan.rows[at:]]
        low, high = self.crops[plan.axis]
        self.first = first
        self.parts = Parts(
            plan.axis - plan.rank, high - low, keeper, finish, name=name, done=self.begin(first)
        )
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, start: tuple[int, ...], part: Tensor, weights: Tensor) -> None:
        """Add the output of a window."""
        plan, begin = self.plan, self.begins[0]
        if self.sums is None:
            shape = list(self.whole)
            shape[plan.axis] = self.tile[plan.axis]
            # one sample's leading axes, however many windows ran at once
            lead = [part.shape[0], *self.lead[1:]]
            self.sums = torch.zeros(lead + shape, dtype=self.wide, device=part.device)
            self.counts = torch.zeros(shape, dtype=self.wide, device=part.device)
        assert self.counts is not None
        where: list[Any] = [...]
        for axis, at in enumerate(start):
            place = self._place(at, axis) - (begin if axis == plan.axis else 0)
            where.append(slice(place, place + self.tile[axis]))
        weights = weights.to(part.device, self.wide)
        self.sums[tuple(where)] += part.to(self.wide) * weights
        self.counts[tuple(where)] += weights

    def begin(self, number: int) -> int:
        """Return where in the output what a row puts away begins; of the row after the last, the
        end.
        """
        plan, (low, high) = self.plan, self.crops[self.plan.axis]
        if number == len(plan.rows):
            return high - low
        place = self._place(plan.rows[number][0][plan.axis], plan.axis)
        return min(max(place, low), high) - low

    def end_row(self, number: int) -> None:
        """Put away what no later row reaches."""
        plan = self.plan
        assert self.sums is not None
        assert self.counts is not None
        begin = self.begins[0]
        last = number == len(plan.rows) - 1
        axis, size = plan.axis - plan.rank, self.tile[plan.axis]
        end = begin + size if last else self.begins[1]
        done = min(end - begin, size)
        if number >= self.first:
            self._put(begin, done)
        if last:
            return
        del self.begins[0]
        graph = self.sums.requires_grad  # which needs what was divided, and by what
        self.sums = _moved(self.sums, axis, done, copy=graph)
        self.counts = _moved(self.counts, axis, done, copy=graph)

    def _put(self, begin: int, done: int) -> None:
        assert self.sums is not None
        assert self.counts is not None
        axis = self.plan.axis - self.plan.rank
        sums, counts = self.sums.narrow(axis, 0, done), self.counts.narrow(axis, 0, done)
        mean = sums / counts if sums.requires_grad else sums.div_(counts)
        for each, (low, high) in enumerate(self.crops):
            where = each - self.plan.rank
            if where == axis:
                first = max(low - begin, 0)
                last = max(first, min(high - begin, done))
                mean = mean.narrow(axis, first, last - first)
            else:
                mean = mean.narrow(where, low, high - low)
        if mean.shape[axis]:
            self.parts.add(mean.to(self.dtype))

    def _place(self, at: int, axis: int) -> int:
        return at * self.tile[axis] // self.plan.window[axis]

    def _crop(self, axis: int) -> tuple[int, int]:
        """Return the part of an axis that is no padding of the volume."""
        plan = self.plan
        if plan.sizes[axis] == plan.image[axis]:
            return 0, self.whole[axis]
        zoom = self.whole[axis] / plan.window[axis]
        pad = plan.pads[axis]
        return round(pad * zoom), round((pad + plan.sizes[axis]) * zoom)


def _moved(tensor: Tensor, axis: int, by: int, *, copy: bool) -> Tensor:
    """Return what comes behind, and zeros for what is not there yet."""
    size = tensor.shape[axis]
    if copy:
        shape = list(tensor.shape)
        shape[axis] = by
        return torch.cat([tensor.narrow(axis, by, size - by), tensor.new_zeros(shape)], axis)
    # a row is large: no second one for it, but pieces that do not overlap where they go to
    for at in range(0, size - by, by):
        length = min(by, size - by - at)
        tensor.narrow(axis, at, length).copy_(tensor.narrow(axis, at + by, length))
    tensor.narrow(axis, size - by, by).zero_()
    return tensor


def _fitted(weights: Tensor, full: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return weights at the resolution of an output; each coarser one is made of the one before."""
    if tuple(full.shape) == tuple(sizes):
        return full
    if tuple(weights.shape) == tuple(sizes):
        return weights
    return F.interpolate(weights[None, None], tuple(sizes), mode="nearest-exact")[0, 0]


def window_starts(
    image: Sequence[int], window: Sequence[int], steps: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return where windows begin that cover a volume; the last of a row ends with the volume.

    Args:
        image: sizes of the volume, at least the window's.
        window: sizes of a window.
        steps: from one to the next, at least 1.
    """
    monai = _monai()
    if monai is not None:
        slices = monai[0](tuple(image), tuple(window), tuple(steps))
        return [tuple(int(each.start) for each in one) for one in slices]
    axes = []
    for size, length, step in zip(image, window, steps, strict=True):
        count = -(-(size - length) // step) + 1
        axes.append([min(index * step, size - length) for index in range(count)])
    return list(itertools.product(*axes))


@functools.lru_cache(maxsize=8)
def _importance(window: tuple[int, ...], kind: str) -> Tensor:
    with without_dispatch_modes(), torch.inference_mode(False):  # it outlives this call
        return importance(window, kind)


def importance(window: Sequence[int], kind: str) -> Tensor:
    """Return the weights of a window's voxels, float32.

    Args:
        window: its sizes.
        kind: "constant", or "gaussian" with a standard deviation of an eighth of the window and
            no weight below a thousandth.
    """
    monai = _monai()
    if monai is not None:
        made: Tensor = monai[1](tuple(window), mode=kind, sigma_scale=_SIGMA).float()
        return made.expand(tuple(window))
    if kind == "constant":
        return torch.ones(tuple(window))
    weights = torch.ones(())
    for size in window:
        places = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        one = torch.exp(-places.square() / (2 * (_SIGMA * size) ** 2))
        weights = weights.unsqueeze(-1) * one
    return weights.clamp_min(max(float(weights.min()), 1e-3))


@functools.cache
def _monai() -> tuple[Any, Any] | None:
    """Return MONAI's functions that place and weigh windows; None where it is not installed."""
    try:
        from monai.data.utils import compute_importance_map, dense_patch_slices
    except ImportError:
        return None
    return dense_patch_slices, compute_importance_map
