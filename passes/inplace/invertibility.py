"""Which channels can be undone: a rule on numbers, decided without waiting for the device.

From the activated output ``y = act(gamma * xhat + beta)`` the backward recovers
``xhat = (act^-1(y) - beta) / gamma``. ``y`` was rounded relatively, by at most half a unit ``u`` of
its type, so ``xhat``, whose own size is about 1, is known to ``u * (|xhat| + |beta| / |gamma|)``.
A channel is therefore *unsafe*, and keeps its input, where

* ``|beta| > limit * |gamma|``: 16 in float32 and float64, so that the error stays below 2e-6 of a
  standard deviation in float32, and 1 in 16 bits, where it then is no more than that of rounding
  ``xhat`` itself;
* ``|gamma|``, times the slope, is so small that values near 0 are subnormal numbers, which have
  fewer digits or are flushed to 0. A gamma of 0 belongs here, one of 1e-12 with no beta does not:
  floating point has no favourite scale;
* a PReLU's slope is not positive: its function has no inverse;
* an ELU has been followed so far down that the slope there, ``1 + min(y) / alpha``, multiplies the
  rounding by more than 512 (2 in 16 bits) once divided by ``gamma``.

On a CPU the rule is applied to the values of each step. On other devices reading a value waits for
all the work that was queued before, so a step uses the count that an earlier one sent to the host
when it had time. To be right while values move, the rule is then stricter by a factor of 8 and
takes in every ``|gamma|`` below 0.1 and every PReLU's slope below 0.02, and *which* channels are
kept is chosen on the device: the worst ones, of these values. Only where nothing is known, at the
first step and when weights changed although no backward ran (they were loaded, or set by hand), a
step waits for the count.
"""

from __future__ import annotations

__all__ = ["Guard", "Kept", "unsafe_channels"]

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketize._torch import FakeTensor, version_of
from pocketize.passes.inplace.activations import Activation

_MARGIN = 8.0
_SMALL_GAMMA = 0.1
_SMALL_SLOPE = 0.02


@dataclass(frozen=True)
class Kept:
    """What a layer has to keep of its input.

    Attributes:
        everything: the whole input, because most channels are unsafe.
        index: int64 of shape (K,), the slices that are kept on axis 1 of the cells; None for none.
    """

    everything: bool = False
    index: Tensor | None = None


def unsafe_channels(
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    lowest: Tensor | None,
    dtype: torch.dtype,
    *,
    slopes: Tensor | None = None,
    margin: bool = False,
) -> Tensor:
    """Return which channels cannot be undone, by the rule that this file's head states.

    Args:
        weight: gamma of any shape, in float32 or float64.
        bias: beta of the same shape, or None for all zeros.
        activation: the activation.
        lowest: for an ELU, its least output in each channel, of the same shape.
        dtype: of the activated tensor.
        slopes: those of a PReLU, of the same shape.
        margin: be stricter, for values that may have moved on when the answer is used.

    Returns:
        bool of that shape.
    """
    info = torch.finfo(dtype)
    narrow = info.bits == 16
    strict = _MARGIN if margin else 1.0
    size = weight.abs()
    # float16 counts on its subnormal numbers; the others may have them flushed to zero.
    least = info.smallest_normal / (1.0 if dtype == torch.float16 else info.eps)
    lean = min(activation.slope, 1.0) if slopes is None else slopes.clamp(max=1.0)
    safe = size * lean >= least
    if margin:
        safe &= size >= _SMALL_GAMMA
        safe &= True if slopes is None else slopes >= _SMALL_SLOPE
    if bias is not None:
        safe &= bias.abs() * strict <= size * (1.0 if narrow else 16.0)
    if lowest is not None:
        slope = 1.0 + lowest.to(size.dtype) / activation.slope
        safe &= size * slope * (2.0 if narrow else 512.0) >= strict
    return ~safe  # what is not a number is not safe


class Guard:
    """Decides for one layer, step by step, which slices of the input are kept.

    It holds what is known of the layer between steps. That is no part of the model's state: copies
    and pickles start anew.
    """

    def __init__(self) -> None:
        self._capacity: int | None = None  # slices that are kept; None if nothing is known
        self._versions: tuple[int, ...] = ()
        self._stepped = False
        self._counts: Tensor | None = None  # two numbers on their way to the host
        self._event: Any = None

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        return Guard, ()

    def stepped(self) -> None:
        """Take note that a backward has run, after which weights may change."""
        self._stepped = True

    def select(
        self, unsafe: Tensor, nearly: Tensor, parameters: tuple[Tensor | None, ...], name: str
    ) -> Kept:
        """Return what has to be kept in this step.

        Args:
            unsafe: bool of shape (G,): slices that cannot be undone.
            nearly: the same by the stricter rule.
            parameters: the layer's parameters, whose versions tell whether they were changed.
            name: what a warning calls the layer.
        """
        if isinstance(unsafe, FakeTensor) or unsafe.is_meta:
            return Kept()  # values are not there, and neither are gradients
        if unsafe.device.type == "cpu":
            return _keep(unsafe, int(unsafe.sum()))
        return self._on_device(unsafe, unsafe | nearly, parameters, name)

    def _on_device(
        self, unsafe: Tensor, suspect: Tensor, parameters: tuple[Tensor | None, ...], name: str
    ) -> Kept:
        versions = tuple(version_of(p) for p in parameters if p is not None)
        by_hand = versions != self._versions and not self._stepped
        self._versions = versions
        self._stepped = False
        capturing = unsafe.is_cuda and torch.cuda.is_current_stream_capturing()
        if not capturing:
            if self._capacity is None or by_hand:
                self._capacity, self._counts = int(suspect.sum()), None
            elif self._counts is not None and self._event.query():
                self._capacity, missed = (int(count) for count in self._counts)
                self._counts = None
                if missed:
                    warnings.warn(
                        f"in-place-norm: {missed} gammas of {name} became too small to be undone "
                        "from one step to the next, and their gradients of that step are inexact; "
                        "from now on the layer keeps what it needs",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        kept = _keep_worst(unsafe, suspect, self._capacity or 0)
        if not capturing and self._counts is None:
            self._send(suspect, _missed(unsafe, kept))
        return kept

    def _send(self, suspect: Tensor, missed: Tensor) -> None:
        """Send the counts to the host; they are read once they have arrived."""
        counts = torch.stack([suspect.sum(), missed])
        self._counts = torch.empty(2, dtype=counts.dtype, pin_memory=counts.is_cuda)
        self._counts.copy_(counts, non_blocking=True)
        self._event = torch.Event(counts.device)
        self._event.record()


def _keep(unsafe: Tensor, count: int) -> Kept:
    if count == 0:
        return Kept()
    if 2 * count > unsafe.numel():
        return Kept(everything=True)
    return Kept(index=unsafe.nonzero().flatten())


def _keep_worst(unsafe: Tensor, suspect: Tensor, capacity: int) -> Kept:
    """Keep a number of slices that the host knows: unsafe ones first, then nearly unsafe ones."""
    if capacity == 0:
        return Kept()
    if 2 * capacity > unsafe.numel():
        return Kept(everything=True)
    rank = unsafe.to(torch.float32) + suspect.to(torch.float32)
    return Kept(index=rank.topk(capacity).indices)


def _missed(unsafe: Tensor, kept: Kept) -> Tensor:
    """Count the unsafe slices that are not kept."""
    if kept.everything:
        return unsafe.new_zeros((), dtype=torch.int64)
    missed = unsafe if kept.index is None else unsafe.index_fill(0, kept.index, False)
    return missed.sum()
