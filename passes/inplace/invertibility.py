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

__all__ = ["InPlaceCall", "InvertibilityCheck", "unsafe_channels"]

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from pocketize._torch import FakeTensor, version_of
from pocketize.passes.inplace.activations import Activation, ActivationTag
from pocketize.passes.shared.norm_activation import FusedCall, KeptInput
from pocketize.passes.shared.norm_gradients import Norm, accumulation

_MARGIN = 8.0
_SMALL_GAMMA = 0.1
_SMALL_SLOPE = 0.02


class InPlaceCall(FusedCall):
    """A norm and an activation that keep their output, and of their input what cannot be undone.

    The caller attaches the tag, which says which activation, to the output.
    """

    name: ClassVar[str] = "in-place-norm"

    def __init__(
        self, norm: Norm, tag: ActivationTag, invertibility: InvertibilityCheck, count: Any = None
    ) -> None:
        super().__init__(norm, tag.activation, tag.layer)
        self.tag, self.invertibility, self.count = tag, invertibility, count

    def check(self) -> None:
        """Check the tag, and take note of the backward pass."""
        self.tag.check()
        self.invertibility.stepped()

    def keep(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, slopes: Tensor | None
    ) -> KeptInput:
        """Keep the slices of the input that cannot be recovered from the output."""
        norm, exact, activation = self.norm, accumulation(y.dtype), self.tag.activation
        parameters, lowest = (weight, bias, slopes), None
        if activation.kind == "elu" and y.numel():
            lowest = norm.cells(y).amin((0, 3), keepdim=True).to(exact)
        if weight is None:
            weight = torch.ones(y.shape[1], dtype=exact, device=y.device)
        gamma = norm.affine(weight, exact)
        beta = None if bias is None else norm.affine(bias, exact)
        over = None if slopes is None else norm.slopes(slopes, y.shape[1], y.dtype)
        unsafe, nearly = (
            unsafe_channels(gamma, beta, activation, lowest, y.dtype, slopes=over, margin=margin)
            .any(2)  # a group is kept whole: its channels share the means
            .flatten()
            for margin in (False, True)
        )
        kept = self.invertibility.select(unsafe, nearly, parameters, self.layer)
        if kept.index is not None and norm.process_group is not None:
            # Processes may choose differently, but must exchange the same sums in the same order.
            return KeptInput(everything=True)
        return kept


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


class InvertibilityCheck:
    """Decides for one layer, step by step, which slices of the input are kept.

    What it knows from earlier steps is no part of the model's state: copies and pickles start anew.
    """

    def __init__(self) -> None:
        self._capacity: int | None = None  # slices that are kept; None if nothing is known
        self._versions: tuple[int, ...] = ()
        self._stepped = False
        self._counts: Tensor | None = None  # two numbers on their way to the host
        self._event: Any = None

    def __reduce__(self) -> tuple[type[InvertibilityCheck], tuple[()]]:
        return InvertibilityCheck, ()

    def stepped(self) -> None:
        """Take note that a backward has run, after which weights may change."""
        self._stepped = True

    def select(
        self, unsafe: Tensor, nearly: Tensor, parameters: tuple[Tensor | None, ...], name: str
    ) -> KeptInput:
        """Return what has to be kept in this step.

        Args:
            unsafe: bool of shape (G,): slices that cannot be undone.
            nearly: the same by the stricter rule.
            parameters: the layer's parameters, whose versions tell whether they were changed.
            name: what a warning calls the layer.
        """
        if isinstance(unsafe, FakeTensor) or unsafe.is_meta:
            return KeptInput()  # values are not there, and neither are gradients
        if unsafe.device.type == "cpu":
            return _keep_worst(unsafe, unsafe, int(unsafe.sum()))
        return self._on_device(unsafe, unsafe | nearly, parameters, name)

    def _on_device(
        self, unsafe: Tensor, suspect: Tensor, parameters: tuple[Tensor | None, ...], name: str
    ) -> KeptInput:
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


def _keep_worst(unsafe: Tensor, suspect: Tensor, capacity: int) -> KeptInput:
    """Keep a number of slices that the host knows: unsafe ones first, then nearly unsafe ones."""
    if capacity == 0:
        return KeptInput()
    if 2 * capacity > unsafe.numel():
        return KeptInput(everything=True)
    rank = unsafe.to(torch.float32) + suspect.to(torch.float32)
    return KeptInput(index=rank.topk(capacity).indices.sort().values)


def _missed(unsafe: Tensor, kept: KeptInput) -> Tensor:
    """Count the unsafe slices that are not kept."""
    if kept.everything:
        return unsafe.new_zeros((), dtype=torch.int64)
    missed = unsafe if kept.index is None else unsafe.index_fill(0, kept.index, False)
    return missed.sum()
