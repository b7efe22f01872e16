"""What cannot be checkpointed, and the reasons that the plan gives."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pocketize import plan, rewrite
from pocketize.errors import NoEffectWarning
from pocketize.passes import Checkpoint
from tests.passes.checkpoint.test_checkpoint import BLOCKS, checkpointed, inputs, net


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Conv2d(1, 1, 1), "it has no submodules"),
        (lambda: net().requires_grad_(False), "cannot be estimated.*unfreeze parameters"),
        (Branching, "does not run on tensors without values"),
    ],
)
def test_models_that_cannot_be_searched_are_refused_with_the_reason(make: Any, why: str):
    with pytest.warns(NoEffectWarning, match=why):
        rewrite(make(), Checkpoint(), inputs=inputs())


@pytest.mark.slow
def test_a_second_application_is_refused():
    once = rewrite(net(), Checkpoint(only=("encoder",)), inputs=inputs())
    with pytest.warns(NoEffectWarning, match="1 modules of it are already checkpointed"):
        rewrite(once, Checkpoint(), inputs=inputs())


class Changed(nn.Module):
    """Blocks that cannot be run twice, each for a reason of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.part = Part(kind)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.part.aside.tensor = y * 2
        z = self.part(y)
        if self.kind == "input changed later":
            y.mul_(2)
        if self.kind == "twice":
            z = self.part(z)
        return z + y


class Part(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.kind = kind
        self.aside = SimpleNamespace()
        self.plain = torch.zeros(4)
        self.generator = torch.Generator().manual_seed(0)
        if kind == "hook":
            self.inner.register_forward_hook(Hook())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input changed":
            x = x.add_(1)
        if self.kind == "input changed later":
            return self.inner(torch.tanh(x * 3)).tanh()
        y = torch.sin(torch.tanh(self.inner(x)))
        if self.kind == "aside":
            y = y + self.aside.tensor
        if self.kind == "python random":
            y = y * random.random()
        if self.kind == "generator":
            y = y * torch.rand(y.shape, generator=self.generator)
        if self.kind == "writes":
            self.plain.add_(y.detach().mean((0, 2, 3)))
        return torch.exp(y)


class Hook:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("hook", "part.inner has forward hooks, which would run twice"),
        ("input changed", "its input is changed in place"),
        ("input changed later", "its input is changed in place"),
        ("aside", "it reads a tensor that is neither its own nor among its arguments"),
        ("python random", "random numbers from Python or NumPy"),
        ("generator", "a generator of its own"),
        ("writes", "neither its own nor a buffer"),
        ("twice", "it runs 2 times in one forward"),
    ],
)
def test_modules_that_cannot_be_run_again_are_refused_with_the_reason(kind: str, why: str):
    planned = plan(Changed(kind), Checkpoint(only=("part",)), inputs=inputs())
    assert [row.path for row in planned.passes[0].refused] == ["part"]
    assert why in planned.passes[0].refused[0].why
    assert planned.passes[0].edits == ()


def test_without_such_a_reason_the_same_block_is_taken():
    made = rewrite(Changed("nothing"), Checkpoint(only=("part",)), inputs=inputs())
    assert checkpointed(made) == ["part"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize(
    ("convert", "why"), [(fx.symbolic_trace, "GraphModule"), (torch.jit.script, "TorchScript")]
)
def test_graph_modules_and_torchscript_are_refused(convert: Any, why: str):
    model = net()
    model.encoder = convert(model.encoder)
    rows = plan(model, Checkpoint(only=BLOCKS), inputs=inputs()).passes[0].refused
    assert [row.path for row in rows if why in row.why] == ["encoder"]
