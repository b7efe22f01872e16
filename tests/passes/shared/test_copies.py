"""A rewritten network that has run can be copied wherever the untouched one can."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import pocketize, rewrite
from pocketize.passes import Amp, Checkpoint, InPlaceNorm, Offload, Patchwise, Recompute
from pocketize.plugin.base import Pass

SIZE = "1x1x16x16"
PASSES: dict[str, Callable[[], list[Pass]]] = {
    "in-place-norm": lambda: [InPlaceNorm()],
    "recompute": lambda: [Recompute(min_bytes=1)],
    "checkpoint": lambda: [Checkpoint()],
    "offload": lambda: [Offload(to="disk", min_bytes="1B")],
    "amp": lambda: [Amp()],
    "exact": lambda: [Patchwise(size=8)],
    "train": lambda: [Patchwise(size=8, train=True)],
    "slab": lambda: [Patchwise(mode="slab", size=8)],
    "window": lambda: [Patchwise(mode="window", size=8)],
    "together": lambda: [Checkpoint(), Offload(to="disk", min_bytes="1B")],
}


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.InstanceNorm2d(o), nn.LeakyReLU())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(block(1, 4), block(4, 4), nn.Conv2d(4, 2, 1))


def trained(model: nn.Module, x: Tensor) -> Any:
    model(x).square().sum().backward()


def kept(model: nn.Module, x: Tensor) -> Any:
    return model(x)  # the graph is alive


def inferred(model: nn.Module, x: Tensor) -> Any:
    model.eval()
    with torch.inference_mode():
        return model(x)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters = list(model.parameters())
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("run", [trained, kept, inferred])
@pytest.mark.parametrize("name", PASSES)
def test_a_rewritten_network_that_has_run_can_be_copied_and_pickled(name: str, run: Any) -> None:
    x = torch.randn(1, 1, 16, 16)
    lean = rewrite(net(), *PASSES[name](), inputs=SIZE)
    held = run(lean, x)
    copied = copy.deepcopy(lean)
    again = pickle.loads(pickle.dumps(lean))
    saved = io.BytesIO()
    torch.save(lean, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    expected = results(lean, x)
    for other in (copied, again, loaded):
        assert other.training == lean.training
        for a, b in zip(results(other, x), expected, strict=True):
            assert torch.equal(a, b)
    first = next(copied.parameters())
    with torch.no_grad():
        first.add_(1)  # the copy computes with weights of its own
    assert not torch.equal(results(copied, x)[0], expected[0])
    assert torch.equal(results(lean, x)[0], expected[0])
    del held


class Supervised(nn.Module):
    """Keeps its inner results for a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = block(1, 4), block(4, 4), nn.Conv2d(4, 2, 1)
        self.outputs: list[Any] = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        for index, part in enumerate((self.a, self.b)):
            x = self.outputs[index] = part(x)
        return self.head(x)


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("run", [trained, kept, inferred])
@pytest.mark.parametrize("name", ["recompute", "checkpoint", "offload", "amp", "window"])
def test_a_network_that_keeps_its_outputs_is_planned_and_copied_after_it_has_run(
    name: str, run: Any
) -> None:
    torch.manual_seed(0)
    model, x = Supervised(), torch.randn(1, 1, 16, 16)
    run(model, x)
    lean = rewrite(model, *PASSES[name](), inputs=SIZE)
    run(lean, x)
    small = pocketize(lean, 2, inputs=SIZE)  # which copies it
    assert small(x).shape == (1, 2, 16, 16)
    assert model.outputs[1] is not None
