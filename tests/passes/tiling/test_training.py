"""Training through a forward by tiles, with autograd's own tools."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.errors import ExecutionError
from pocketize.graph.capture import capture
from pocketize.passes import Patchwise
from pocketize.passes.tiling.program import build_program
from pocketize.passes.tiling.storage import Storage
from pocketize.passes.tiling.tiled_graph import TiledGraph
from pocketize.passes.tiling.training import differentiable_forward
from tests.passes.tiling.test_execution import LARGE


def _by_tiles(model: nn.Module, x: Tensor, tile: tuple[int, ...], train: bool = False) -> Tensor:
    traced = capture(model, x.detach(), train=train)
    program = build_program(TiledGraph(traced), tile)
    (node,) = [n for n in traced.graph.nodes if n.op == "placeholder"]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    (made,) = differentiable_forward(
        program=program, tensors=tensors, inputs={node: x}, storage=Storage("host", x.device)
    ).values()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_few_steps_of_training_end_in_the_same_weights(name: str) -> None:
    torch.manual_seed(0)
    whole = LARGE[name]().double().eval()
    tiled = copy.deepcopy(whole)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, tiled)]
    for step in range(3):
        x = torch.randn(
            1, 1, 8, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        )
        for model, optimizer in zip((whole, tiled), optimizers, strict=True):
            y = model(x) if model is whole else _by_tiles(model, x, (8, 8, 8))
            optimizer.zero_grad()
            (y.softmax(1)[:, 0].mean() + y.square().mean()).backward()
            optimizer.step()
    for (key, a), b in zip(whole.named_parameters(), tiled.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), key


def test_what_comes_before_and_after_is_differentiated_too() -> None:
    torch.manual_seed(0)
    model = LARGE["DynUNet"]().double().eval()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 1, 8, 8, 16, dtype=torch.float64)
    found = []
    for by_tiles in (False, True):
        inner = x * scale
        y = _by_tiles(model, inner, (8, 8, 4)) if by_tiles else model(inner)
        (gradient,) = torch.autograd.grad(y.square().sum(), [scale])
        found.append(gradient)
    assert torch.allclose(found[0], found[1], rtol=1e-10)


def test_a_second_backward_needs_the_graph_that_the_first_may_keep() -> None:
    y = _by_tiles(LARGE["UNet"]().eval(), torch.randn(1, 1, 8, 8, 16), (8, 8, 8)).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(ExecutionError, match=r"^patchwise: .* has run, .* say retain_graph=True"):
        y.backward()


def test_batch_norms_without_running_statistics_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, padding=1),
    ).double()
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    _by_tiles(model, x, (4, 12), train=True).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-11)


# -- as a pass -----------------------------------------------------------------------------------


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(x)
    (y.softmax(1)[:, 0].mean() + y.square().mean()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SegResNet", "PlainConvUNet"])
def test_a_rewritten_model_in_training_mode_has_the_whole_volumes_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = LARGE[name]().double().train()
    x = torch.randn(1, 1, 8, 8, 32, dtype=torch.float64)
    tiled = rewrite(model, Patchwise(size=8, train=True, keep="disk"), inputs=x)
    assert tiled.training
    expected, found = _gradients(model, x), _gradients(tiled, x)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        size = max(1.0, float(gradient.abs().max()))
        assert (found[key] - gradient).abs().max() < 1e-9 * size, key


@pytest.mark.slow
def test_without_the_option_the_volume_trains_whole() -> None:
    model = LARGE["DynUNet"]().train()
    x = torch.randn(1, 1, 8, 8, 16)
    tiled = rewrite(model, Patchwise(size=8), inputs=x)
    y = tiled(x)
    assert "_TiledFunction" not in type(y.grad_fn).__name__
    assert (
        "_TiledFunction"
        in type(rewrite(model, Patchwise(size=8, train=True), inputs=x)(x).grad_fn).__name__
    )


@pytest.mark.slow
def test_under_autocast_the_gradients_are_as_near_to_float32_as_autocasts_own() -> None:
    torch.manual_seed(0)
    model = DynUNet(2, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]).train()
    x = torch.randn(1, 1, 32, 64)
    tiled = rewrite(model, Patchwise(size=16, train=True), inputs=x)
    exact = _gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == tiled(x).dtype
        whole, by_tiles = _gradients(model, x), _gradients(tiled, x)

    def distance(found: dict[str, Tensor]) -> float:
        return sum(float((found[key] - exact[key]).square().sum()) for key in exact) ** 0.5

    assert 0 < distance(by_tiles) < 2 * distance(whole)
