"""Private torch is reached through ``pocketize._torch`` alone, and each function there works."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pocketize import _torch
from pocketize._torch import (
    FakeTensor,
    FakeTensorMode,
    global_forward_hooks,
    in_autograd_function,
    innermost_saving,
    is_compiled,
    keeps_graph,
    saving_hooks_allowed,
    storage_key,
    transforms_active,
    version_of,
    without_dispatch_modes,
)
from pocketize.errors import ExecutionError


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


def test_without_dispatch_modes_real_tensors_are_made_within_a_fake_mode() -> None:
    with FakeTensorMode():
        assert isinstance(torch.zeros(2), FakeTensor)
        with without_dispatch_modes():
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


#: Attributes of ``nn.Module`` that torch's own subclasses and all wrappers rely on: stable.
STABLE = {
    *vars(nn.Module()),
    "_load_from_state_dict",
    "_load_state_dict_pre_hooks",
    "_save_to_state_dict",
}
#: What else of torch's counts as private where its name is no more than part of an attribute.
OBJECTS = (
    torch.Tensor,
    torch.UntypedStorage,
    torch.ops.aten.add.Tensor,
    FakeTensor,
    FakeTensorMode,
    nn.InstanceNorm2d,
    nn.Conv2d,
    torch.fx.Node,
    torch.fx.Graph,
    torch.fx.GraphModule,
    type(torch.ones(1, requires_grad=True).sum().grad_fn),
)
PRIVATE = {
    name for owner in OBJECTS for name in dir(owner) if re.fullmatch(r"_[a-zA-Z]\w*", name)
} - STABLE
ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("rewrite", "passes", "zoo")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "rewrite" / "_torch.py"
]


def _modules_of_torch(tree: ast.Module) -> set[str]:
    """Return the names under which a file knows modules of torch."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if f"{getattr(node, 'module', '')}.{alias.name}".strip(".").split(".")[0] == "torch"
        and alias.name.rpartition(".")[2].islower()
    }


def _private(tree: ast.Module) -> Iterator[tuple[int, str]]:
    modules = _modules_of_torch(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                parts = f"{module}.{alias.name}".strip(".").split(".")
                if parts[0] == "torch" and any(part.startswith("_") for part in parts):
                    yield node.lineno, ".".join(parts)
        elif isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            text = ast.unparse(node)
            of_torch = text.startswith("torch.") or text.rpartition(".")[0] in modules
            dotted = of_torch and node.attr.startswith("_")
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if (
                dotted
                or (node.attr in PRIVATE and not own)
                or text == "torch.utils.swap_tensors"
                or text == "torch.__file__"
            ):
                yield node.lineno, text
        elif isinstance(node, ast.Call):
            text = ast.unparse(node)
            if re.search(r"\.resize_\(0\)$", text) or re.match(r"sys\._getframe\([3-9]\)", text):
                yield node.lineno, text
            for value in node.args:
                if isinstance(value, ast.Constant) and (
                    value.value in PRIVATE or re.match(r"torch\.(\w+\.)*_", str(value.value))
                ):
                    yield node.lineno, str(value.value)


def test_no_other_file_touches_private_torch() -> None:
    """Private is what has an underscore: modules, names, and attributes of torch's objects.

    Exchanging tensors, taking their memory away and torch's folder count too. What every
    ``nn.Module`` has in its ``__dict__`` (``_parameters``, ``_forward_hooks``, ...) does not: torch
    has had it under these names from the start, and subclasses outside of torch rely on it.
    """
    found = {
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in SOURCES
        for line, text in _private(ast.parse(path.read_text(encoding="utf-8")))
    }
    told = "\n".join(sorted(found))
    assert not found, f"{told}\nbelongs in rewrite/_torch.py, with a fallback or a refusal"


@pytest.mark.parametrize(
    "line",
    [
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.nn.modules.conv import _ConvNd",
        "import torch._dynamo",
        "torch._C._is_tracing()",
        "isinstance(target, torch._ops.OpOverload)",
        "key = tensor.untyped_storage()._cdata",
        "tensor._version != old",
        "target._schema.arguments",
        "getattr(tensor, '_use_count')",
        "importlib.import_module('torch._dynamo')",
        "storage.resize_(0)",
        "torch.utils.swap_tensors(a, b)",
        "import torch.distributed as dist; dist._functional_collectives",
        "from torch.distributed import distributed_c10d; distributed_c10d._world",
    ],
)
def test_private_torch_is_recognised(line: str) -> None:
    assert list(_private(ast.parse(line)))


def test_what_is_no_private_torch_is_not_taken_for_it() -> None:
    lines = ["module._parameters", "self._version", "from torch import nn", "own._helper()"]
    assert not [each for line in lines for each in _private(ast.parse(line))]


def test_every_name_is_found_in_this_torch() -> None:
    assert [name for name in _torch.__all__ if getattr(_torch, name) is None] == []


def test_a_name_that_torch_dropped_is_an_error_that_names_the_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("torch._subclasses.fake_tensor.FakeTensor")
    with pytest.raises(
        ExecutionError, match=rf"torch {re.escape(torch.__version__)} has no .*Fake"
    ):
        _ = _torch.FakeTensor
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = _torch.Unknown


@pytest.mark.parametrize(
    ("base", "module", "layer"),
    [
        ("ConvNd", "conv", nn.LazyConv2d(2, 1)),
        ("ConvTransposeNd", "conv", nn.ConvTranspose3d(1, 1, 1)),
        ("BatchNorm", "batchnorm", nn.SyncBatchNorm(2)),
        ("InstanceNorm", "instancenorm", nn.InstanceNorm1d(2)),
        ("NormBase", "batchnorm", nn.InstanceNorm1d(2)),
    ],
)
def test_without_a_private_base_its_public_classes_stand_for_it(
    base: str, module: str, layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(layer, getattr(_torch, base))
    monkeypatch.delattr(f"torch.nn.modules.{module}._{base}")
    assert isinstance(layer, getattr(_torch, base))
    assert not isinstance(nn.Linear(1, 1), getattr(_torch, base))


def test_a_write_within_keep_version_does_not_count_and_released_memory_is_gone() -> None:
    tensor = torch.ones(4)
    before = version_of(tensor)
    with _torch.keep_version(tensor):
        tensor.add_(1)
    assert version_of(tensor) == before
    _torch.release(tensor.untyped_storage())
    assert tensor.untyped_storage().nbytes() == 0


def test_tensors_are_exchanged_and_views_hooks_and_holders_are_told() -> None:
    one, other = torch.zeros(2), torch.ones(3)
    _torch.swap_tensors(one, other)
    assert one.shape == (3,)
    assert _torch.is_view(one[1:])
    assert not _torch.is_view(one)
    leaf = torch.ones(2, requires_grad=True)
    assert not _torch.has_tensor_hooks(leaf)
    leaf.register_hook(lambda gradient: gradient)
    assert _torch.has_tensor_hooks(leaf)
    alone = _torch.holders(one)[1]
    view = one[1:]
    assert _torch.holders(one)[1] == alone + 1
    assert view.shape == (2,)


def test_the_parts_of_a_sparse_tensor_are_found_before_it_is_coalesced() -> None:
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,), check_invariants=True)
    indices, values = _torch.sparse_parts(sparse)
    assert indices.tolist() == [[0, 0]]
    assert values.tolist() == [1.0, 2.0]


def test_operators_tell_their_schema_their_kernels_and_their_parts() -> None:
    aten = torch.ops.aten
    assert _torch.schema_of(aten.add_.Tensor).is_mutable
    assert _torch.schema_of(len) is None
    assert _torch.has_kernel("aten::add.Tensor", "CompositeImplicitAutograd") is False
    assert _torch.has_kernel("aten::matmul", "CompositeImplicitAutograd") is True
    assert _torch.has_kernel("aten::no_such_operator", "CPU") is None
    x, seen = torch.ones(2, 2), []

    class Watching(_torch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watching() as mode:
        assert _torch.dispatch_modes() == [mode]
        _torch.run_parts(aten.matmul.default, (x, x), {})
        with _torch.without_dispatch_modes():
            assert _torch.dispatch_modes() == []
            x.mul(2)
    assert seen == [aten.mm.default]


def test_nodes_are_numbered_and_known_while_they_run() -> None:
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            seen.append(_torch.running_node())
            return gradients[0]

    seen: list[Any] = []
    leaf = torch.ones(2, requires_grad=True)
    before = _torch.next_sequence_number()
    out = Watched.apply(leaf)
    assert _torch.autograd_function_of(out.grad_fn) is Watched
    assert _torch.autograd_function_of((leaf * 2).grad_fn) is None
    out.sum().backward()
    assert before <= seen[0] < _torch.next_sequence_number()
    assert _torch.running_node() is None


@pytest.mark.parametrize("told", [True, False], ids=["by-hooks", "by-stack"])
def test_a_checkpoint_that_takes_what_is_saved_is_seen(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not told:  # as in torch before 2.8
        monkeypatch.setattr(_torch, "_saving_hooks", lambda **_: (False, None))
    seen: list[bool] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch.in_checkpoint())
        return x * 2

    x = torch.ones(2, requires_grad=True)
    checkpoint(inside, x, use_reentrant=False)
    inside(x)
    assert seen == [True, False]


def test_what_called_is_told_without_the_files_of_torch() -> None:
    frames: list[str] = []

    class Noting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for frame in _torch.user_frames():
                frames.append(frame.f_code.co_name)  # noqa: PERF401  (would be a frame of its own)
            return x

    nn.Sequential(Noting())(torch.ones(1))
    assert frames[:2] == ["forward", "test_what_called_is_told_without_the_files_of_torch"]
    assert not _torch.backward_runs(0)


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


class _Aliasing(_torch.TorchDispatchMode):
    """Keeps an alias of what an operator reads, as it is below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.relu.default:
            self.kept = _torch.watching_alias(args[0])
        return func(*args, **(kwargs or {}))


def test_an_alias_made_below_autograd_sees_writes() -> None:
    weight = torch.ones(2, requires_grad=True)
    with _Aliasing() as mode:
        weight.relu()
    before = _torch.version_of(mode.kept)
    with torch.no_grad():
        weight.add_(1)
    assert _torch.version_of(mode.kept) > before
    assert not mode.kept.requires_grad


def test_tensors_that_stand_for_many_are_told() -> None:
    seen = []
    torch.func.vmap(lambda x: (seen.append(_torch.is_batched(x)), x)[1])(torch.ones(2, 2))
    x = torch.ones(2, requires_grad=True)
    made = x * 2
    made.register_hook(lambda slope: seen.append(_torch.is_batched(slope)))
    torch.autograd.grad(made, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True, True]
    assert not _torch.is_batched(x)


def test_compiled_modules_are_told() -> None:
    model = torch.nn.Linear(1, 1)
    assert not is_compiled(model)
    assert is_compiled(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    assert is_compiled(model)


def test_forbidden_hooks_on_saved_tensors_are_seen() -> None:
    assert saving_hooks_allowed()
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not saving_hooks_allowed()
