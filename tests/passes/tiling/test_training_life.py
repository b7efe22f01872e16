"""What people do around a step that trains by tiles: right as on the whole volume, or refused."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from pocketize import rewrite
from pocketize.errors import ExecutionError
from pocketize.passes import Patchwise
from pocketize.passes.shared.forwards import wrapping
from pocketize.passes.tiling.exact import ExactForward
from tests.passes.tiling.nets import double

#: What torch itself imports for its dual tensors is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

Act = Callable[[nn.Module, Tensor], Any]


class Net(nn.Module):
    """Two outputs, the first of which the second is made of; statistics, weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4, affine=True)
        self.middle, self.last = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.middle(F.leaky_relu(self.norm(self.first(x))) * self.scale)
        return y, self.last(F.silu(y))


def _nets() -> tuple[nn.Module, nn.Module, Tensor]:
    return copy.deepcopy(_made())


@functools.cache
def _made() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net().double(), double(1, 1, 12, 14)
    return model, rewrite(model, Patchwise(size=5, train=True, progress=False), inputs=x), x


def _gradients(model: nn.Module, loss: Tensor, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    y, z = model(x)
    loss: Tensor = y.square().mean() + z.softmax(1)[:, 0].mean()
    return loss


def _flat(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for each in found:
            yield from _flat(each)


def _same(act: Act) -> None:
    model, tiled, x = _nets()
    pairs = zip(_flat(act(model, x.clone())), _flat(act(tiled, x.clone())), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10), (a - b).abs().max()


# -- written between forward and backward ---------------------------------------------------------


def _scaled(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5)


WRITES: dict[str, tuple[Callable[[Any, Tensor, tuple[Tensor, ...]], Any], str]] = {
    "weight": (lambda net, x, out: _scaled(net.last.weight), r"last\.weight was written"),
    "buffer": (lambda net, x, out: _scaled(net.scale), "scale was written"),
    "input": (lambda net, x, out: _scaled(x), "input 0 was written"),
    "output that is read again": (lambda net, x, out: out[0].tanh_(), "output 0 was written"),
    "loaded": (lambda net, x, out: net.load_state_dict(net.state_dict()), "weight was written"),
    "data": (lambda net, x, out: setattr(net.first.weight, "data", torch.ones(4, 1, 3, 3)), "or"),
    "step": (
        lambda net, x, out: torch.optim.SGD(_with_gradients(net), lr=0.1).step(),
        "weight was written",
    ),
}


def _with_gradients(net: nn.Module) -> list[nn.Parameter]:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return list(net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_what_is_computed_from_again_must_not_be_written_before_the_backward(name: str) -> None:
    write, words = WRITES[name]
    _, tiled, x = _nets()
    out = tiled(x)
    loss = out[1].square().sum()
    write(tiled, x, out)
    with pytest.raises(ExecutionError, match=rf"^patchwise: .*{words}"):
        loss.backward()


@pytest.mark.slow
def test_running_statistics_that_forwards_update_are_nobodys_write() -> None:
    def act(model: nn.Module, x: Tensor) -> Any:
        first, second = model(x), model(x * 2)
        return _gradients(model, (first.sum() * second).square().mean())

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1)
    ).double()
    x = double(2, 1, 12, 12)
    tiled = rewrite(model, Patchwise(size=5, train=True, progress=False), inputs=x)
    for a, b in zip(act(model, x), act(tiled, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


# -- right ----------------------------------------------------------------------------------------


def _written_output(model: nn.Module, x: Tensor) -> Any:
    _, z = model(x)
    return _gradients(model, z.sigmoid_().square().sum()), z


def _two_forwards(model: nn.Module, x: Tensor) -> Any:
    a, b = model(x), model(x * 2)
    return _gradients(model, (a[1] * b[0].sum()).sum())


def _twice_through_one_graph(model: nn.Module, x: Tensor) -> Any:
    y, z = model(x)
    first = _gradients(model, z.square().sum(), retain_graph=True)
    return first, _gradients(model, (y * y).sum(), allow_unused=True)[:4]


def _some_gradients(model: Any, x: Tensor) -> Any:
    return torch.autograd.grad(_loss(model, x), [model.norm.weight, model.first.bias])


def _modes_toggled(model: nn.Module, x: Tensor) -> Any:
    loss = _loss(model, x)
    model.eval()
    return _gradients(model, loss)


def _hooks_on_weights(model: Any, x: Tensor) -> Any:
    handle = model.first.weight.register_hook(lambda gradient: gradient * 0.1)
    _loss(model, x).backward()
    handle.remove()
    return [p.grad for p in model.parameters()]


def _steps_in_the_backward(model: nn.Module, x: Tensor) -> Any:
    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(2):
        _loss(model, x).backward()
    return list(model.parameters())


def _other_weights(model: nn.Module, x: Tensor) -> Any:
    factor = torch.tensor(1.1, dtype=x.dtype, requires_grad=True)
    given = {name: p * factor for name, p in model.named_parameters()}
    y, z = torch.func.functional_call(model, given, (x,))
    return torch.autograd.grad(y.sum() + z.square().sum(), [factor, *model.parameters()])


def _another_activation(model: Any, x: Tensor) -> Any:
    before = _gradients(model, _loss(model, x))
    model.norm = nn.InstanceNorm2d(4, eps=0.1).to(x)
    model.middle.weight = nn.Parameter(model.middle.weight.detach() * 2)
    return before, _gradients(model, _loss(model, x))


def _unfrozen(model: Any, x: Tensor) -> Any:
    model.first.requires_grad_(False)
    model(x)
    model.first.requires_grad_()
    return _gradients(model, _loss(model, x))


def _graph_that_is_not_differentiated(model: nn.Module, x: Tensor) -> Any:
    return _gradients(model, _loss(model, x), create_graph=True)


def _inference_written_with_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        _, z = model.eval()(x)
    factor = torch.ones((), dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(z.mul_(factor).sum(), factor)


def _transformed_inference(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        batched = torch.func.vmap(model.eval())(torch.stack([x, x * 2]))
        with forward_ad.dual_level():
            _, z = model(forward_ad.make_dual(x, x.cos()))
            return batched, forward_ad.unpack_dual(z).tangent


@pytest.mark.slow
@pytest.mark.parametrize(
    "act",
    [
        _written_output,
        _two_forwards,
        _twice_through_one_graph,
        _some_gradients,
        _modes_toggled,
        _hooks_on_weights,
        _steps_in_the_backward,
        _other_weights,
        _another_activation,
        _unfrozen,
        _graph_that_is_not_differentiated,
        _inference_written_with_gradients,
        _transformed_inference,
    ],
)
def test_as_on_the_whole_volume(act: Act) -> None:
    _same(act)


@pytest.mark.slow
def test_weights_that_are_untied_between_two_calls_are_two() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(layer, nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1)).double()
    model[2].weight = layer.weight
    x = double(1, 2, 8, 9)
    tiled = rewrite(model, Patchwise(size=4, train=True, progress=False), inputs=x)
    for _ in range(2):
        found = []
        for net in (model, tiled):
            net.zero_grad(set_to_none=True)
            net(x).square().sum().backward()
            found.append([p.grad for p in net.parameters()])
        for a, b in zip(*found, strict=True):
            assert a is not None
            assert b is not None
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
        weight = layer.weight.detach().flip(0)
        for net in (model, tiled):
            net[2].weight = nn.Parameter(weight.clone())  # type: ignore[index]


# -- refused --------------------------------------------------------------------------------------


def _gradient_penalty(model: nn.Module, x: Tensor) -> Any:
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[1].sum(), x, create_graph=True)
    return _gradients(model, gradient.square().sum(), allow_unused=True)


def _gradient_of_a_function(model: nn.Module, x: Tensor) -> Any:
    return torch.func.grad(lambda given: model(given)[1].square().sum())(x)


def _forward_mode(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, x))


def _hook_after_a_step(model: Any, x: Tensor) -> Any:
    model(x)
    model.middle.register_forward_hook(lambda module, inputs, output: output * 2)
    model(x)


def _backward_hook_after_a_step(model: Any, x: Tensor) -> Any:
    model(x)
    model.middle.register_full_backward_hook(lambda module, inner, outer: None)
    model(x)


def _hook_on_all_modules(model: Any, x: Tensor) -> Any:
    model(x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        model(x)
    finally:
        handle.remove()


def _gradients_in_a_batch(model: Any, x: Tensor) -> Any:
    y, _ = model(x)
    both = torch.stack([torch.ones_like(y), torch.zeros_like(y)])
    torch.autograd.grad(y, model.first.weight, both, is_grads_batched=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_gradient_penalty, "cannot be differentiated again"),
        (_gradient_of_a_function, "function transform"),
        (_forward_mode, "forward-mode AD"),
        (_hook_after_a_step, "middle has a forward hook"),
        (_hook_on_all_modules, "every module has a forward hook"),
        (_gradients_in_a_batch, "one gradient at a time"),
        (_backward_hook_after_a_step, "middle has a backward hook"),
    ],
)
def test_what_does_not_go_by_tiles_is_refused_in_the_passs_name(act: Act, words: str) -> None:
    _, tiled, x = _nets()
    with pytest.raises(ExecutionError, match=rf"^patchwise: .*{words}"):
        act(tiled, x)


@pytest.mark.slow
def test_forwards_leave_nothing_behind_with_or_without_a_backward() -> None:
    _, tiled, x = _nets()
    counts = []
    for step in range(6):
        _loss(tiled, x) if step < 3 else _loss(tiled, x).backward()
        tiled.zero_grad(set_to_none=True)
        gc.collect()  # cycles of the plan
        counts.append(sum(1 for o in gc.get_objects() if type(o) is Tensor))
    assert counts[2] == counts[1]
    assert counts[5] == counts[4]


class _Settings:
    """What modules hold besides numbers and tensors, such as einops' layers their recipes."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("train", [False, True])
def test_attributes_of_attributes_do_not_cost_a_trace_each_time(train: bool) -> None:
    _, made, x = _nets()
    made.settings = {3: _Settings(_Settings(({"axes": [0]},))), "name": _Settings(None)}
    made.train(train)
    forward = wrapping(made, ExactForward)
    for _ in range(3):
        with torch.set_grad_enabled(train):
            made(x)
    assert len(forward._prepared) == 1
    made.settings[3].value.value = 2
    with torch.set_grad_enabled(train):
        made(x)
    assert len(forward._prepared) == 2  # a forward may have read it
