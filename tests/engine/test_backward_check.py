"""The check of the backward: what breaks it is found, frozen and reported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocketize import plan


class _SavedSize(torch.autograd.Function):
    """A backward that knows the number of channels by heart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.reshape(gradient.shape[0], 24, *gradient.shape[2:])


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.saved = nn.Conv2d(8, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(_SavedSize.apply(self.saved(self.stem(x)))))


def test_only_the_group_whose_backward_breaks_is_left_alone() -> None:
    (step,) = plan(_Net(), "pocket", inputs="1x1x8x8").passes
    assert [change.path for change in step.changes] == ["wide"]
    why = {refusal.path: refusal.why for refusal in step.refused}["saved"]
    assert "24 channels: the check found that it cannot change: its backward" in why
    assert "invalid for input of size" in why


def test_a_net_whose_own_backward_fails_is_rewritten_all_the_same() -> None:
    class Broken(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(_SavedSize.apply(self.wide(self.saved(self.stem(x)))))

    (step,) = plan(Broken(), "pocket", inputs="1x1x8x8").passes
    assert [change.path for change in step.changes] == ["saved", "wide"]
