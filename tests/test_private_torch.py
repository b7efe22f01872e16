"""Private torch is reached through ``pocketize._torch`` alone, and each function there works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pocketize._torch import (
    global_forward_hooks,
    in_autograd_function,
    innermost_saving,
    keeps_graph,
    real_tensors,
    storage_key,
    transforms_active,
    version_of,
)


def test_a_write_raises_a_tensors_version_and_inference_tensors_have_none() -> None:
    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


def test_views_share_the_key_of_their_storage_and_other_tensors_have_another() -> None:
    tensor = torch.zeros(4)
    assert storage_key(tensor) == storage_key(tensor[1:]) == storage_key(tensor.untyped_storage())
    assert storage_key(tensor) != storage_key(torch.zeros(4))


def test_real_tensors_are_made_within_a_fake_mode() -> None:
    with FakeTensorMode():
        assert isinstance(torch.zeros(2), FakeTensor)
        with real_tensors():
            assert torch.arange(3).tolist() == [0, 1, 2]
        assert isinstance(torch.zeros(2), FakeTensor)


def test_function_transforms_are_seen() -> None:
    seen = []
    torch.func.grad(lambda x: (seen.append(transforms_active()), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert not transforms_active()
    with torch.autograd.forward_ad.dual_level():
        assert transforms_active()
    assert not transforms_active()


class _Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[bool]) -> torch.Tensor:
        seen.append(in_autograd_function())
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _New(_Old):
    @staticmethod
    def forward(x: torch.Tensor, seen: list[bool]) -> torch.Tensor:  # type: ignore[override]
        seen.append(in_autograd_function())
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None


def test_the_forward_of_an_autograd_function_is_told_from_code_without_gradients() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    for function in (_Old, _New):
        function.apply(x, seen).sum().backward()
        with torch.no_grad():
            function.apply(x, seen)
    assert seen == [True] * 4
    assert not in_autograd_function()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not in_autograd_function()


def test_where_torch_does_not_tell_no_autograd_function_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch._C, "_is_fwd_grad_enabled")
    seen: list[bool] = []
    _Old.apply(torch.ones(2), seen)
    assert seen == [False]


def test_a_backward_pass_tells_whether_it_keeps_its_graph() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = (x * 2).sum()
    x.register_hook(lambda _: seen.append(keeps_graph()))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_where_torch_does_not_tell_no_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append(keeps_graph()))
    x.sum().backward(retain_graph=True)
    assert seen == [False]


def test_hooks_of_all_modules_are_seen() -> None:
    def hook(*_: object) -> None: ...

    before = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    after = torch.nn.modules.module.register_module_forward_hook(hook)
    assert global_forward_hooks() == [hook, hook]
    before.remove()
    after.remove()
    assert global_forward_hooks() == []


def test_the_innermost_hooks_on_saved_tensors_are_seen_where_torch_shows_them() -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    assert innermost_saving() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, pack):
        shown = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
        assert innermost_saving() == ((pack, pack) if shown else None)
