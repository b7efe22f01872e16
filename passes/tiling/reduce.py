"""What a forward by tiles makes of its outputs before they are stored, and what it shows."""

from __future__ import annotations

__all__ = ["ProgressBar", "Reduction", "reduction"]

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pocketize.errors import InputError

Reduction = Callable[[Tensor], Tensor]
#: A progress bar appears for what takes longer than this, in seconds.
PATIENCE = 2.0


def reduction(name: str | None) -> Reduction | None:
    """Return what is made of an output before it is stored; None for nothing.

    Args:
        name: None or "argmax".
    """
    return None if name is None else _labels


def _labels(logits: Tensor) -> Tensor:
    """Return the number of the largest channel, (N, 1, *spatial) uint8."""
    if logits.ndim < 3 or not 2 <= logits.shape[1] <= 256:
        channels = logits.shape[1] if logits.ndim > 1 else 0
        raise InputError(
            "patchwise: reduce='argmax' needs outputs (N, C, *spatial) with 2 to 256 channels, "
            f"got {tuple(logits.shape)} with {channels}; leave reduce away, and threshold the "
            "output of a single channel yourself"
        )
    return logits.argmax(1, keepdim=True).to(torch.uint8)


class ProgressBar:
    """A callback ``(done, total)`` that draws a bar on terminals, for what takes long.

    Args:
        wanted: False for never.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and sys.stderr.isatty()
        self.began = time.monotonic()
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Tell how many parts are done."""
        if not self.wanted:
            return
        if self.bar is None:
            if time.monotonic() - self.began < PATIENCE:
                return
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="tile", leave=False, file=sys.stderr)
        self.bar.n = done
        self.bar.refresh()
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
