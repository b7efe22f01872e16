"""What is to be measured, checked before anything runs."""

from __future__ import annotations

__all__ = ["Request"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.errors import MeasureError, nearest
from pocketize.memory.step import OPTIMIZERS


@dataclass(frozen=True)
class Request:
    """What is to be measured; see :func:`pocketize.memory.measure`."""

    model: nn.Module
    inputs: Any
    mode: str = "train"
    optimizer: str | None = "adam"
    loss: Callable[[Any], Tensor] | None = None
    estimate: bool = False
    device: torch.device | None = None
    time_steps: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before anything runs."""
        if not isinstance(self.model, nn.Module):
            raise MeasureError(f"model must be an nn.Module, not {type(self.model).__name__}")
        if self.mode not in ("train", "infer"):
            hint = nearest(str(self.mode), ("train", "infer"))
            raise MeasureError(f"mode must be 'train' or 'infer', not {self.mode!r}.{hint}")
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            hint = nearest(str(self.optimizer), OPTIMIZERS)
            raise MeasureError(
                f"optimizer must be 'adam', 'sgd' or None, not {self.optimizer!r}.{hint}"
            )
        if self.time_steps < 0:
            raise MeasureError(f"time_steps must be 0 or more, not {self.time_steps}")

    @property
    def train(self) -> bool:
        """Whether a training step is measured."""
        return self.mode == "train"
