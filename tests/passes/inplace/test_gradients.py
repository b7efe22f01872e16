"""Gradients are those of the ordinary pair, whatever the norm, the activation and the values."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.examples import examples
from tests.passes.inplace.pairs import ACTIVATIONS, NORMS, Made, batch, in_place, pair, run, worst


def _some(norms: Iterable[str], activations: Iterable[str]) -> list[Any]:
    """All pairs; a quarter of them, with each norm and each activation, is fast."""
    return [
        pytest.param(norm, activation, marks=[pytest.mark.slow] if (i + j) % 4 else [])
        for i, norm in enumerate(norms)
        for j, activation in enumerate(activations)
    ]


@pytest.mark.parametrize(("norm", "activation"), _some(NORMS, ACTIVATIONS))
def test_gradcheck(norm: str, activation: str) -> None:
    _, net = pair(norm, activation, channels=2)
    net.eval() if norm == "instance-tracked" else net.train()
    x = batch(norm, 2, n=2).requires_grad_()
    parameters = dict(net.named_parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(parameters, values, strict=True))
        output: Tensor = torch.func.functional_call(net, given, (x,))
        return output

    assert "NormActivation" in _history(net(x))
    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def _history(output: Tensor) -> str:
    return output.grad_fn.name() if output.grad_fn is not None else ""


@pytest.mark.parametrize("norm", NORMS)
def test_output_gradients_and_running_statistics_are_those_of_the_pair(norm: str) -> None:
    for activation, train in itertools.product(ACTIVATIONS, (True, False)):
        plain, net = pair(norm, activation)
        plain.train(train)
        net.train(train)
        for seed in range(2):  # the second step starts from the statistics of the first
            x = batch(norm, seed=seed)
            weight = torch.randn(x.shape, dtype=x.dtype)
            expected, found = run(plain, x, weight), run(net, x, weight)
            assert worst(expected, found) < 1e-12, (activation, train)


@settings(max_examples=examples(25), deadline=None)
@given(
    norm=st.sampled_from(sorted(NORMS)),
    activation=st.sampled_from(["leaky", "elu", "prelu", "identity"]),
    channels=st.sampled_from([4, 8, 12]),
    samples=st.integers(2, 5),
    train=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_size_gives_the_gradients_of_the_pair(
    norm: str, activation: str, channels: int, samples: int, train: bool, seed: int
) -> None:
    plain, net = pair(norm, activation, channels)
    plain.train(train)
    net.train(train)
    x = batch(norm, channels, n=samples, seed=seed)
    weight = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-11


def _errors(plain: nn.Module, x: Tensor, weight: Tensor) -> tuple[list[float], list[float]]:
    """Errors of the pair and of the layer in place, in x's type, against the pair in float64.

    Relative to the largest value of each gradient.
    """
    truth = run(copy.deepcopy(plain).double(), x.double(), weight.double())
    pairs = (run(plain, x, weight), run(in_place(plain), x, weight))
    return tuple(_against(truth, made) for made in pairs)  # type: ignore[return-value]


def _against(truth: Made, made: Made) -> list[float]:
    return [
        float((a - b.double()).abs().max() / a.abs().max().clamp(min=1e-30))
        for a, b in zip(truth.gradients, made.gradients, strict=True)
    ]


@pytest.mark.parametrize("activation", ["leaky", "flat", "elu", "prelus", "identity"])
@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d"])
def test_float32_is_as_near_to_the_truth_as_the_pair_whatever_gamma_is(
    norm: str, activation: str
) -> None:
    gammas = (1.0, -1.0, 1e-2, 1e-4, 1e-12, -1e-12, 1e-35, 0.0)
    for gamma, beta in itertools.product(gammas, (0.0, 0.5, 30.0)):
        plain, _ = pair(norm, activation, dtype=torch.float32, gamma=gamma)
        layer = plain.get_submodule("0")
        assert isinstance(layer.bias, Tensor)
        with torch.no_grad():
            layer.bias.fill_(beta)
        x = batch(norm, dtype=torch.float32, n=8)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        expected, found = _errors(plain, x, weight)
        for own, error in zip(expected, found, strict=True):
            assert error <= max(2 * own, 1e-5), (gamma, beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["leaky", "elu", "identity"])
@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d"])
def test_sixteen_bits_are_as_near_to_the_truth_as_the_pair(
    norm: str, activation: str, dtype: torch.dtype
) -> None:
    for gamma in (1.0, -0.3, 1e-3, 0.0):
        plain, _ = pair(norm, activation, dtype=torch.float32, gamma=gamma)
        x = batch(norm, dtype=dtype, n=8)
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected, found = _errors(plain, x, weight)  # the parameters stay in float32
        for own, error in zip(expected, found, strict=True):
            assert error <= max(2 * own, torch.finfo(dtype).eps), gamma


def test_only_the_channels_that_cannot_be_undone_are_kept() -> None:
    plain, net = pair("batch-2d", channels=16, dtype=torch.float32)
    for module in (plain, net):
        with torch.no_grad():
            module.get_submodule("0").weight[3] = 0.0  # type: ignore[index, operator]
    x = batch("batch-2d", 16, dtype=torch.float32)
    output = copy.deepcopy(net)(x.requires_grad_())
    source, aside, index, *_ = output.grad_fn.saved_tensors
    assert source.data_ptr() == output.data_ptr()
    assert index.tolist() == [3]
    assert aside.numel() == x.numel() // 16
    weight = torch.randn(x.shape)
    assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-4


def test_a_layer_of_zeros_keeps_its_input_and_not_its_output() -> None:
    _, net = pair("batch-2d", channels=16, gamma=0.0)
    x = batch("batch-2d", 16).requires_grad_()
    output = net(x)
    source, aside, index, *_ = output.grad_fn.saved_tensors
    assert torch.equal(source, x)
    assert aside is None
    assert index is None


def test_a_gamma_that_becomes_small_in_training_is_noticed_in_that_very_step() -> None:
    plain, net = pair("instance-3d", dtype=torch.float32)
    x = batch("instance-3d", dtype=torch.float32)
    weight = torch.randn(x.shape)
    for gamma in (1.0, 1e-3, 1e-9, 0.0, 1e-9, -1.0):
        for module in (plain, net):
            with torch.no_grad():
                module.get_submodule("0").weight[1] = gamma  # type: ignore[index, operator]
        assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-4


@pytest.mark.parametrize("slopes", [(0.2, 0.0, 0.3, 0.4), (0.2, -0.5, 0.3, 1e-40), (0.0,), (-1.0,)])
@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d"])
def test_slopes_without_an_inverse_keep_their_channels(
    norm: str, slopes: tuple[float, ...]
) -> None:
    plain, net = pair(norm, "prelu" if len(slopes) == 1 else "prelus", dtype=torch.float32)
    for module in (plain, net):
        with torch.no_grad():
            module.get_parameter("1.weight").copy_(torch.tensor(slopes))
    x = batch(norm, dtype=torch.float32, n=8)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    truth = run(copy.deepcopy(plain).double(), x.double(), weight.double())
    expected, found = (_against(truth, run(module, x, weight)) for module in (plain, net))
    for own, error in zip(expected, found, strict=True):
        assert error <= max(2 * own, 1e-5)


@pytest.mark.parametrize("norm", ["batch-2d", "instance-3d", "group-1d"])
def test_tensors_larger_than_a_block_are_worked_on_piece_by_piece(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketize.passes.shared.norm_activation import FusedCall

    plain, net = pair(norm, channels=8)
    x = batch(norm, 8)
    weight = torch.randn(x.shape, dtype=x.dtype)
    whole = run(copy.deepcopy(net), x, weight)
    monkeypatch.setitem(FusedCall.blocks, "cpu", 16)
    assert worst(whole, run(copy.deepcopy(net), x, weight)) < 1e-13
    assert worst(run(plain, x, weight), run(net, x, weight)) < 1e-12
