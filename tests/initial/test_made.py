"""Modules that conversions put into a model are drawn from the schemes of what stood there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from pocketize.engine.surgery import apply_edits
from pocketize.errors import RewriteError
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import Convert, Redraw


@conversion("test-two-convs")
def two_convs(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Two convolutions of zeros and a norm whose statistics have seen something."""
    assert isinstance(module, nn.Conv2d)
    first = nn.Conv2d(module.in_channels, 48, 1, bias=False)
    norm = nn.BatchNorm2d(48)
    last = nn.Conv2d(48, module.out_channels, 3, padding=1)
    nn.init.constant_(norm.running_mean, 3.0)
    for layer in (first, last):
        nn.init.zeros_(layer.weight)
    return nn.Sequential(first, norm, last)


EDITS = [Convert("1", "test-two-convs"), Redraw("1")]


def net(std: float) -> nn.Sequential:
    """Three convolutions whose owner drew them himself, and whose biases are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)))
    for layer in model:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return model


def redrawn(model: nn.Module, seed: int = 1) -> nn.Module:
    apply_edits(model, EDITS, generator=torch.Generator().manual_seed(seed))
    return model


def test_new_layers_follow_the_owners_scheme_and_all_others_stay() -> None:
    model = net(0.02)
    before = [model[i].weight.clone() for i in (0, 2)]
    redrawn(model)
    for layer in (model[1][0], model[1][2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model[1][2].bias.any()
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].weight, before[1])
    assert not model[1][1].running_mean.any()
    assert torch.equal(model[1][1].weight, torch.ones(48))


def test_a_scheme_with_a_fan_is_scaled_to_each_new_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for width in (16, 32, 64)))
    for layer in model:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    redrawn(model)
    for layer in (model[1][0], model[1][2]):
        fan = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.1)


def test_zeros_are_inherited_by_the_last_layer_only() -> None:
    model = net(0.02)
    nn.init.zeros_(model[1].weight)
    redrawn(model)
    assert not model[1][2].weight.any()
    assert model[1][0].weight.any()


def test_the_generator_decides() -> None:
    one, same, other = (redrawn(net(0.02), seed)[1][0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(RewriteError, match="cannot change '7'"):
        apply_edits(net(0.02), [Redraw("7")])
