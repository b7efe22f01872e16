"""Multiply-accumulates against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pocketize.errors import InputError, MeasureError
from pocketize.memory import count_macs, measure


@pytest.mark.parametrize(
    ("layer", "inputs", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), "2x3x16x16", 2 * 8 * 16 * 16 * 3 * 9),
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), "2x3x16x16", 2 * 8 * 16 * 16 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), "1x3x16x16", 8 * 8 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, padding="same", dilation=2), "1x3x16x16", 8 * 16 * 16 * 3 * 9),
        (nn.Conv2d(8, 16, 3, groups=4), "1x8x10x10", 16 * 8 * 8 * 2 * 9),
        (nn.Conv2d(8, 8, 5, groups=8, padding=2), "1x8x10x10", 8 * 10 * 10 * 25),
        (nn.Conv1d(2, 4, 3), "1x2x10", 4 * 8 * 2 * 3),
        (nn.Conv3d(1, 4, (1, 3, 3), padding=(0, 1, 1)), "1x1x4x8x8", 4 * 4 * 8 * 8 * 9),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), "1x8x5x5", 8 * 5 * 5 * 4 * 4),
        (nn.ConvTranspose3d(8, 4, 3, stride=2, padding=1), "1x8x4x4x4", 8 * 64 * 4 * 27),
        (nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), "1x8x5x5", 8 * 5 * 5 * 4),
    ],
)
def test_convolutions(layer: nn.Module, inputs: str, expected: int) -> None:
    assert count_macs(layer, inputs) == (expected, 0, 0, ())


@pytest.mark.parametrize(
    ("layer", "inputs", "expected"),
    [
        (nn.Linear(10, 20), "3x10", 3 * 10 * 20),
        (nn.Linear(10, 20, bias=False), "3x5x10", 3 * 5 * 10 * 20),
        (nn.Linear(10, 20), "10", 10 * 20),
    ],
)
def test_linear_layers(layer: nn.Module, inputs: str, expected: int) -> None:
    assert count_macs(layer, inputs) == (0, expected, 0, ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "inputs", "operator"),
    [
        (nn.LSTM(4, 5), "3x2x4", "rnn"),
        (nn.Bilinear(4, 5, 6), "2x4,2x5", "trilinear"),
    ],
)
def test_an_operator_without_a_formula_is_named(net: nn.Module, inputs: str, operator: str) -> None:
    counted = count_macs(net, inputs)
    assert counted[:3] == (0, 0, 0)
    (named,) = counted.not_counted
    assert operator in named
    profile = measure(net, inputs, estimate=True)
    assert profile.not_counted == (named,)
    assert f"not counted in the MACs: {named}" in str(profile)


def test_upsampling_and_gamma_are_no_products() -> None:
    class Smooth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="trilinear")
            return torch.lgamma(x.cummax(0).values)

    assert count_macs(Smooth(), "1x1x4x4x4") == (0, 0, 0, ())


def test_an_operator_from_elsewhere_is_named() -> None:
    library = torch.library.Library("pocketize_tests_macs", "DEF")
    library.define("blend(Tensor x) -> Tensor")
    library.impl("blend", lambda x: x.clone(), "CompositeExplicitAutograd")

    class Blends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.ops.pocketize_tests_macs.blend(x)
            return out

    try:
        assert count_macs(Blends(), "1x2").not_counted == ("pocketize_tests_macs.blend",)
    finally:
        library._destroy()


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight  # 3 x 4 by 4 x 6
        z = torch.addmm(self.bias, x, self.weight.reshape(6, 4).t())
        return (y @ z.t()) @ x  # 3 x 6 by 6 x 3, 3 x 3 by 3 x 4


def test_figures_are_half_of_those_of_torch() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(12 * 12, 5),
        nn.GRU(5, 3),
    ).eval()
    x = torch.ones(2, 4, 8, 8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        net(x)
    macs = count_macs(net, x)
    assert 2 * (macs.conv + macs.linear + macs.products) == counter.get_total_flops()


def test_products_with_a_parameter_are_linear_and_others_are_told_apart() -> None:
    assert count_macs(Products(), "3x4") == (0, 2 * 3 * 4 * 6, 3 * 6 * 3 + 3 * 3 * 4, ())


@pytest.mark.parametrize("training", [True, False])
def test_attention_counts_its_projections_as_linear_also_on_its_fast_path(training: bool) -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    tokens = torch.ones(3, 5, 8)
    counted = count_macs(net, (tokens, tokens, tokens))
    assert counted.linear == 3 * 5 * 8 * (3 * 8 + 8)
    assert counted.products == 3 * 2 * (5 * 5 * 4 + 5 * 5 * 4)
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_counts_its_scores_and_their_mixtures() -> None:
    class Attends(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value)

    given = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 7, 4), torch.ones(2, 3, 7, 6)
    assert count_macs(Attends(), given).products == 2 * 3 * 5 * 7 * (4 + 6)


@pytest.mark.slow
def test_profile_reports_convolutions_and_linear_layers_of_one_forward() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    expected = 4 * 6 * 6 * 9 + 4 * 6 * 6 * 5
    assert measure(net, "1x1x8x8").macs == expected
    assert measure(net, "1x1x8x8", "infer", estimate=True).macs == expected


@pytest.mark.slow
def test_a_model_that_looks_at_values_is_counted_on_real_tensors() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    net = Looks()
    assert count_macs(net, torch.ones(1, 4)).weights == 16
    assert count_macs(net, -torch.ones(1, 4)).weights == 0


def test_counting_leaves_mode_and_random_state() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    state = torch.get_rng_state()
    count_macs(net, "1x2")
    assert net.training
    assert net[0].training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_errors_are_told() -> None:
    with pytest.raises(InputError, match="cannot read input shape"):
        count_macs(nn.Linear(2, 2), "2by2")
    with pytest.raises(MeasureError, match="Linear did not get through a forward pass on 1x3"):
        count_macs(nn.Linear(2, 2), "1x3")
