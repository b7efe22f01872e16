"""Interval arithmetic of local operators: which part of its input an operator needs for a part of
its result, axis by axis.

A window is ``(low, high)`` along one spatial axis, in the coordinates of the whole tensor; a region
is one window for every spatial axis. A :class:`Reach` says what an operator with a kernel needs; an
:class:`Source` is the same for operators that pick or mix entries by index (interpolation, padding,
cropping), with the indices and weights at hand.
"""

from __future__ import annotations

__all__ = [
    "Reach",
    "Region",
    "Source",
    "Window",
    "crop_source",
    "cut",
    "is_contested",
    "linear_source",
    "nearest_source",
    "pad_source",
    "region_of",
    "whole",
]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Window: TypeAlias = tuple[int, int]
Region: TypeAlias = tuple[Window, ...]


def cut(tensor: Tensor, region: Region) -> Tensor:
    """Return a view of a region of a tensor (N, C, *spatial)."""
    index = (slice(None), slice(None), *(slice(low, high) for low, high in region))
    return tensor[index]


def region_of(shape: Sequence[int]) -> Region:
    """Return the region that covers a tensor (N, C, *spatial)."""
    return tuple((0, size) for size in shape[2:])


def hull(a: Region | None, b: Region) -> Region:
    """Return the smallest region that has two others in it; None is nothing."""
    if a is None:
        return b
    return tuple(
        (min(low, other[0]), max(high, other[1])) for (low, high), other in zip(a, b, strict=True)
    )


def whole(region: Region, shape: Sequence[int]) -> bool:
    """Whether a region covers a tensor (N, C, *spatial)."""
    return region == region_of(shape)


@dataclass(frozen=True)
class Reach:
    """The windows of a convolution or a pooling along one axis.

    Result ``o`` reads the inputs ``o * stride - padding + t * dilation`` for t in [0, kernel).

    Attributes:
        size: length of the input.
        kernel: entries of the kernel.
        stride: step of the kernel.
        padding: entries added in front; whatever lies behind the end counts as padding too.
        dilation: distance of the kernel's entries.
    """

    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def reads(self, window: Window) -> Window:
        """Return the inputs that a window of the result reads, borders not yet cut."""
        low = window[0] * self.stride - self.padding
        return low, (window[1] - 1) * self.stride - self.padding + self._span

    def inside(self, window: Window) -> Window:
        """Return the same within the input; empty windows lie at the nearer border."""
        low, high = self.reads(window)
        low = min(max(low, 0), self.size)
        return low, max(low, min(high, self.size))

    def needed(self, window: Window) -> Window:
        """Return what to ask for: the same, and where all is padding one entry."""
        low, high = self.inside(window)
        low = min(low, self.size - 1)
        return low, max(low + 1, high)

    def outside(self, window: Window) -> tuple[int, int]:
        """Return how many entries of padding stand before and behind the inputs that are read."""
        (low, high), (start, stop) = self.reads(window), self.inside(window)
        return (high - low, 0) if start == stop else (start - low, high - stop)

    # -- the other way round: a transposed convolution --------------------------------------------

    def writers(self, window: Window) -> Window:
        """Return the inputs of a transposed convolution that reach a window of its result.

        Input ``i`` writes to ``i * stride - padding + t * dilation``.
        """
        low = -((-(window[0] + self.padding - self._span + 1)) // self.stride)
        high = (window[1] - 1 + self.padding) // self.stride + 1
        low = min(max(low, 0), self.size)
        return low, max(low, min(high, self.size))

    def written(self, window: Window) -> Window:
        """Return the entries of the result that a window of inputs writes to, borders not cut."""
        low = window[0] * self.stride - self.padding
        return low, (window[1] - 1) * self.stride - self.padding + self._span

    @property
    def _span(self) -> int:
        return (self.kernel - 1) * self.dilation + 1


@dataclass(frozen=True)
class Source:
    """Where the entries of a result come from along one axis.

    Attributes:
        indices: (taps, length): for each entry of the result the inputs that it mixes; -1 stands
            for a constant.
        weights: (taps, length), or None where each entry is one input, as it is.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None

    @property
    def identity(self) -> bool:
        """Whether every entry is the input at its own place."""
        one = self.weights is None and len(self.indices) == 1
        return one and bool((self.indices[0] == np.arange(self.indices.shape[1])).all())

    def reads(self, window: Window) -> Window:
        """Return the smallest window of inputs that a window of the result needs."""
        used = self.indices[:, window[0] : window[1]]
        used = used[used >= 0]
        return (int(used.min()), int(used.max()) + 1) if used.size else (0, 0)

    def local(self, window: Window, read: Window) -> Source:
        """Return the source of a window of the result, with indices into a window of inputs."""
        part = self.indices[:, window[0] : window[1]]
        weights = None if self.weights is None else self.weights[:, window[0] : window[1]]
        return Source(np.where(part < 0, -1, part - read[0]), weights)


def crop_source(start: int, stop: int, step: int = 1) -> Source:
    """Return the source of a slice; ``stop`` is exclusive and not beyond the input."""
    return Source(np.arange(start, stop, step, dtype=np.int64)[None])


def pad_source(size: int, before: int, after: int, mode: str) -> Source:
    """Return the source of a padding, which may be negative and then crops.

    Args:
        size: length of the input.
        before: entries in front.
        after: entries behind.
        mode: "constant", "reflect", "replicate" or "circular".

    Raises:
        ValueError: there is no such mode.
    """
    places = np.arange(-before, size + after, dtype=np.int64)
    if mode == "constant":
        indices = np.where((places < 0) | (places >= size), -1, places)
    elif mode == "replicate":
        indices = np.clip(places, 0, size - 1)
    elif mode == "circular":
        # what a crop at the other end takes away is not wrapped around
        start, stop = max(0, -before), size - max(0, -after)
        indices = start + (places - start) % max(1, stop - start)
    elif mode == "reflect":
        period = max(1, 2 * (size - 1))
        indices = size - 1 - np.abs(size - 1 - places % period)
    else:
        raise ValueError(f"no padding mode is called {mode!r}")
    return Source(indices[None])


def nearest_source(size: int, length: int, scale: float | None, *, exact: bool) -> Source:
    """Return the source of nearest-neighbour interpolation, by torch's rule and rounding.

    Args:
        size: length of the input.
        length: length of the result.
        scale: the factor that the caller gave; None where only the length was given.
        exact: "nearest-exact", which rounds from the middle of an entry.
    """
    # torch computes in float32
    ratio = np.float32(1.0 / scale) if scale else np.float32(size) / np.float32(length)
    places = np.arange(length, dtype=np.float32)
    if exact:
        places = places + np.float32(0.5)
    indices = np.minimum(np.floor(places * ratio).astype(np.int64), size - 1)
    return Source(indices[None])


def is_contested(size: int, length: int, scale: float | None, *, exact: bool, wide: bool) -> bool:
    """Whether torch's kernels differ in what nearest-neighbour interpolation picks.

    Those for images on a CPU copy or double where the lengths say so, whatever the scale factor;
    some compute places of float64 in float64.

    Args:
        size: length of the input.
        length: length of the result.
        scale: the factor that the caller gave.
        exact: "nearest-exact".
        wide: the entries are float64.
    """
    picked = nearest_source(size, length, scale, exact=exact).indices[0]
    places = np.arange(length)
    told = not exact and scale is not None and length in (size, 2 * size)
    if told and (picked != places // (length // size)).any():
        return True
    if not wide:
        return False
    ratio = 1.0 / scale if scale else size / length
    real = ((places + (0.5 if exact else 0.0)) * ratio).astype(np.float32)
    return bool((picked != np.minimum(np.floor(real), size - 1)).any())


def linear_source(size: int, length: int, scale: float | None, *, align_corners: bool) -> Source:
    """Return the source of linear interpolation along one axis.

    Args:
        size: length of the input.
        length: length of the result.
        scale: the factor that the caller gave; None where only the length was given.
        align_corners: the first and last entries of both coincide.
    """
    places = np.arange(length, dtype=np.float64)
    if size == length:  # torch takes each entry twice, the second time with weight 0
        real = places
    elif align_corners:
        ratio = (size - 1) / (length - 1) if length > 1 else 0.0
        real = places * ratio
    else:
        ratio = 1.0 / scale if scale else size / length
        real = np.maximum((places + 0.5) * ratio - 0.5, 0.0)
    low = np.minimum(np.floor(real).astype(np.int64), size - 1)
    high = low if size == length else np.minimum(low + 1, size - 1)
    part = real - low  # also where both are the last entry
    return Source(np.stack([low, high]), np.stack([1.0 - part, part]))
