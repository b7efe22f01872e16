"""Small networks to plan for, and the paper's numbers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from pocketize import zoo

#: Complexity of the lymph node images at scale 1, 1/2, 1/4, 1/8 and 1/16 (the paper's Table 1).
LYMPH = (0.1518, 0.0857, 0.0655, 0.0496, 0.0375)
SMALL = "1x1x32x32"


def small_unet(*widths: int, norm: bool = False) -> nn.Module:
    """The paper's U-Net, narrow."""
    return zoo.build("complexity_unet2d", widths=widths or (8, 12, 16, 24, 32), norm=norm)


@functools.cache
def paper_unet() -> nn.Module:
    """The paper's U-Net at full width; on the meta device, because only its shapes matter."""
    with torch.device("meta"):
        return zoo.build("complexity_unet2d")


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Literal(nn.Module):
    """A net that cannot shrink in the middle: its forward has the width written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module = nn.Conv2d(1, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.first(x).relu())
        y = y.view(x.shape[0], 16, x.shape[2], x.shape[3])
        return self.head(y)
