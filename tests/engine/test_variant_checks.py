"""Passes that check their own conversions check them in every variant of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import plan
from pocketize.passes.amp.amp import AutocastForward
from pocketize.passes.checkpoint.checkpoint import CheckpointedForward
from pocketize.plugin.edits import Convert

X = torch.randn(2, 1, 8, 8)


def test_a_conversion_that_breaks_in_a_variant_only_is_left_out() -> None:
    class Reads(nn.Module):
        """In one variant it reads the shape of a weight, which a block does not have."""

        def __init__(self) -> None:
            super().__init__()
            self.tied = False
            self.a, self.b = (nn.Conv2d(1 if i == 0 else 32, 32, 3, padding=1) for i in range(2))
            self.c, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu()).relu()
            x = self.c(x)
            return self.head(x.relu() * self.c.weight.shape[0] if self.tied else x.relu())

    asked = "bottleneck:activations=any,min_channels=8"
    tied: list[dict[str, Any]] = [{"tied": True}]
    (alone,) = plan(Reads(), asked, inputs=X).passes
    (both,) = plan(Reads(), asked, inputs=X, variants=tied).passes
    swapped = [edit.module for edit in alone.edits if isinstance(edit, Convert)]
    assert "c" in swapped
    assert [e.module for e in both.edits if isinstance(e, Convert)] == [
        path for path in swapped if path != "c"
    ]
    (why,) = [refusal.why for refusal in both.refused if refusal.path == "c"]
    assert "in evaluation mode with tied=True it raises" in why


@pytest.mark.parametrize("name", ["amp", "checkpoint:only=body"])
def test_passes_that_wrap_refuse_what_breaks_in_a_variant_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Body(nn.Sequential):
        deep = False

        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return [out, out] if self.deep else out

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.deep = False

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

    for kind in (AutocastForward, CheckpointedForward):

        def fails(self: Any, *args: Any, original: Any = kind.__call__) -> Any:
            out = original(self, *args)
            return out[:1] if isinstance(out, list) else out

        monkeypatch.setattr(kind, "__call__", fails)
    assert plan(Whole(), name, inputs=X).passes[0].edits
    (planned,) = plan(Whole(), name, inputs=X, variants=[{"body.deep": True}]).passes
    assert not planned.edits
    assert "with body.deep=True the outputs have other" in planned.refused[0].why
