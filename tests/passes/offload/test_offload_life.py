"""Offloading when weights or inputs change, when a backward never comes, under transforms."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize.engine.surgery import apply_edits
from pocketize.errors import ExecutionError
from pocketize.graph.clone import clone
from pocketize.passes import Offload
from pocketize.plugin.edits import Convert
from tests.passes.shared.uses import function_transforms

X = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pair(min_bytes: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Sigmoid()
    ).double()
    made = clone(model)
    apply_edits(made, [Convert("", Offload.name, {"min_bytes": min_bytes, "to": "disk"})])
    return model, made


def test_files_are_closed_after_the_backward_pass_and_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = []

    def counted(**options: Any) -> Any:
        files.append(real(**options))
        return files[-1]

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    _, model = pair(1)
    loss(model).backward()
    assert len(files) > 2
    assert all(file.closed for file in files)
    dropped = loss(model)
    assert not all(file.closed for file in files)
    del dropped
    assert all(file.closed for file in files)


#: All tensors that may be moved are, some are, none is.
SIZES = pytest.mark.parametrize("min_bytes", [1, 2_000, 1_000_000])


def loss(model: nn.Module, scale: float = 1.0) -> Tensor:
    return model(X * scale).square().mean()


def both(min_bytes: int, use: Callable[[Any], Any]) -> None:
    results = []
    for model in pair(min_bytes):
        told = use(model)
        gradients = [p.grad for p in model.parameters()]
        results.append([told, *gradients, *model.parameters(), *model.buffers()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def write(model: Any) -> None:
    with torch.no_grad():
        model[3].weight.mul_(1.5)


def step(model: Any) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load(model: Any) -> None:
    model[3].load_state_dict({name: 2 * t for name, t in model[3].state_dict().items()})


@SIZES
@pytest.mark.parametrize("change", [write, step, load])
def test_weights_written_in_between_are_told_by_name(change: Any, min_bytes: int):
    _, model = pair(min_bytes)
    value = loss(model)
    value.backward(retain_graph=True)
    change(model)
    with pytest.raises(ExecutionError, match=r"^offload: parameter '3.weight'.*was written to"):
        value.backward()


@SIZES
def test_inputs_written_in_between_are_told(min_bytes: int):
    _, model = pair(min_bytes)
    x = X.clone()
    value = model(x).square().mean()
    x.mul_(2)
    with pytest.raises(ExecutionError, match=r"^offload: a tensor of shape \(2, 1, 8, 8\)"):
        value.backward()


@SIZES
def test_outputs_written_in_between_are_told_where_they_were_not_moved(min_bytes: int):
    model, made = pair(min_bytes)
    out = made(X)
    total = out.sum()
    with torch.no_grad():
        out.mul_(2)
    if min_bytes == 1:  # what was moved is what it was, and its gradients are right
        total.backward()
        model(X).sum().backward()
        for a, b in zip(model.parameters(), made.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    else:
        with pytest.raises(ExecutionError, match=r"^offload: a tensor of shape"):
            total.backward()


@SIZES
def test_what_is_legal_in_between_gives_the_same_numbers(min_bytes: int):
    def use(model: Any) -> Any:
        value = loss(model) + loss(model, 2.0)
        with torch.no_grad():
            model[0].bias.add_(1)  # which no gradient needs
        model[3].weight = nn.Parameter(2 * model[3].weight.detach())
        model.eval()
        value.backward()
        return [module.training for module in model]

    both(min_bytes, use)


@SIZES
def test_an_optimizer_in_backward(min_bytes: int):
    def use(model: Any) -> None:
        def update(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter.sub_(0.5 * parameter.grad)  # type: ignore[operator]
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            loss(model).backward()

    both(min_bytes, use)


@SIZES
def test_weights_passed_in_second_derivatives_and_an_empty_batch(min_bytes: int):
    def use(model: Any) -> Any:
        given = {n: (p.detach() * 1.1).requires_grad_() for n, p in model.named_parameters()}
        torch.func.functional_call(model, given, (X,)).square().sum().backward()
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        first.square().sum().backward()
        none = torch.empty(0, 1, 8, 8, dtype=torch.float64, requires_grad=True)
        model(none).sum().backward()
        return [tensor.grad for tensor in given.values()], first, x.grad, none.grad

    both(min_bytes, use)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # by torch, for jvp
@SIZES
def test_function_transforms_and_dual_numbers(min_bytes: int):
    both(min_bytes, lambda model: function_transforms(model, X))


@pytest.mark.slow
@SIZES
def test_forwards_without_a_backward_are_freed(min_bytes: int):
    _, model = pair(min_bytes)

    def fail(*_: Any) -> None:
        raise ValueError

    counts = []
    for _ in range(3):
        kept = model(X)
        copy.deepcopy(model)
        handle = model[4].register_forward_hook(fail)
        with pytest.raises(ValueError):  # noqa: PT011
            model(X)
        handle.remove()
        del kept
        gc.collect()
        counts.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
    assert counts[2] == counts[1]


def test_a_folder_without_space_is_told(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    _, model = pair(1)
    monkeypatch.setattr("pocketize.passes.offload.offload._write", full)
    with pytest.raises(ExecutionError, match=r"^offload: .*No space left on device.*folder"):
        model(X)
