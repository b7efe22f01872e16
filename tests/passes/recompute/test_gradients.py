"""Recomputation changes no output, no gradient, no statistic and no random number."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from pocketize import rewrite
from pocketize.passes import Recompute
from pocketize.passes.recompute.norms import RecomputedCall
from pocketize.passes.shared import norm_gradients
from tests.examples import examples
from tests.passes.recompute.nets import Functional, Net, gradients, reference, same

NORMS: dict[str, Any] = {
    "batch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "instance-affine": {
        d: partial(n, affine=True, track_running_stats=True)
        for d, n in enumerate((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), 1)
    },
    "group": dict.fromkeys((1, 2, 3), partial(nn.GroupNorm, 2)),
    "none": dict.fromkeys((1, 2, 3), lambda channels: nn.Identity()),
}
ACTS: dict[str, Any] = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "leaky relu in place": nn.LeakyReLU(0.1, inplace=True),
    "gelu": nn.GELU(),
    "silu": F.silu,
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(inplace=True),
    "prelu": nn.PReLU(),
    "elu": partial(F.elu, alpha=0.5),
    "softplus": F.softplus,
    "torch.relu_": torch.relu_,
    "tanh": torch.tanh,
}


def recomputed(model: nn.Module, x: torch.Tensor, keep: str = "level") -> nn.Module:
    return rewrite(model, Recompute(keep=keep, min_bytes=0), inputs=x)


def check(model: nn.Module, x: torch.Tensor, keep: str = "level") -> None:
    made = recomputed(model.double(), x.double(), keep)
    for train in (True, False):
        twin = reference(made).train(train)
        same(gradients(twin, x.double()), gradients(made.train(train), x.double()))


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("keep", ["conv", "block", "level"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_in_every_mode(norm: str, keep: str) -> None:
    check(Net(NORMS[norm][3], nn.ReLU(inplace=True), 3), torch.randn(2, 1, 4, 4, 4), keep)


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act: str) -> None:
    check(Net(nn.BatchNorm2d, ACTS[act]), torch.randn(2, 1, 8, 8))


@pytest.mark.slow
@settings(max_examples=examples(8), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    norm=st.sampled_from(sorted(NORMS)),
    act=st.sampled_from(sorted(ACTS)),
    dims=st.integers(1, 3),
    batch=st.integers(1, 3),
    keep=st.sampled_from(["conv", "block", "level"]),
    dropout=st.sampled_from([0.0, 0.4]),
    size=st.sampled_from([1, 3, 1000]),
)
def test_any_small_net(norm, act, dims, batch, keep, dropout, size) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RecomputedCall.blocks, "cpu", 8 * size)  # from one channel to all
        x = torch.randn(batch, 1, *(8, 6, 4)[:dims])
        check(Net(NORMS[norm][dims], ACTS[act], dims, dropout), x, keep)


@pytest.mark.slow
def test_a_wrong_gradient_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    block = norm_gradients._block

    def off(cells: Any) -> Any:
        found = block(cells)
        return found._replace(dx=found.dx * 1.0001)

    monkeypatch.setattr(norm_gradients, "_block", off)
    with pytest.raises(AssertionError, match="differs by"):
        check(Net(nn.BatchNorm2d, nn.ReLU()), torch.randn(2, 1, 8, 8))


@pytest.mark.slow
def test_in_place_calls_and_sums() -> None:
    check(Functional(), torch.randn(2, 1, 8, 8))


@pytest.mark.slow
def test_running_statistics_are_updated_once() -> None:
    made = recomputed(Net(nn.BatchNorm2d, nn.ReLU()), x := torch.randn(2, 1, 8, 8))
    gradients(made.train(), x)
    assert {int(b) for n, b in made.named_buffers() if n.endswith("num_batches_tracked")} == {1}


@pytest.mark.slow
def test_channels_last_stays_and_agrees() -> None:
    last = torch.channels_last
    model = Net(nn.BatchNorm2d, nn.ReLU()).to(memory_format=last)
    x = torch.randn(2, 1, 8, 8)
    check(model, x.contiguous(memory_format=last))


@pytest.mark.slow
def test_autocast_is_in_the_state_it_was() -> None:
    made = recomputed(Net(partial(nn.GroupNorm, 2), nn.ReLU()), x := torch.randn(2, 1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(reference(made), x)
        found = gradients(made, x)
    assert found["output 0"].dtype is torch.bfloat16
    same(expected, found, 2e-2)


@pytest.mark.slow
def test_a_second_backward_over_the_same_graph() -> None:
    made = recomputed(
        Net(nn.BatchNorm2d, nn.ReLU()).double(), x := torch.randn(2, 1, 8, 8).double()
    )
    loss = made(x).sum()
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    loss.backward()
    same(first, {n: p.grad for n, p in made.named_parameters()})


@pytest.mark.slow
def test_gradients_of_gradients() -> None:
    made = recomputed(
        Net(nn.InstanceNorm2d, nn.SiLU()).double(), x := torch.randn(2, 1, 8, 8).double()
    )
    found = []
    for model in (reference(made), made):
        point = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(point).square().sum(), point, create_graph=True)
        slope.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_region_that_the_model_checkpoints_itself_is_left_to_it(reentrant: bool) -> None:
    class Checkpointing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, padding=1)
            self.net = nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.LeakyReLU(inplace=True)
            )
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.norm(self.first(x)))
            x = checkpoint(self.net, x, use_reentrant=reentrant)
            return self.last(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about reentrant checkpoints
        check(Checkpointing(), torch.randn(2, 1, 8, 8))


@pytest.mark.slow
def test_frozen_layers_and_outputs_at_several_depths() -> None:
    class Deep(Net):
        def forward(self, x: torch.Tensor) -> Any:
            first = self.act(self.n1(self.a1(x)))
            second = self.act(self.n2(self.a2(first)))
            return {"first": first, "rest": [second, self.head(second)]}

    model = Deep(nn.BatchNorm2d, nn.ReLU(inplace=True))
    model.a1.requires_grad_(False)
    check(model, torch.randn(2, 1, 8, 8))
