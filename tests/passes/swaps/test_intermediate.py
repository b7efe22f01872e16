"""Norm and activation inside a block: of the kinds that follow the convolution, set alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.graph.capture import capture
from pocketize.passes import CompactBlock, Separable
from pocketize.passes.swaps.intermediate import Intermediates, groups_for

X = torch.randn(2, 16, 8, 8)


def block(*after: nn.Module, model: nn.Module | None = None) -> Any:
    """What a compact block looks like in a chain of a convolution and what follows it."""
    model = model or nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), *after)
    given = CompactBlock(ratio=2, activations="any", inner_norm=True)
    made: Any = rewrite(model, given, inputs=X)
    return made[0]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(16, eps=1e-3, momentum=0.3),
        nn.BatchNorm2d(16, momentum=None, affine=False),
        nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
        nn.InstanceNorm2d(16),
        nn.GroupNorm(4, 16, eps=1e-6),
    ],
)
def test_a_norm_is_copied_with_its_settings(norm: Any) -> None:
    found = block(norm, nn.ReLU(inplace=True))
    assert list(found._modules) == [
        "reduce",
        "reduce_norm",
        "reduce_activation",
        "depthwise",
        "depthwise_norm",
        "depthwise_activation",
        "expand",
    ]
    for layer in (found.reduce_norm, found.depthwise_norm):
        assert type(layer) is type(norm)
        for name in ("eps", "momentum", "affine", "track_running_stats", "num_groups"):
            assert getattr(layer, name, None) == getattr(norm, name, None), name
        assert sum(p.numel() for p in layer.parameters()) in (0, 16)
    assert found.reduce_activation.inplace


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ELU(0.7),
        nn.CELU(0.6),
        nn.SELU(),
        nn.GELU("tanh"),
        nn.SiLU(inplace=True),
        nn.Mish(),
        nn.Hardswish(),
        nn.Hardtanh(-2, 2),
        nn.Softplus(2.0),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.PReLU(),
        nn.PReLU(16, init=0.1),
    ],
    ids=str,
)
def test_an_activation_is_copied_with_its_settings(activation: nn.Module) -> None:
    found = block(nn.BatchNorm2d(16), activation).reduce_activation
    y = torch.linspace(-8, 8, 2 * 8 * 3).reshape(2, 8, 3)
    if isinstance(activation, nn.PReLU):
        assert found.weight.shape == ((1,) if activation.num_parameters == 1 else (8,))
        assert torch.equal(found.weight, torch.full_like(found.weight, activation.init))
    else:
        assert torch.allclose(found(y.clone()), activation(y.clone()))
        assert getattr(found, "inplace", False) == getattr(activation, "inplace", False)


class Functional(nn.Module):
    """Activations that are called as functions, and a norm behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.drop(self.first(x))), 0.3)
        x = F.elu(self.norm(self.second(x)))
        return self.third(F.leaky_relu(x, 0.3)) + 1


def test_functions_count_and_what_does_not_follow_is_what_is_usual() -> None:
    model = Functional()
    inside = Intermediates(model, capture(model, X))
    group = {"kind": "GroupNorm", "num_groups": 4, "eps": 1e-5, "affine": True}
    assert inside.of("first").norm == group
    assert inside.of("first").activation == {"kind": "LeakyReLU", "negative_slope": 0.3}
    assert inside.of("second").activation == {"kind": "ELU", "alpha": 1.0}
    third = inside.of("third")
    assert third.norm == group
    assert third.activation["kind"] in ("LeakyReLU", "ELU")
    assert str(inside.of("first")) == "GroupNorm and LeakyReLU"


def test_a_net_without_norms_gets_activations_only_and_one_without_either_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    assert list(block(model=model)._modules) == [
        "reduce",
        "reduce_activation",
        "depthwise",
        "depthwise_activation",
        "expand",
    ]
    bare = nn.Sequential(nn.Conv2d(16, 16, 3))
    given = Separable(activations="any", inner_norm=True)
    (planned,) = plan(bare, given, inputs=X).passes
    assert "no norm and no activation" in planned.notes[-1]


def test_groups_divide_the_channels() -> None:
    assert [groups_for(8, n) for n in (16, 12, 4, 7, 5)] == [8, 6, 4, 7, 5]
    assert groups_for(4, 6) == 3
    found = block(nn.GroupNorm(16, 16), nn.ReLU())
    assert (found.reduce_norm.num_groups, found.reduce_norm.num_channels) == (8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_inside_are_of_the_convolutions_dtype_and_begin_as_new(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.PReLU()).to(dtype)
    nn.init.constant_(model[1].weight, 3.0)
    made: Any = rewrite(model, Separable(activations="any", inner_norm=True), inputs=X.to(dtype))
    tensors = [*made[0].parameters(), *made[0].buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    norm = made[0].depthwise_norm
    assert torch.equal(norm.weight, torch.ones(16, dtype=dtype))
    assert torch.equal(norm.running_var, torch.ones(16, dtype=dtype))
    assert int(norm.num_batches_tracked) == 0
