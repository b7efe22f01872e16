"""Interval arithmetic of local operators: which part of its input an operator needs for a part of
its result, axis by axis.

An interval is ``(low, high)`` along one spatial axis, in the coordinates of the whole tensor; a box
is one interval for each spatial axis. A :class:`ReceptiveField` says what an operator with a kernel
reads. A :class:`Resampling` says it for operators that pick or mix entries by index
(interpolation, padding, cropping), with the indices and weights.
"""

from __future__ import annotations

__all__ = [
    "Box",
    "Interval",
    "ReceptiveField",
    "Resampling",
    "box_of",
    "crop_resampling",
    "cut",
    "hull",
    "is_contested",
    "is_empty",
    "linear_resampling",
    "nearest_resampling",
    "pad_resampling",
]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Interval: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[Interval, ...]


def cut(tensor: Tensor, box: Box) -> Tensor:
    """Return a view of a box of a tensor (N, C, *spatial)."""
    index = (slice(None), slice(None), *(slice(low, high) for low, high in box))
    return tensor[index]


def box_of(shape: Sequence[int]) -> Box:
    """Return the box that covers a tensor (N, C, *spatial)."""
    return tuple((0, size) for size in shape[2:])


def is_empty(box: Box) -> bool:
    """Whether a box has no entries."""
    return any(low >= high for low, high in box)


def hull(a: Box | None, b: Box) -> Box:
    """Return the smallest box that contains two others; None is empty."""
    if a is None:
        return b
    return tuple(
        (min(low, other[0]), max(high, other[1])) for (low, high), other in zip(a, b, strict=True)
    )


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of a convolution or a pooling along one axis, of a ``size``.

    Result ``o`` reads the inputs ``o * stride - padding + t * dilation`` for t in [0, kernel).
    Entries behind the end are padding, too.
    """

    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def reads(self, interval: Interval) -> Interval:
        """Return the inputs that an interval of the result reads, not yet cut at the borders."""
        low = interval[0] * self.stride - self.padding
        return low, (interval[1] - 1) * self.stride - self.padding + self._span

    def inside(self, interval: Interval) -> Interval:
        """Return the same within the input; an empty interval is at the nearer border."""
        low, high = self.reads(interval)
        low = min(max(low, 0), self.size)
        return low, max(low, min(high, self.size))

    def needed(self, interval: Interval) -> Interval:
        """Return the same, and where all is padding one entry, as tensors must not be empty."""
        low, high = self.inside(interval)
        low = min(low, self.size - 1)
        return low, max(low + 1, high)

    def outside(self, interval: Interval) -> tuple[int, int]:
        """Return the number of padding entries before and behind the inputs that are read."""
        (low, high), (start, stop) = self.reads(interval), self.inside(interval)
        return (high - low, 0) if start == stop else (start - low, high - stop)

    def writers(self, interval: Interval) -> Interval:
        """Return the inputs of a transposed convolution that write to an interval of its result.

        Input ``i`` writes to ``i * stride - padding + t * dilation``.
        """
        low = -((-(interval[0] + self.padding - self._span + 1)) // self.stride)
        high = (interval[1] - 1 + self.padding) // self.stride + 1
        low = min(max(low, 0), self.size)
        return low, max(low, min(high, self.size))

    def written(self, interval: Interval) -> Interval:
        """Return the entries of the result that an interval of inputs writes to, not cut."""
        low = interval[0] * self.stride - self.padding
        return low, (interval[1] - 1) * self.stride - self.padding + self._span

    @property
    def _span(self) -> int:
        return (self.kernel - 1) * self.dilation + 1


@dataclass(frozen=True)
class Resampling:
    """The inputs of each entry of a result along one axis.

    Attributes:
        indices: (taps, length): for each entry of the result the inputs that it mixes; -1 stands
            for a constant.
        weights: (taps, length), or None where each entry is one input, unscaled.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None

    @property
    def identity(self) -> bool:
        """Whether every entry is the input at its own index."""
        one = self.weights is None and len(self.indices) == 1
        return one and bool((self.indices[0] == np.arange(self.indices.shape[1])).all())

    def reads(self, interval: Interval) -> Interval:
        """Return the smallest interval of inputs that an interval of the result reads."""
        used = self.indices[:, interval[0] : interval[1]]
        used = used[used >= 0]
        return (int(used.min()), int(used.max()) + 1) if used.size else (0, 0)

    def local(self, interval: Interval, read: Interval) -> Resampling:
        """Return the resampling of an interval, with indices into an interval of inputs."""
        part = self.indices[:, interval[0] : interval[1]]
        weights = None if self.weights is None else self.weights[:, interval[0] : interval[1]]
        return Resampling(np.where(part < 0, -1, part - read[0]), weights)


def crop_resampling(kept: range) -> Resampling:
    """Return the resampling that keeps some entries."""
    return Resampling(np.array(kept, dtype=np.int64)[None])


def pad_resampling(size: int, before: int, after: int, mode: str) -> Resampling:
    """Return the resampling of a padding by entries in front and behind; negative ones crop.

    Raises:
        ValueError: there is no such mode.
    """
    places = np.arange(-before, size + after, dtype=np.int64)
    if mode == "constant":
        indices = np.where((places < 0) | (places >= size), -1, places)
    elif mode == "replicate":
        indices = np.clip(places, 0, size - 1)
    elif mode == "circular":
        # entries that are cropped at the other end are not wrapped around
        start, stop = max(0, -before), size - max(0, -after)
        indices = start + (places - start) % max(1, stop - start)
    elif mode == "reflect":
        period = max(1, 2 * (size - 1))
        indices = size - 1 - np.abs(size - 1 - places % period)
    else:
        raise ValueError(f"no padding mode is called {mode!r}")
    return Resampling(indices[None])


def nearest_resampling(size: int, length: int, scale: float | None, *, exact: bool) -> Resampling:
    """Return the resampling of nearest-neighbour interpolation, by torch's rule and rounding.

    ``scale`` is the factor that the caller gave; None where only the length was given. With
    ``exact`` it is "nearest-exact", which rounds from the middle of an entry.
    """
    # torch computes in float32
    ratio = np.float32(1.0 / scale) if scale else np.float32(size) / np.float32(length)
    places = np.arange(length, dtype=np.float32)
    if exact:
        places = places + np.float32(0.5)
    indices = np.minimum(np.floor(places * ratio).astype(np.int64), size - 1)
    return Resampling(indices[None])


def is_contested(size: int, length: int, scale: float | None, *, exact: bool, wide: bool) -> bool:
    """Whether torch's kernels pick different entries in nearest-neighbour interpolation.

    CPU kernels for images copy or double by the lengths, whatever the scale factor; some compute
    the indices of float64 tensors, which are ``wide``, in float64.
    """
    picked = nearest_resampling(size, length, scale, exact=exact).indices[0]
    places = np.arange(length)
    told = not exact and scale is not None and length in (size, 2 * size)
    if told and (picked != places // (length // size)).any():
        return True
    if not wide:
        return False
    ratio = 1.0 / scale if scale else size / length
    real = ((places + (0.5 if exact else 0.0)) * ratio).astype(np.float32)
    return bool((picked != np.minimum(np.floor(real), size - 1)).any())


def linear_resampling(
    size: int, length: int, scale: float | None, *, align_corners: bool
) -> Resampling:
    """Return the resampling of linear interpolation; ``scale`` is the factor that was given."""
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
    return Resampling(np.stack([low, high]), np.stack([1.0 - part, part]))
