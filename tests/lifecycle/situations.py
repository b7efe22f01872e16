"""What people do around a forward. Each situation is a function of a network and of ``disturb``.

It runs the network and returns tensors: gradients, outputs, buffers. With ``disturb=False`` it
leaves out what is its point (the write between forward and backward): where torch refuses the
untouched network, the result without the disturbance is what may be right all the same.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from tests.lifecycle.networks import volume

__all__ = ["SITUATIONS", "Situation", "Tagged", "live_tensors"]

Run = Callable[[nn.Module, bool], list[Tensor]]


@dataclass(frozen=True)
class Situation:
    """One thing that people do.

    Attributes:
        title: its row in ``docs/situations.md``.
        run: does it.
        training: the mode that the network is in when it begins.
        variant: of the network, see :class:`~tests.lifecycle.networks.LifeNet`.
    """

    title: str
    run: Run
    training: bool = True
    variant: str = ""


SITUATIONS: dict[str, Situation] = {}


def situation(title: str, **more: Any) -> Callable[[Run], Run]:
    """Register a function as a situation; ``more`` are fields of :class:`Situation`."""

    def register(run: Run) -> Run:
        SITUATIONS[run.__name__] = Situation(title, run, **more)
        return run

    return register


def gradients(loss: Tensor, net: nn.Module, *more: Tensor) -> list[Tensor]:
    """Return the gradients of parameters that require them, and of further tensors."""
    asked = [p for p in net.parameters() if p.requires_grad] + list(more)
    found = torch.autograd.grad(loss, asked, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(asked, found, strict=True)]


def loss_of(output: Tensor) -> Tensor:
    """Return a loss whose gradient differs from voxel to voxel."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return (output.square() + weights * output).sum()


def buffers(net: nn.Module) -> list[Tensor]:
    """Return copies of the buffers."""
    return [b.detach().clone() for b in net.buffers()]


def step(net: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """Return gradients and buffers after one forward and backward."""
    return gradients(loss_of(net(volume() if x is None else x)), net) + buffers(net)


# --- plain use


@situation("a training step; one in evaluation mode; forwards without gradients between")
def steps_of_all_kinds(net: nn.Module, disturb: bool) -> list[Tensor]:
    found = step(net)
    net.eval()
    with torch.no_grad():
        found.append(net(volume()))
    found += step(net)
    net.train()
    with torch.inference_mode():
        found.append(net(volume()).clone())
    return found + step(net)


@situation("two forwards, then one backward")
def two_forwards(net: nn.Module, disturb: bool) -> list[Tensor]:
    loss = loss_of(net(volume())) + loss_of(net(2 * volume()))
    return gradients(loss, net) + buffers(net)


@situation("gradients accumulate over several steps")
def accumulated(net: nn.Module, disturb: bool) -> list[Tensor]:
    for scale in (1, 2, 3):
        loss_of(net(scale * volume())).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in net.parameters() if p.grad is not None]


@situation("gradients of the input, of a second input, of some parameters only")
def partial_gradients(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume().requires_grad_()
    condition = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    found = gradients(loss_of(net(x, condition)), net, x, condition)
    x = volume().requires_grad_()
    found += torch.autograd.grad(loss_of(net(x)), [x, net.get_parameter("deep.0.weight")])
    net.requires_grad_(False)
    net.get_parameter("head.weight").requires_grad_()
    found += gradients(loss_of(net(volume())), net)
    net.requires_grad_(False)
    return found + gradients(loss_of(net(x)), net, x)


@situation("an optimizer steps within backward (`register_post_accumulate_grad_hook`)")
def optimizer_in_backward(net: nn.Module, disturb: bool) -> list[Tensor]:
    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(1e-3 * parameter.grad)
        parameter.grad = None

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        loss_of(net(volume())).backward()  # type: ignore[no-untyped-call]
    return [p.detach() for p in net.parameters()] + buffers(net)


@situation("backward through the same graph twice (`retain_graph=True`)")
def retained(net: nn.Module, disturb: bool) -> list[Tensor]:
    loss = loss_of(net(volume()))
    wanted = list(net.parameters())
    found = list(torch.autograd.grad(loss, wanted, retain_graph=disturb))
    return found + (list(torch.autograd.grad(loss, wanted)) if disturb else found)


# --- written between forward and backward


def _written(net: nn.Module, disturb: bool, write: Callable[[], None]) -> list[Tensor]:
    loss = loss_of(net(volume()))
    if disturb:
        write()
    return gradients(loss, net)


def _scale(*tensors: Tensor) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(1.5)


for _name in (
    *("down.0.weight", "down.0.bias", "down.1.weight", "deep.0.weight", "deep.1.weight"),
    *("deep.1.bias", "deep.3.weight", "deep.4.bias", "join.0.weight", "join.1.weight"),
    *("head.weight", "head.bias"),
):

    def _one(net: nn.Module, disturb: bool, name: str = _name) -> list[Tensor]:
        return _written(net, disturb, lambda: _scale(net.get_parameter(name)))

    _one.__name__ = f"written_{_name}"
    situation("one parameter is written between forward and backward")(_one)


@situation("the optimizer steps between forward and backward")
def optimizer_step_between(net: nn.Module, disturb: bool) -> list[Tensor]:
    step(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return _written(net, disturb, lambda: optimizer.step() and None)


@situation("weights are loaded between forward and backward (`load_state_dict`)")
def loaded_between(net: nn.Module, disturb: bool) -> list[Tensor]:
    other = {name: 1.5 * t if t.is_floating_point() else t for name, t in net.state_dict().items()}
    return _written(net, disturb, lambda: net.load_state_dict(other) and None)


@situation("a parameter's `.data` is replaced between forward and backward")
def data_replaced(net: nn.Module, disturb: bool) -> list[Tensor]:
    def swap() -> None:
        for parameter in net.parameters():
            parameter.data = 1.5 * parameter.data

    return _written(net, disturb, swap)


@situation("a parameter is replaced by another between forward and backward")
def parameter_replaced(net: nn.Module, disturb: bool) -> list[Tensor]:
    old = list(net.parameters())
    loss = loss_of(net(volume()))
    for module in net.modules() if disturb else ():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(1.5 * parameter.detach()))
    return list(torch.autograd.grad(loss, old))


@situation("buffers are written between forward and backward, in evaluation mode", training=False)
def buffers_written(net: nn.Module, disturb: bool) -> list[Tensor]:
    floats = [b for b in net.buffers() if b.is_floating_point()]
    return _written(net, disturb, lambda: _scale(*floats))


@situation("the input is written between forward and backward")
def input_written(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume()
    loss = loss_of(net(x))
    if disturb:
        _scale(x)
    return gradients(loss, net)


@situation("the output is written in place (`logits.sigmoid_()`)")
def output_written(net: nn.Module, disturb: bool) -> list[Tensor]:
    return gradients(loss_of(net(volume()).sigmoid_()), net)


@situation("an intermediate tensor, kept by a hook, is written between forward and backward")
def intermediate_written(net: nn.Module, disturb: bool) -> list[Tensor]:
    kept: list[Tensor] = []
    handle = net.get_submodule("deep").register_forward_hook(lambda m, i, out: kept.append(out))
    loss = loss_of(net(volume()))
    handle.remove()
    if disturb:
        _scale(kept[0])
    return gradients(loss, net)


# --- switched between forward and backward


@situation("`eval()` between forward and backward; the modes stay as set")
def eval_between(net: nn.Module, disturb: bool) -> list[Tensor]:
    loss = loss_of(net(volume()))
    net.eval()
    found = gradients(loss, net) + buffers(net)
    assert not any(module.training for module in net.modules())
    return found


@situation("`train()` between forward and backward; the modes stay as set", training=False)
def train_between(net: nn.Module, disturb: bool) -> list[Tensor]:
    loss = loss_of(net(volume()))
    net.train()
    found = gradients(loss, net) + buffers(net)
    assert all(module.training for module in net.modules())
    return found


@situation("parameters are frozen between forward and backward")
def frozen_between(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume().requires_grad_()
    loss = loss_of(net(x))
    net.requires_grad_(False)
    found = torch.autograd.grad(loss, [x])
    net.requires_grad_()
    return list(found)


@situation("autocast or the default dtype is switched between forward and backward")
def settings_between(net: nn.Module, disturb: bool) -> list[Tensor]:
    loss = loss_of(net(volume()))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(loss, net)
    finally:
        torch.set_default_dtype(torch.float32)


@situation("backward runs inside `torch.no_grad()`, another thread, anomaly detection")
def backward_elsewhere(net: nn.Module, disturb: bool) -> list[Tensor]:
    wanted = list(net.parameters())
    loss = loss_of(net(volume()))
    with torch.no_grad():
        found = list(torch.autograd.grad(loss, wanted))
    loss = loss_of(net(volume()))
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, wanted)))
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is slow
        with torch.autograd.detect_anomaly():
            found += torch.autograd.grad(loss_of(net(volume())), wanted)
    return found


@situation("dropout: the same masks, and the same random state afterwards", variant="dropout")
def dropout(net: nn.Module, disturb: bool) -> list[Tensor]:
    torch.manual_seed(5)
    found = step(net)
    loss = loss_of(net(volume()))
    torch.manual_seed(6)  # between forward and backward
    found += gradients(loss, net)
    return [*found, torch.rand(3), *step(net)]


@situation("weights are written after the first of two backwards through one graph")
def written_after_backward(net: nn.Module, disturb: bool) -> list[Tensor]:
    loss = loss_of(net(volume()))
    wanted = list(net.parameters())
    first = list(torch.autograd.grad(loss, wanted, retain_graph=True))
    if disturb:
        _scale(*wanted)
    return first + list(torch.autograd.grad(loss, wanted))


# --- hooks


@situation("forward hooks registered after the rewrite run, and change outputs")
def forward_hooks(net: nn.Module, disturb: bool) -> list[Tensor]:
    calls: list[str] = []

    def count(name: str) -> Any:
        return lambda module, inputs, output: calls.append(name)

    for name, module in net.named_modules():
        module.register_forward_hook(count(name))
    net.get_submodule("deep.3").register_forward_hook(lambda m, i, out: 2 * out)
    net.get_submodule("join.1").register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    found = step(net)
    return [*found, torch.tensor([calls.count(name) for name, _ in net.named_modules()])]


@situation("backward hooks registered after the rewrite run, and change gradients")
def backward_hooks(net: nn.Module, disturb: bool) -> list[Tensor]:
    calls: list[str] = []

    def hook(module: nn.Module, before: Any, after: Any) -> Any:
        calls.append("")
        return tuple(None if g is None else 2 * g for g in before)

    net.get_submodule("deep").register_full_backward_hook(hook)
    net.get_submodule("join.0").register_full_backward_hook(hook)
    return [*step(net), torch.tensor(len(calls))]


@situation("hooks for all modules (`register_module_forward_hook`) run")
def global_hooks(net: nn.Module, disturb: bool) -> list[Tensor]:
    calls: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: calls.append(type(module).__name__)
    )
    try:
        found = step(net)
    finally:
        hook.remove()
    return [*found, torch.tensor(len(calls))]


@situation("hooks on parameters change their gradients")
def parameter_hooks(net: nn.Module, disturb: bool) -> list[Tensor]:
    calls: list[str] = []
    for name, parameter in net.named_parameters():
        parameter.register_hook(lambda g, name=name: (calls.append(name), 2 * g)[1])
    loss_of(net(volume())).backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in net.parameters() if p.grad is not None]
    return [*found, torch.tensor(len(calls))]


@situation("a module is replaced after the rewrite")
def module_replaced(net: nn.Module, disturb: bool) -> list[Tensor]:
    step(net)
    torch.manual_seed(1)
    net.get_submodule("deep")[3] = nn.Conv2d(6, 6, 1).double()
    net.head = nn.Conv2d(4, 2, 1).double()
    return step(net)


# --- higher derivatives and function transforms


@situation("second derivatives with `autograd.grad(..., create_graph=True)`")
def second_derivative(net: nn.Module, disturb: bool) -> list[Tensor]:
    x, wanted = volume().requires_grad_(), list(net.parameters())
    first = torch.autograd.grad(loss_of(net(x)), [x, *wanted], create_graph=True)
    return list(
        torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=False)
    )


@situation("a gradient penalty with `backward(create_graph=True)`")
def gradient_penalty(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume().requires_grad_()
    output = loss_of(net(x))
    (g,) = torch.autograd.grad(output, [x], create_graph=True)
    ((g.norm() - 1) ** 2 + output).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in net.parameters() if p.grad is not None]


@situation("`create_graph=True`, and the graph is not used")
def graph_created(net: nn.Module, disturb: bool) -> list[Tensor]:
    x, wanted = volume().requires_grad_(), list(net.parameters())
    found = torch.autograd.grad(loss_of(net(x)), [x, *wanted], create_graph=True)
    return [g.detach() for g in found]


def _other_weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: (1.1 * p.detach()).requires_grad_() for n, p in net.named_parameters()}


@situation("`torch.func.functional_call` with other weights")
def called_with_weights(net: nn.Module, disturb: bool) -> list[Tensor]:
    given = _other_weights(net)
    loss = loss_of(functional_call(net, given, (volume(),)))
    return list(torch.autograd.grad(loss, list(given.values()))) + buffers(net)


@situation("MAML: a step through updated weights (`functional_call`, `create_graph=True`)")
def maml(net: nn.Module, disturb: bool) -> list[Tensor]:
    given = dict(net.named_parameters())
    inner = torch.autograd.grad(loss_of(net(volume())), list(given.values()), create_graph=True)
    fast = {n: p - 1e-3 * g for (n, p), g in zip(given.items(), inner, strict=True)}
    outer = loss_of(functional_call(net, fast, (2 * volume(),)))
    return list(torch.autograd.grad(outer, list(given.values())))


@situation("`torch.func.grad` and `jacrev`", training=False)
def function_gradient(net: nn.Module, disturb: bool) -> list[Tensor]:
    weights = {n: p.detach() for n, p in net.named_parameters()}
    found = grad(lambda w: loss_of(functional_call(net, w, (volume(),))))(weights)
    x = volume(1)
    return [*found.values(), jacrev(lambda t: net(t).sum(dim=(2, 3)))(x)]


@situation("per-sample gradients (`vmap(grad(...))`)", training=False)
def per_sample(net: nn.Module, disturb: bool) -> list[Tensor]:
    weights = {n: p.detach() for n, p in net.named_parameters()}

    def loss(w: dict[str, Tensor], sample: Tensor) -> Tensor:
        return loss_of(functional_call(net, w, (sample[None],)))

    return list(vmap(grad(loss), (None, 0))(weights, volume()).values())


@situation("forward-mode derivatives (`jvp`, dual tensors)", training=False)
def forward_mode(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume()
    found = list(jvp(net, (x,), (x.flip(-1),)))
    with fwAD.dual_level():
        dual = net(fwAD.make_dual(x, x.flip(-1)))
        found += [t.detach().clone() for t in fwAD.unpack_dual(dual) if t is not None]
    with torch.no_grad(), fwAD.dual_level():
        dual = net(fwAD.make_dual(x, x.flip(-1)))
        found += [t.detach().clone() for t in fwAD.unpack_dual(dual) if t is not None]
    return found


@situation("Hessians (`torch.autograd.functional.hvp`, `torch.func.hessian`)", training=False)
def hessians(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume(1)
    found = list(torch.autograd.functional.hvp(lambda t: loss_of(net(t)), x, x.flip(-1)))
    corner = torch.zeros(2, dtype=torch.float64)
    mask = torch.zeros_like(x)
    mask[0, 0, 3, 3] = 1
    return [*found, hessian(lambda c: loss_of(net(x + c[0] * mask + c[1] * mask.flip(1))))(corner)]


@situation("the caller forbids hooks on saved tensors (`disable_saved_tensors_hooks`)")
def hooks_disabled(net: nn.Module, disturb: bool) -> list[Tensor]:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        loss = loss_of(net(volume()))
    return gradients(loss, net)


# --- no backward


@situation("forwards without a backward, then a step; nothing stays in memory")
def lost_forwards(net: nn.Module, disturb: bool) -> list[Tensor]:
    step(net)
    counts = []
    for _ in range(3):
        for _ in range(2):
            net(volume())
        counts.append(live_tensors())
    assert counts[2] <= counts[1], f"live tensors grow: {counts}"
    return step(net)


def live_tensors() -> int:
    """Return how many tensors are alive."""
    gc.collect()
    return sum(issubclass(type(t), Tensor) for t in gc.get_objects())


class _Stop(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


def _interrupted(net: nn.Module, path: str, disturb: bool) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Stop

    handle = net.get_submodule(path).register_forward_pre_hook(stop) if disturb else None
    try:
        with contextlib.suppress(_Stop):
            net(volume())
    finally:
        if handle is not None:
            handle.remove()
    yield


@situation("an interrupt in the middle of a forward, then a step", training=False)
def interrupted_forward(net: nn.Module, disturb: bool) -> list[Tensor]:
    for path in ("down.1", "deep.2", "join.0", "head"):
        for _ in _interrupted(net, path, disturb):
            pass
    with torch.no_grad():
        found = [net(volume())]
    return found + step(net)


@situation("an interrupt in the middle of a backward, then a step", training=False)
def interrupted_backward(net: nn.Module, disturb: bool) -> list[Tensor]:
    def stop(grad: Tensor) -> None:
        raise RuntimeError("an interrupt")

    handle = net.get_parameter("deep.0.weight").register_hook(stop)
    with contextlib.suppress(RuntimeError):
        loss_of(net(volume())).backward()  # type: ignore[no-untyped-call]
    handle.remove()
    net.zero_grad()
    return step(net)


# --- inputs


@situation("an empty batch", variant="batch norms")
def empty_batch(net: nn.Module, disturb: bool) -> list[Tensor]:
    # batch norms in training refuse it without a rewrite, and instance norms in both modes
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    output = net(volume(0))
    return [output, *gradients(output.sum(), net)]


@situation("Inf and NaN in the input")
def not_finite(net: nn.Module, disturb: bool) -> list[Tensor]:
    net.eval()
    x = volume()
    x[0, 0, 3, 4], x[1, 1, 9, 12] = float("inf"), float("nan")
    with torch.no_grad():
        found = [net(x)]
    return found + step(net, x)


@situation("other sizes, dtypes and memory formats than those of the example")
def other_inputs(net: nn.Module, disturb: bool) -> list[Tensor]:
    found = step(net, torch.cat([volume(), volume()], dim=-1)[:1])
    found += step(net, volume().contiguous(memory_format=torch.channels_last))
    found += step(net, volume().transpose(2, 3))
    found += step(net, volume()[:, :, ::2, 2:14])
    net.float()
    found.append(net(volume().float()).double().round(decimals=2))
    net.double()
    return found


class Tagged(Tensor):
    """A tensor that carries a tag, as image libraries' tensors carry their affine."""

    tag: str = ""

    @staticmethod
    def of(tensor: Tensor, tag: str) -> Tagged:
        """Return a tagged view of a tensor."""
        made = tensor.as_subclass(Tagged)
        made.tag = tag
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the tag on."""
        made = super().__torch_function__(func, types, args, kwargs or {})
        given = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        tags = [a.tag for a in given if isinstance(a, Tagged) and a.tag]
        if isinstance(made, Tagged) and tags:
            made.tag = tags[0]
        return made


@situation("a tensor subclass with metadata is returned with its metadata")
def subclass(net: nn.Module, disturb: bool) -> list[Tensor]:
    found = []
    for training in (True, False):
        net.train(training)
        output = net(Tagged.of(volume(), "mm"))
        assert type(output) is Tagged, f"{type(output).__name__} comes out"
        assert output.tag == "mm", "the tag is lost"
        found += gradients(loss_of(output.as_subclass(Tensor)), net)
    with torch.no_grad():
        output = net(Tagged.of(volume(), "mm"))
    assert type(output) is Tagged, f"{type(output).__name__} comes out without gradients"
    assert output.tag == "mm", "the tag is lost without gradients"
    return [*found, output.as_subclass(Tensor)]


# --- copies, compilation, regions, threads


@situation("copied and pickled after it has run")
def copied(net: nn.Module, disturb: bool) -> list[Tensor]:
    net.kept = [net(volume())]  # type: ignore[assignment]
    net.kept = [t.detach() for t in net.kept]  # type: ignore[assignment, union-attr]
    step(net)
    twin = copy.deepcopy(net)
    file = io.BytesIO()
    pickle.dump(net, file)
    file.seek(0)
    again = pickle.load(file)
    return step(twin) + step(again) + step(net)


@situation("inside a checkpoint of the caller (`torch.utils.checkpoint`)", training=False)
def in_a_checkpoint(net: nn.Module, disturb: bool) -> list[Tensor]:
    x = volume().requires_grad_()
    found = gradients(loss_of(checkpoint(net, x, use_reentrant=False)), net, x)
    x = volume().requires_grad_()
    loss_of(checkpoint(net, x, use_reentrant=True)).backward()  # type: ignore[no-untyped-call]
    found += [p.grad for p in net.parameters() if p.grad is not None]
    assert x.grad is not None
    return [*found, x.grad]


@situation("the caller has hooks on saved tensors (`save_on_cpu`)")
def in_saved_tensor_hooks(net: nn.Module, disturb: bool) -> list[Tensor]:
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(net(volume()))
    return gradients(loss, net)


@situation("inside an `autocast` region of the caller", training=False)
def in_autocast(net: nn.Module, disturb: bool) -> list[Tensor]:
    net.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = net(volume().float())
        found = gradients(output.float().square().sum(), net)
    # roundings differ in their order, so what can be compared is coarse
    return [output.isfinite(), *(g.isfinite() for g in found), torch.tensor(output.dtype.itemsize)]


@situation("forward and backward in two threads at once")
def two_threads(net: nn.Module, disturb: bool) -> list[Tensor]:
    net.eval()
    found: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        found[index] = gradients(loss_of(net((index + 1) * volume())), net)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [t for index in sorted(found) for t in found[index]]


@situation("compiled (`torch.compile`)")
def compiled(net: nn.Module, disturb: bool) -> list[Tensor]:
    torch._dynamo.reset()
    try:
        return step(torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    finally:
        torch._dynamo.reset()
