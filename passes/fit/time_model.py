"""Predict how long a step takes from the operators that it runs.

Each convolution of the step is timed once on the device, on a part of its volume; each other
operator once, at a size that it has in the step, and scaled by the bytes that it reads and writes.
On the CPU this is the time of one thread, which other programs do not disturb, divided by the
number of threads. Times are cached in a file per device and version of torch, so that only a
network with other layers needs timing again.
"""

from __future__ import annotations

__all__ = ["TimeModel"]

import contextlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketize._torch import OpOverload, pytree, schema_of
from pocketize.errors import FitError
from pocketize.memory.work import EXAMPLE_BYTES, ConvolutionShape, Described, Operations, Work
from pocketize.passes.fit.cache import cache_folder, read_json_file, write_json_file
from pocketize.passes.offload.offload import file_copy, host_copy
from pocketize.passes.tiling.storage import Storage

aten = torch.ops.aten

#: A call is repeated for so many seconds, and then until the fastest two times differ by less than
#: this factor; for so many seconds, or so many times at most. The fastest counts.
_SECONDS, _ALIKE, _LONGEST, _TIMES = 0.02, 1.05, 0.3, 12
#: Calls of fewer seconds are repeated so many times for one reading of the clock.
_SHORT, _MANY = 2e-4, 100
#: Python's part of an operator, and of each operator, tensor, module or tile that a pass looks at
#: besides, in calls of the smallest operator: a fit to steps of four networks of 2 to 200 ms.
_PYTHON, _FOLLOWED = 3, 60
#: An operator is timed on so many sets of tensors in turn, at most.
_SETS = 256
#: Bytes of a move whose time is all in its beginning and end.
_SMALL_MOVE = 4096
#: Entries of float32 on a page of memory.
_PAGE = 1024
#: Calls on fewer bytes than these cost the same, whatever the operator.
_SCALARS = 4096
#: Arguments of which kernels read what their forward wrote: on other bytes the process may crash.
_OPAQUE = {"workspace", "reserve"}
#: Stands in a cache file for an operator that cannot be timed.
_FAILED = -1.0


class TimeModel:
    """Times of operators on one device.

    Args:
        device: where the step will run, and must be available here.
        cache: file with the times of earlier runs; ``None`` for the user's cache folder.
    """

    def __init__(self, device: torch.device, cache: Path | None = None) -> None:
        self.device = device
        self.cache = _cache_file(device) if cache is None else cache
        self._times: dict[str, float] = _read(self.cache)
        self._new = False

    def seconds(self, work: Work) -> float:
        """Predict the time of a step; on the CPU, with the present number of threads."""
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        python = work.dispatched * _PYTHON + work.followed * _FOLLOWED
        total = python * self._call_seconds() * threads
        for (place, away), count in work.moves.items():
            total += self._moves(place, away, count, work.moved[place, away]) * threads
        for convolution, count in work.convolutions.items():
            total += count * self._convolution(convolution)
        for name, operations in work.others.items():
            total += self._others(name, operations)
        return total / threads

    def save(self) -> None:
        """Write the times to the cache file; a folder that cannot be written to is no error."""
        if self._new:
            write_json_file(self.cache, {**_read(self.cache), **self._times})
            self._new = False

    def _convolution(self, convolution: ConvolutionShape) -> float:
        part = _part(convolution)
        scale = _points(convolution) / _points(part)
        seconds = self._time(repr(tuple(part)), lambda: self._convolution_call(part))
        if seconds is None:
            raise FitError(f"this convolution does not run on {self.device}: {part}")
        return scale * seconds

    def _others(self, name: str, operations: Operations) -> float:
        """Time is proportional to bytes, above a fixed cost for each call."""
        call = self._call_seconds()
        if operations.nbytes < operations.calls * _SCALARS:
            return operations.calls * call
        func, args, kwargs = operations.example
        size = operations.example_bytes
        # the time of a product does not follow from its bytes
        key = f"{name} {args!r}" if operations.flops else f"{name} {size.bit_length()}"
        seconds = self._time(key, lambda: self._call(func, args, kwargs))
        if seconds is None:  # it cannot be repeated on random numbers
            size = EXAMPLE_BYTES
            seconds = self._time("plain", self._plain_call) or 0.0
        rate = max(0.0, seconds - call) / size
        return operations.calls * call + operations.nbytes * rate

    def _moves(self, place: str, away: bool, count: int, nbytes: int) -> float:
        """A cost for each move, and one for each byte."""
        if place == "host" and self.device.type == "cpu":  # another device's times are not known
            rate = self._time("plain", self._plain_call) or 0.0
            return nbytes * rate / EXAMPLE_BYTES
        times = []
        for size in (_SMALL_MOVE, EXAMPLE_BYTES // 4):
            key = f"{place} {'away' if away else 'back'} {size}"
            times.append(self._time(key, partial(self._move_call, place, away, size)) or 0.0)
        rate = max(0.0, times[1] - times[0]) / (EXAMPLE_BYTES // 4)
        return count * times[0] + nbytes * rate

    def _move_call(self, place: str, away: bool, nbytes: int) -> Callable[[], object]:
        if place == "map":
            return partial(_use_map, nbytes)
        tensor = torch.rand(nbytes // 4, device=self.device)
        if place == "disk":
            return (lambda: file_copy(tensor, None)) if away else file_copy(tensor, None)
        return (lambda: host_copy(tensor)) if away else host_copy(tensor)

    def _plain_call(self) -> Callable[[], object]:
        return self._call(torch.neg, (Described((EXAMPLE_BYTES // 8,), torch.float32, (1,)),), {})

    def _call_seconds(self) -> float:
        tiny = Described((1,), torch.float32, (1,))
        return self._time("call", lambda: self._call(torch.neg, (tiny,), {})) or 0.0

    def _time(self, key: str, make: Callable[[], Callable[[], object]]) -> float | None:
        """Return the time of a call; ``None`` where it fails on random numbers."""
        if key not in self._times:
            try:
                self._times[key] = _fastest(make(), self.device)
            except Exception:  # whatever an operator raises on values that it was not made for
                self._times[key] = _FAILED
            self._new = True
        seconds = self._times[key]
        return None if seconds == _FAILED else seconds

    def _convolution_call(self, convolution: ConvolutionShape) -> Callable[[], object]:
        dtype = getattr(torch, convolution.dtype)
        given = [self._filled(shape, dtype) for shape in (convolution.input, convolution.weight)]
        rest: Any = None, *convolution.options
        if not convolution.mask:
            return self._cold(lambda *of: aten.convolution(*of, *rest), given)
        out = aten.convolution(*given, *rest)
        rest = [out.shape[1]], *convolution.options, list(convolution.mask)
        return self._cold(lambda *of: aten.convolution_backward(*of, *rest), [out, *given])

    def _call(self, func: Any, args: Any, kwargs: Any) -> Callable[[], object]:
        if isinstance(func, OpOverload):
            opaque = _OPAQUE.intersection(each.name for each in schema_of(func).arguments)
            if opaque:
                raise ValueError(f"{func} needs the {opaque.pop()} of its forward")
        leaves, spec = pytree.tree_flatten(
            (args, kwargs), is_leaf=lambda value: isinstance(value, Described)
        )
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Described)]

        def call(*tensors: Tensor) -> object:
            for place, tensor in zip(places, tensors, strict=True):
                leaves[place] = tensor
            given, named = pytree.tree_unflatten(leaves, spec)
            return func(*given, **named)

        return self._cold(call, [self._filled(*leaves[place]) for place in places])

    def _filled(
        self, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None
    ) -> Tensor:
        if stride is None:
            made = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            made = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
        real = dtype.is_floating_point or dtype.is_complex
        return made.copy_(torch.rand(shape[-1:])) if real else made.zero_()

    def _cold(self, call: Callable[..., object], tensors: list[Tensor]) -> Callable[[], object]:
        """Return a call on other tensors each time, as in a step: caches do not hold them."""
        nbytes = max(1, sum(tensor.nbytes for tensor in tensors))
        count = min(_SETS, EXAMPLE_BYTES // nbytes) if nbytes > _SCALARS else 1
        more = range(count - 1)
        sets = [
            tensors,
            *([self._filled(t.shape, t.dtype, t.stride()) for t in tensors] for _ in more),
        ]
        following = itertools.cycle(sets)
        return lambda: call(*next(following))


def _use_map(nbytes: int) -> None:
    """Make a mapped file, touch every page of it, and remove it."""
    buffer = Storage("disk", torch.device("cpu")).allocate((nbytes // 4,), torch.float32)
    buffer.tensor[::_PAGE].fill_(1)
    buffer.close()


def _part(convolution: ConvolutionShape) -> ConvolutionShape:
    """Return the same convolution on a part of its volume that is quick to run.

    It is cut along the last axes: which kernel torch takes on one thread of a CPU, some 17 times
    faster than the other, depends on the sizes of the first four axes (``ConvParams.use_mkldnn``).
    Tiles have many sizes that hardly differ; those of one multiple of eight are timed once.
    """
    batch, channels, *sizes = convolution.input
    sizes = [size if size < 16 else size // 8 * 8 for size in sizes]
    width = max(convolution.weight[0], convolution.weight[1], channels)
    item = torch.finfo(getattr(torch, convolution.dtype)).bits // 8
    # as many voxels as make 4 MiB of the widest of its tensors
    voxels = max(512, (EXAMPLE_BYTES // 16) // (width * item * batch))
    while math.prod(sizes) > voxels:
        axis = max(range(len(sizes)), key=lambda axis: (sizes[axis] >= 16, axis))
        if sizes[axis] < 8:
            break
        sizes[axis] = (sizes[axis] + 1) // 2
    return convolution._replace(input=(batch, channels, *sizes))


def _points(convolution: ConvolutionShape) -> int:
    return convolution.input[0] * math.prod(convolution.input[2:])


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    clock = time.thread_time if device.type == "cpu" else time.perf_counter

    def timed(repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        _synchronize(device)
        return clock() - start

    with torch.no_grad(), _one_thread():
        call()  # the first call allocates and compiles
        spent = timed(1)
        # what is as short as the clock's own steps is timed many times at once
        repeats = 1 if spent > _SHORT else _MANY
        seen = [spent] if repeats == 1 else []
        while len(seen) < _TIMES and not _settled(seen, spent):
            taken = timed(repeats)
            seen.append(taken / repeats)
            spent += taken
    return min(seen)


def _settled(seen: list[float], spent: float) -> bool:
    """Tell whether another program did not disturb the fastest of some times, or not to wait."""
    if len(seen) < 2 or spent < _SECONDS:
        return False
    best, second = sorted(seen)[:2]
    return second < _ALIKE * best or spent > _LONGEST


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _cache_file(device: torch.device) -> Path:
    if device.type == "cpu":
        name = platform.processor() or platform.machine()
    else:
        name = getattr(torch, device.type).get_device_name(device)
    plain = "".join(c if c.isalnum() else "-" for c in f"{name}-{torch.__version__}")
    return cache_folder() / f"times-{plain}.json"


def _read(file: Path) -> dict[str, float]:
    return {k: float(v) for k, v in read_json_file(file).items() if isinstance(v, int | float)}
