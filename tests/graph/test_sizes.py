from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pocketize import analyse, compare, measure, plan
from pocketize.errors import CaptureError, InputError
from pocketize.graph.sizes import suggest_sizes


class UNet(nn.Module):
    """Halves its input twice, so that sizes must be multiples of four."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        low = nn.functional.max_pool2d(nn.functional.max_pool2d(x, 2), 2)
        return self.up(x + nn.functional.interpolate(low, scale_factor=4.0))


def test_the_nearest_sizes_that_suit_are_named() -> None:
    both = r"It runs on 1x1x8x16 float32 and on 1x1x12x16 float32"
    with pytest.raises(InputError, match=both):
        plan(UNet(), "pocket", inputs="1x1x10x16")
    with pytest.raises(InputError, match=both):
        analyse(UNet(), (1, 1, 10, 16))
    with pytest.raises(InputError, match=both):
        compare(UNet(), UNet(), "1x1x10x16", estimate=True)
    with pytest.raises(InputError, match=r"It runs on 1x1x8x16 float32$"):
        plan(UNet(), "pocket", inputs="1x3x8x16")
    with pytest.raises(InputError, match="It runs on 1x1x1024x4096 float32"):
        measure(UNet(), "1x1x1026x4096", estimate=True)


def test_an_error_of_another_cause_stays_what_it_is() -> None:
    for inputs in ("1x1x8x8", "1x8x8", "nothing", None):
        with pytest.raises(CaptureError, match=r"^elsewhere$"), suggest_sizes(UNet(), inputs):
            raise CaptureError("elsewhere")
    with pytest.raises(CaptureError, match="did not run"):
        plan(UNet(), "pocket", inputs=torch.zeros(1, 2, 8, 8, 8))
