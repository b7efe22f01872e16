"""The gradient of the whole volume's loss, from tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize._torch import TorchDispatchMode
from pocketize.graph.capture import capture, find_tensors
from pocketize.graph.inputs import as_inputs
from pocketize.memory.tracker import LiveTracker
from pocketize.passes.tiling.backward import TiledBackward
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.program import Program, build_program
from pocketize.passes.tiling.storage import Storage
from pocketize.passes.tiling.tiled_graph import TiledGraph
from tests.foreign import foreign_nets
from tests.passes.tiling.test_execution import LARGE, _Odd

NETS = {net.name: net for net in foreign_nets() if "slow" not in net.tags}


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """Every entry counts, and not all alike."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in outputs:
        weights = torch.arange(tensor.numel(), dtype=tensor.dtype).cos().reshape(tensor.shape)
        total = total + (tensor.square() * weights + tensor).double().mean()
    return total


def _whole(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    _loss(find_tensors(as_inputs(x, model).call(model))).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert x.grad is not None
    return found, x.grad


def _program(model: nn.Module, x: Tensor, tile: Sequence[int]) -> Program:
    return build_program(TiledGraph(capture(model, x)), tile)


def _tiled(
    model: nn.Module, x: Tensor, program: Program, place: str = "device"
) -> tuple[dict[str, Tensor], Tensor]:
    traced = program.graph.traced
    (node,) = [n for n in traced.graph.nodes if n.op == "placeholder"]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keeper = Storage(place, x.device)
    execution = Execution(
        program=program, tensors=tensors, inputs={node: x}, storage=keeper, retain=True
    )
    with torch.no_grad():
        made = execution.run()
    leaves = {n: made[n].detach().requires_grad_() for n in program.outputs}
    _loss([leaves[n] for n in traced.outputs()]).backward()
    gradients = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
    back = TiledBackward(execution, keeper)
    back.begin(gradients)
    back.differentiate(range(len(program.steps) - 1, -1, -1))
    (of_input,) = back.take_inputs([node])
    back.end()
    assert of_input is not None
    names = list(tensors)
    rows = zip(names, back.take_weights(names), strict=True)
    return {name: weight for name, weight in rows if weight is not None}, of_input


def _agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = max(1.0, float(gradient.abs().max()))
        assert (found[name] - gradient).abs().max() < 1e-9 * size, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_other_peoples_networks_have_the_whole_volumes_gradients(name: str) -> None:
    net = NETS[name]
    torch.manual_seed(0)
    model, x = net.build().double().eval(), net.inputs().double()
    # recorded first: some keep features of a call, with which they cannot be copied
    program = _program(model, x, (*x.shape[2:-1], -(-x.shape[-1] // 4)))
    expected, of_input = _whole(model, x)
    found, of_tiles = _tiled(model, x, program)
    _agree(found, expected)
    assert torch.allclose(of_tiles, of_input, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_gates_groups_and_outputs_of_several_sizes(place: str) -> None:
    torch.manual_seed(0)
    model, x = _Odd().double().eval(), torch.randn(2, 1, 19, 14, dtype=torch.float64)
    expected, of_input = _whole(model, x)
    found, of_tiles = _tiled(model, x, _program(model, x, (5, 6)), place)
    _agree(found, expected)
    assert torch.allclose(of_tiles, of_input, rtol=1e-9, atol=1e-11)


def test_frozen_weights_get_none() -> None:
    model = _Odd().double().eval()
    model.a.weight.requires_grad_(False)
    x = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    found, _ = _tiled(model, x, _program(model, x, (4, 12)))
    assert "a.weight" not in found
    assert "a.bias" in found


def _peak(run: Any, model: nn.Module, x: Tensor) -> int:
    held = list(model.parameters())
    tracker = LiveTracker(torch.device("cpu"), str)
    tracker.assign("parameters", held)
    tracker.assign("inputs", [x])
    with tracker:
        tracker.enter("forward")
        run()
    return tracker.finish().peak - sum(t.numel() * t.element_size() for t in held)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_four_slabs_train_in_less_than_half_of_the_whole_volumes_peak(name: str) -> None:
    model, x = LARGE[name]().eval(), torch.randn(1, 1, 16, 16, 128)
    program = _program(model, x, (16, 16, 32))  # whose tensors have no memory, but are counted
    tiled = _peak(lambda: _tiled(model, x, program, "disk"), model, x)
    whole = _peak(lambda: _whole(model, x), model, x)
    assert tiled < whole / 2, (tiled, whole)


def _convolved(ndim: int) -> nn.Module:
    """Each convolution's result is stored for a norm; padding, stride, groups and a bias."""
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if ndim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    return nn.Sequential(
        *(conv(1, 4, 3, padding=1), norm(4, affine=True), nn.ReLU()),
        *(conv(4, 4, 3, stride=2, padding=1, groups=2, bias=False), norm(4), nn.ReLU()),
        *(conv(4, 6, 3, padding=2, dilation=2), norm(6), conv(6, 2, 1)),
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_convolution_whose_result_waits_is_not_computed_again(
    ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = _convolved(ndim)
    x, tile = torch.randn(1, 1, *[12] * (ndim - 1), 24), [12] * (ndim - 1) + [5]
    program = _program(model, x, tile)
    with _Convolutions() as counted:
        found, of_input = _tiled(model, x, program)
    assert counted.forward == counted.backward > 4
    monkeypatch.setattr(TiledBackward, "_run_form", Execution._run_form)
    with _Convolutions() as counted:
        computed, of_same_input = _tiled(model, x, program)
    assert counted.forward == 2 * counted.backward
    assert found.keys() == computed.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(of_input, of_same_input)
    assert all(torch.equal(found[name], computed[name]) for name in found)


class _Convolutions(TorchDispatchMode):
    """Counts convolutions and their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))
