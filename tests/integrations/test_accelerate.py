"""accelerate wraps and unwraps the forward of a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

import accelerate

from pocketize import plain, rewrite
from pocketize.errors import ExecutionError
from pocketize.passes.shared.forwards import lowering

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
X = torch.randn(2, 1, 8, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Conv2d(8, 2, 1)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "passes", [["recompute:min_bytes=0"], ["amp"], ["recompute:min_bytes=0", "amp"]], ids="+".join
)
def test_an_unwrapped_model_is_the_model(passes: list[str]) -> None:
    lean = rewrite(net(), passes=passes, inputs=X)
    expected = lean(X)
    forward: Any = vars(lean)["forward"]
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(lean)
    accelerator.backward(prepared(X).square().mean())
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is lean
    assert lowering(unwrapped) == (["recompute"] if passes[0] != "amp" else [])
    copied = copy.deepcopy(unwrapped)
    with pytest.raises(ExecutionError, match="call the model once after unwrap_model"):
        copied(X)
    torch.testing.assert_close(unwrapped(X), expected)
    assert vars(unwrapped)["forward"] is forward
    unwrapped(X).sum().backward()
    torch.testing.assert_close(copy.deepcopy(unwrapped)(X), expected)


def test_an_unwrapped_model_can_be_made_plain() -> None:
    lean = rewrite(net(), "recompute:min_bytes=0", "amp", inputs=X)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerator.prepare(lean)
    accelerator.unwrap_model(lean, keep_fp32_wrapper=False)
    with pytest.raises(ExecutionError, match="call the model once after unwrap_model"):
        plain(lean)
    lean.eval()(X)
    made = plain(lean).train()
    assert lowering(lean) == ["recompute"]
    assert "forward" not in vars(made)
    assert torch.equal(made(X), net()(X))
