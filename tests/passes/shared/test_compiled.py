"""What passes save is saved under ``torch.compile`` too, and the numbers are the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from pocketize import rewrite
from pocketize.errors import PocketizeWarning
from pocketize.passes import Recompute
from pocketize.passes.recompute.compiled import describe_uses, planned
from pocketize.passes.shared import compiled as module
from pocketize.passes.shared import forwards
from pocketize.plugin.base import Pass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not module.HAS_REGIONS, reason="the compiler updates buffers twice"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # dynamo looks at inputs
]


class Block(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        conv = nn.Conv2d(before, after, 3, padding=1)
        super().__init__(conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.1, inplace=True))


class Net(nn.Module):
    """Two blocks with a concatenation and dropout; a second head in training only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = Block(1, 8), Block(8, 8), Block(16, 8)
        self.drop, self.side, self.head = nn.Dropout(0.5), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)
        self.supervised, self.disturbed = False, ""

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        first = self.a(x)
        if self.disturbed == "attribute":
            self.seen = first
        if self.disturbed == "break" and float(first.detach().sum()) < 1e9:
            first = first * 1
        second = self.b(first)
        last = self.drop(self.c(torch.cat((first, second), 1))) * scale
        return [self.head(last), self.side(second)] if self.supervised else self.head(last)


X = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(forwards, "_compiled", set())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(net: nn.Module, call: Any) -> list[Tensor]:
    """Outputs, gradients and buffers of two steps."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        out = call(X, scale=2.0)
        outs = out if isinstance(out, list) else [out]
        net.zero_grad()
        sum(o.square().mean() for o in outs).backward()  # type: ignore[union-attr]
        found += [o.detach() for o in outs] + [p.grad for p in net.parameters()]
        found += [b.clone() for b in net.buffers()]
    return found


def compare(plain: nn.Module, net: nn.Module, call: Any) -> None:
    for a, b in zip(step(plain, plain), step(net, call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def stored(net: nn.Module) -> int:
    """Bytes that the compiled forward of a training step keeps for the backward pass."""
    sizes: list[int] = []

    def forward(graph: Any, inputs: Any) -> Any:
        (output,) = graph.graph.find_nodes(op="output")
        made = {n for n in output.args[0] if n is not None and n.op != "placeholder"}
        sizes.append(sum(n.meta["val"].nbytes for n in made if hasattr(n.meta["val"], "nbytes")))
        return graph.forward

    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _: graph.forward)
    torch.compile(copy.deepcopy(net), backend=backend, fullgraph=True)(X)
    torch._dynamo.reset()
    return sum(sizes)


@pytest.mark.parametrize(
    ("given", "most"),
    [(Recompute(), 0.75), (Recompute(keep="level"), 0.45)],
    ids=str,
)
def test_the_compiled_step_stores_less_and_computes_the_same(given: Pass, most: float) -> None:
    plain = Net()
    net = rewrite(plain, given, inputs=X)
    assert stored(net) < most * stored(plain)
    compare(plain, net, torch.compile(net, backend="aot_eager", fullgraph=True))


def test_a_backend_without_a_backward_graph_updates_buffers_once() -> None:
    plain = Net()
    net = rewrite(plain, Recompute(), inputs=X)
    compare(plain, net, torch.compile(net, backend="eager", fullgraph=True))


@pytest.mark.parametrize("disturbed", ["attribute", "break"])
def test_a_forward_that_is_not_one_graph_recomputes_without_the_compiler(disturbed: str) -> None:
    plain = Net()
    net = rewrite(plain, Recompute(), inputs=X)
    plain.disturbed = net.disturbed = disturbed  # type: ignore[assignment]
    call = torch.compile(net, backend="aot_eager")
    with pytest.warns(PocketizeWarning, match=r"^recompute: torch.compile cannot trace .* one gra"):
        compare(plain, net, call)


def test_heads_that_the_trace_leaves_out_do_not_shift_what_is_rebuilt() -> None:
    plain = Net()
    plain.supervised = True
    net = rewrite(plain, Recompute(keep="level"), inputs=X)
    both = stored(net)
    plain.supervised = net.supervised = False  # type: ignore[assignment]
    assert stored(net) < both
    compare(plain, net, torch.compile(net, backend="aot_eager", fullgraph=True))
    uses = describe_uses(plain, ["head.weight", "a.0.weight"], frozenset({"a.0.weight"}))
    assert planned(uses)  # the text is enough to make the policy of a trace


@pytest.mark.parametrize("around", ["checkpoint", "autocast", "functional", "inside"])
def test_it_may_stand_inside_something_else(around: str) -> None:
    plain = Net().eval()  # a second run draws other random numbers
    net = rewrite(plain, Recompute(keep="level"), inputs=X).eval()

    def inner(model: nn.Module) -> Any:
        if around == "checkpoint":
            return lambda x, **kw: checkpoint(model, x, use_reentrant=False, **kw)
        if around == "functional":
            held = dict(model.named_parameters())
            return lambda x, **kw: torch.func.functional_call(model, held, (x,), kw)

        def call(x: Tensor, **kw: Any) -> Tensor:
            if around == "inside":
                return F.relu(model(F.gelu(x), **kw))
            with torch.autocast("cpu", torch.bfloat16):
                return model(x, **kw).float()

        return call

    reference = step(plain, inner(plain))
    found = step(net, torch.compile(inner(net), backend="aot_eager"))
    for a, b in zip(reference, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", ["recompute", "checkpoint"])
def test_regions_may_stand_in_regions(inside: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = Block(1, 8), Block(8, 8)
            self.last = nn.Conv2d(8, 2, 1)
            if inside == "checkpoint":  # which by itself updates running statistics twice
                self.body[1] = nn.InstanceNorm2d(8)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            x = self.first(x * scale)
            if inside == "checkpoint":
                return self.last(checkpoint(self.body, x, use_reentrant=False))
            return self.last(self.body(x))

    plain = Outer()
    net = copy.deepcopy(plain)
    if inside == "recompute":
        net.body = rewrite(net.body, Recompute(min_bytes=0), inputs=torch.zeros(2, 8, 32, 32))
    net = rewrite(net, Recompute(min_bytes=0, keep="level"), inputs=(X, 2.0))
    compare(plain, net, torch.compile(net, backend="aot_eager", fullgraph=True))
