"""Find the largest input for which a network fits a memory budget."""

from __future__ import annotations

__all__ = ["largest_input"]

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from pocketize.errors import FitError, InputError, PocketizeError
from pocketize.memory.meter import measure_here, read_device
from pocketize.memory.step import Request, quick_collections
from pocketize.passes.fit.limits import read_budget
from pocketize.passes.fit.result import Fit
from pocketize.passes.fit.search import fit

#: Networks halve their volume at most so often: N is a multiple of one of these.
_STEPS = (1, 2, 4, 8, 16, 32, 64)
#: Of the peak of the untouched network, what the leanest way may need.
_LEANEST = 0.05
_LARGEST = 1 << 14


def largest_input(
    model: nn.Module,
    pattern: str,
    *,
    memory: str | int,
    prove: bool = True,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Fit:
    """Find the largest N for which a step fits.

    Args:
        model: any module; unchanged.
        pattern: shape of the input with N for the sizes to be found, such as ``"1x1xNxNxN"``,
            ``"1x1xNxNx64"`` or, for the largest batch, ``"Nx1x96x96x96"``.
        memory: the budget, as for :func:`fit`.
        prove: as for :func:`fit`, with the N that was found.
        progress: likewise.
        options: further options of :func:`fit`.

    Raises:
        FitError: not even the smallest input that runs through the network fits.
        InputError: the pattern has no N, or is no shape.
    """
    tell = progress or (lambda text: None)
    if not re.fullmatch(r"(\d+|N)(x(\d+|N))+", pattern) or "N" not in pattern:
        raise InputError(
            f"{pattern!r:.60} has no N to be found; write a shape such as 1x1xNxNxN, or "
            "Nx1x96x96x96 for the largest batch"
        )
    device = options.get("device")
    request = Request(
        model=model,
        inputs=None,
        mode=options.get("mode", "train"),
        optimizer=options.get("optimizer", "adam"),
        estimate=True,
        device=None if device is None else read_device(device),
    )

    def shape(n: int) -> str:
        return pattern.replace("N", str(n))

    def peak(n: int) -> int:
        return measure_here(replace(request, inputs=shape(n))).peak

    def attempt(n: int) -> Fit | FitError:
        def tell_of(text: str) -> None:
            tell(f"{shape(n)}: {text}")

        try:
            return fit(model, shape(n), memory=memory, prove=False, progress=tell_of, **options)
        except FitError as error:
            return error

    read_budget(memory)
    with quick_collections():
        tell(f"looking for sizes on which the network runs, as {pattern}")
        step = _granularity(peak, pattern)
        low = _smallest(peak, step)
        best = attempt(low)
        if isinstance(best, FitError):
            raise FitError(f"{shape(low)} is the smallest input that runs, and for it, {best}")
        most = best.usable / _LEANEST
        high = low  # multiples of the step: `low` fits, and `high` cannot
        while high < _LARGEST and peak(high) < most:
            high *= 2
        if high >= _LARGEST:
            raise InputError(f"the peak does not grow with N in {pattern}")
        while high - low > step:
            middle = low + max(step, (high - low) // 2 // step * step)
            tell(f"{shape(low)} fits, and {shape(high)} does not")
            found = attempt(middle)
            if isinstance(found, Fit):
                low, best = middle, found
            else:
                high = middle
    remark = f"{shape(low)} is the largest that fits; {shape(low + step)} does not."
    if prove:
        best = fit(model, shape(low), memory=memory, progress=progress, **options)
    return replace(best, remarks=(remark, *best.remarks))


def _granularity(peak: Callable[[int], int], pattern: str) -> int:
    """Return the number of which N must be a multiple."""
    for step in _STEPS:
        # odd multiples, so that no further halving hides
        if _runs(peak, 5 * step) and _runs(peak, 7 * step):
            return step
    raise InputError(f"no N up to {7 * _STEPS[-1]} runs through the network as {pattern}")


def _smallest(peak: Callable[[int], int], step: int) -> int:
    return next((n for n in (step, 2 * step, 3 * step) if _runs(peak, n)), 5 * step)


def _runs(peak: Callable[[int], int], n: int) -> bool:
    try:
        peak(n)
    except PocketizeError:
        return False
    return True
